"""One number a token on top of the last hidden states: a value V(s), or the reward of what was written so far.

Legend: D hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mas_hpc.errors import CheckpointError

WEIGHTS_FILE = "score_head.safetensors"


class ScalarHead(nn.Module):
    """A linear map to one number, in float32 whatever the model's type; its tensors are `score.weight` and `score.bias`.

    Weights start normal with standard deviation 1 / sqrt(D + 1), drawn from `seed` alone (torch's own generator stays as
    it is), the bias at zero: arXiv 2009.01325.

    Example: ScalarHead(576, seed=0)(hidden_TD)
    """

    def __init__(self, hidden_size: int, *, seed: int) -> None:
        super().__init__()
        self.score = nn.utils.skip_init(nn.Linear, hidden_size, 1)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.score.weight, std=(hidden_size + 1) ** -0.5, generator=generator)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., D] to [...], in the type of the head's own weights."""
        return self.score(hidden.to(self.score.weight.dtype))[..., 0]

    def save(self, folder: Path) -> None:
        """Write `folder`/score_head.safetensors. Raises CheckpointError."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.state_dict(), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: cannot write the scalar head: {error}") from error

    @classmethod
    def load(cls, folder: Path, hidden_size: int) -> ScalarHead:
        """Read what `save` wrote. Raises CheckpointError when it is absent, damaged or of another hidden size."""
        path = folder / WEIGHTS_FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot read a scalar head ({error}); expected the folder of a trained reward or value model: "
                "train one, or copy the folder again"
            ) from error
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        expected = {"score.weight": (1, hidden_size), "score.bias": (1,)}
        if found != expected:
            raise CheckpointError(
                f"{path}: holds {found}, expected {expected}; it belongs to a model of another hidden size: "
                "set model.path to the model that it was trained with"
            )
        head = cls(hidden_size, seed=0)
        head.load_state_dict(tensors)
        return head
