"""Layers of LLaVA and Qwen-VL compiled, against the same model as plain PyTorch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mmchat.models.base import Batch
from mmchat.quant.kernels import layout, ops
from mmchat.runtime.base import Runtime
from mmchat.runtime.compiled import ALL_USES, CompiledRuntime, make_runtime
from mmchat.runtime.compiler import CACHE_VARIABLE
from mmchat.runtime.eager import EagerRuntime
from tests.models.llava import oracle as llava
from tests.models.qwen_vl import oracle as qwen_vl
from tests.models.reading import read

CPU = torch.device("cpu")
# PyTorch warns about its own use of TorchScript when the inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
FAMILIES = {"llava": (llava, ("two", "text")), "qwen_vl": (qwen_vl, ("two", "text", "crossing"))}


def built(family: ModuleType, kv_dtype: torch.dtype | None) -> Any:
    model = family.build()
    model.kv_dtype = kv_dtype
    return model


@torch.inference_mode()
def written(runtime: Runtime, family: ModuleType, case: str) -> tuple[Tensor, Tensor]:
    """Logits of a prompt, of four tokens after it, and of a draft; all keys and values."""
    cache: Any = runtime.new_cache(1, 0)
    rows = [read(runtime, cache, family.prompt(family.CASES[case]))]
    for tokens in ([5], [9], [11], [4], [3, 8, 6, 7]):
        batch = Batch.all_of(torch.tensor(tokens), cache.lengths[0])
        rows.append(runtime.forward(batch, cache))
    kept = [stored.flatten(0, 2) for layer in cache.layers for stored in layer.row(0)]
    return torch.cat(rows), torch.cat(kept)


@pytest.fixture(autouse=True)
def one_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled layers take torch's products and attention: so does what they are compared with."""
    monkeypatch.setattr(ops, "has_slow_mkl", lambda: False)
    monkeypatch.setattr(ops, "MANY_QUERIES", 1 << 30)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_equals_eager(name, kv_dtype, monkeypatch, tmp_path):
    """All that is compiled is traced, without the slow compiler behind it."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    family, cases = FAMILIES[name]
    compiled = CompiledRuntime(built(family, kv_dtype), CPU, uses=ALL_USES, backend="eager")
    plain = EagerRuntime(built(family, kv_dtype), CPU)
    for case in cases:
        expected, _ = written(plain, family, case)
        with torch.compiler.set_stance("fail_on_recompile"):
            found, _ = written(compiled, family, case)
        assert float((found - expected).abs().max()) < 1e-5
    assert compiled.notices == []


# What is compiled is traced above for each family with each cache.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kv_dtype"), [("llava", torch.int8), ("qwen_vl", None)])
def test_what_compile_on_makes_for_a_processor_equals_eager(name, kv_dtype, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    family, cases = FAMILIES[name]
    compiled = make_runtime(built(family, kv_dtype), CPU, "on")
    plain = EagerRuntime(built(family, kv_dtype), CPU)
    for case in cases:
        (found, kept), (expected, exact) = (written(one, family, case) for one in (compiled, plain))
        # in int8 a last bit may choose another level of a key, or of 16 bits of a query
        assert float((found - expected).abs().max()) < (5e-4 if kv_dtype else 1e-4)
        if kv_dtype:
            levels = (kept - exact.int())[..., : -layout.SCALE_BYTES].abs()
            assert levels.max() <= 1
            assert levels.float().mean() < 1e-5
    assert compiled.notices == []
