"""Every way to multiply gives the same product."""

import pytest
import torch
from torch import Tensor

from worker.native.linear import PLAIN, Products, can_pack, choose_products

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not can_pack(CPU, torch.bfloat16), reason="this CPU or build of torch has no products of packed bfloat16 matrices"
)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 33, 512])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("products", [PLAIN, Products(streams=True), Products(streams=True, packs=True)])
def test_all_ways_agree_within_the_rounding_of_bfloat16(rows: int, has_bias: bool, products: Products) -> None:
    torch.manual_seed(rows)
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((rows, 96), (160, 96), (160,)))
    linear = products.linear(weight, bias if has_bias else None)
    wanted = exact(x, weight, bias if has_bias else None)
    assert (linear(x).double() - wanted).abs().max() < 2**-7 * wanted.abs().max()
    assert torch.backends.mkldnn.enabled  # the switch is back


@needs_packing
def test_a_second_copy_of_the_weights_is_not_counted_as_read() -> None:
    weight = torch.randn(64, 32).bfloat16()
    linear = Products(streams=True, packs=True).linear(weight)
    assert linear.packed is not None and linear.tensors() == [weight]


def test_only_bfloat16_on_a_cpu_is_packed_and_only_where_there_is_room() -> None:
    assert choose_products(CPU, torch.float32, has_room=True) == PLAIN
    assert choose_products(torch.device("cuda"), torch.bfloat16, has_room=True) == PLAIN
    assert not choose_products(CPU, torch.bfloat16, has_room=False).packs
