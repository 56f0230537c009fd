"""New weights for the engines: streamed, checked on arrival, and acknowledged by every rank before anybody goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Literal, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store

from mas_hpc.checksum import Checksum
from mas_hpc.distributed.mpi import load_mpi
from mas_hpc.distributed.weight_blocks import Plan, plan
from mas_hpc.distributed.weight_channels import (
    Channel,
    GroupChannel,
    Members,
    MpiChannel,
    SharedChannel,
    file_memory,
    read_text,
    read_texts,
    window_memory,
)
from mas_hpc.distributed.weight_source import NamedTensor, Source, TensorSpec
from mas_hpc.distributed.world import World
from mas_hpc.errors import MasHpcError, RolloutError

WeightTransport = Literal["auto", "shared", "mpi", "group"]

BLOCK_BYTES = 32 << 20
"""Tensors travel in blocks of this size: with 1 MiB they cost a third more CPU time."""
BLOCKS_AHEAD = 2
"""How far the sender may be ahead of the slowest receiver."""


class Load(Protocol):
    """RolloutEngine.load: take the weights, serve them as `version`, return the checksum of what was copied."""

    def __call__(self, *, version: int, weights: Iterable[NamedTensor] | None = None) -> str: ...


class WeightSync:
    """Moves weights from one rank to engines on others, over any Channel.

    Members meet in the store, so that one that never comes is named; then blocks travel, each side copying one while the
    next is under way; then the sender compares what every engine says it holds with what was sent, and all hear the verdict.
    Source ranks that hold shards but do not send call `help_gather`. Nothing is sent to an engine beside the trainer: one that
    shares the trainer's tensors is given load(version=version), one beside shards load(version=version, weights=source).
    Example: sync.send(version=3, source=HeldWeights(named_weights(model, bank, trained))) on the sender, and
    sync.receive(engine.load) on the receivers, both return the checksum
    """

    def __init__(self, members: Members, channel: Channel, store: Store, *, block_bytes: int = BLOCK_BYTES) -> None:
        """`store` is this sync's own, the same for all members."""
        self._members, self._channel, self._store = members, channel, store
        self._block_bytes = block_bytes
        self._num_pushes = 0

    def send(self, *, version: int, source: Source) -> str:
        """Give `source` to every receiver; return its checksum. Collective with the receivers (and source ranks).

        Raises RolloutError naming the ranks that did not come, stopped, failed, or hold something else.
        """
        assert self._members.sends
        board = self._next_board()
        read_texts(board, "ready", self._members, f"be ready for weights of version {version}")
        for key in ("header", "verdict"):  # all have read the last ones
            self._board(self._num_pushes - 1).delete_key(key)
        board.set("header", json.dumps({"version": version, "specs": [asdict(spec) for spec in source.specs]}))
        total = Checksum()
        self._stream(source, self._plan(source.specs), total)
        answers = read_texts(board, "served", self._members, f"serve weights of version {version}")
        compared = {rank: _compare(json.loads(answer), version, str(total)) for rank, answer in answers.items()}
        problems = [f"rank {rank} {problem}" for rank, problem in compared.items() if problem]
        verdict = f"weights of version {version} did not arrive: {'; '.join(problems)}" if problems else ""
        board.set("verdict", verdict)
        if verdict:
            raise RolloutError(verdict)
        return str(total)

    def receive(self, load: Load) -> str:
        """Load what the sender sends next; return the checksum. Collective.

        Raises RolloutError when the sender does not come, stops, or finds that an engine, here or elsewhere, holds
        something else; what `load` raises goes on after the sender has been told.
        """
        members = self._members
        assert not members.sends
        board = self._next_board()
        board.set(f"ready/{members.rank}", "")
        header = json.loads(read_text(board, "header", members, members.sender, "send weights"))
        specs = [TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in header["specs"]]
        arriving = self._arriving(self._plan(specs))
        answer = {"version": header["version"], "checksum": ""}
        try:
            answer["checksum"] = load(version=header["version"], weights=arriving)
        except MasHpcError as error:
            answer["error"] = str(error)
            raise
        finally:
            for _ in arriving:  # what the engine left
                pass
            board.set(f"served/{members.rank}", json.dumps(answer))
        verdict = read_text(board, "verdict", members, members.sender, "compare checksums")
        for what in ("ready", "served"):  # the sender has read them
            board.delete_key(f"{what}/{members.rank}")
        if verdict:
            raise RolloutError(verdict)
        return answer["checksum"]

    def close(self) -> None:
        """Give the buffers back. Collective among the members."""
        self._channel.close()

    def _next_board(self) -> Store:
        """The keys of the next push."""
        self._num_pushes += 1
        return self._board(self._num_pushes)

    def _board(self, number: int) -> Store:
        return PrefixStore(f"push/{number}", self._store)

    def _plan(self, specs: Iterable[TensorSpec]) -> Plan:
        return plan(tuple(specs), block_bytes=self._block_bytes, ahead_bytes=BLOCKS_AHEAD * self._block_bytes)

    def _stream(self, source: Source, plan: Plan, total: Checksum) -> None:
        """Fill the blocks from the source and post them."""
        ring = self._channel.ring(plan.ring_bytes)
        tensors = iter(source)
        for block in plan.blocks:
            self._channel.wait(block.needs)
            for spec, view in block.views(ring):
                policy, name, tensor = next(tensors)
                assert (policy, name) == (spec.policy, spec.name), f"the source yields {name} where it promised {spec.name}"
                view.copy_(tensor)
                total.add(policy, name, view)
            self._channel.post(block.bytes_in(ring))
        assert next(tensors, None) is None, "the source yields more than it promised"
        self._channel.wait(len(plan.blocks))

    def _arriving(self, plan: Plan) -> Iterator[tuple[str, str, Tensor]]:
        """The tensors as they come, each a view into the ring until the next one is asked for."""
        ring = self._channel.ring(plan.ring_bytes)
        num_posted = 0
        for number, block in enumerate(plan.blocks):
            while num_posted < len(plan.blocks) and plan.blocks[num_posted].needs <= number:
                self._channel.post(plan.blocks[num_posted].bytes_in(ring))
                num_posted += 1
            self._channel.wait(number + 1)
            for spec, view in block.views(ring):
                yield spec.policy, spec.name, view
            self._channel.release()


def open_sync(
    world: World, *, sender: int, receivers: Sequence[int], timeout_s: float, transport: WeightTransport = "auto",
    block_bytes: int = BLOCK_BYTES,
) -> WeightSync | None:  # fmt: skip
    """A WeightSync from `sender` to `receivers`; None on the other ranks. Collective among all ranks of the world.

    shared: memory that the members share, which are on one host (an MPI window under an MPI launcher, else a file in
    /dev/shm); mpi: broadcast on buffers; group: broadcast over gloo. auto: shared on one host; between hosts mpi under an MPI
    launcher, else group. Raises RolloutError when not all members come or have room.
    """
    assert world.store is not None and len(world.hosts) == world.size, "the world is not connected"
    ranks = sorted((sender, *receivers))
    group = dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=timeout_s))
    if world.rank not in ranks:
        return None
    members = Members(rank=world.rank, sender=sender, receivers=tuple(receivers), timeout_s=timeout_s)
    if transport == "auto":
        one_host = len({world.hosts[rank] for rank in ranks}) == 1
        transport = "shared" if one_host else "mpi" if world.launcher == "mpi" else "group"
    store = PrefixStore(f"weights/{group.group_name}", world.store)
    channel: Channel
    if transport == "mpi":
        channel = MpiChannel(members, load_mpi().COMM_WORLD)
    elif transport == "group":
        channel = GroupChannel(members, group)
    else:
        by_mpi = world.launcher == "mpi"
        memory = window_memory(members, load_mpi().COMM_WORLD) if by_mpi else file_memory(members, store)
        channel = SharedChannel(members, group, memory)
    return WeightSync(members, channel, store, block_bytes=block_bytes)


def help_gather(source: Source) -> None:
    """Take part in gathering the shards of a source that another rank sends. Collective among the source ranks."""
    for _ in source:
        pass


def _compare(answer: dict[str, str], version: int, checksum: str) -> str:
    """What is wrong with a receiver's answer; "" when nothing is."""
    if "error" in answer:
        return f"could not load them: {answer['error']}"
    if (answer["version"], answer["checksum"]) != (version, checksum):
        return f"holds version {answer['version']} with checksum {answer['checksum'] or 'of nothing'}, sent was {checksum}"
    return ""
