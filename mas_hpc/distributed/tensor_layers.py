"""A model's layers cut over ranks that compute each of them together, in place, as the plan that transformers ships says.

A column layer holds rows of its weight, so that its outputs, such as whole attention heads, are this rank's alone; a row layer
takes these as its inputs, and the ranks' results are added up (arXiv 1909.08053). Weights are ordinary, smaller tensors: what
computes with them, such as tree attention and packed products, does not know. The vocabulary is cut, too: an embedding looks
up its own tokens, and the loss joins the ranks' parts of the logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from mas_hpc.distributed.exchange import gather_lines
from mas_hpc.distributed.world import World
from mas_hpc.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """The ranks that share each layer, and this one's place among them.

    Example: TensorGroup(rank=0, size=2, group=mesh.get_group("tensor"))
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    control: dist.ProcessGroup | None = None
    """Of gloo, for what is not tensors of the model; None: `group`."""

    def __deepcopy__(self, memo: object) -> TensorGroup:
        """A copy of what the group is attached to is of the same ranks."""
        return self

    def part(self, length: int) -> slice:
        """What this rank has of so many rows: ranks have equally many, the last perhaps fewer."""
        rows = -(-length // self.size)
        return slice(min(self.rank * rows, length), min((self.rank + 1) * rows, length))

    def reduce(self, tensor: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """The ranks' tensors, joined element by element. Collective."""
        joined = tensor.contiguous().clone()
        dist.all_reduce(joined, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=self.group)
        return joined

    def join(self, part: Tensor, length: int) -> Tensor:
        """The ranks' parts of a last dimension of so many rows, as `part` says, side by side. Collective."""
        mine = nn.functional.pad(part, (0, -(-length // self.size) - part.shape[-1]))
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine.contiguous(), group=self.group)
        return torch.cat(parts, -1)[..., :length]

    def agree(self, tokens: Sequence[int], logprobs: Sequence[float]) -> tuple[list[int], list[float]]:
        """What the first rank has drawn: nothing that a device rounds in its own way may part the ranks. Collective."""
        drawn = torch.tensor([tokens, logprobs], dtype=torch.float64)  # which holds every int32
        dist.broadcast(drawn, group=self.control or self.group, group_src=0)
        return [int(token) for token in drawn[0].tolist()], drawn[1].tolist()

    def first_bytes(self, data: bytes) -> bytes:
        """The first rank's, on every rank; others give theirs for nothing. Collective."""
        group, size = self.control or self.group, torch.tensor([len(data)])
        dist.broadcast(size, group=group, group_src=0)
        told = bytearray(data) if self.rank == 0 else bytearray(int(size))
        if told:
            dist.broadcast(torch.frombuffer(told, dtype=torch.uint8), group=group, group_src=0)
        return bytes(told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Along which dimension a parameter was cut, and how long it was there.

    Example: Cut(dim=0, length=576)
    """

    dim: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What was done to a module's parameters, by name; others are whole on every rank, with the same whole gradient."""

    cuts: dict[str, Cut] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    """Whole, but a rank's gradient is through its own part of the layer: the sum over ranks is the gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What a plan's word does to a layer: by the first word of a parameter's name in it.

    Example: Style(cuts={"weight": 0, "bias": 0})
    """

    cuts: Mapping[str, int] = field(default_factory=dict)
    """Dimension that is cut; lora_a [rank, in] and lora_b [rank, out] are those of adapters."""
    partial: tuple[str, ...] = ()


STYLES = {
    "colwise": Style(cuts={"weight": 0, "bias": 0, "lora_b": 1}, partial=("lora_a",)),
    "rowwise": Style(cuts={"weight": 1, "lora_a": 1}, partial=("lora_b",)),
    "replicated_with_grad_allreduce": Style(partial=("weight", "bias")),
}
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def check_cut(model: PreTrainedModel, size: int) -> None:
    """Refuse a model whose layers cannot be shared by so many ranks. Raises ConfigError."""
    key, kind, config = f"distributed.tensor_parallel={size}", model.config.model_type, model.config
    if not getattr(config, "base_model_tp_plan", None):
        raise ConfigError(f"{key}: transformers has no plan by which {kind} is cut; leave it out, or choose a Llama-like model")
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads and heads % size:
            raise ConfigError(
                f"{key}: {kind} has {name}={heads}, which {size} ranks cannot share; leave it out, or choose a model with a "
                f"multiple of {size}"
            )
    for name, module, style in _planned(model):
        if style not in STYLES:
            raise ConfigError(
                f"{key}: {kind} cuts {name} {style!r}, and only {', '.join(STYLES)} are known here; leave it out, or choose a "
                "Llama-like model"
            )
        for leaf, dim in STYLES[style].cuts.items():
            weight = dict(module.named_parameters(recurse=False)).get(leaf)
            if weight is not None and weight.shape[dim] % size:
                raise ConfigError(
                    f"{key}: {name}.{leaf} of {kind} has a side of {weight.shape[dim]}, which {size} ranks cannot share"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What was done to a model, which keeps it; a copy of the model has a copy."""

    group: TensorGroup
    layout: Layout
    """By the model's own names."""
    shared_input: _SharedInput


_DONE = "mas_hpc_cut"


def cut(module: nn.Module, group: TensorGroup) -> Layout:
    """Leave this rank's part of the layers of the model in `module`, in place; of one that was cut, adapters that are new.

    The layout has the names of `module`. Raises ConfigError as check_cut does.
    """
    model = next(part for part in module.modules() if isinstance(part, PreTrainedModel))
    done: _Done | None = getattr(model, _DONE, None)
    if done is None:
        check_cut(model, group.size)
        done = _Done(group=group, layout=Layout(), shared_input=_SharedInput(group))
        setattr(model, _DONE, done)
        _cut_vocabulary(model, done.layout, _names(model), group)
    for _, layer, word in _planned(model):
        _cut_layer(done, layer, word, _names(model))
    parameters, names = dict(model.named_parameters()), _names(module)
    return Layout(
        cuts={names[id(parameters[name])]: where for name, where in done.layout.cuts.items()},
        partial={names[id(parameters[name])] for name in done.layout.partial},
    )


def group_of(module: nn.Module) -> TensorGroup | None:
    """The ranks that share the layers of the model in `module`, which was cut; None: it is whole."""
    done: Iterator[_Done] = (getattr(part, _DONE) for part in module.modules() if hasattr(part, _DONE))
    return next((one.group for one in done), None)


def digest_of_whole(world: World, module: nn.Module, digest: Callable[[], str]) -> str:
    """Names the weights on every rank alike, also where ranks have parts of them: the first ranks have all. Collective."""
    group = group_of(module)
    is_asked = world.rank < (group.size if group else 1)
    return "-".join(gather_lines(world, [digest()] if is_asked else []))


def whole_numel(model: nn.Module) -> Callable[[Tensor], int]:
    """How many numbers a parameter of the model has on all ranks that share it."""
    done: _Done | None = getattr(model, _DONE, None)
    names, cuts = _names(model), done.layout.cuts if done else {}

    def count(parameter: Tensor) -> int:
        where = cuts.get(names[id(parameter)])
        own = parameter.shape[where.dim] if where else 0
        return parameter.numel() // own * where.length if where and own else parameter.numel()

    return count


def _names(module: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in module.named_parameters()}


def _cut_layer(done: _Done, layer: nn.Module, word: str, names: Mapping[int, str]) -> None:
    """A layer that was cut is left alone; one that an adapter has taken the place of lacks its hooks."""
    style, layout = STYLES[word], done.layout
    mine = [(name.partition(".")[0], parameter) for name, parameter in layer.named_parameters()]
    known = layout.cuts.keys() | layout.partial
    if all(names[id(parameter)] in known for leaf, parameter in mine if leaf in style.cuts or leaf in style.partial):
        return
    for leaf, parameter in mine:
        if leaf in style.cuts and names[id(parameter)] not in layout.cuts:
            _cut_parameter(layout, names, parameter, style.cuts[leaf], done.group)
        elif leaf in style.partial:
            layout.partial.add(names[id(parameter)])
    if word == "colwise":
        layer.register_forward_pre_hook(done.shared_input)
    elif word == "rowwise":
        layer.register_forward_hook(_sum_outputs(done.group))


def _planned(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """The layers that the plan names, and its words for them."""
    plan = model.config.base_model_tp_plan or {}
    for name, module in model.base_model.named_modules():
        pattern = _NUMBER.sub(".*", name)
        if pattern in plan:
            yield name, module, plan[pattern]


def _cut_parameter(layout: Layout, names: Mapping[int, str], parameter: Parameter, dim: int, group: TensorGroup) -> None:
    length = parameter.shape[dim]
    part = group.part(length)
    layout.cuts[names[id(parameter)]] = Cut(dim=dim, length=length)
    parameter.data = parameter.data.narrow(dim, part.start, part.stop - part.start).clone(memory_format=torch.contiguous_format)


def _cut_vocabulary(model: PreTrainedModel, layout: Layout, names: Mapping[int, str], group: TensorGroup) -> None:
    """Rows of the embedding and the LM head, which may be one parameter."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    part = group.part(embedding.num_embeddings)
    for parameter in dict.fromkeys((embedding.weight, head.weight)):
        _cut_parameter(layout, names, parameter, 0, group)
    own = _OwnTokens(part, group)
    if embedding.padding_idx is not None:  # its row learns nothing
        is_here = part.start <= embedding.padding_idx < part.stop
        embedding.padding_idx = embedding.padding_idx - part.start if is_here else None
    embedding.register_forward_pre_hook(own.before)
    embedding.register_forward_hook(own.after)


# ---- what happens to activations


class _Copied(torch.autograd.Function):
    """The same on every rank; each rank's gradient is through its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce(grad, "sum"), None


class _Summed(torch.autograd.Function):
    """The sum of what the ranks have; its gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return group.reduce(x, "sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def summed(x: Tensor, group: TensorGroup) -> Tensor:
    """The ranks' tensors, added up, for a result that is the same on every rank. Collective."""
    return _Summed.apply(x, group)  # type: ignore[no-any-return]


class _SharedInput:
    """Hook of column layers. Those that read one tensor, such as q, k and v, get one copy: one sum in the backward pass."""

    def __init__(self, group: TensorGroup) -> None:
        self._group = group
        self._last: tuple[Callable[[], Tensor | None], Tensor] | None = None

    def __deepcopy__(self, memo: object) -> _SharedInput:
        """A copy of the model has inputs of its own."""
        return _SharedInput(self._group)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = args
        if not torch.is_grad_enabled():
            return args
        if self._last is None or self._last[0]() is not x:
            self._last = ref(x), _Copied.apply(x, self._group)
        return (self._last[1],)


def _sum_outputs(group: TensorGroup) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Hook of row layers: each rank has added the bias, which is whole, and only one of them counts."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        bias = module.bias
        whole = summed(output, group)
        return whole if bias is None else whole - (group.size - 1) * bias.detach()  # type: ignore[operator]

    return hook


class _OwnTokens:
    """Hooks of an embedding that has some rows: it looks up row 0 for tokens of others, whose result is then zero."""

    def __init__(self, part: slice, group: TensorGroup) -> None:
        self._part, self._group = part, group
        self._is_here: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (token,) = args
        self._is_here = (self._part.start <= token) & (token < self._part.stop)
        return (torch.where(self._is_here, token - self._part.start, 0),)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self._is_here is not None
        is_here, self._is_here = self._is_here, None
        return summed(output.masked_fill(~is_here[..., None], 0.0), self._group)
