"""The check that compiled kernels pass before they are used sees a fault on any branch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmchat.quant.kernels import layout, native, self_check
from mmchat.quant.kernels.library import Library
from tests.quant.kernels.available import needs_compiler, needs_kernels, needs_packing

pytestmark = needs_kernels

LINEARS = ("linear_bf16", "linear_int8", "linear_int4")


class Faulty:
    """The compiled kernels, but for one function whose last number is off by a little in a case."""

    def __init__(self, name: str, is_case: Callable[..., bool], off: float = 0.5) -> None:
        self._name, self._is_case, self._off = name, is_case, off
        self.met = False

    def __getattr__(self, name: str) -> Any:
        function = getattr(native.library(), name)
        return self._spoilt(function) if name == self._name else function

    def _spoilt(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: Any, **named: Any) -> torch.Tensor:
            out = function(*arguments, **named)
            if self._is_case(*arguments, **named):
                self.met = True
                out[(-1,) * out.dim()] += self._off
            return out

        return call


def sees(name: str, is_case: Callable[..., bool], off: float = 0.5) -> bool:
    faulty = Faulty(name, is_case, off)
    found = self_check.first_fault(faulty)  # type: ignore[arg-type]
    assert faulty.met
    return found is not None


def test_without_a_fault_there_is_none() -> None:
    library = native.library()
    assert library
    assert self_check.first_fault(library) is None
    assert self_check.first_fault(library, briefly=True) is None


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_a_fault_of_some_tokens_or_rows_is_seen(name: str, count: int) -> None:
    assert sees(name, lambda x, weight, *_: len(x) == count)
    assert sees(name, lambda x, weight, *_: len(weight) == count)


@needs_packing
@pytest.mark.parametrize("shape", self_check.PACKED)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_fault_of_packed_int4_is_seen(shape: tuple[int, int], group: int) -> None:
    def is_case(x: torch.Tensor, packed: torch.Tensor) -> bool:
        held = packed.shape[1] == x.shape[1] // 2 + 4 * x.shape[1] // group
        return held and (len(x), len(packed)) == shape

    assert sees("linear_packed_int4", is_case)


@pytest.mark.slow
@pytest.mark.parametrize("bits", layout.GROUPS)
def test_a_fault_of_blocks_is_seen(bits: int) -> None:
    for tokens in (1, 4, 6, 9, 65):
        assert sees("linear_blocks", lambda given, x, *_, **__: given == bits and len(x) == tokens)  # noqa: B023
    assert sees("widen_blocks", lambda given, *_: given == bits, off=2)
    if bits in layout.BITS:
        assert sees("quantize_blocks", lambda given, _: given == bits, off=77)


@needs_packing
@pytest.mark.parametrize("name", ["pack_int4", "widen_packed_int4"])
def test_a_fault_of_packing_is_seen(name: str) -> None:
    assert sees(name, lambda *_: True, off=1)


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("shape", self_check.MANY)
def test_a_fault_of_many_tokens_is_seen(name: str, shape: tuple[int, int]) -> None:
    assert sees(name, lambda x, weight, *_: (len(x), len(weight)) == shape)


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_a_fault_of_what_is_left_of_a_row_is_seen(name: str, blocks: int) -> None:
    assert sees(name, lambda x, *_: x.shape[1] // 64 % 4 == blocks)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_fault_of_groups_taken_together_or_left_is_seen(group: int, is_whole: bool) -> None:
    def is_case(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, _: Any) -> bool:
        groups = scale.shape[1]
        return x.shape[1] // groups == group and (groups >= 8 if is_whole else groups % 8 > 0)

    assert sees("linear_int4", is_case)


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_a_fault_of_attention_of_some_width_is_seen(width: int) -> None:
    assert sees("attend", lambda query, key, *_: key.shape[-1] == width, off=0.01)


@pytest.mark.parametrize("has_mask", [True, False])
def test_a_fault_of_attention_to_long_texts_is_seen(has_mask: bool) -> None:
    assert sees("attend", lambda q, key, v, mask: key.shape[2] > 512 and has_mask != (mask is None))


@pytest.mark.parametrize("shape", self_check.MANY_QUERIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_of_the_attention_of_many_queries_is_seen(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    def is_case(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> bool:
        return (query.shape[2], key.shape[2], query.dtype) == (*shape[:2], dtype)

    assert sees("attend_many", is_case, off=0.05)


Load = Callable[[], tuple[Library | None, str]]


@pytest.fixture
def load_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_compiler: None
) -> Callable[[str, str], Load]:
    """What loads the kernels of a source with `new` in the place of `old`."""

    def edited(old: str, new: str) -> Load:
        changed = 0
        for name in native.SOURCES + native.HEADERS:
            text = (Path(native.__file__).parent / name).read_text()
            changed += text.count(old)
            (tmp_path / name).write_text(text.replace(old, new))
        assert changed
        monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
        return native._load.__wrapped__

    monkeypatch.setattr(native, "_shipped", lambda: None)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "kernels")
    return edited


@pytest.mark.slow
@needs_compiler
def test_a_source_without_a_fault_is_used(load_edited: Callable[[str, str], Load]) -> None:
    library, _ = load_edited("INLINE", "INLINE")()
    assert library


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("for (; g < groups; g++) {", "for (; g + 1 < groups; g++) {"),
        ("for (; b < blocks; b++)", "for (; b < blocks - 1; b++)"),
        ("for (; m < m1; m++) { CALL(one", "for (; m + 1 < m1; m++) { CALL(one"),
        ("; k += BLOCK) {\n            uint8_t", " - BLOCK; k += BLOCK) {\n            uint8_t"),
        ("p * size + (first_of(tiling, t) - m0) * PANEL", "p * size"),
        ("tokens > MOST - 2 ? MOST - tokens : 2", "2"),
        ("k / SPAN * tiling.count + t)", "k / SPAN * tiling.count)"),
        ("of.full + others / of.least", "of.full"),
        ("place][row], &given", "at][row], &given"),
        ("i + pairs < panels ? pairs : 0", "0"),
        ("xscale += step / BLOCK", "xscale += 1"),
        ("tile.y += tokens * tile.N", "tile.y += tile.N"),
        ("y + m * N);", "y + (m - m0) * N);"),
        ("D == 128) span(q, key, value,", "D == 128) span(q, key, key,"),
        ("load(at) * shrink[i] + sum[t][i]", "load(at) + sum[t][i]"),
        ("j >= N ? -INFINITY", "j > N ? -INFINITY"),
        ("least(STRIP, j - seen + 1)", "least(STRIP, j - seen)"),
        ("(own + STRIP - 1 <= 0) continue", "(own <= 0) continue"),
    ],
)
def test_a_fault_in_the_source_is_seen_and_remembered(
    old: str,
    new: str,
    load_edited: Callable[[str, str], Load],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = load_edited(old, new)
    library, reason = load()
    assert library is None
    assert "is wrong here" in reason
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert load() == (None, reason)
