"""Nodes that are lost, leave and join: each has an agent of torchrun, and all are on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.forked import TRAINING
from tests.training.run.torchrun import BAR, LAUNCHED, be_torchrun, ended, losses, losses_of_runs
from tests.waiting import DEADLINE, wait_for


def agent(folder: Path, loses: str, port: int, *given: str, job: str = "pretrain", nodes: str = "1:2") -> Any:
    """Start one of the agents of an elastic job, each of one process; returns what has the methods of a `Popen`."""
    said = folder.with_name(f"{folder.name}.said")
    rendezvous = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic", "--rdzv-backend=c10d"]
    noticed = "--rdzv-conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    counts = [f"--nnodes={nodes}", "--nproc-per-node=1", "--max-restarts=3"]
    how = [*counts, "--local-addr=127.0.0.1", *rendezvous, noticed]
    command = [str(LAUNCHED), str(said), loses, job, *given, "--out", str(folder)]
    process = TRAINING.start(be_agent, [*how, "--run-path", "--start-method=forkserver", *command], said)

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        return process.exitcode

    return SimpleNamespace(poll=lambda: process.exitcode, wait=wait, communicate=said.read_text)


def is_open(port: int) -> bool:
    with socket.socket() as other:
        return other.connect_ex(("127.0.0.1", port)) == 0


def be_agent(arguments: list[str], said: Path) -> None:
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    be_torchrun([argument.replace("node after ", f"node:{os.getpid()}:") for argument in arguments], said)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.parametrize(("loses", "others"), [("node after 0", "none"), ("node after -1", "waits:5")])
def test_where_a_node_is_lost_at_the_start_the_other_makes_the_run(alone, config, tmp_path, loses, others):
    """While the run is made ready, of which the other hears at once, or before they meet, for which it waits 5 s."""
    folder, given, port = tmp_path / "elastic", ("--config", config), free_port()
    first = agent(folder, others, port, *given)
    wait_for(lambda: is_open(port), first)  # the one that is lost must not be where all meet
    assert agent(folder, loses, port, *given).wait(DEADLINE) == -signal.SIGKILL
    assert first.wait(DEADLINE) == 0
    assert losses(folder) == pytest.approx(losses(alone), rel=BAR)


@pytest.mark.slow
def test_where_the_node_is_lost_at_which_all_meet_the_others_end_and_the_run_is_resumed(alone, config, tmp_path):
    folder, given, port = tmp_path / "elastic", ("--config", config), free_port()
    first = agent(folder, "node after 4", port, *given)
    wait_for(lambda: is_open(port), first)
    second = agent(folder, "none", port, *given)
    assert first.wait(DEADLINE) == -signal.SIGKILL
    assert second.wait(DEADLINE) not in (0, None)
    ended(folder, "--resume", world=1)
    assert losses(folder) == pytest.approx(losses(alone), rel=BAR)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_that_a_node_leaves_and_joins_ends_as_if_none_had(alone, config, tmp_path, parallel):
    folder, given, port = tmp_path / "elastic", ("--config", config, "--parallel", parallel), free_port()
    first = agent(folder, "others", port, *given)
    wait_for(lambda: is_open(port), first)  # the one that is lost must not be where all meet
    assert agent(folder, "node after 4", port, *given).wait(DEADLINE) == -signal.SIGKILL
    wait_for(lambda: json.loads(folder.joinpath("metrics.jsonl").read_text().splitlines()[-1])["step"] >= 6, first)
    second = agent(folder, "others", port, *given)
    assert first.wait(DEADLINE) == second.wait(DEADLINE) == 0
    assert losses(folder) == pytest.approx(losses(alone), rel=BAR)


@pytest.mark.slow
@pytest.mark.parametrize("loses", ["none", "1:5"])
def test_two_nodes_make_the_comparison_of_one_process_also_where_one_of_a_run_is_killed(compared, tmp_path, loses):
    options, alone = compared
    folder, how = tmp_path / "nodes", {"job": "compare", "nodes": "2"}
    port = free_port()
    agents = [agent(folder, loses, port, *options, **how) for _ in range(2)]
    assert [each.wait(2 * DEADLINE) for each in agents] == [0, 0]
    for method, expected in losses_of_runs(alone).items():
        assert losses_of_runs(folder)[method] == pytest.approx(expected, rel=BAR)
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [run["error"] for run in found["runs"]] == [None, None]
