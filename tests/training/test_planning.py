"""``galore plan``: its table, its JSON, its page, and what it refuses."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from galore_torch.memory import KINDS, parse_bytes
from galore_torch.training.finetune.presets import configure as finetune
from galore_torch.training.planning.report import HEADINGS
from galore_torch.training.pretrain.presets import configure as pretrain
from galore_torch.training.run.folder import RunFolder
from tests.command_line import app

TINY = ("llama-tiny", "--micro-batch", "2", "--batch", "4", "--seq", "16", "--vocab", "300")


def galore_plan(*arguments: str):
    return CliRunner().invoke(app(), ["plan", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def planned(*arguments: str) -> dict:
    result = galore_plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[str, ...]:
    """A configuration of one layer of llama-tiny: how many there are changes nothing but the time."""
    folder = tmp_path_factory.mktemp("small")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=1, num_attention_heads=4, vocab_size=300,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return str(folder), "--micro-batch", "2", "--batch", "4", "--seq", "16", "--dtype", "float32"


@pytest.fixture(scope="module")
def two(small) -> dict:
    return planned(*small, "--method", "full", "--method", "galore", "--memory", "1GB")


@pytest.mark.slow
def test_a_preset_is_planned_by_its_name():
    assert planned(*TINY, "--method", "galore", "--memory", "1GB")["best"] == "galore"


def test_json_holds_every_kind_of_every_method(two):
    assert list(two["methods"]) == ["full", "galore"]
    for one in two["methods"].values():
        assert set(one["held"]) == set(one["peak"]) == set(KINDS)
        assert one["peak_bytes"] == sum(one["peak"].values()) > one["held"]["weights"] > 0


def test_galore_has_bases_and_less_state(two):
    full, galore = two["methods"]["full"]["held"], two["methods"]["galore"]["held"]
    assert full["bases"] == 0 < galore["bases"]
    assert galore["states"] + galore["bases"] < full["states"]
    assert galore["gradients"] < full["gradients"] < full["weights"]


def test_what_gives_up_least_is_the_best_that_fits(two, small):
    assert two["best"] == "full"
    least = two["methods"]["galore"]["peak_bytes"]
    assert planned(*small, "--method", "full", "--method", "galore", "--memory", f"{least}B")["best"] == "galore"


def test_table_and_page(small, tmp_path):
    page = ("--memory", "1GB", "--page", str(tmp_path / "plan.html"))
    result = galore_plan(*small, "--method", "galore-8bit-per-layer", *page)
    assert result.exit_code == 0, result.output
    assert set(HEADINGS) < set(result.output.split())
    assert max(map(len, result.output.splitlines())) <= 80
    assert "galore-8bit-per-layer" in result.output
    page = (tmp_path / "plan.html").read_text()
    assert "<svg" in page
    assert "galore-8bit-per-layer" in page
    assert re.findall(r">\s*([GM]B)\s*<", page) == ["MB", "MB"]  # of the table and of the chart


def test_where_nothing_fits_the_smallest_plan_says_what_it_lacks(small):
    found = planned(*small, "--method", "galore", "--memory", "1MB")
    assert found["best"] is None
    instead = found["instead"]
    assert instead["settings"] == {"gradient_checkpointing": True, "micro_batch": 1, "batch": 1}
    assert 10**6 < instead["peak_bytes"] < found["methods"]["galore"]["peak_bytes"]


@pytest.mark.slow
def test_where_nothing_fits_a_smaller_micro_batch_of_what_gives_up_least_is_offered_too(small):
    most = ("--micro-batch", "32", "--batch", "64")
    methods = ("--method", "full", "--method", "galore")
    held = planned(*small, *most, *methods)["methods"]["full"]["held"]
    room = sum(held[kind] for kind in ("weights", "gradients", "states")) * 11 // 10
    found = planned(*small, *most, *methods, "--memory", f"{room}B")
    assert found["best"] is None
    assert found["instead"]["method"] == "galore"
    usual = found["usual"]
    assert usual["method"] == "full"
    assert usual["settings"]["gradient_checkpointing"]
    assert "batch" not in usual["settings"]  # more of them are accumulated
    assert usual["peak_bytes"] <= room


SEVERAL = ("--method", "full", "--method", "galore", "--gradients", "fused", "--rank", "16")


def test_under_ddp_each_process_keeps_buckets_and_sends_what_is_projected_in_low_rank(small):
    alone = planned(*small, *SEVERAL)["methods"]
    found = planned(*small, *SEVERAL, "--world-size", "2", "--bandwidth", "1gbit")
    full, galore = found["methods"]["full"], found["methods"]["galore"]
    assert (found["world_size"], found["parallel"]) == (2, "ddp")
    assert full["held"]["gradients"] == 2 * alone["full"]["held"]["gradients"]
    assert full["held"]["weights"] == alone["full"]["held"]["weights"]
    # Of two processes each sends half of its gradients, twice.
    assert full["cost"]["sent_bytes"] == {"weights": 0, "gradients": 4 * full["parameters"], "renewals": 0}
    assert galore["cost"]["sent_bytes"]["gradients"] < full["cost"]["sent_bytes"]["gradients"]
    assert galore["cost"]["sent_bytes"]["renewals"] > 0
    assert full["cost"]["link_seconds"]["gradients"] == pytest.approx(4 * full["parameters"] * 8 / 1e9)
    assert full["cost"]["step_seconds"] >= full["cost"]["link_seconds"]["gradients"]
    assert full["cost"]["days"] is None


def test_under_fsdp_weights_and_states_are_divided_and_gathered(small):
    alone = planned(*small, *SEVERAL)["methods"]
    found = planned(*small, *SEVERAL, "--world-size", "2", "--parallel", "fsdp")["methods"]
    for kind in ("weights", "gradients", "states"):
        assert found["full"]["held"][kind] == pytest.approx(alone["full"]["held"][kind] / 2, abs=1)
    assert found["galore"]["held"]["bases"] == alone["galore"]["held"]["bases"]
    assert found["full"]["cost"]["sent_bytes"]["weights"] == 4 * found["full"]["parameters"]  # half of them, twice
    assert found["full"]["cost"]["step_seconds"] is None
    parts = planned(*small, *SEVERAL, "--world-size", "2", "--parallel", "fsdp", "--shard-bases")["methods"]
    bases = found["galore"]["held"]["bases"]
    assert parts["galore"]["held"]["bases"] == bases / 2
    assert parts["galore"]["held"]["work"] > found["galore"]["held"]["work"]  # the one that is gathered
    gathered = [one["galore"]["cost"]["sent_bytes"]["weights"] for one in (parts, found)]
    assert gathered[0] - gathered[1] == bases / 2 * 2  # by the step, and by the layers of its micro-batch
    assert parts["full"] == found["full"]


def test_days_follow_from_the_rate_where_nothing_waits_for_a_link(small):
    rate = ("--tokens", "1M", "--tokens-per-second", "100", "--method", "full")
    one = planned(*small, *rate)["methods"]["full"]["cost"]
    assert one["days"] == pytest.approx(1e6 / 100 / 86_400)
    assert one["step_seconds"] == pytest.approx(4 * 16 / 100)
    two = planned(*small, *rate, "--world-size", "2")["methods"]["full"]["cost"]
    assert two["days"] == pytest.approx(one["days"] / 2)
    result = galore_plan(*small, *rate, "--world-size", "2", "--bandwidth", "1gbit")
    assert "in each of 2 processes (ddp)" in " ".join(result.output.split())
    assert "days" in result.output


def test_a_rank_that_saves_nothing_is_said(small):
    result = galore_plan(*small, "--method", "full", "--method", "galore", "--rank", "256")
    assert "galore: its rank saves nothing" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llama-2b"], "model = 'llama-2b' is no preset"),
        (["llama-tiny", "--memory", "24"], "memory = '24' is no size"),
        (["llama-tiny", "--memory", "24 apples"], "memory = '24 apples' is no size"),
        (["llama-tiny", "--method", "galor"], "did you mean 'galore'?"),
        (["llama-tiny", "--method", "galore", "--rank", "300"], "rank = 300 is beyond the matrices of 'llama-tiny'"),
        (["llama-tiny", "--method", "galore", "--rank", "0"], "rank = 0 is out of range"),
        ([*TINY, "--method", "galore", "--update", "backward"], "micro_batch = 2 is a part of batch = 4"),
        (["llama-tiny", "--method", "full", "--rank", "8"], "rank = 8 has no effect with method = 'full'"),
        ([*TINY, "--world-size", "0"], "world_size = 0 is out of range"),
        ([*TINY, "--world-size", "3"], "batch = 4 cannot be divided among 3 processes"),
        ([*TINY, "--world-size", "2", "--parallel", "tp"], "parallel = 'tp' is not known"),
        ([*TINY, "--world-size", "2", "--bandwidth", "fast"], "bandwidth = 'fast' is none"),
        ([*TINY, "--world-size", "2", "--bandwidth", "10 Gb/s"], "bandwidth = '10 Gb/s' is none"),
        ([*TINY, "--bandwidth", "1gbit"], "bandwidth has no effect with world_size = 1"),
        ([*TINY, "--parallel", "fsdp"], "parallel has no effect with world_size = 1"),
        ([*TINY, "--world-size", "2", "--tokens", "1e9"], "give --tokens-per-second"),
        ([*TINY, "--tokens", "-1", "--tokens-per-second", "10"], "tokens = '-1' is no number of tokens"),
        ([*TINY, "--tokens", "20 apples", "--tokens-per-second", "10"], "tokens = '20 apples' is no number of tokens"),
        ([*TINY, "--world-size", "2", "--method", "lora"], "adapter = 'lora' is planned in one process alone"),
        ([*TINY, "--world-size", "2", "--parallel", "fsdp", "--method", "qgalore"], "weight_bits = 8 is not served by"),
        ([*TINY, "--world-size", "2", "--shard-bases"], "shard_bases = True has no effect with parallel = 'ddp'"),
        (
            [*TINY, "--world-size", "2", "--parallel", "fsdp", "--shard-bases", "--basis-bits", "8"],
            "basis_bits = 8 is not served by shard_bases",
        ),
        (["folder/that/is/not", "--memory", "24GB"], "model = 'folder/that/is/not' cannot be loaded"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_its_remedy(arguments, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = galore_plan(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_a_vocabulary_is_that_of_the_model_but_for_a_preset(small):
    result = galore_plan(*small, "--vocab", "400")
    assert (result.exit_code, "vocab = 400 has no effect" in result.output) == (2, True)


def test_methods_whose_library_is_missing_are_left_out_and_told(small, monkeypatch, tmp_path):
    monkeypatch.setattr("galore_torch.training.settings.optimizer.find_spec", lambda _: None)
    monkeypatch.setattr("galore_torch.training.planning.command.METHODS", ("galore-8bit", "galore"))
    result = galore_plan(*small, "--page", str(tmp_path / "plan.html"))
    for told in (result.stdout, html.unescape((tmp_path / "plan.html").read_text())):
        assert "Left out: galore-8bit. optim = 'galore-adamw8bit' needs bitsandbytes." in " ".join(told.split())
    monkeypatch.setattr("galore_torch.training.planning.command.METHODS", ("galore-8bit", "galore", "lora"))
    several = planned(*small, "--world-size", "2")
    assert list(several["methods"]) == ["galore"]
    assert several["left_out"].keys() == {"galore-8bit", "lora"}
    assert several["left_out"]["lora"] == "adapter = 'lora' is planned in one process alone."
    refused = galore_plan(*small, "--method", "galore-8bit")
    assert refused.exit_code == 2
    assert "needs bitsandbytes. Install it with" in " ".join(refused.output.split())


@pytest.fixture
def ended(small, tmp_path):
    """The folder of a run that has ended, by its settings, with a model that has a tokenizer."""

    def make(config, name: str) -> str:
        RunFolder(tmp_path / name).create(config, "0" * 64)
        shutil.copytree(small[0], tmp_path / name / "model")
        (tmp_path / name / "model" / "tokenizer.json").write_text("{}")
        return str(tmp_path / name)

    return make


def test_a_run_is_planned_with_its_settings_but_for_those_that_are_given(small, ended):
    sizes = {"batch": 6, "micro_batch": 3, "seq": 24, "rank": 12, "gradients": "projected"}
    of_galore = ended(pretrain("llama-tiny", **sizes), "galore")
    flags = [f for name, value in sizes.items() for f in (f"--{name.replace('_', '-')}", str(value))]
    like = planned(small[0], "--dtype", "float32", *flags, "--method", "galore", "--method", "full")["methods"]
    assert planned(of_galore)["methods"] == {"run": like["galore"]}
    both = planned(of_galore, "--method", "run", "--method", "full", "--rank", "24")["methods"]
    assert both["full"] == like["full"]
    assert both["run"]["held"]["bases"] == 2 * like["galore"]["held"]["bases"]


def test_a_fine_tuning_is_planned_as_one(small, ended):
    """What is frozen has no state; a pair of answers is two sequences."""
    flags = ("--dtype", "float32", "--batch", "8", "--micro-batch", "8", "--seq", "48", "--rank", "12")
    file = str(Path(small[0], "config.json"))  # a configuration alone is of a model that has learnt nothing
    fresh, of_model = (
        planned(one, *flags, "--method", "lora", "--method", "full")["methods"] for one in (file, small[0])
    )
    tuned = {"task": "dpo", "data": "pairs.jsonl", "model": small[0], "batch": 4, "max_length": 48, "rank": 12}
    folder = ended(finetune(**tuned, method="lora"), "pairs")
    found = planned(folder)["methods"]["run"]["held"]
    assert found["states"] < fresh["lora"]["held"]["states"]
    assert of_model["lora"]["held"]["states"] == found["states"]
    assert "8 sequences of 48 tokens at once" in " ".join(galore_plan(folder).output.split())
    assert planned(folder, "--rank", "24")["methods"]["run"]["held"]["states"] > found["states"]
    assert planned(folder, "--method", "full")["methods"] == {"full": fresh["full"]}
    narrow = ended(finetune(**tuned, method="lora", target_modules="q_proj"), "narrow")
    assert planned(narrow)["methods"]["run"]["held"]["states"] < found["states"]


def test_a_rank_that_nobody_gave_fits_keys_and_values_of_few_heads(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 8}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=64, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    found = planned(str(tmp_path), "--seq", "8", "--method", "low-rank", "--method", "galore")["methods"]
    assert found["galore"]["held"]["bases"] > 0


@pytest.mark.parametrize("wrong", [{"hidden_size": -256}, {"rope_scaling": {"type": "nonsense"}}])
def test_a_configuration_of_which_no_model_can_be_made_is_refused(wrong, small, tmp_path):
    config = json.loads(Path(small[0], "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | wrong), encoding="utf-8")
    refused = galore_plan(str(tmp_path))
    assert refused.exit_code == 2
    assert "of which no model can be made" in " ".join(refused.output.split())


@pytest.mark.parametrize("architectures", [None, ["LlamaModel"], ["NoSuchForCausalLM"]])
def test_a_configuration_without_a_head_is_refused(architectures, tmp_path):
    transformers.LlamaConfig(architectures=architectures).save_pretrained(tmp_path)
    result = galore_plan(str(tmp_path))
    assert result.exit_code == 2
    assert "a head that gives a loss" in " ".join(result.output.split())


@pytest.mark.slow
def test_a_forward_that_needs_numbers_leaves_the_bytes_that_do_not(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**sizes, intermediate_size=48, num_local_experts=2, vocab_size=64)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    result = galore_plan(str(tmp_path), "--seq", "8", "--dtype", "float32", "--method", "galore", "--json")
    found = json.loads(result.stdout)["methods"]["galore"]
    assert found["untraced"]
    assert found["held"]["activations"] == 0 < found["held"]["states"]
    shown = galore_plan(str(tmp_path), "--seq", "8", "--dtype", "float32", "--method", "galore").output
    assert "activations, logits and work are not known" in " ".join(shown.split())


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "1e3GB", "1 G", "24 gigabytes"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


def test_a_layer_that_lacks_what_a_model_reads_of_it_leaves_the_bytes_that_need_no_forward(tmp_path):
    """T5 reads the dtype of a linear layer's weight, and W = BA has none."""
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 128,
        "decoder_start_token_id": 0,
    }
    transformers.T5Config(**sizes, architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    found = planned(str(tmp_path), "--seq", "8", "--method", "low-rank", "--method", "full")
    assert found["methods"]["low-rank"]["held"]["weights"] > 0
    assert "has no attribute 'weight'" in json.dumps(found["methods"]["low-rank"])
    assert "has no attribute" not in json.dumps(found["methods"]["full"])


def test_the_logits_of_a_model_of_images_and_text_are_told(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**sizes, vocab_size=400)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    named = {"architectures": ["LlavaForConditionalGeneration"], "image_token_index": 399}
    transformers.LlavaConfig(text_config=text, vision_config=vision, **named).save_pretrained(tmp_path)
    told = planned(str(tmp_path), "--seq", "8", "--method", "full")["methods"]["full"]
    assert told["held"]["logits"] > 0
