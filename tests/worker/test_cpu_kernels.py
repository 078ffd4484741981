"""Products and packing of the C step against numpy, for every instruction set that this machine runs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from worker.native.cpu.build import AVX2, NoLibrary, cpu_flags, load_library
from worker.native.cpu.pack import GROUP, Arena, Kernels, Packed, new_matrix

SIZES = [(32, 32), (64, 96), (1, 1), (33, 31), (100, 70), (31, 130)]  # rows and columns of matrices
FORMATS = ["bfloat16", "int8", "int4"]


def variants() -> list[str]:
    """plain C, AVX2, and what this machine has, as far as it has them."""
    flags = cpu_flags()
    return ["plain", *(["avx2"] if set(AVX2.values()) < set(flags) else []), "own"]


@pytest.fixture(scope="module", params=variants())
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    flags = {"plain": [], "avx2": list(AVX2.values()), "own": cpu_flags()}[request.param]
    try:
        return load_library(flags)
    except NoLibrary as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=[1, 2, 4])
def kernels(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Kernels:
    return Kernels(library, request.param)


def packed(kernels: Kernels, weights: torch.Tensor, format: str) -> Packed:
    matrix = new_matrix(Arena(1 << 20), *weights.shape, format)
    assert kernels.pack(matrix, weights) == 0
    return matrix


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_the_unpacked_weights(kernels: Kernels, format: str, size: tuple[int, int]) -> None:
    matrix = packed(kernels, random(*size), format)
    unpacked = kernels.unpack(matrix).double()
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 64):
        x = random(rows, size[1], seed=rows)
        expected = rounded_activations(x, format).double() @ unpacked.T
        torch.testing.assert_close(kernels.multiply(matrix, x).double(), expected, rtol=1e-4, atol=1e-4)


def rounded_activations(x: torch.Tensor, format: str) -> torch.Tensor:
    """As the step rounds them: to bfloat16, or to whole numbers up to 127 in groups of 32."""
    if format == "bfloat16":
        return x.bfloat16().float()
    whole = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    sizes = whole.abs().amax(-1, keepdim=True).clamp(min=1e-20)
    return ((whole * (127 / sizes)).round() * (sizes / 127)).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bfloat16_is_rounded_to_the_nearest(kernels: Kernels, dtype: torch.dtype) -> None:
    weights = random(45, 77).to(dtype)
    assert kernels.unpack(packed(kernels, weights, "bfloat16")).equal(weights.float().bfloat16().float())


@pytest.mark.parametrize(("format", "step"), [("int8", 0.51 / 127), ("int4", 1 / 7)])
def test_a_number_is_off_by_no_more_than_its_group_allows(kernels: Kernels, format: str, step: float) -> None:
    """Half a step; in four bits a whole one, where the largest number gives way to many smaller ones."""
    weights = random(40, 100)
    matrix = packed(kernels, weights, format)
    assert matrix.scales is not None
    groups = torch.nn.functional.pad(weights, (0, 28)).view(40, -1, GROUP)
    off = torch.nn.functional.pad(kernels.unpack(matrix) - weights, (0, 28)).view(40, -1, GROUP)
    assert (off.abs().amax(-1) <= groups.abs().amax(-1) * step).all()


def test_four_bits_lose_less_than_with_the_largest_number_as_the_scale(kernels: Kernels) -> None:
    weights = random(64, 256)
    groups = weights.view(64, -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round() * scale - groups).square().mean()
    own = (kernels.unpack(packed(kernels, weights, "int4")) - weights).square().mean()
    assert own < 0.8 * plain


@pytest.mark.parametrize(("format", "offsets", "least", "most"), [
    ("int8", False, -127, 127), ("int8", True, -127, 127), ("int4", False, -8, 7), ("int4", True, 0, 15),
])  # fmt: skip
def test_groups_that_are_there_already_keep_every_bit(
    kernels: Kernels, format: str, offsets: bool, least: int, most: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(least, most + 1, (37, 96), generator=generator, dtype=torch.int8)
    scales, starts = (random(37, 3, seed=seed).half() for seed in (2, 3))
    matrix = new_matrix(Arena(1 << 20), 37, 96, format, offsets)
    zero = 128 if format == "int8" else 0 if offsets else 8
    kernels.place(matrix, (numbers.int() + zero).to(torch.uint8), scales, starts if offsets else None)
    expected = numbers.view(37, 3, GROUP) * scales.float()[:, :, None]
    expected = (expected + starts.float()[:, :, None] * offsets).view(37, 96)
    assert kernels.unpack(matrix).equal(expected)
    for rows in (1, 5, 8, 11):
        x = random(rows, 96, seed=rows)
        product = rounded_activations(x, format).double() @ expected.double().T
        torch.testing.assert_close(kernels.multiply(matrix, x).double(), product, rtol=1e-4, atol=1e-3)


def test_rows_that_lie_apart_or_over_each_other_are_read_where_they_are(kernels: Kernels) -> None:
    pool = random(5000)
    for stride in (1, 40, 77):
        weights = pool.as_strided((60, 40), (stride, 1), 3)
        assert kernels.unpack(packed(kernels, weights, "bfloat16")).equal(weights.bfloat16().float())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_rows_with_numbers_that_are_none_are_counted(kernels: Kernels, format: str, wrong: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = random(70, 40).to(dtype)
        weights[3, 0] = weights[69, 39] = wrong
        assert kernels.pack(new_matrix(Arena(1 << 20), 70, 40, format), weights) == 2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wrong", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_no_numbers_stay_none_and_spoil_no_other_row(
    kernels: Kernels, format: str, wrong: float
) -> None:
    matrix = packed(kernels, random(40, 70), format)
    for at in (0, 3, 31, 69):
        x = random(10, 70)
        clean = kernels.multiply(matrix, x)
        x[4, at] = wrong
        product = kernels.multiply(matrix, x)
        assert not product[4].isfinite().any()
        assert product[:4].equal(clean[:4]) and product[5:].equal(clean[5:])


def test_nothing_but_zeros_stays_nothing(kernels: Kernels) -> None:
    for format in FORMATS:
        matrix = packed(kernels, torch.zeros(33, 64), format)
        assert not kernels.unpack(matrix).any() and not kernels.multiply(matrix, random(5, 64)).any()
        assert not kernels.multiply(packed(kernels, random(33, 64), format), torch.zeros(5, 64)).any()


def test_float16_scales_are_rounded_as_numpy_rounds(kernels: Kernels) -> None:
    weights = torch.zeros(64, GROUP)
    weights[:, 0] = torch.logspace(-9, 6, 64)
    matrix = packed(kernels, weights, "int8")
    assert matrix.scales is not None
    expected = np.minimum(weights[:, 0].numpy() / np.float32(127), 65504).astype(np.float16)
    assert matrix.scales.numpy()[:64].tolist() == expected.tolist()


def test_packed_weights_take_the_bytes_that_their_format_says() -> None:
    for format, bits in (("bfloat16", 16), ("int8", 8.5), ("int4", 4.5)):
        matrix = new_matrix(Arena(1 << 20), 64, 128, format)
        assert sum(tensor.nbytes for tensor in matrix.tensors()) == 64 * 128 * bits / 8


def test_a_pool_serves_many_calls_of_few_units(library: ctypes.CDLL) -> None:
    """Threads that wake up late must not look at the next call's work."""
    kernels = Kernels(library, 4)
    weights = random(64, 32).bfloat16().float()
    for turn in range(300):
        matrix = packed(kernels, weights + turn, "bfloat16")
        assert kernels.unpack(matrix)[63, 31] == (weights + turn).bfloat16()[63, 31]


@contextmanager
def no_more_threads() -> Iterator[None]:
    """Their stacks would be larger than any memory."""
    system, before, huge = ctypes.CDLL(None), (ctypes.c_char * 64)(), (ctypes.c_char * 64)()
    system.pthread_getattr_default_np(before)
    system.pthread_attr_init(huge)
    system.pthread_attr_setstacksize(huge, ctypes.c_size_t(1 << 50))
    system.pthread_setattr_default_np(huge)
    yield
    system.pthread_setattr_default_np(before)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "pthread_setattr_default_np"), reason="glibc alone has it")
def test_a_pool_says_how_many_threads_it_got(library: ctypes.CDLL) -> None:
    with no_more_threads():
        kernels = Kernels(library, 3)
    assert kernels.threads == 1
    assert Kernels(library, 3).threads == 3
    assert not kernels.unpack(packed(kernels, torch.zeros(64, 64), "int8")).any()


def test_sources_say_what_they_are_compiled_for(tmp_path: Path) -> None:
    assert load_library([], tmp_path)._name != load_library(cpu_flags(), tmp_path)._name
