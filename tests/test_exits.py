"""Every way to end has its exit code."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from torch.distributed import DistNetworkError, DistStoreError

from mas_hpc.distributed.supervisor_verdict import judge
from mas_hpc.errors import CheckpointError, ConfigError, DataError, LaunchError, LostPeerError, RolloutError, RunError
from mas_hpc.exits import exit_code


@pytest.mark.parametrize("kind", [ConfigError, DataError, RolloutError, LaunchError, CheckpointError, RunError])
def test_what_a_user_can_mend_is_one(kind: type[Exception]) -> None:
    assert exit_code(kind("model.path=x")) == 1


def test_the_others_have_codes_of_their_own() -> None:
    assert exit_code(ValueError("a bug")) == 70
    assert exit_code(MemoryError()) == 71
    assert exit_code(torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB")) == 71
    assert exit_code(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")) == 71
    assert exit_code(RuntimeError("Native API failed. UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY")) == 71
    assert exit_code(OSError(errno.ENOSPC, "No space left on device")) == 74
    assert exit_code(OSError(errno.EACCES, "Permission denied")) == 1
    assert exit_code(LostPeerError("rank 0 has heard nothing")) == 75
    assert exit_code(DistNetworkError("reset")) == exit_code(DistStoreError("gone")) == 75
    assert exit_code(KeyboardInterrupt()) == 130


def test_a_full_disk_is_one_whatever_reports_it() -> None:
    quota = str(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
    assert exit_code(CheckpointError(f"runs/x/checkpoints: cannot be written: {quota}")) == 74
    rust = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert exit_code(RuntimeError(rust)) == 74


@pytest.mark.parametrize("code", [errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN])
def test_a_file_system_that_fails_is_no_mistake_of_the_user(code: int) -> None:
    error = OSError(code, os.strerror(code), "runs/x/metrics.jsonl")
    assert exit_code(error) == exit_code(CheckpointError(f"runs/x/checkpoints: cannot write: rank 3: {error}")) == 74
    assert judge([74, None], outlives=False) == "broke"


def test_who_loses_a_peer_may_be_in_a_rollout_or_in_a_launch() -> None:
    assert issubclass(LostPeerError, RolloutError) and issubclass(LostPeerError, LaunchError)
