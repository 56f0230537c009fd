"""A rank of two: what it says goes over the group of gloo, gradients over that of all, and both skip what is not finite."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from mas_hpc.config_methods import SFTConfig
from mas_hpc.data.token_tree import TokenTree
from mas_hpc.distributed.ddp import DataParallel, sum_gradients
from mas_hpc.distributed.device import new_mesh
from mas_hpc.distributed.exchange import gather_lines, most
from mas_hpc.distributed.world import World, connected
from mas_hpc.models.attention import prepare
from mas_hpc.training.learner import Learner
from mas_hpc.training.methods import Objective
from mas_hpc.training.network import Network, Outputs
from mas_hpc.training.share import Totals
from mas_hpc.types import Sample

used: list[tuple[str, object]] = []


def record(name: str) -> None:
    """Note which group the collective of this name is asked to use."""
    call = getattr(dist, name)

    def recorded(*args: object, **options: object) -> object:
        used.append((name, options.get("group")))
        return call(*args, **options)

    setattr(dist, name, recorded)


def skip_alike(world: World) -> None:
    """One rank alone has a loss that is not finite: neither moves."""
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    network = Network(model=prepare(LlamaForCausalLM(shape).eval()))
    learner = Learner(network, DataParallel(world), SFTConfig(steps=3))
    samples = [
        Sample(id=name, tree=name, agent="", policy="", prompt_ids=(1, 2), prompt_spans=(("", 2),), completion_ids=(3, 4))
        for name in ("first", "second")
    ]

    def loss(outputs: Outputs, tree: TokenTree, totals: Totals) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return outputs.logprob_N.sum() * (float("inf") if world.rank else 1.0), {}

    before = [parameter.detach().clone() for parameter in learner.trained]
    metrics = learner.update(samples, Objective(loss=loss), Totals.of(samples))
    assert len(network.share(samples, world)) == 1 and metrics["skipped_steps"] == 1.0
    assert all(torch.equal(old, new) for old, new in zip(before, learner.trained, strict=True))


def main() -> None:
    for name in ("all_gather", "all_reduce"):
        record(name)
    with connected(World.from_env(), "auto") as world:
        assert world.control is not None and world.control is not dist.group.WORLD
        assert gather_lines(world, [f"rank {world.rank}"]) == ["rank 0", "rank 1"]
        assert most(world, 3 * world.rank) == 3
        assert {group for _, group in used} == {world.control}, used
        used.clear()
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.full((2,), 1.0 + world.rank)
        sum_gradients(world, [parameter])
        assert parameter.grad.tolist() == [3.0, 3.0]
        assert used == [("all_reduce", world.control), ("all_reduce", None)], used
        group = dist.group.WORLD
        group.bound_device_id = torch.device("xpu", 0)
        assert new_mesh("cpu", (1, 2), ("replicate", "shard")).mesh_dim_names == ("replicate", "shard")
        assert group.bound_device_id == torch.device("xpu", 0)
        group.bound_device_id = None
        skip_alike(world)
        print(f"rank {world.rank} on {world.device}: all good", flush=True)


if __name__ == "__main__":
    main()
