"""Weights that other programs packed are what their own libraries make of them, bit for bit."""

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.packed import packing_of
from mmchat.errors import CheckpointError, ParamsError
from mmchat.strict_json import Where
from tests.attack.mutations import mutated
from tests.packed_writers import KINDS

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = json.loads((GOLDEN / "packed.json").read_text())
TENSORS = load_file(GOLDEN / "packed.safetensors")
WHERE = Where("config.json")


def stored(kind):
    start = f"{kind}/stored/"
    return {n.removeprefix(start): t for n, t in TENSORS.items() if n.startswith(start)}


def unpacked(folder, config, tensors):
    save_file(tensors, folder / "model.safetensors")
    packing = packing_of(config, WHERE)
    return packing.unpacked(open_checkpoint(folder))


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_those_of_the_library_that_packed_them(tmp_path, kind):
    plain = {"norm.weight": torch.ones(3)}
    with unpacked(tmp_path, CONFIGS[kind], stored(kind) | plain) as files:
        expected = TENSORS[f"{kind}/weight"]
        assert set(files.entries) == {"x.weight", "norm.weight"}
        entry, found = files.entries["x.weight"], files.read("x.weight")
        assert (entry.shape, entry.dtype) == (expected.shape, str(expected.dtype)[6:])
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        weight = files.computed["x.weight"]
        assert torch.equal(weight.rows(0, 16), expected[:16])


def hand_made(kind):
    key, value, write = KINDS[kind]
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    return {key: value}, write("x", weight)


STATE = "x.weight.quant_state.bitsandbytes__nf4"


def state(**changes):
    """A bitsandbytes state that says something else of itself."""
    found = json.loads(bytes(stored("nf4-nested")[STATE].tolist())) | changes
    return {STATE: torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)}


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape).to(dtype)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("nf4-nested", state(shape=[2**31, 2**31]), "in whole numbers"),
        ("nf4-nested", state(shape=[2**30, 2**30]), "9,216 bytes for"),
        ("nf4-nested", state(shape=[-144, -128]), "in whole numbers"),
        ("nf4-nested", state(shape=[144, True]), "in whole numbers"),
        ("nf4-nested", state(shape=[18432]), "not that of a matrix"),
        ("nf4-nested", state(shape=None), "not that of a matrix"),
        ("nf4-nested", state(blocksize=0), "blocksize '0' is not read"),
        ("nf4-nested", state(blocksize=2**40), "blocksize '1099511627776' is"),
        ("nf4-nested", state(blocksize=128), r"expected \[144\] uint8"),
        ("nf4-nested", state(nested_blocksize=64), r"expected \[5\] float32"),
        ("nf4-nested", state(nested_offset="x"), "nested_offset is no number"),
        ("nf4-nested", state(dtype="int8"), "dtype 'int8' is not read"),
        ("nf4-nested", {STATE: ones(2, dtype=torch.uint8)}, "its JSON is damaged"),
        ("nf4-nested", {STATE: ones(5000, dtype=torch.uint8)}, "expected up to 4,096 bytes"),
        ("nf4-nested", {"x.weight.absmax": None}, "'x.weight.absmax' is missing"),
        ("nf4-nested", {"x.weight": ones(9215, 1, dtype=torch.uint8)}, "9,215 bytes for"),
        ("nf4", {"x.weight.absmax": ones(287)}, r"expected \[288\] float32, found \[287\]"),
        ("nf4", {"x.weight.quant_map": ones(15)}, r"expected \[16\] float32"),
        ("bnb-int8", {"x.SCB": ones(23)}, r"expected \[24\] float32"),
        ("bnb-int8", {"x.weight": ones(24 * 64, dtype=torch.int8)}, "is no matrix"),
        ("bnb-int8", {"x.weight_format": ones(1, dtype=torch.uint8)}, "in the order of a GPU"),
        ("fp8-dynamic", {"x.weight_scale": ones(24, 2)}, r"expected \[24, 1\] or \[1\] or \[\]"),
        ("fp8-dynamic", {"x.weight": ones(24, 256)}, "expected  float8_e4m3fn or int8"),
        ("w4a16", {"x.weight_shape": torch.tensor([24, 2**40])}, "is no shape of a weight"),
        ("w4a16", {"x.weight_shape": torch.tensor([24, 512])}, "found"),
        ("w4a16", {"x.weight_shape": torch.tensor([-24, 256])}, "is no shape of a weight"),
        ("w4a16", {"x.weight_scale": ones(24, 3)}, "256 columns do not share 3 scales"),
        ("w4a16", {"x.weight_scale": ones(23, 2)}, "expected 24 rows, found 23"),
        ("w4a16-asym", {"x.weight_zero_point": ones(3, 7, dtype=torch.int32)}, "found"),
        ("mlx-4bit", {"x.scales": ones(24, 3, dtype=torch.bfloat16)}, r"expected \[24, 2\]"),
        ("mlx-4bit", {"x.biases": ones(24, 2)}, "expected .* bfloat16, found"),
        ("mlx-4bit", {"x.weight": ones(24, 12, dtype=torch.uint32)}, "96 columns are not groups"),
        ("gptq", {"x.g_idx": ones(127, dtype=torch.int32)}, r"expected \[128\] int32"),
        ("gptq", {"x.g_idx": 9 * ones(128, dtype=torch.int32)}, "names groups beyond the 1"),
        ("gptq", {"x.g_idx": -1 * ones(128, dtype=torch.int32)}, "names groups beyond the 1"),
        ("gptq", {"x.scales": ones(1, 65)}, "65 outputs do not fit"),
        ("gptq", {"x.qzeros": ones(2, 8, dtype=torch.int32)}, r"expected \[1, 8\] int32"),
        ("awq", {"x.qweight": ones(128, 9, dtype=torch.int32)}, "64 outputs do not fit"),
        ("awq", {"x.qweight": None}, "no tensor is packed so"),
    ],
)
def test_packings_of_other_sizes_are_refused(tmp_path, kind, changes, message):
    config, tensors = (CONFIGS[kind], stored(kind)) if kind in CONFIGS else hand_made(kind)
    tensors = {n: t for n, t in {**tensors, **changes}.items() if t is not None}
    with (
        pytest.raises(CheckpointError, match=message),
        unpacked(tmp_path, config, {**tensors, "norm.weight": torch.ones(3)}) as files,
    ):
        files.read("x.weight")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "packed by 'hqq'; mmchat reads bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": {}}, "packed by 'torchao'"),
        ({"quant_method": "exl2", "bits": 4.0}, "packed by 'exl2'"),
        ({"quant_method": ["x"]}, "packed by"),
        ({}, "quantised by another program"),
        ({"quant_method": "gptq", "bits": 3}, "packed by gptq: bits '3' is not read, only '4'"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' is not read"),
        ({"quant_method": "auto-round", "packing_format": "x"}, "packing_format 'x' is not read"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format"),
        ({"quant_method": "compressed-tensors"}, "format 'None' is not read"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "sparse weights are not read",
        ),
        ({"bits": 3, "group_size": 64}, "bits '3' is not read"),
        ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, "mode 'mxfp4' is not read"),
    ],
)
def test_other_packings_are_refused_by_name_with_the_next_step(config, message):
    with pytest.raises(ParamsError, match=message) as caught:
        packing_of({"quantization_config": config}, WHERE)
    assert "--quantize int4" in str(caught.value)


@pytest.mark.parametrize("kind", ["nf4-nested", "w4a16-asym", "mlx-4bit", "gptq", "awq", "fp8"])
def test_fuzz_packed_files(tmp_path, kind):
    """Whatever is damaged, a CheckpointError comes or a weight of the size that is said."""
    config, tensors = (CONFIGS[kind], stored(kind)) if kind in CONFIGS else hand_made(kind)
    packing, path = packing_of(config, WHERE), tmp_path / "model.safetensors"
    save_file({**tensors, "norm.weight": torch.ones(3)}, path)
    whole, rng = path.read_bytes(), random.Random(11)
    header = 8 + int.from_bytes(whole[:8], "little")
    at = whole.find(b'{"quant_type"')
    for count in range(600):
        if at > 0 and count % 2:
            content = (
                whole[:at] + mutated(rng, whole[at : at + 90])[:90].ljust(90) + whole[at + 90 :]
            )
        else:
            content = mutated(rng, whole, header)
        path.unlink()
        path.write_bytes(content)
        with (
            contextlib.suppress(CheckpointError),
            packing.unpacked(open_checkpoint(tmp_path)) as files,
        ):
            for name, entry in files.entries.items():
                assert tuple(files.read(name).shape) == entry.shape


def test_fuzz_configs():
    """Any JSON in the place of any value gives a packing or a ParamsError."""
    rng = random.Random(5)
    values = [None, True, -1, 4, 8.0, "x", "gptq", [], {}, [1], {"a": {}}, 2**70, float("1e300")]
    for key, value, _ in KINDS.values():
        for _ in range(200):
            changed = dict(value)
            name = rng.choice([*value, "group_size", "mode", "format", "quant_method"])
            changed[name] = rng.choice(values)
            with contextlib.suppress(ParamsError):
                packing_of({key: changed}, WHERE)
