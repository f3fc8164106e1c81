"""Each branch of the C kernels, whatever this processor has: VNNI and AMX emulated, and portable C.

Activations are whole numbers with 127 in each block, so that rounding leaves them as they are, and
scales are powers of two. The products are then whole numbers, which must come out exactly.
"""

from __future__ import annotations

import itertools
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from mmchat.hardware.cpu import is_arm, processor_flags
from mmchat.quant.kernels import blocks_reference, layout, native, reference, self_check
from mmchat.quant.kernels.library import BLOCK, Library
from tests.quant.kernels.available import needs_compiler

HEADER = Path(__file__).with_name("emulated_instructions.h")
AVX2 = ("-mavx2", "-mfma")
EMULATED = (*AVX2, "-include", str(HEADER))
BUILDS = {
    "portable C": (),
    "AVX2": AVX2,
    "AVX2, AVX-512": (*AVX2, "-mavx512f"),
    "AVX-512 VNNI": (*EMULATED, "-DEMULATE_AVX512_VNNI"),
    "AMX": (*EMULATED, "-DEMULATE_AVX512_VNNI", "-DEMULATE_AMX=0"),
    "AVX VNNI": (*EMULATED, "-DEMULATE_AVX_VNNI"),
}
NEON = {
    "NEON": (),
    "NEON dotprod": ("asimddp",),
    "NEON i8mm": ("asimddp", "i8mm"),
}
if is_arm():  # other processors emulate it, in test_arm
    BUILDS = {name: native.arm_flags(features) for name, features in NEON.items()}
VNNI = {
    "AMX": (*AVX2, "-mavx512vl", "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
    "AVX-512 VNNI": (*AVX2, "-mavx512vl", "-mavx512vnni"),
    "AVX VNNI": (*AVX2, "-mavxvnni"),
}
TOKENS = (1, 2, 3, 4, 5, 8, 15, 66)
MANY_TOKENS = (*range(1, 10), 66)
ROWS = 35  # which neither 4 nor 16 divides
ACTIVATIONS = ("random", "127", "-127", "127 and -127 in turn")
INT8 = ("random", "-128", "127", "-128 and 127 in turn", "64", "64 and 65 in turn")
INT4 = ("random", "0", "15", "0 and 15 in turn")

pytestmark = [needs_compiler, pytest.mark.process]  # compiles each set anew
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 intrinsics")
CAPABLE = torch.backends.cpu.get_cpu_capability()


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest) -> str:
    """One set of instructions; a name of BUILDS."""
    name: str = request.param
    if name in NEON:
        if set(NEON[name]) - set(processor_flags()):
            pytest.skip(f"this processor has not got {name}")
    elif name != "portable C" and not CAPABLE.startswith(("AVX2", "AVX512")):
        pytest.skip(f"runs on AVX2; this is {CAPABLE}")
    elif name == "AVX2, AVX-512" and not CAPABLE.startswith("AVX512"):
        pytest.skip(f"runs on AVX-512; this is {CAPABLE}")
    return name


@pytest.fixture(scope="module")
def library(build: str, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The kernels with these instructions."""
    return compiled(tmp_path_factory.mktemp("kernels"), BUILDS[build])


def compiled(folder: Path, instructions: tuple[str, ...]) -> Library:
    """At -Og, which takes a third of the time to compile."""
    kept = [flag for flag in native._FLAGS if not flag.startswith(("-march=", "-O"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_FLAGS", ("-Og", *kept, *instructions))
        native._compile(native._compiler(), folder / "kernels.so")
    return Library(folder / "kernels.so")


def whole(kind: str, low: int, high: int, *shape: int) -> torch.Tensor:
    """Whole numbers as float32: random ones, or two that take turns."""
    if kind == "random":
        return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(7)) * 1.0
    first, *rest = (float(word) for word in kind.removesuffix(" in turn").split(" and "))
    out = torch.full(shape, first)
    out[..., 1::2] = rest[0] if rest else first
    return out


def activations(kind: str, tokens: int, width: int) -> torch.Tensor:
    """[tokens, width]; the largest of each block is 127 or -127."""
    x = whole(kind, -127, 127, tokens, width)
    signs = 1 - torch.arange(tokens * width // BLOCK).reshape(tokens, -1) % 2 * 2
    if kind == "random":
        x[:, 5::BLOCK] = 127.0 * signs
    return x


def test_the_library_has_these_instructions_and_passes_its_own_check(
    build: str, library: Library
) -> None:
    assert library.instructions == build.split(",")[0]  # those of the products
    assert self_check.first_fault(library) is None


@pytest.mark.skipif(not CAPABLE.startswith("AVX"), reason=f"runs on AVX2; this is {CAPABLE}")
def test_where_linux_refuses_matrix_units_vectors_are_taken(tmp_path: Path) -> None:
    refused = (*EMULATED, "-DEMULATE_AVX512_VNNI", "-DEMULATE_AMX=-1")
    library = compiled(tmp_path, refused)
    assert library.instructions == "AVX-512 VNNI"
    assert self_check.first_fault(library) is None


@pytest.mark.parametrize("tokens", TOKENS)
def test_int8_products_are_exact(library: Library, tokens: int) -> None:
    scale = 2.0 ** (torch.arange(ROWS) % 5 - 2)
    for kind, pattern in itertools.product(INT8, ACTIVATIONS):
        weight = whole(kind, -128, 127, ROWS, 640).to(torch.int8)
        wide = reference.widen_int8(weight, scale, torch.float64)
        x = activations(pattern, tokens, 640)
        assert torch.equal(library.linear_int8(x, weight, scale).double(), x.double() @ wide.T)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_products_are_exact(library: Library, tokens: int, group: int) -> None:
    width = 1152  # 36, 18 and 9 groups, which 8 does not divide
    at = torch.arange(ROWS * width // group).reshape(ROWS, -1)
    scale = (2.0 ** (at % 3 - 1)).bfloat16()
    zero = (at % 7 - 3.0).bfloat16()
    for kind, pattern in itertools.product(INT4, ACTIVATIONS):
        levels = whole(kind, 0, 15, ROWS, width).to(torch.uint8)
        weight = levels[:, ::2] | levels[:, 1::2] << 4
        wide = reference.widen_int4(weight, scale, zero, torch.float64)
        x = activations(pattern, tokens, width)
        found = library.linear_int4(x, weight, scale, zero).double()
        assert torch.equal(found, x.double() @ wide.T)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [8, 16, 40])  # 40: two pairs and one left
def test_packed_int4_products_are_exact(library: Library, group: int, rows: int) -> None:
    if not library.packs_int4:
        pytest.skip(f"{library.instructions} reads int4 as it lies")
    width = 1152
    at = torch.arange(rows * width // group).reshape(rows, -1)
    scale, zero = (2.0 ** (at % 3 - 1)).bfloat16(), (at % 7 - 3.0).bfloat16()
    for kind in INT4:
        levels = whole(kind, 0, 15, rows, width).to(torch.uint8)
        held = levels[:, ::2] | levels[:, 1::2] << 4, scale, zero
        packed = library.pack_int4(*held)
        assert torch.equal(packed, reference.pack_int4(*held))
        wide = reference.widen_int4(*held, torch.float64)
        assert torch.equal(library.widen_packed_int4(packed, width).double(), wide)
        for tokens, pattern in itertools.product(MANY_TOKENS, ACTIVATIONS):
            x = activations(pattern, tokens, width)
            found = library.linear_packed_int4(x, packed).double()
            assert torch.equal(found, x.double() @ wide.T), (kind, tokens, pattern)


@pytest.mark.parametrize("bits", layout.GROUPS)
@pytest.mark.parametrize("rows", [8, 16, 40])
def test_products_of_blocks_are_exact(library: Library, bits: int, rows: int) -> None:
    width = 1216  # four blocks of 256, and one of 192
    codes = self_check.exact_codes(bits, rows, width, torch.Generator().manual_seed(7))
    most = 15 if bits == layout.TABLE else 2**bits - 1
    for kind in ("random", "0", f"{most}", f"0 and {most} in turn"):
        held = codes._replace(levels=whole(kind, 0, most, rows, width).to(torch.uint8))
        packed = blocks_reference.pack(bits, held)
        wide = blocks_reference.widen(bits, held, self_check.NUMBERS)
        widened = library.widen_blocks(bits, packed, self_check.NUMBERS)
        assert torch.equal(widened, wide.bfloat16())
        for tokens, pattern in itertools.product(MANY_TOKENS, ACTIVATIONS):
            x = activations(pattern, tokens, width)
            found = library.linear_blocks(bits, x, packed, self_check.NUMBERS).double()
            assert torch.equal(found, x.double() @ wide.double().T), (kind, tokens, pattern)


@pytest.mark.parametrize("tokens", TOKENS)
def test_bfloat16_products_are_exact(library: Library, tokens: int) -> None:
    x, weight = activations("random", tokens, 192), whole("random", -128, 127, ROWS, 192)
    expected = x.double() @ weight.double().T
    assert torch.equal(library.linear_bf16(x, weight.bfloat16()).double(), expected)


@pytest.mark.parametrize("length", [1, 2, 63, 65, 513, 1300])
@pytest.mark.parametrize("width", [16, 128])
def test_attention_is_that_of_the_reference(library: Library, length: int, width: int) -> None:
    draw = torch.Generator().manual_seed(7)
    query = torch.randn(2, 6, 1, width, generator=draw)
    key, value = torch.randn(2, 2, 2, length, width, generator=draw).bfloat16()
    mask = torch.rand(2, 1, 1, length, generator=draw) < 0.6
    mask[..., -1] = True
    for seen in (None, mask, mask[:1]):
        expected = reference.attend(query.double(), key.double(), value.double(), seen)
        found = library.attend(query, key, value, seen)
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    value[0, 0, length - 1, 3] = float("nan")
    assert library.attend(query, key, value, None)[0, 0, 0, 3].isnan()
    key[0, 0, length - 1, 3] = float("nan")
    assert library.attend(query, key, value, None)[0, 0].isnan().all()
    assert not library.attend(query, key, value, torch.zeros_like(mask)).any()


@pytest.mark.parametrize("length", [1, 2, 63, 65, 513, 1300])
@pytest.mark.parametrize("width", [16, 128, 256])
def test_attention_to_int8_is_that_of_the_reference(
    library: Library, length: int, width: int
) -> None:
    draw = torch.Generator().manual_seed(7)
    query = torch.randn(2, 6, 1, width, generator=draw)
    rows = torch.randn(2, 2, 2, length + 3, width, generator=draw)
    key, value = reference.round_rows(rows)[:, :, :, :length]
    wide = [reference.widen_rows(x, torch.float64) for x in (key, value)]
    mask = torch.rand(2, 1, 1, length, generator=draw) < 0.6
    mask[..., -1] = True
    for seen in (None, mask, mask[:1]):
        expected = reference.attend(query.double(), *wide, seen)
        found = library.attend(query, key, value, seen)
        assert torch.allclose(found.double(), expected, rtol=1e-3, atol=2e-4)
    ends = (length, length // 2 + 1)
    parts = [[x[row, None, :, :end] for row, end in enumerate(ends)] for x in (key, value)]
    together = library.attend_rows(query[:, :, 0], *parts)
    for row, end in enumerate(ends):
        k, v = (x[row, None, :, :end] for x in (key, value))
        assert torch.equal(together[row], library.attend(query[row, None], k, v, None)[0, :, 0])


def test_rounding_and_widening_are_those_of_the_reference(library: Library) -> None:
    draw = torch.Generator().manual_seed(7)
    weight = torch.randn(40, 256, generator=draw) * torch.rand(40, 1, generator=draw)
    pairs = [(library.quantize_int8(weight), reference.quantize_int8(weight))]
    pairs += [
        (library.quantize_int4(weight, group), reference.quantize_int4(weight, group))
        for group in (32, 64, 128)
    ]
    for ours, plain in pairs:
        for a, b in zip(ours, plain, strict=True):
            assert float((a != b).float().mean()) < 0.01  # sums differ in their last bit
    for bits in layout.BITS:
        found = library.quantize_blocks(bits, weight)
        plain = blocks_reference.pack(bits, blocks_reference.quantize(bits, weight))
        assert float((found != plain).float().mean()) < 0.02  # of two that are as good, another
    int8, *int4 = (ours for ours, _ in pairs)
    wide = reference.widen_int8(*int8, torch.bfloat16)
    assert torch.equal(library.widen_int8(*int8), wide)
    for weights in int4:
        wide = reference.widen_int4(*weights, torch.bfloat16)
        assert float((library.widen_int4(*weights) != wide).float().mean()) < 0.01


@on_x86
@pytest.mark.parametrize("name", VNNI)
def test_the_real_instructions_are_compiled(name: str, tmp_path: Path) -> None:
    assembly = tmp_path / "linear.s"
    compiler = [native._compiler(), "-Og", "-fopenmp", *VNNI[name], "-S", "-o", str(assembly)]
    for source in ("linear.c", "blocks.c"):
        command = [*compiler, str(Path(native.__file__).with_name(source))]
        done = subprocess.run(command, capture_output=True, text=True)
        if "unrecognized" in done.stderr or "unknown argument" in done.stderr:
            pytest.skip(f"this compiler is too old for {name}")
        assert done.returncode == 0, done.stderr
        text = assembly.read_text()
        assert "vpdpbusd" in text
        assert "vpmaddubsw" not in text
        assert ("tdpbsud" in text) == (name == "AMX")
        assert name in text or source == "blocks.c"
