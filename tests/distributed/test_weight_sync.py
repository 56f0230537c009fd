"""Weights between real ranks: they arrive, or everybody hears which rank holds something else, stopped or never came."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mas_hpc.distributed.weight_source import ZeroWeights
from mas_hpc.errors import LaunchError

ROOT = Path(__file__).parents[2]
SENDER, RECEIVER = 0, 1
Found = list[dict[str, dict[str, Any]]]


def outcomes(launcher: list[str], num_ranks: int, folder: Path, script: str = "weight_ranks.py") -> list[Any]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launcher, str(Path(__file__).parent / script), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def torchrun_command(num_ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return outcomes(torchrun_command(3), 3, tmp_path_factory.mktemp("torchrun"))


@pytest.fixture(scope="module")
def mpiexec(tmp_path_factory: pytest.TempPathFactory) -> Found:
    pytest.importorskip("mpi4py")
    launcher = shutil.which("mpiexec", path=Path(sys.executable).parent)
    if launcher is None:
        pytest.skip("no mpiexec beside this Python")
    return outcomes([launcher, "-n", "2", sys.executable], 2, tmp_path_factory.mktemp("mpiexec"))


def by_launcher(launcher: str) -> list[Any]:
    transports = {"torchrun": ("group", "file"), "mpiexec": ("window", "mpi")}[launcher]
    return [pytest.param(launcher, transport, marks=pytest.mark.slow, id=transport) for transport in transports]


TRANSPORTS = [*by_launcher("torchrun"), *by_launcher("mpiexec")]


@pytest.mark.parametrize(("launcher", "transport"), TRANSPORTS)
def test_weights_arrive_and_both_sides_know_their_checksum(
    launcher: str, transport: str, request: pytest.FixtureRequest
) -> None:
    found: Found = request.getfixturevalue(launcher)
    sender, receiver = found[SENDER][transport], found[RECEIVER][transport]
    assert sender["first"] == receiver["first"] == receiver["held after first"]
    assert sender["held at the end"] != sender[""] == receiver[""] == receiver["held at the end"]
    assert receiver["version"] == 3


@pytest.mark.parametrize(("launcher", "transport"), TRANSPORTS)
def test_only_what_is_given_is_moved(launcher: str, transport: str, request: pytest.FixtureRequest) -> None:
    found: Found = request.getfixturevalue(launcher)
    receiver = found[RECEIVER][transport]
    assert receiver["single"] == found[SENDER][transport]["single"]
    assert receiver["single tensors"] == 1 and receiver["single value"] == [1.0] * 5


@pytest.mark.parametrize(("launcher", "transport"), TRANSPORTS)
def test_an_engine_that_holds_something_else_is_named_on_every_rank(
    launcher: str, transport: str, request: pytest.FixtureRequest
) -> None:
    found: Found = request.getfixturevalue(launcher)
    sender, receiver = found[SENDER][transport], found[RECEIVER][transport]
    for spoil in ("flip", "ignore"):
        assert sender[spoil].startswith(
            "RolloutError: weights of version 3 did not arrive: rank 1 holds version 3 with checksum"
        )
        assert receiver[spoil] == sender[spoil]
        assert sender[""] in sender[spoil]
    assert "checksum of nothing" in sender["ignore"]
    assert sender["refuse"].endswith("rank 1 could not load them: no room for these weights")
    assert receiver["refuse"] == "CheckpointError: no room for these weights"


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["group", "file"])
def test_of_two_engines_only_the_spoilt_one_is_named_and_both_go_on(torchrun: Found, transport: str) -> None:
    sender, spoilt, sound = (found[f"two by {transport}"] for found in torchrun)
    assert sender["1"] == spoilt["1"] == sound["1"]
    assert sender["2"] == spoilt["2"] == sound["2"]
    assert "rank 1 holds" in sender["2"] and "rank 2 holds" not in sender["2"]
    assert sender["3"] == sender["expected"] == spoilt["held"] == sound["held"]


@pytest.mark.slow
def test_shards_are_gathered_on_the_way_to_another_rank_and_beside_the_trainer(torchrun: Found) -> None:
    first, second, engine = (found["sharded"] for found in torchrun)
    assert (first["rows"], second["rows"]) == (4, 3)
    assert first["answer"] == engine["answer"] == engine["held"] == engine["expected"]
    assert first["whole"] == second["whole"] == first["expected"]


@pytest.mark.slow
def test_zero_3_gathers_whole_tensors_a_few_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="extra: deepspeed")
    for found in outcomes(torchrun_command(2), 2, tmp_path, "zero_ranks.py"):
        assert found["gathered"] == found["before"]
        assert found["shapes"] == [[7, 6], [7], [5, 7], [5]]
        assert found["shards"] == [0, 0, 0, 0], "nothing is left whole"
        assert found["close"] == [True] * 4, "it reads the weights as they are after a step"


def test_zero_3_without_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(LaunchError, match=r"pip install 'mas-hpc\[deepspeed\]'"):
        ZeroWeights([])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_a_rank_that_never_comes_or_stops_is_named(launcher: str, request: pytest.FixtureRequest) -> None:
    found: Found = request.getfixturevalue(launcher)
    sender, receiver = found[SENDER]["absences"], found[RECEIVER]["absences"]
    assert "waited for rank 1 to be ready for weights of version 5 (at most 0.5 s)" in sender["no receiver"]
    assert "waited for rank 0 to send weights (at most 0.5 s)" in receiver["no sender"]
    waited_for = {"torchrun": "receive weights", "mpiexec": "move a block"}[launcher]
    assert f"weight sync: rank 0 waited for rank 1 to {waited_for} (at most 1.5 s)" in sender["stopped"]
