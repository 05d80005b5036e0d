"""A run in several processes, which torchrun starts: the run of one process, also where a process is lost."""

from __future__ import annotations

import json
import os
import socket
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from galore_torch.training.run import processes
from galore_torch.training.run.command import REFUSED
from tests.forked import galore
from tests.training.run.torchrun import BAR, ended, launch, losses, losses_of_runs, names


def settings(**given: Any) -> Any:
    adapter = SimpleNamespace(adapter=given.pop("adapter", "none"))
    schedule = SimpleNamespace(**{"batch": 8, "micro_batch": None, **given})
    return SimpleNamespace(schedule=schedule, adapter=adapter)


@pytest.mark.parametrize(
    ("world", "given", "micro_batch"),
    [("1", {}, 8), ("1", {"micro_batch": 2}, 2), ("2", {}, 4), ("4", {"micro_batch": 4}, 2), ("8", {}, 1)],
)
def test_a_batch_is_divided_among_the_processes(world, given, micro_batch, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert processes.require_served(settings(**given)) == micro_batch


@pytest.mark.parametrize(
    ("world", "given", "words"),
    [
        ("3", {}, "batch = 8 cannot be divided among 3"),
        ("2", {"micro_batch": 3}, "micro-batches of 3"),
        ("2", {"adapter": "relora", "parallel": "fsdp"}, "parallel = 'fsdp' and adapter = 'relora'"),
    ],
)
def test_what_several_processes_cannot_run_is_refused(world, given, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=words):
        processes.require_served(settings(**given))


def lose_the_others(place: dict[str, str]) -> None:
    os.environ |= place
    processes.MEETING = 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_where_a_process_is_lost_at_the_start_the_others_say_so(rank, tmp_path):
    """The first one is where all meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"RANK": rank, "WORLD_SIZE": "2"}
    done = galore("pretrain", "--out", tmp_path / "run", before=partial(lose_the_others, place))
    assert done.returncode == REFUSED
    assert f"127.0.0.1:{place['MASTER_PORT']} in 2 s" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == []


# By torchrun ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_make_the_run_of_one_also_where_one_is_killed(alone, config, tmp_path, parallel):
    printed = ended(tmp_path / "two", "--config", config, "--parallel", parallel)
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=BAR)
    assert printed.count("perplexity") == 3  # of two evaluations and at the end, by the first process alone
    for rank in (0, 1):
        folder = tmp_path / f"lost-{rank}"
        ended(folder, "--config", config, "--parallel", parallel, restarts=1, loses=f"{rank}:5")
        assert losses(folder) == pytest.approx(losses(alone), rel=BAR)
        assert names(folder) == names(tmp_path / "two")


@pytest.mark.slow
def test_a_comparison_in_two_processes_is_that_of_one_and_goes_on_where_one_is_killed(compared, tmp_path):
    options, alone = compared
    folder = tmp_path / "two"
    status, printed = launch(folder, *options, job="compare", loses="1:5")
    assert status == 1
    assert printed.count("perplexity") == 0
    for method in ("full", "galore"):
        assert "SIGKILL" in (folder / method / "lr-0.01" / "seed-0.error").read_text(encoding="utf-8")
    printed = ended(folder, *options, job="compare")
    for number in (1, 2):
        assert printed.count(f"{number}/2 ") == 1  # by the first process alone
    for method, expected in losses_of_runs(alone).items():
        assert losses_of_runs(folder)[method] == pytest.approx(expected, rel=BAR)
        assert names(folder / method / "lr-0.01") == names(alone / method / "lr-0.01")
    assert names(folder) == names(alone)
    found, one = (json.loads((each / "results.json").read_text(encoding="utf-8")) for each in (folder, alone))
    assert [run["error"] for run in found["runs"]] == [None, None]
    assert found["notes"] == one["notes"]


@pytest.mark.slow
def test_a_comparison_goes_on_by_itself_also_with_shards(compared, tmp_path):
    options, alone = compared
    ended(tmp_path / "lost", *options, "--parallel=fsdp", job="compare", restarts=1, loses="0:5")
    for method, expected in losses_of_runs(alone).items():
        assert losses_of_runs(tmp_path / "lost")[method] == pytest.approx(expected, rel=BAR)


def test_what_a_comparison_cannot_run_in_two_is_refused_before_anything_is_made(tmp_path):
    options = "--method=full", "--method=relora", "--parallel=fsdp"
    status, printed = launch(tmp_path / "compared", *options, job="compare")
    assert status == 1
    assert "parallel = 'fsdp' and adapter = 'relora'" in printed  # torchrun ends the other when it hears of the first
    assert names(tmp_path) == ["compared.said"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("low-rank", {}),
        ("relora", {"adapter_dropout": 0.0, "restart_every": 3}),
        ("low-rank", {"parallel": "fsdp"}),
        ("lora", {"adapter_dropout": 0.0, "parallel": "fsdp"}),
    ],
)
def test_adapters_are_trained_as_by_one_process_also_where_one_is_killed(method, given, tiny, tmp_path):
    """Those of a ReLoRA begin again after 3 and 6 steps, in the same random directions in all."""
    own = {"rank": 4, "update_proj_gap": None, "batch": 8, "micro_batch": None, "save_every": 4, "lr": 1e-3}
    path = tmp_path / "config.toml"
    path.write_text(tiny(method=method, **own, **given).to_toml(), encoding="utf-8")
    ended(tmp_path / "alone", "--config", str(path), world=1)
    ended(tmp_path / "lost", "--config", str(path), restarts=1, loses="1:5")
    assert losses(tmp_path / "lost") == pytest.approx(losses(tmp_path / "alone"), rel=BAR)
    saved, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("lost", "alone"))
    assert {name: one.shape for name, one in saved.items()} == {name: one.shape for name, one in expected.items()}
    assert all(torch.allclose(one, expected[name], atol=1e-4) for name, one in saved.items())


@pytest.mark.slow
def test_bases_in_parts_make_the_same_run_also_where_it_is_resumed(alone, config, tmp_path):
    folder, given = tmp_path / "parts", ("--config", config, "--parallel", "fsdp", "--shard-bases")
    assert launch(folder, *given, loses="0:5")[0] == 1
    ended(folder, "--resume")
    assert losses(folder) == pytest.approx(losses(alone), rel=BAR)


@pytest.mark.slow
def test_bases_in_few_bits_are_not_kept_in_parts(config, tmp_path):
    given = ("--config", config, "--parallel", "fsdp", "--shard-bases", "--basis-bits", "8")
    status, printed = launch(tmp_path / "parts", *given)
    assert status == 1
    assert "basis_bits is 8" in printed  # torchrun ends the other one when it hears of the first
    assert names(tmp_path) == ["parts.said"]


@pytest.mark.slow
def test_where_one_is_killed_before_the_first_step_the_run_begins_anew(alone, config, tmp_path):
    ended(tmp_path / "lost", "--config", config, restarts=1, loses="1:0")
    assert losses(tmp_path / "lost") == pytest.approx(losses(alone), rel=BAR)


@pytest.mark.slow
def test_a_run_that_has_lost_one_before_the_first_step_is_resumed(alone, config, tmp_path):
    assert launch(tmp_path / "lost", "--config", config, loses="1:0")[0] == 1
    ended(tmp_path / "lost", *(["--resume"] if (tmp_path / "lost").exists() else ["--config", config]), world=1)
    assert losses(tmp_path / "lost") == pytest.approx(losses(alone), rel=BAR)


@pytest.mark.slow
def test_where_one_is_killed_after_the_end_the_run_has_ended(alone, config, tmp_path):
    printed = ended(tmp_path / "lost", "--config", config, restarts=1, loses="ended")
    assert "holds the finished run" in printed
    assert losses(tmp_path / "lost") == pytest.approx(losses(alone), rel=BAR)


@pytest.mark.slow
def test_it_is_so_as_a_user_starts_it(alone, config, tmp_path):
    ended(tmp_path / "lost", "--config", config, "--parallel", "fsdp", restarts=1, loses="1:5", forks=False)
    assert losses(tmp_path / "lost") == pytest.approx(losses(alone), rel=BAR)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_goes_on_in_one_and_again_in_two(alone, config, tmp_path, parallel):
    """Each step's batch is the same, in as many parts as there are processes."""
    folder = tmp_path / "two"
    assert launch(folder, "--config", config, "--parallel", parallel, loses="0:5")[0] == 1
    assert launch(folder, "--resume", world=1, loses="0:7")[0] == 1
    ended(folder, "--resume")
    assert losses(folder) == pytest.approx(losses(alone), rel=BAR)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_which_processes_are_killed_at_any_moment_ends_as_if_none_was(alone, config, tmp_path, parallel):
    """KILLS=20 has twenty of them."""
    kills = int(os.environ.get("KILLS", "2"))
    ended(tmp_path / "lost", "--config", config, "--parallel", parallel, restarts=kills, loses=f"{kills}*{kills}")
    assert losses(tmp_path / "lost") == pytest.approx(losses(alone), rel=BAR)
