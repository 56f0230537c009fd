"""What a route (CPU or XPU) has to offer: the two kernels of kernels.hpp on torch tensors.

Legend: C rows of one chunk, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from mas_hpc_kernels.operation import Statistics, Upstream


class Geometry(NamedTuple):
    """How the columns of a row are dealt to a device.

    Example: Geometry(sub_group_size=32, work_group_size=512): 512 work-items of 16 sub-groups take every 512th column each.
    """

    sub_group_size: int
    """Work-items that execute as one vector: 16 or 32 on PVC, 4 to 64 on a CPU."""
    work_group_size: int
    """Work-items of one row: a multiple of the sub-group, at most 1024 on PVC."""


class Rows(NamedTuple):
    """Products of some hidden states with the head, and what makes logits of them.

    Example: Rows(hidden_CD @ weight_VD.T, target_C, None, 0.0, 1.0), whose logits are the products.
    """

    product_CV: Tensor
    """Contiguous; float32, float64, float16 or bfloat16. The arithmetic is float32, or float64 for float64."""
    target_C: Tensor
    """int64; outside [0, V) where another shard has it."""
    bias_V: Tensor | None
    """In the type of the arithmetic."""
    softcap: float
    inverse_temperature: float


class Kernels(Protocol):
    """The kernels on one kind of device."""

    def row_statistics(self, rows: Rows, into: Statistics) -> None:
        """Write the softmax statistics of each row to `into`."""

    def product_gradient(self, rows: Rows, whole: Statistics, upstream: Upstream) -> None:
        """Replace the products by d loss / d product."""
