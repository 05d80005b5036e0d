"""The command for a rented GPU, rehearsed on a CPU: every part has figures, and none of it fails."""

import json

import pytest

from benchmarks.device.__main__ import PARTS, main
from benchmarks.device.correctness import waits
from benchmarks.device.session import Session


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path, capsys):
    rows = main(["--small", "--device", "cpu", "--budget", "3600", "--out", str(tmp_path)])
    assert list(rows) == list(PARTS)
    assert {part: [row for row, figures in of.items() if "failed" in figures] for part, of in rows.items()} == {
        part: [] for part in PARTS
    }
    for part, of in rows.items():
        assert json.loads((tmp_path / f"{part}.json").read_text()) == of
    assert all(figures["right"] for figures in rows["correctness"].values())
    waiting = rows["waiting"]["AdamW, fused"]
    assert waiting["ordinary: steps of 16 that wait"] == 0
    assert waiting["staggered: steps of 16 that wait"] == 8, "a layer renews in every second step, and waits for itself"
    assert rows["steps"]["350m, galore"]["host_us_a_weight"] > 0
    assert rows["training"]["7b, galore-per-layer/fused"]["tokens_s"] > 0
    assert "\nfactorizations\n" in capsys.readouterr().out


def test_a_part_without_time_says_what_it_left_out(tmp_path):
    rows = main(["--only", "ceilings,staggered", "--device", "cpu", "--small", "--budget", "0", "--out", str(tmp_path)])
    assert rows["staggered"] == {"350m": {"left out": "no time"}}


def test_a_row_that_fails_is_told_and_the_others_go_on(tmp_path):
    session = Session(device="cpu", small=True, out=tmp_path, peers=tmp_path, part="one")
    session.try_row("bad", lambda: {"ms": 1 / 0})
    session.try_row("good", lambda: {"ms": 1.0})
    told = {"bad": {"failed": "ZeroDivisionError: division by zero"}, "good": {"ms": 1.0}}
    assert json.loads((tmp_path / "one.json").read_text()) == told


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "speed"])
    assert "--only names speed" in capsys.readouterr().err


def test_waiting_is_seen():
    import torch

    with waits("cpu") as seen:
        float(torch.ones(()) + 1)
    assert len(seen) == 1
