"""How far a flag is from the parameter group's key, and that nothing on the way is made twice."""

import inspect

from typer.testing import CliRunner

import galore_torch
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.settings.fields import field_names
from galore_torch.training.settings.optimizer import OptimizerConfig
from tests.command_line import app


def count(monkeypatch, kind):
    calls, initialize = [], kind.__init__

    def counted(self, *given, **named):
        if type(self) is kind:
            calls.append(self)
        initialize(self, *given, **named)

    monkeypatch.setattr(kind, "__init__", counted)
    return calls


def test_a_flag_is_at_most_five_frames_from_the_group_and_nothing_is_built_twice(tiny, tmp_path, monkeypatch):
    frames, param_groups = [], galore_torch.param_groups

    def seen(*given, **keys):
        frames.append([frame.function for frame in inspect.stack()[1:] if "galore_torch" in frame.filename])
        assert keys["update_proj_gap"] == 5
        return param_groups(*given, **keys)

    monkeypatch.setattr(galore_torch, "param_groups", seen)
    whole, optimizer = (count(monkeypatch, kind) for kind in (PretrainConfig, OptimizerConfig))
    built = count(monkeypatch, galore_torch.GaLoreAdamW)
    config = tiny(steps=1, eval_every=0)
    whole.clear()
    optimizer.clear()
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for section in (config.model, config.data, config.schedule)
        for name in field_names(type(section))
        if (value := getattr(section, name)) is not None and not isinstance(value, bool)
    ]
    out = str(tmp_path / "run")
    done = CliRunner().invoke(app(), ["pretrain", *flags, "--rank=8", "--update-proj-gap=5", "--out", out])
    assert done.exit_code == 0, done.output
    assert len(frames) == 1
    assert len(frames[0]) <= 5, frames
    assert (len(whole), len(optimizer), len(built)) == (1, 1, 1)
