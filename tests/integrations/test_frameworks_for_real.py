"""Frameworks as they are published run their own command with their GaLore settings: they train, save and resume.

Each lies in an environment of its own, which takes the registry and minutes: `make frameworks` runs them. What is
run is what docs/frameworks.md shows.
"""

import json
import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from tests.integrations.frameworks import ROOT, Framework, losses
from tests.integrations.small_mistral import assert_falls, documents, tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.learning]

STEPS, SAVED = 12, 6
GUIDE = (ROOT / "docs" / "frameworks.md").read_text()

LLAMA_FACTORY = Framework(
    distribution="llamafactory",
    command="llamafactory-cli",
    needs=(
        "accelerate>=1.3,<=1.11",
        "datasets>=2.16,<=4.0",
        "einops",
        "fire",
        "omegaconf",
        "peft>=0.18,<=0.18.1",
        "scipy",
        "torchdata>=0.10,<=0.11",
        "transformers>=4.55,<=5.6",
        "trl>=0.18,<=0.24",
        "tyro<0.9",
    ),
    needs_alone=("torchaudio",),
)
# In several processes on the CPU the Trainer of Transformers 5.6, with any optimizer, loads a saved one to "cpu:0",
# which torch.load does not know. On GPUs there is no such case.
LOADS_TO_ANY_CPU = """\
import torch

torch.serialization.register_package(5, lambda storage: None, lambda storage, at: storage if "cpu:" in at else None)
"""
MS_SWIFT = Framework(distribution="ms-swift", command="swift")
AXOLOTL = Framework(  # the last version for Python 3.11, without what only GPUs and clouds need
    distribution="axolotl",
    command="axolotl",
    needs=(
        "accelerate==1.13.0",
        "addict",
        "art",
        "axolotl-contribs-mit==0.0.6",
        "bitsandbytes",
        "colorama",
        "datasets==4.8.4",
        "einops",
        "evaluate",
        "fastcore",
        "fire",
        "huggingface_hub==1.17.0",
        "kernels>=0.16,<0.17",
        "numba>=0.63.1,<1",
        "packaging==26.0",
        "peft==0.20.0",
        "pillow",
        "posthog==6.7.11",
        "pydantic==2.12.5",
        "python-dotenv==1.0.1",
        "requests",
        "schedulefree==1.4.1",
        "scipy",
        "sentencepiece",
        "tokenizers==0.23.1",
        "torchao==0.17.0",
        "transformers==5.16.1",
        "triton",
        "trl==1.9.0",
        "typer==0.25.1",
        "wandb",
    ),
    needs_alone=("axolotl-contribs-lgpl==0.0.7",),
    version="0.19.0",
)
DIFFUSERS = Framework(distribution="diffusers", command="python")
# What its unconditional training example does, around the guide's lines for the optimizer; from a checkpoint if given.
DIFFUSION = """\
import json, sys
import torch
from diffusers import DDPMScheduler, UNet2DModel

out, steps, *checkpoint = sys.argv[1:]
torch.manual_seed(0)
model = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
images = torch.rand(8, 1, 8, 8) * torch.linspace(0, 1, 8)
scheduler = DDPMScheduler(num_train_timesteps=100)
if checkpoint:
    model = UNet2DModel.from_pretrained(checkpoint[0])
@OPTIMIZER@
begun = 0
if checkpoint:
    saved = torch.load(checkpoint[0] + "/optimizer.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    begun = saved["step"]
losses = {}
for step in range(begun, int(steps)):
    losses[step] = 0.0
    for part in range(2):
        drawn = torch.Generator().manual_seed(2 * step + part)
        noise = torch.randn(images.shape, generator=drawn)
        times = torch.randint(100, (len(images),), generator=drawn)
        predicted = model(scheduler.add_noise(images, noise, times), times).sample
        loss = torch.nn.functional.mse_loss(predicted, noise) / 2
        loss.backward()
        losses[step] += loss.item()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(out)
torch.save({"optimizer": optimizer.state_dict(), "step": int(steps)}, out + "/optimizer.pt")
with open(out + "/losses.json", "w") as file:
    json.dump(losses, file)
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with an untrained LLaMA, its tokenizer, and instructions with their answers."""
    folder = tmp_path_factory.mktemp("material")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": piece[:20], "input": "", "output": piece[20:]} for piece in documents()]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return folder


def shown(language: str, holding: str) -> str:
    """The one block of the guide that holds a text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if holding in block)
    return found


def port() -> str:
    """A port that is free, for processes to find one another."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


def check_falls(framework: Framework, trained: dict[int, float]) -> None:
    """The losses of all steps fall; the first and the last are printed."""
    assert len(trained) == STEPS
    assert_falls(list(trained.values()))
    framework.tell(list(trained.values()))


def check_resumed(framework: Framework, whole: Path, resumed: Path) -> None:
    """The loss falls, and from the checkpoint on all losses are those of the run that was not interrupted."""
    before, after = losses(whole, STEPS), losses(resumed, STEPS)
    assert list(before) == list(range(1, STEPS + 1))
    check_falls(framework, before)
    assert [after[step] for step in range(SAVED + 1, STEPS + 1)] == [
        before[step] for step in range(SAVED + 1, STEPS + 1)
    ]
    assert (resumed / "model.safetensors").exists() or (resumed / f"checkpoint-{STEPS}" / "model.safetensors").exists()


# LLaMA-Factory -------------------------------------------------------------------------------------------------------


def llama_factory_settings(material: Path, out: Path, **given: object) -> str:
    """A file of settings: the guide's, made small, and where things are."""
    settings = {
        **yaml.safe_load(shown("yaml", "galore_update_interval")),
        "galore_rank": 8, "galore_update_interval": 3, "galore_scale": 1.0,
        "stage": "sft", "do_train": True, "finetuning_type": "full", "template": "empty", "cutoff_len": 64,
        "model_name_or_path": str(material / "model"), "dataset": "rows", "dataset_dir": str(material),
        "output_dir": str(out), "max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1, "learning_rate": 0.01,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "report_to": "none", "use_cpu": True,
        **given,
    }  # fmt: skip
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def test_llama_factory(material, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    said = LLAMA_FACTORY.run("train", llama_factory_settings(material, whole))
    assert "Using GaLore optimizer" in said
    checkpoint = str(whole / f"checkpoint-{SAVED}")
    LLAMA_FACTORY.run("train", llama_factory_settings(material, resumed, resume_from_checkpoint=checkpoint))
    check_resumed(LLAMA_FACTORY, whole, resumed)


def test_llama_factory_layer_by_layer(material, tmp_path):
    """Without accumulation, as it demands; it saves no state of such optimizers."""
    out = tmp_path / "out"
    settings = {"galore_layerwise": True, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    LLAMA_FACTORY.run("train", llama_factory_settings(material, out, **settings))
    check_falls(LLAMA_FACTORY, losses(out, STEPS))


def test_llama_factory_refuses_layer_by_layer_with_accumulation(material, tmp_path):
    """What the guide's lines are for."""
    with pytest.raises(AssertionError, match="does not support gradient accumulation"):
        LLAMA_FACTORY.run("train", llama_factory_settings(material, tmp_path / "out", galore_layerwise=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_lines_that_project_gradients_in_llama_factory(material, tmp_path, processes):
    """With accumulation, and in several processes."""
    script, whole, resumed = tmp_path / "train.py", tmp_path / "whole", tmp_path / "resumed"
    script.write_text(LOADS_TO_ANY_CPU + shown("python", "llamafactory"))
    words = ("--nproc-per-node", str(processes), "--master-port", port(), str(script))
    LLAMA_FACTORY.run_beside("torchrun", *words, llama_factory_settings(material, whole))
    checkpoint = str(whole / f"checkpoint-{SAVED}")
    settings = llama_factory_settings(material, resumed, resume_from_checkpoint=checkpoint)
    LLAMA_FACTORY.run_beside("torchrun", *words, settings)
    check_resumed(LLAMA_FACTORY, whole, resumed)


# ms-swift ------------------------------------------------------------------------------------------------------------


def swift(material: Path, out: Path, said: str, processes: int = 1, **given: object) -> None:
    """Train with a file of settings: the guide's, made small, and where things are."""
    settings = {
        **yaml.safe_load(said),
        "model": str(material / "model"), "model_type": "llama", "template": "dummy", "torch_dtype": "float32",
        "dataset": str(material / "rows.json"), "load_from_cache_file": False, "split_dataset_ratio": 0,
        "max_length": 64, "truncation_strategy": "right", "output_dir": str(out), "add_version": False,
        "max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1, "learning_rate": 0.01,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "report_to": "none", "use_cpu": True,
        **given,
    }  # fmt: skip
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    several = {"NPROC_PER_NODE": str(processes), "MASTER_PORT": port()} if processes > 1 else {}
    MS_SWIFT.run("sft", str(file), **several)


def ranks(out: Path) -> set[int]:
    """The ranks that the saved optimizer projects at."""
    saved = torch.load(out / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    return {group["rank"] for group in saved["param_groups"] if "rank" in group}


def test_ms_swift_by_the_names_of_transformers(material, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    said, small = shown("yaml", "optim: galore_adamw\n"), {"optim_args": "rank=8,update_proj_gap=3,scale=1.0"}
    swift(material, whole, said, **small)
    assert ranks(whole) == {8}
    swift(material, resumed, said, **small, resume_from_checkpoint=str(whole / f"checkpoint-{SAVED}"))
    check_resumed(MS_SWIFT, whole, resumed)


def test_ms_swift_trains_adamw_by_its_own_galore(material, tmp_path):
    """What the guide's lines are for."""
    out = tmp_path / "out"
    swift(material, out, "use_galore: true\ntuner_type: full")
    assert ranks(out) == set()
    saved = torch.load(out / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"].values()
    trained = LlamaForCausalLM.from_pretrained(out / f"checkpoint-{STEPS}").parameters()
    assert sorted(state["exp_avg"].shape for state in saved) == sorted(weight.shape for weight in trained)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_lines_that_bring_ms_swift_this_package(material, tmp_path, processes):
    """With accumulation, and in several processes."""
    plugin, whole, resumed = tmp_path / "galore.py", tmp_path / "whole", tmp_path / "resumed"
    plugin.write_text(shown("python", "swift.optimizers"))
    small = {"external_plugins": str(plugin), "galore_rank": 8, "galore_update_proj_gap": 3, "galore_scale": 1.0}
    said = shown("yaml", "external_plugins")
    swift(material, whole, said, processes, **small)
    assert ranks(whole) == {8}
    swift(material, resumed, said, processes, **small, resume_from_checkpoint=str(whole / f"checkpoint-{SAVED}"))
    check_resumed(MS_SWIFT, whole, resumed)


# Axolotl -------------------------------------------------------------------------------------------------------------


def axolotl(material: Path, out: Path, **given: object) -> None:
    """Train with a file of settings: the guide's, made small, and where things are."""
    settings = {
        **yaml.safe_load(shown("yaml", "optim_args: {")), "optim_args": {"rank": 8, "update_proj_gap": 3, "scale": 1.0},
        "base_model": str(material / "model"), "attn_implementation": "eager", "bf16": False, "tf32": False,
        "datasets": [{"path": str(material / "rows.json"), "ds_type": "json", "type": "completion", "field": "output"}],
        "dataset_prepared_path": str(out.with_name("prepared")), "val_set_size": 0, "sequence_len": 64,
        "excess_length_strategy": "truncate", "output_dir": str(out), "max_steps": STEPS, "save_steps": SAVED,
        "logging_steps": 1, "learning_rate": 0.01, "lr_scheduler": "cosine", "micro_batch_size": 4,
        "gradient_accumulation_steps": 2, "seed": 0,  # without one, it orders the rows by chance
        **given,
    }  # fmt: skip
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    AXOLOTL.run("train", str(file), "--launcher", "python", AXOLOTL_DO_NOT_TRACK="1")


def test_axolotl(material, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    axolotl(material, whole)
    assert ranks(whole) == {8}
    axolotl(material, resumed, resume_from_checkpoint=str(whole / f"checkpoint-{SAVED}"))
    check_resumed(AXOLOTL, whole, resumed)


# diffusers -----------------------------------------------------------------------------------------------------------


def test_diffusers(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DIFFUSION.replace("@OPTIMIZER@", shown("python", "# was torch.optim.AdamW")))

    def diffused(name: str, *words: object) -> dict[str, float]:
        DIFFUSERS.run(str(script), str(tmp_path / name), *map(str, words))
        return json.loads((tmp_path / name / "losses.json").read_text())

    whole, half = diffused("whole", STEPS), diffused("half", SAVED)
    check_falls(DIFFUSERS, whole)
    resumed = diffused("resumed", STEPS, tmp_path / "half")
    assert {**half, **resumed} == pytest.approx(whole, rel=1e-6)  # biases of convolutions round by the memory's layout
