"""`galore` as torchrun starts it. LOSES = "RANK:STEP" has that process killed after that step, in the first start."""

import os
import signal
import sys
from typing import Any

from galore_torch.cli import main
from galore_torch.training.run.callbacks import Recorder


def losing(rank: str, step: int) -> None:
    on_log = Recorder.on_log

    def killed(self: Recorder, args: Any, state: Any, control: Any, **given: Any) -> None:
        on_log(self, args, state, control, **given)
        if os.environ["RANK"] == rank and state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Recorder.on_log = killed


if __name__ == "__main__":
    if os.environ.get("LOSES") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        rank, _, step = os.environ["LOSES"].partition(":")
        losing(rank, int(step))
    sys.exit(main())
