"""How weights, gradients and optimizer states lie over the ranks. Every implementation takes the same steps.

Losses are already divided by global counts, so gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from mas_hpc.distributed.tensor_layers import TensorGroup
from mas_hpc.distributed.trained_state import Fill
from mas_hpc.distributed.world import World

Groups = Mapping[str, Sequence[Parameter]]
"""Trained parameters by the policy, or head, that they belong to."""
BuildOptimizer = Callable[[Iterable[Sequence[Parameter]]], Optimizer]
"""One param_group a group, in order."""


class TrainedModule(Protocol):
    """A module on its way through optimizer steps: zero_grad, backward of every pass, clip, step."""

    module: nn.Module
    """What a pass calls."""
    groups: dict[str, list[Parameter]]
    """Trained parameters, as the optimizer has them: perhaps shards."""
    optimizer: Optimizer

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of one pass; `is_last` of this rank's passes of the step. Collective where weights are sharded."""
        ...

    def clip(self, active: Sequence[str], max_norm: float) -> dict[str, float]:
        """Sum the gradients of the active groups over ranks and scale each group's down to `max_norm`; return the norms before.

        Collective. A gradient that this rank misses counts as zero, unless all ranks miss it. Those of other groups are None.
        """
        ...

    def step(self) -> None:
        """Let the optimizer take its step."""
        ...

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter by the module's name, whole; each is valid until the next is asked for. Collective."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs, by name, the same names under every strategy. Collective.

        parameter/<name> of every trained parameter, as the module's named_parameters() calls it, and optimizer/<name>/<key>
        (exp_avg, exp_avg_sq, step, ...) of those that have taken a step. A tensor has the shape of the whole: it is whole on
        every rank, or a DTensor.
        """
        ...

    def restore(self, fill: Fill, started: Collection[str]) -> None:
        """Call `fill` once with the tensors of `state`, which it overwrites, and take them over. Collective.

        `started` names the parameters that have an optimizer state then; the others have none.
        """
        ...

    def put_back(self, parameters: Mapping[str, Tensor]) -> None:
        """Overwrite parameters, as `state` gave them, by the names of parameter/<name>; the optimizer stays. Collective."""
        ...


class Strategy(Protocol):
    """Example: DataParallel(world).train(module, {"shared": list(module.parameters())}, build)."""

    world: World
    """The ranks that share out the trees, and this one's place among them."""
    tensor: TensorGroup | None
    """Ranks that have the same trees, and each a part of every layer; None: a pass has whole layers."""
    shards: bool
    """Whether ranks hold parts of what serves, so that what is trained is a copy of it."""
    lockstep: bool
    """Whether a pass is a collective, so that all ranks have to make the same number of passes."""

    def train(
        self, module: nn.Module, groups: Groups, build: BuildOptimizer, fill: Fill | None = None
    ) -> TrainedModule:  # fmt: skip
        """Take the module over, in place, with its optimizer. Parameters of no group are frozen. Collective.

        Those on the meta device get memory for this rank's part alone; `fill` is then called with every parameter by its
        name, of the shape of the whole, as in TrainedModule.state, and overwrites those that had none.
        """
        ...

    def freeze(self, module: nn.Module) -> nn.Module:
        """Take over, in place, a module that only answers. Collective."""
        ...

    def gather(self, values: Mapping[str, Sequence[float]]) -> list[dict[str, list[float]]]:
        """All ranks' named numbers, rank 0's first; a rank without work has fewer names. Collective."""
        ...
