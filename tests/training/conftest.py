"""A model of two layers in float64, samples that every method can read, and a rank whose peers are absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mas_hpc.distributed.ddp import DataParallel
from mas_hpc.distributed.world import World
from mas_hpc.models.attention import prepare
from mas_hpc.types import Sample

VOCABULARY = 19


@pytest.fixture(autouse=True)
def norms_stay_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMSNorm in float32 whatever the model's dtype, which would hide errors above 1e-8."""

    def rms_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    for norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", rms_norm)


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    """make_model(tied=True): always the same weights."""

    def make(*, tied: bool = True) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=tied, initializer_range=0.3,
        )  # fmt: skip
        return prepare(LlamaForCausalLM(config).double().eval())

    return make


@pytest.fixture
def make_samples() -> Callable[..., list[Sample]]:
    """make_samples(num_trees): four samples a tree, which are two pairs, with every column that a method may read."""

    def make(num_trees: int = 6) -> list[Sample]:
        generator = torch.Generator().manual_seed(1)

        def draw(n: int) -> tuple[int, ...]:
            return tuple(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist())

        def near(center: float, n: int) -> tuple[float, ...]:
            return tuple((center + torch.rand(n, generator=generator, dtype=torch.float64)).tolist())

        found = []
        for tree in range(num_trees):
            prompt = draw(3 + tree)
            for number in range(4):
                size = 1 + (tree + number) % 5
                columns = {
                    "reference_logprob": near(-3.0, size), "old_logprob": near(-3.0, size), "old_value": near(-0.5, size),
                    "return": near(0.0, size), "label": near(0.0, size), "kl": (0.3,) * size,
                }  # fmt: skip
                found.append(
                    Sample(
                        id=f"{tree}/{number}", tree=str(tree), agent="solver", policy=("a", "b")[tree % 2], prompt_ids=prompt,
                        prompt_spans=(("", len(prompt)),), completion_ids=draw(size), behavior_logprobs=near(-3.0, size),
                        advantage=number - 1.5 + 0.1 * tree, label=float(number % 2 == 0), margin=0.2 * (number == 0),
                        columns=columns,
                    )
                )  # fmt: skip
        return found

    return make


class LoneRank(DataParallel):
    """A strategy as one of several ranks sees it, but for the others: it keeps what would have been gathered."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__(World(rank=rank, size=size))
        self.gathered: list[dict[str, list[float]]] = []

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Leave this rank's part."""

    def gather(self, values: Mapping[str, Sequence[float]]) -> list[dict[str, list[float]]]:
        """This rank's part alone."""
        self.gathered.append({name: list(value) for name, value in values.items()})
        return self.gathered[-1:]


@pytest.fixture
def lone_rank() -> type[LoneRank]:
    return LoneRank
