"""torchtitan's container of optimizers with GaLore, by the lines of docs/torchtitan.md: it trains, saves and resumes.

torchtitan lies in an environment of its own, as the other frameworks that `make frameworks` runs. Its own command asks
for a GPU; what is run of it are its model, with the attention that a CPU has, its container and its schedule.
"""

import json
import re

import pytest

from tests.integrations.frameworks import ROOT, Framework
from tests.integrations.small_mistral import assert_falls

pytestmark = [pytest.mark.slow, pytest.mark.learning]

STEPS, SAVED = 12, 6
GUIDE = (ROOT / "docs" / "torchtitan.md").read_text()
TORCHTITAN = Framework(distribution="torchtitan", command="python", needs=("torchtitan", "triton"))  # which it imports
TRAIN = """\
import json, sys
import torch
from galore_llama3 import galore, llama3_debugmodel_galore
from torchtitan.models.common.attention import ScaledDotProductAttention

out, steps, gradients, *checkpoint = sys.argv[1:]
torch.manual_seed(0)
described = llama3_debugmodel_galore()
sizes = described.model_spec.model
sizes.layers = sizes.layers[:2]
for layer in sizes.layers:
    layer.attention.inner_attention = ScaledDotProductAttention.Config()
model = sizes.build()
model.init_states()
optimizers = galore(rank=8, lr=0.01, gradients=gradients, update_proj_gap=3, scale=1.0).build(model_parts=[model])
schedule = described.lr_scheduler.build(optimizers=optimizers, training_steps=@STEPS@)
begun = 0
if checkpoint:
    saved = torch.load(checkpoint[0], weights_only=True)
    model.load_state_dict(saved["model"])
    optimizers.load_state_dict(saved["optimizers"])
    schedule.load_state_dict(saved["schedule"])
    begun = saved["step"]
tokens = torch.randint(sizes.vocab_size, (1, 17), generator=torch.Generator().manual_seed(0)).expand(4, -1)
losses = {}
for step in range(begun, int(steps)):
    for part in tokens.split(2):
        said = model(part[:, :-1])
        loss = torch.nn.functional.cross_entropy(said.flatten(0, 1), part[:, 1:].flatten()) / 2
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizers.step()
    schedule.step()
    optimizers.zero_grad()
    losses[step] = 2 * loss.item()
state = {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "schedule": schedule.state_dict()}
torch.save({**state, "step": int(steps)}, out)
bases = [name for name in state["optimizers"] if "basis" in name]
print(json.dumps({"losses": losses, "bases": bases}))
"""


@pytest.mark.parametrize("gradients", ["full", "fused"])
def test_its_container_trains_saves_and_resumes(gradients, tmp_path):
    (block,) = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    (tmp_path / "galore_llama3.py").write_text(block)
    script = tmp_path / "train.py"
    script.write_text(TRAIN.replace("@STEPS@", str(STEPS)))

    def trained(name: str, *words: object) -> dict:
        said = TORCHTITAN.run(str(script), str(tmp_path / name), *map(str, words))
        return json.loads(said.splitlines()[-1])

    whole, half = trained("whole", STEPS, gradients), trained("half", SAVED, gradients)
    assert_falls(list(whole["losses"].values()))
    TORCHTITAN.tell(list(whole["losses"].values()))
    assert whole["bases"]
    resumed = trained("resumed", STEPS, gradients, tmp_path / "half")
    assert {**half["losses"], **resumed["losses"]} == whole["losses"]
