"""What is particular to ExecuTorch: pieces of text, limits, one file, a quiet and quick start."""

import subprocess
import sys

import pytest
import torch

import mmchat
from mmchat.checkpoints.exported_folder import PROGRAM_NAME
from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest
from mmchat.errors import ContextLengthExceeded, ExportError
from mmchat.evals.scenes import heldout_scenes
from mmchat.images import from_pil
from tests.export.conftest import GREEDY, answers
from tests.loading.test_loader import finish
from tests.models.mllama import oracle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def models(tiny_executorch):
    """The model and its export."""
    return mmchat.load(None, device="cpu", dtype="float32"), mmchat.load(tiny_executorch)


def test_the_logits_are_the_models_at_every_length(models):
    """Over the borders of the cache's steps and of the pieces that a text is read in."""
    ids = torch.randint(1, 200, (1, 600), generator=torch.Generator().manual_seed(1))
    readers = [oracle.Reader(model.runtime) for model in models]
    begin = 0
    for count in (1, 2, 3, 128, 16, 106, 1, 17, 200, 1):
        piece = ids[:, begin : begin + count]
        own, other = (reader.verify(piece) for reader in readers)
        assert (own - other).abs().max() < 1e-3 * own.abs().max(), begin
        begin += count


def test_a_longer_text_or_more_pictures_name_the_way_out(models):
    exported = models[1]
    with pytest.raises(ContextLengthExceeded):
        finish(exported.chat().send("red " * 1100, (), GREEDY))
    pictures = [from_pil(p) for s in heldout_scenes(4) for p in s.pictures[:1]]
    with pytest.raises(ExportError, match="exported for 3; export it again"):
        finish(exported.chat().send("And?", pictures, GREEDY))


def test_the_file_holds_the_weights_once(tiny_executorch, models):
    weights = sum(p.numel() * 4 for p in models[0].runtime.model.parameters())
    size = (tiny_executorch / PROGRAM_NAME).stat().st_size
    assert weights < size < 1.1 * weights
    assert not list(tiny_executorch.glob("*.safetensors"))
    record = read_manifest(tiny_executorch / MANIFEST_NAME).export
    assert record.executorch.startswith("1.")
    assert record.programs


def test_loading_is_silent(tiny_executorch, capfd):
    model = mmchat.load(tiny_executorch)
    assert answers(model, "Hello", ())
    assert capfd.readouterr().err == ""


def test_the_compiler_is_not_imported_to_run(tiny_executorch):
    program = (
        "import sys, mmchat;"
        f"model = mmchat.load({str(tiny_executorch)!r});"
        "print(model.chat().ask('Hello'));"
        "print([n for n in ('executorch.exir', 'torchao', 'torch._dynamo') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[1:] == ["[]"], done.stderr
