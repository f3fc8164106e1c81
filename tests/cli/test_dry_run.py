"""`mmchat generate --dry-run` and `mmchat inspect` beside what an export really writes."""

import json

import pytest

SCHEMES = [("none", "float32"), ("none", "bfloat16"), ("int8", "bfloat16"), ("int4", "float32")]


@pytest.fixture(params=SCHEMES, ids="-".join)
def export(request, run_real, tmp_path):
    """Scheme, dtype, folder and bytes of the weights of an export."""
    scheme, dtype = request.param
    folder = tmp_path / "out"
    options = ("--quantize", scheme, "--dtype", dtype, "-o", str(folder))
    made = run_real("export", "--format", "safetensors", *options)
    assert made.exit_code == 0, made.stderr
    return scheme, dtype, folder, (folder / "model.safetensors").stat().st_size


def test_a_dry_run_counts_the_weights_that_an_export_holds(run_real, export):
    scheme, dtype, folder, size = export
    for model in ((str(folder),), ("tiny", "--quantize", scheme, "--dtype", dtype)):
        facts = json.loads(run_real("generate", *model, "-p", "x", "--dry-run", "--json").stdout)
        assert (facts["quantize"], facts["dtype"]) == (scheme, dtype)
        memory = facts["memory"]
        assert memory["weights"] + memory["in_file"] == pytest.approx(size, rel=0.01)


def test_inspect_estimates_what_an_export_writes(run_real, export):
    scheme, dtype, folder, size = export
    found = json.loads(run_real("inspect", str(folder), "--json").stdout)
    assert found["checkpoint"]["bytes"] == pytest.approx(size, rel=0.01)
    if dtype == "bfloat16":
        name = dtype if scheme == "none" else scheme
        assert found["weight_bytes"][name] == pytest.approx(size, rel=0.01)


@pytest.mark.slow
def test_a_dry_run_says_what_each_rank_needs(run_real):
    ask = ("generate", "llama3.2-90B", "-p", "x", "--dry-run", "-q", "--device", "cpu")
    shared = run_real(*ask, "--parallel", "8")
    assert shared.exit_code == 0, shared.stderr
    assert " on each of 8 ranks" in shared.stdout
    one, eight = (
        json.loads(run_real(*ask, "--json", "--parallel", n).stdout)["memory"] for n in ("1", "8")
    )
    assert one["cache"] == 8 * eight["cache"]
    assert run_real(*ask, "--parallel", "6").exit_code == 2


def test_a_dry_run_refuses_what_an_export_does_not_have(run_real, export):
    scheme, _, folder, _ = export
    other = "int8" if scheme == "int4" else "int4"
    done = run_real("generate", str(folder), "-p", "x", "--dry-run", "--quantize", other)
    assert f"was exported with --quantize {scheme}, which cannot be changed" in done.stderr
    assert done.exit_code == 2


def test_how_many_pictures_fit_the_context_is_said(run_real, tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 10)).save(tmp_path / "dog.png")
    asked = ["generate", "tiny", "-p", "x", *["-i", str(tmp_path / "dog.png")] * 3]
    tokens = json.loads(run_real(*asked, "--dry-run", "--json").stdout)["prompt_tokens"]
    for less, which in ((0, "first 2"), (1, "first")):
        done = run_real(*asked, "--dry-run", "--max-seq-len", str(tokens - less))
        assert f"too many for the context; the {which} of its 3 pictures would fit" in done.stdout
    done = run_real(*asked, "--max-seq-len", str(tokens))
    assert "; the first 2 of its 3 pictures would fit (of a document: paper.pdf#1-2)" in done.stderr
    assert done.exit_code == 2
