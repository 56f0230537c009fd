"""The files of a checkpoint are what safetensors itself reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mas_hpc.distributed.checkpoint_files import sum_of
from mas_hpc.distributed.checkpoint_format import _NAMES, write_tensors


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"of {dtype}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in _NAMES}
    tensors |= {"one": torch.tensor(2.5), "none": torch.zeros(0, 4), "odd": torch.arange(7, dtype=torch.uint8)}
    found = write_tensors(tmp_path / "file", tensors, {"key": "value"})
    assert found == sum_of(tmp_path / "file")
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == tensor.dtype and read[name].equal(tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"key": "value"}


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_tensors(Path("/dev/full"), {"a": torch.zeros(1 << 16)}, {})
