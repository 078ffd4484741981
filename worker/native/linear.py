"""One product with a weight matrix, computed in the way that is fastest for the number of rows.

In bfloat16 on a CPU torch has two ways. Its own kernel streams the weights as they lie and is the best for a single row;
oneDNN is the best for several, and better still when the weights lie in its own order, which it otherwise makes anew in
each call. So there are two copies of the weights where memory allows. The matrices of SmolLM2-135M, 2 threads of an
AVX512_BF16 EPYC, in ms:

    rows                       1     2     8   512
    torch's own kernel       9.1  14.4    58     -
    oneDNN                  19.1  18.7    23   350
    oneDNN, weights packed  13.2  12.7  14.7   330
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """x [rows, in] to [rows, out]."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]
    packed: Tensor | None = None  # the weight in oneDNN's own order
    streams: bool = False  # torch's own kernel for a single row

    def __call__(self, x: Tensor) -> Tensor:
        if self.streams and len(x) == 1:
            return streamed_product(x, self.weight, self.bias)
        if self.packed is not None:
            return packed_product(x, self.packed, self.bias)
        return F.linear(x, self.weight, self.bias)

    def tensors(self) -> list[Tensor]:
        """What a step reads, once."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def streamed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    onednn: Any = torch.backends.mkldnn  # whose type does not say that the switch is a bool
    onednn.enabled = False
    try:
        return F.linear(x, weight, bias)
    finally:
        onednn.enabled = True


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """The operators are those that torch's own compiler emits; where a build lacks them, the plain product serves."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@dataclass(frozen=True, slots=True)
class Products:
    """How the matrices of a model are to be multiplied with."""

    streams: bool = False
    packs: bool = False

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return Linear(weight, bias, pack(weight) if self.packs else None, self.streams)


PLAIN = Products()


def choose_products(device: torch.device, dtype: torch.dtype, has_room: bool) -> Products:
    """`has_room`: there is memory for a second copy of the weights."""
    return Products(streams=True, packs=has_room) if can_pack(device, dtype) else PLAIN


def pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed
