"""One LoRA adapter per policy on one frozen base, all resident; each token of a flat row chooses its own.

    y = base(x) + ((x @ A_all) * gate) @ B_all        gate [T, P*r]: the scale in the columns of the token's policy

One pair of matmuls serves all agents, and only the policies that the row names are computed. LoRA (arXiv 2106.09685)
scales by alpha / rank; rank-stabilised (arXiv 2312.03732), by alpha / sqrt(rank).
Legend: T tokens, P policies of the row, r rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mas_hpc.errors import CheckpointError, ConfigError
from mas_hpc.models.linear import linear

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""PEFT's init_lora_weights that leave the base weights alone; the others, such as pissa, do not."""


@dataclass(slots=True)
class Route:
    """Which policies adapt the current row; shared by all layers of a bank. No policies: the base model."""

    active: tuple[int, ...] = ()
    gate: Tensor | None = None
    """[T, P*r], P = len(active)."""
    is_open: bool = False


class BankLinear(nn.Module):
    """A frozen linear layer and one low-rank update per policy; `weight` and `bias` keep their names in checkpoints."""

    def __init__(
        self, base: nn.Linear, generators: Sequence[torch.Generator], rank: int, route: Route,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.bias, self.route = base.weight, base.bias, route
        like = torch.empty(0, dtype=torch.promote_types(base.weight.dtype, torch.float32), device=device or base.weight.device)
        blocks = [torch.empty(rank, base.in_features) for _ in generators]
        for block, generator in zip(blocks, generators, strict=True):
            nn.init.kaiming_uniform_(block, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.ParameterList(nn.Parameter(block.to(like)) for block in blocks)
        self.lora_b = nn.ParameterList(nn.Parameter(like.new_zeros(rank, base.out_features)) for _ in blocks)

    def base(self, x: Tensor) -> Tensor:
        """The frozen layer."""
        return linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [1, T, in] to [1, T, out]; without a route any shape, by the base alone."""
        base = self.base(x)
        gate, active = self.route.gate, self.route.active
        if gate is None:
            return base
        assert x.shape[:-1] == (1, len(gate)), f"route is for a flat row of {len(gate)} tokens, input is {x.shape}"
        # Joined anew in each pass: even in a decoding step of 8 tokens, a cache saved nothing measurable.
        a_all, b_all = (torch.cat([part[index] for index in active]) for part in (self.lora_a, self.lora_b))
        delta = (F.linear(x.to(a_all.dtype), a_all) * gate) @ b_all
        return base + delta.to(base.dtype)


class AdapterBank:
    """The adapters of a model's policies: routing, parameters, and import and export in PEFT's format."""

    def __init__(
        self, policies: Sequence[str], layers: Mapping[str, BankLinear], *, rank: int, alpha: float, rank_stabilized: bool
    ) -> None:
        self.policies = tuple(policies)
        self.index = {policy: index for index, policy in enumerate(self.policies)}
        self.rank, self.alpha, self.rank_stabilized = rank, alpha, rank_stabilized
        self._scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self._layers = dict(layers)
        self._route = next(iter(self._layers.values())).route

    @classmethod
    def install(
        cls,
        model: PreTrainedModel,
        policies: Sequence[str],
        *,
        rank: int,
        alpha: float,
        target_modules: Sequence[str],
        seed: int,
        rank_stabilized: bool = False,
        device: torch.device | None = None,
    ) -> AdapterBank:
        """Freeze the model and give its linear layers of the named kinds one adapter per policy, in place.

        A is drawn as PEFT draws it, from a generator per policy (seed + index); B is zero, so that nothing changes yet.
        Adapters live on `device`, which is the base weights' unless named, in float32 or, on a float64 base, float64.
        Raises ConfigError when a target is not a linear layer.
        """
        assert policies and len(set(policies)) == len(policies), f"policies must be distinct: {policies}"
        targets = _find_targets(model, target_modules)
        model.requires_grad_(False)
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(policies))]
        route = Route()
        layers = {name: BankLinear(linear, generators, rank, route, device) for name, linear in targets.items()}
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        return cls(policies, layers, rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)

    @contextmanager
    def route(self, adapter_T: Tensor | None) -> Iterator[None]:
        """Adapt token t of the flat rows run inside by policy `adapter_T[t]` (-1: none); None, as no route: the base.

        With activation checkpointing, which runs the layers again in the backward pass, keep it open until that has ended:
        closed too early, the recomputed layers would be the base's, and torch raises CheckpointError. Does not nest.
        """
        route = self._route
        assert not route.is_open, "a route is open already"
        active, gate = ((), None) if adapter_T is None else self._gate(adapter_T)
        route.is_open, route.active, route.gate = True, active, gate
        try:
            yield
        finally:
            route.is_open, route.active, route.gate = False, (), None

    def _gate(self, adapter_T: Tensor) -> tuple[tuple[int, ...], Tensor | None]:
        present = [index for index in adapter_T.unique().tolist() if index >= 0]
        if not present:
            return (), None
        assert present[-1] < len(self.policies), f"adapter {present[-1]} of {len(self.policies)}"
        column_P = torch.tensor(present, device=adapter_T.device).repeat_interleave(self.rank)
        layer = next(iter(self._layers.values()))
        gate = (adapter_T[:, None] == column_P).to(layer.lora_a[0]) * self._scale
        return tuple(present), gate

    def parameters_of(self, policy: str) -> list[nn.Parameter]:
        """The trainable parameters of one policy: A and B of each layer."""
        index = self.index[policy]
        return [part[index] for layer in self._layers.values() for part in (layer.lora_a, layer.lora_b)]

    def tensors(self, policy: str) -> dict[str, Tensor]:
        """A copy of one adapter under PEFT's names: A is [rank, in], B is [out, rank]."""
        index = self.index[policy]
        tensors = {}
        for name, layer in self._layers.items():
            key_a, key_b = _peft_keys(name)
            tensors[key_a] = layer.lora_a[index].detach().clone()
            tensors[key_b] = layer.lora_b[index].detach().T.contiguous()
        return tensors

    def assign(self, policy: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite one adapter with what `tensors` returned. Raises CheckpointError when names or shapes differ."""
        expected = {key: tuple(tensor.shape) for key, tensor in self.tensors(policy).items()}
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise CheckpointError(
                    f"adapter of policy {policy!r}: {key} has shape {found.get(key, 'missing')}, expected "
                    f"{expected.get(key, 'no such tensor')}; it was trained on another model, rank or target_modules"
                )
        index = self.index[policy]
        with torch.no_grad():
            for name, layer in self._layers.items():
                key_a, key_b = _peft_keys(name)
                layer.lora_a[index].copy_(tensors[key_a])
                layer.lora_b[index].copy_(tensors[key_b].T)

    def merged_state_dict(self, model: PreTrainedModel, policy: str) -> dict[str, Tensor]:
        """The weights of the plain model that acts as `policy`, W + scale * (B A); model and bank stay as they are.

        Example: model.save_pretrained(folder, state_dict=bank.merged_state_dict(model, "solver"))
        """
        index = self.index[policy]
        weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
        for name, layer in self._layers.items():
            delta = (layer.lora_a[index].T @ layer.lora_b[index]).T.detach() * self._scale
            weights[f"{name}.weight"] = (layer.weight.detach() + delta).to(layer.weight.dtype)
        return weights

    def export(self, policy: str, folder: Path, *, base_model: str) -> None:
        """Write one adapter as PEFT does; `base_model` is the name or path its users load. Raises CheckpointError."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rank_stabilized,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": self._target_modules(),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.tensors(policy), folder / WEIGHTS_FILE, metadata={"format": "pt"})
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: cannot write the adapter of policy {policy!r}: {error}") from error

    def load(self, policy: str, folder: Path) -> None:
        """Read one adapter in PEFT's format. Raises CheckpointError when it is incomplete or does not fit the bank."""
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            tensors = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{folder}: cannot read a PEFT adapter ({error}); expected {CONFIG_FILE} and {WEIGHTS_FILE}"
            ) from error
        self._check(config, folder / CONFIG_FILE)
        self.assign(policy, tensors)

    def _check(self, config: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError when the configuration is not of plain LoRA in the shape of this bank."""
        targets = config.get("target_modules")
        found = {
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "rank_stabilized": bool(config.get("use_rslora")),
            # Of a pattern, which is a string, the names of the tensors tell.
            "target_modules": sorted({_leaf(name) for name in targets})
            if isinstance(targets, list)
            else self._target_modules(),
        }
        expected = (self.rank, self.alpha, self.rank_stabilized, self._target_modules())
        for (key, value), wanted in zip(found.items(), expected, strict=True):
            if value != wanted:
                raise CheckpointError(
                    f"{path}: the adapter has {key}={value}, but the bank has {wanted}; set adapters.{key}={value}"
                )
        if config.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type={config.get('peft_type')} is not supported, only plain LoRA")
        for key in ("use_dora", "alpha_pattern", "rank_pattern", "alora_invocation_tokens"):
            if config.get(key):
                raise CheckpointError(f"{path}: {key}={config[key]} is not supported, only plain LoRA")
        if config.get("init_lora_weights", True) not in INITIALIZATIONS:
            raise CheckpointError(
                f"{path}: init_lora_weights={config['init_lora_weights']} is an update of changed base weights; convert it "
                "to plain LoRA with peft (save_pretrained, path_initial_model_for_weight_conversion)"
            )

    def _target_modules(self) -> list[str]:
        return sorted({_leaf(name) for name in self._layers})


def _peft_keys(name: str) -> tuple[str, str]:
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"


def _find_targets(model: PreTrainedModel, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """The named linear layers below the head, by full name. Raises ConfigError when one is missing or none is named."""
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    available = {_leaf(name) for name in linears}
    unsuited = {_leaf(name) for name, module in model.named_modules() if isinstance(module, Conv1D)}
    kind = model.config.model_type
    if unsuited.intersection(target_modules):
        raise ConfigError(
            f"adapters.target_modules: {sorted(unsuited.intersection(target_modules))} of {kind} are Conv1D layers, "
            "which take no adapter; train the full model (adapters.policies=shared) or choose a Llama-like model"
        )
    if not target_modules or not available.issuperset(target_modules):
        raise ConfigError(
            f"adapters.target_modules: {sorted(set(target_modules) - available)} are no linear layers of {kind}; "
            f"expected at least one of {sorted(available)}"
        )
    return {name: linear for name, linear in linears.items() if _leaf(name) in target_modules}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
