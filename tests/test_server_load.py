"""Many clients at once: nothing is lost and nothing mixed up (experiments/server_load.py has the long run)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conftest import ROOT
from server_process import Server

sys.path.insert(0, str(ROOT / "experiments"))
from server_load import load, short_questions


@pytest.mark.slow
def test_many_clients_each_get_their_own_answers(tmp_path: Path) -> None:
    with Server(tmp_path, "--n-ctx", "8192") as server:
        found = load(server, 32, 30.0)
        assert found["n_wrong"] == found["n_lost"] == 0, found
        assert sum(found["answers"].values()) > 32
        assert all(found["answers"][kind] > 0 for kind in ("short", "stream", "document"))
        assert found["memory_mib"]["end"] < 1.5 * found["memory_mib"]["begin"]


@pytest.mark.slow
def test_short_questions_come_between_the_chunks_of_a_long_document(tmp_path: Path) -> None:
    with Server(tmp_path, "--n-ctx", "8192") as server:
        idle = short_questions(server, 30, False, 0)
        busy = short_questions(server, 30, True, 4000)
        assert busy["still_reading"]
        assert busy["p95_s"] < 10 * max(idle["p95_s"], 0.02), (idle, busy)
