"""LLaVA's layers compiled, against the same model as plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmchat.models.prompt import Prompt
from mmchat.runtime.base import Runtime
from mmchat.runtime.compiled import ALL_USES, CompiledRuntime
from mmchat.runtime.compiler import CACHE_VARIABLE
from mmchat.runtime.eager import EagerRuntime
from tests.models.llava import oracle
from tests.models.llava.oracle import CASES, distance, prompt
from tests.models.reading import read

CPU = torch.device("cpu")
# PyTorch warns about its own use of TorchScript when the inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@torch.inference_mode()
def written(runtime: Runtime, case: str) -> Tensor:
    """Logits of a prompt, of four tokens after it, and of a draft."""
    start: Prompt = prompt(CASES[case])
    cache = runtime.new_cache(1, 0)
    rows = [read(runtime, cache, start)]
    for tokens in ([5], [9], [11], [4], [3, 8, 6, 7]):
        batch = oracle.Batch.all_of(torch.tensor(tokens), cache.lengths[0])
        rows.append(runtime.forward(batch, cache))
    return torch.cat(rows)


def test_compiled_equals_eager(monkeypatch, tmp_path):
    """All that is compiled is traced, without the slow compiler behind it."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    weights = oracle.random_weights()
    compiled = CompiledRuntime(oracle.build(weights), CPU, uses=ALL_USES, backend="eager")
    plain = EagerRuntime(oracle.build(weights), CPU)
    for case in ("two", "text", "last"):
        expected = written(plain, case)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert distance(written(compiled, case), expected) < 1e-5
    assert compiled.notices == []
