"""Tensors of a checkpoint as safetensors, one file a rank, through torch's distributed checkpoint (DCP).

DCP plans who writes and reads which part, so that what some ranks wrote sharded is read by any number of ranks, sharded or
not. Its own metadata file is a pickle; torch's Hugging Face reader finds the same in the headers of the safetensors files.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mas_hpc.distributed.checkpoint_files import FileSum
from mas_hpc.errors import CheckpointError

Finish = Callable[[dict[str, FileSum]], None]
"""Called on the first rank when all have written, with the files of all."""
_OFFSETS = "DCP_SHARDING_INFO"
"""Where the reader looks, in a file's header, for where in the whole tensor each part begins."""
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Types as the headers of safetensors files name them."""
# A world of one has no process group, which is what DCP warns of; the filter is for the thread that writes, too.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class _Writer(HuggingFaceStorageWriter):
    """Writes straight from the tensors' memory, where the base class holds the whole file in memory first."""

    def __init__(self, folder: Path, finish: Finish) -> None:
        super().__init__(path=str(folder), save_distributed=True)
        self._folder, self._finish = folder, finish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's file; its size and checksum are the result."""
        tensors: dict[str, Tensor] = {}
        offsets, addresses = {}, set()
        for item in plan.items:
            assert item.tensor_data is not None and item.index.fqn not in tensors, item.index
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), item.index
            tensor = tensor.detach().contiguous()
            is_shared = tensor.data_ptr() in addresses  # as is the step of DeepSpeed's flat row, by all weights in it
            addresses.add(tensor.data_ptr())
            tensors[item.index.fqn] = tensor.clone() if is_shared else tensor
            offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        results = []
        if tensors:
            file = self._folder / f"rank_{plan.storage_data['shard_index'] - 1:05d}.safetensors"
            found = write_tensors(file, tensors, {_OFFSETS: json.dumps(offsets), "format": "pt"})
            results = [WriteResult(index=MetadataIndex(file.name), size_in_bytes=found.num_bytes, storage_data=found)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """All ranks have written."""
        self._finish({result.index.fqn: result.storage_data for rank in results for result in rank})


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileSum:
    """Write contiguous tensors of host memory as a safetensors file, and force it to disk; other threads run meanwhile.

    safetensors' own writer holds Python's lock while it writes, so that training would stand still. Raises OSError.
    """
    ordered = sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0]))  # so each lies aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with file.open("wb") as stream:
        for block in chain((len(text).to_bytes(8, "little"), text), (_bytes(tensor) for _, tensor in ordered)):
            stream.write(block)
            digest.update(block)
        stream.flush()
        os.fsync(stream.fileno())
    return FileSum(num_bytes=8 + len(text) + end, xxh3_128=digest.hexdigest())


def _bytes(tensor: Tensor) -> Any:
    """Its memory, as a buffer."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def write(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None, finish: Finish) -> None:
    """Write these tensors, plain or DTensors, in host memory, and force them to disk; then `finish` on the first rank.

    A plain tensor is written once, by one of the ranks that have its name. Collective in `group`; None: a world of one.
    Raises CheckpointError on all ranks when one fails.
    """
    with _told(f"{folder}: cannot write the checkpoint"):
        dcp.save(dict(tensors), storage_writer=_Writer(folder, finish), process_group=group, no_dist=group is None)


def read_into(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Overwrite these tensors, plain or DTensors of any placement, with what the checkpoint holds under their names.

    Names, shapes and types have been compared with `layout`. Collective in `group`. Raises CheckpointError on all ranks.
    """
    with _told(f"{folder}: cannot read the checkpoint"), torch.no_grad():
        dcp.load(
            dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group, no_dist=group is None
        )


def layout(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor in a checkpoint, by name. Reads the files' headers."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: (tuple(tensor.size), tensor.properties.dtype)
        for name, tensor in found.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


@contextmanager
def _told(what: str) -> Iterator[None]:
    """DCP's collection of tracebacks as one message."""
    try:
        yield
    except CheckpointException as error:
        causes = [f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items())]
        raise CheckpointError(f"{what}: {'; '.join(causes)}") from None
