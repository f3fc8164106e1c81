"""Models in Ollama's folder: found by name, listed, described, and never touched."""

import json
import os
import stat

import pytest

from mmchat.catalog.find import find_model
from mmchat.catalog.known import data_path, known_specs
from mmchat.checkpoints import ollama_folder as reader
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.ollama_folder import ollama_model, ollama_models
from mmchat.errors import CheckpointError
from mmchat.tokenizers import open_tokenizer
from tests.gguf_models import ollama_folder, write_model

SPEC = known_specs()[0]
USUAL = "registry.ollama.ai/library/llama3.2-vision/"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a pair."""
    tiny, folder = data_path("assets", "tiny"), tmp_path_factory.mktemp("pair")
    with open_checkpoint(tiny) as opened:
        weights = {name: opened.read(name).clone() for name in opened.entries}
    write_model(folder, weights, SPEC.config, open_tokenizer(tiny), "pair")
    return [(folder / name).read_bytes() for name in ("model.gguf", "mmproj.gguf")]


@pytest.fixture
def put(tmp_path, files, monkeypatch):
    """Puts a model into Ollama's folder, under the name of a manifest."""
    root = tmp_path / "ollama"
    monkeypatch.setenv("OLLAMA_MODELS", str(root))

    def put(name=f"{USUAL}latest", **options):
        (tmp_path / "new").mkdir(exist_ok=True)
        paths = [tmp_path / "new" / str(number) for number in range(len(files))]
        for path, content in zip(paths, files, strict=True):
            path.write_bytes(content)
        return ollama_folder(root, paths, name, **options)

    return put


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_list_shows_them(run_real, put, files):
    put()
    put("registry.ollama.ai/me/eyes/8b")
    put("registry.ollama.ai/library/mistral/latest", family="llama")
    rows = [line.split("\t") for line in run_real("list").stdout.splitlines()]
    names = {row[0]: row[4:6] for row in rows}
    assert names["llama3.2-vision:latest"] == names["me/eyes:8b"]
    assert names["me/eyes:8b"][1] == "Ollama Q4_K_M"
    assert "mistral:latest" not in names
    found = {model["name"]: model for model in json.loads(run_real("list", "--json").stdout)}
    assert found["me/eyes:8b"]["repo"] is None
    assert found["me/eyes:8b"]["bytes"] == sum(map(len, files))


def test_what_is_said_of_one(run_real, put):
    folder = put().parents[4]
    before = everything(folder)
    done = run_real("inspect", "llama3.2-vision", "--json")
    facts = json.loads(done.stdout)["checkpoint"]
    assert (facts["format"], facts["files"], facts["tensors"]) == ("gguf", 2, 158)
    assert facts["bytes_by_dtype"].keys() == {"Q4_K", "Q6_K", "float16", "float32"}
    where = run_real("where", "llama3.2-vision").stdout.strip()
    assert where == facts["path"]
    assert "blobs/sha256-" in where
    dry = json.loads(
        run_real("generate", "llama3.2-vision", "-p", "x", "--dry-run", "--json").stdout
    )
    assert (dry["quantize"], dry["prompt_tokens"]) == ("int4-b32", 11)
    exact = ["generate", "llama3.2-vision", "-p", "x", "--dry-run", "--json", "--quantize", "none"]
    assert json.loads(run_real(*exact).stdout)["quantize"] == "none"
    assert everything(folder) == before


def test_it_is_never_removed(run_real, put):
    folder = put().parents[4]
    before = everything(folder)
    done = run_real("remove", "-y", "llama3.2-vision")
    assert done.exit_code == 2
    assert "llama3.2-vision:latest is Ollama's, and mmchat deletes nothing of it" in done.stderr
    assert "'ollama rm llama3.2-vision:latest' does" in done.stderr
    blob = run_real("where", "llama3.2-vision").stdout.strip()
    assert "mmchat did not put it there" in run_real("remove", "-y", blob).stderr
    assert "mmchat cannot tell what it put there" in run_real("remove", "-y", str(folder)).stderr
    assert everything(folder) == before


def test_without_it_what_was_looked_for_is_said(run_real, put):
    put()
    done = run_real("generate", "llama3.2-vision:90b", "-p", "x")
    assert done.exit_code == 3
    assert "Llama-3.2-90B-Vision-Instruct is not on this machine" in done.stderr
    assert "Ollama has no 'llama3.2-vision:90b' in " in done.stderr
    assert "Ollama" not in run_real("generate", "llama3.2-90B", "-p", "x").stderr


def test_the_weights_of_the_hub_come_first(put, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    put()
    assert find_model("llama3.2-vision").format == "gguf"
    folder = tmp_path / "hub/models--meta-llama--Llama-3.2-11B-Vision-Instruct/snapshots/0123abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
    assert find_model("llama3.2-vision").checkpoint == folder


def test_a_model_of_another_architecture_is_not_taken_for_ours(run_real, put):
    put("registry.ollama.ai/library/llava/latest", family="llama")
    done = run_real("generate", "llava", "-p", "x")
    assert "llava-1.5-7b-hf is not on this machine" in done.stderr
    assert ollama_model("llava") is not None


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("llama3.2-vision", f"{USUAL}latest"),
        ("llama3.2-vision", f"{USUAL}90b"),  # the only tag
        ("llama3.2-vision:11b-instruct-q4_K_M", f"{USUAL}11b-instruct-q4_K_M"),
        ("me/eyes:8b", "registry.ollama.ai/me/eyes/8b"),
        ("hf.co/me/eyes:Q4_K_M", "hf.co/me/eyes/Q4_K_M"),
    ],
)
def test_names(put, name, manifest):
    put(manifest)
    found = ollama_model(name)
    assert found is not None
    assert found.projector is not None
    assert found.weights.read_bytes()[:4] == b"GGUF"
    assert ollama_model(found.name) == found


@pytest.mark.parametrize(
    "name",
    ["", "x y", "../x", "a/../b", "a/b/c/d", "x:", ":x", "x:../..", "/x", "x/", "ä", "x" * 200],
)
def test_names_that_lead_nowhere(put, name):
    put()
    assert ollama_model(name) is None


def test_the_usual_places(tmp_path, monkeypatch):
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    own, service = reader.ollama_folders()
    assert own == tmp_path / ".ollama" / "models"
    assert service.name == "models"
    monkeypatch.setenv("OLLAMA_MODELS", "~/elsewhere")
    assert reader.ollama_folders() == [tmp_path / "elsewhere"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["layers"][0].update(digest="sha256:../../etc/passwd"), "is no hash"),
        (lambda m: m["layers"][0].update(digest="sha256:" + "A" * 64), "is no hash"),
        (lambda m: m["layers"][0].update(digest=7), "is no hash"),
        (lambda m: m["layers"][0].update(digest="sha256:" + "0" * 64), "cannot be read: No such"),
        (lambda m: m["layers"][0].update(size=5), "bytes, 5 are recorded; pull the model again"),
        (lambda m: m.update(layers={}), "layers: expected a list"),
        (lambda m: m.update(layers=[7]), "expected an object"),
        (lambda m: m.update(layers=m["layers"] * 2), "is not one file of weights, or two"),
        (lambda m: m.update(layers=m["layers"][1:]), "is not one file of weights, or two"),
    ],
)
def test_hostile_manifests(put, change, reason):
    path = put()
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=reason.replace("(", r"\(")):
        ollama_model("llama3.2-vision")
    assert list(ollama_models()) == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"layers": 1}', b"x" * 2**21])
def test_manifests_that_are_none(put, content):
    put().write_bytes(content)
    with pytest.raises(CheckpointError):
        ollama_model("llama3.2-vision")


def test_an_adapter_is_not_passed_over(put):
    put(adapter={"a": 1})
    with pytest.raises(CheckpointError, match="has a LoRA adapter in GGUF, which mmchat does not"):
        ollama_model("llama3.2-vision")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(run_real, put):
    folder = put().parents[4]
    folder.chmod(0)
    try:
        assert (
            "may not be read by this user"
            in run_real("generate", "llama3.2-vision", "-p", "x").stderr
        )
    finally:
        folder.chmod(stat.S_IRWXU)


def test_doctor_names_it_in_place_of_a_download(put, monkeypatch):
    from mmchat.doctor import verdict

    put()
    spec = next(s for s in known_specs() if s.name == "Llama-3.2-11B-Vision-Instruct")
    best = verdict.Outlook(spec, "int4", None, True, None)  # type: ignore[arg-type]
    assert verdict._recommended(best).commands == ("mmchat chat llama3.2-vision",)
