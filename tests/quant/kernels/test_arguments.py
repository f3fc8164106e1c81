"""What C would read otherwise than it lies in memory never gets there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from mmchat.quant.kernels import native, reference
from tests.quant.kernels.available import needs_kernels

pytestmark = needs_kernels

WEIGHT = torch.randn(6, 128)


def arguments(name: str) -> list[torch.Tensor]:
    """Tensors that a function takes."""
    library = native.library()
    assert library
    int8, int4 = library.quantize_int8(WEIGHT), library.quantize_int4(WEIGHT, 64)
    packed = reference.pack_int4(*library.quantize_int4(torch.randn(16, 128), 64))
    x = torch.randn(3, 128)
    return {
        "linear_bf16": [x, WEIGHT.bfloat16()],
        "linear_int8": [x, *int8],
        "linear_int4": [x, *int4],
        "linear_packed_int4": [x, packed],
        "widen_int8": [*int8],
        "widen_int4": [*int4],
        "quantize_int8": [WEIGHT],
        "linear_blocks": [x, library.quantize_blocks(6, torch.randn(16, 128))],
        "widen_blocks": [library.quantize_blocks(6, torch.randn(16, 128))],
        "quantize_blocks": [torch.randn(16, 128)],
        "attend": [
            torch.randn(2, 4, 1, 64),
            *torch.randn(2, 2, 2, 5, 64).bfloat16(),
            torch.ones(2, 1, 1, 5, dtype=torch.bool),
        ],
    }[name]


NAMES = (
    "linear_bf16", "linear_int8", "linear_int4", "linear_packed_int4", "widen_int8", "widen_int4",
    "quantize_int8", "linear_blocks", "widen_blocks", "quantize_blocks",
)  # fmt: skip


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, with other numbers between them."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, at an address that is odd."""
    held = bytearray(tensor.nbytes + 1)
    out = torch.frombuffer(held, dtype=torch.uint8, offset=1)
    out.copy_(tensor.contiguous().view(torch.uint8).flatten())
    moved = torch.empty(0, dtype=tensor.dtype)
    moved.set_(out.untyped_storage(), 0, tensor.shape, tensor.stride())
    return moved


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "of another width": lambda t: t.half() if t.itemsize != 2 else t.float(),
    "of another kind": lambda t: t.view({1: torch.bool, 2: torch.half, 4: torch.int32}[t.itemsize]),
    "spread out": spread,
    "shorter": lambda t: t[..., :-1].contiguous(),
    "misaligned": misaligned,
    "elsewhere": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_argument_is_refused(name: str, change: str) -> None:
    library = native.library()
    if "packed" in name and not (library and library.packs_int4):
        pytest.skip("int4 is read as it lies here")
    function = getattr(library, name)
    function = partial(function, 6) if "blocks" in name else function
    for position, tensor in enumerate(arguments(name)):
        given = arguments(name)
        given[position] = CHANGES[change](tensor)
        if change == "misaligned" and tensor.itemsize == 1:
            function(*given)  # bytes may lie anywhere; narrower weights alone are weights, too
        elif change != "shorter" or position or name.startswith("linear") or "blocks" in name:
            with pytest.raises(ValueError, match=r"expected|weights"):
                function(*given)


def test_rows_that_are_missing_are_seen() -> None:
    library = native.library()
    assert library
    for name in ("linear_int8", "linear_int4", "widen_int8", "widen_int4"):
        given = arguments(name)
        given[-1] = given[-1][:-1]
        with pytest.raises(ValueError, match="expected"):
            getattr(library, name)(*given)


def test_rows_that_fill_no_panel_are_not_packed() -> None:
    library = native.library()
    assert library
    if not library.packs_int4:
        pytest.skip(f"{library.instructions} reads int4 as it lies")
    with pytest.raises(ValueError, match="cannot be packed"):
        library.pack_int4(*library.quantize_int4(WEIGHT, 64))  # 6
    packed = library.pack_int4(*library.quantize_int4(torch.randn(8, 128), 64))
    for given in (packed[:6], packed[:, :-1].contiguous()):
        with pytest.raises(ValueError, match="packed int4 weights"):
            library.linear_packed_int4(torch.randn(3, 128), given)
        with pytest.raises(ValueError, match="packed int4 weights"):
            library.widen_packed_int4(given, 128)


def test_blocks_of_other_bits_or_rows_are_refused() -> None:
    library, x = native.library(), torch.randn(3, 128)
    assert library
    for rows, bits in ((6, 8), (8, 5)):
        with pytest.raises(ValueError, match="blocks of"):
            library.quantize_blocks(bits, torch.randn(rows, 128))
    packed = library.quantize_blocks(4, torch.randn(16, 128))
    for bits, given in ((6, packed), (4, packed[:7]), (5, packed)):
        with pytest.raises(ValueError, match=r"blocks of|expected"):
            library.linear_blocks(bits, x, given)


@pytest.mark.parametrize("group", [0, 16, 48, 256])
def test_groups_of_another_size_are_refused(group: int) -> None:
    library = native.library()
    assert library
    with pytest.raises(ValueError, match="groups"):
        library.quantize_int4(WEIGHT, group)


@pytest.mark.parametrize("change", ["of another width", "spread out", "shorter", "elsewhere"])
@pytest.mark.parametrize("position", [1, 2])
@pytest.mark.parametrize("is_int8", [False, True])
def test_wrong_keys_and_values_are_refused(change: str, position: int, is_int8: bool) -> None:
    library, given = native.library(), arguments("attend")
    assert library
    if is_int8:
        given[1:3] = map(reference.round_rows, given[1:3])
    given[position] = CHANGES[change](given[position])
    with pytest.raises(ValueError, match="keys and values"):
        library.attend(*given)


def test_a_wrong_mask_is_refused() -> None:
    library, given = native.library(), arguments("attend")
    assert library
    for mask in (given[3].float(), given[3].expand(2, 1, 1, 5)[:, :, :, :1], torch.ones(3, 5) > 0):
        with pytest.raises((ValueError, RuntimeError)):
            library.attend(*given[:3], mask)
