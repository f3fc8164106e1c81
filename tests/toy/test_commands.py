"""A family from elsewhere passes everything that a user can ask, without a change of the package.

A picture takes nine positions, the rotary base depends on the length of the prompt, and nothing is
cross-attended.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mmchat
from mmchat.catalog import known
from mmchat.catalog.spec import load_spec
from mmchat.models.registry import FAMILIES
from tests.toy.asking import ask_json, run
from tests.toy.config import CONFIG
from tests.toy.pictures import picture

pytestmark = pytest.mark.timeout(120)


def test_it_is_in_the_registry_only_while_it_is_asked_for(folder: Path) -> None:
    assert "toy" not in FAMILIES
    with pytest.raises(mmchat.MmchatError, match="unknown model type 'toy'"):
        mmchat.load(folder)


def test_generate_answers_about_a_picture(toy: str, png: str) -> None:
    answer = ask_json(toy, png)
    assert answer["usage"] == {
        "prompt_tokens": 1 + 3 + 9 + 3 + 1 + 3,
        "cached_tokens": 0,
        "completion_tokens": 8,
        "image_count": 1,
        "image_tokens": 9,
        "draft_tokens": 0,
        "accepted_tokens": 0,
    }
    picture(2).pixels.save(png)
    assert ask_json(toy, png)["output_ids"] != answer["output_ids"]


def test_penalties_and_drafts_pass_over_ids_that_are_no_tokens(toy: str, png: str) -> None:
    repeated = ("-p", "abcabcabcabc", "-i", png, "-i", png, "-n", "16", "--temperature", "0")
    more = ("--json", "--repetition-penalty", "1.3", "--speculate")
    answers = [json.loads(run("generate", toy, *repeated, *more, s)) for s in ("off", "8")]
    assert answers[0]["prompt_ids"].count(CONFIG.image_token_id) == 18
    assert answers[0]["output_ids"] == answers[1]["output_ids"]


def test_chat_takes_pictures_and_commands(toy: str, png: str) -> None:
    lines = run("chat", toy, "-n", "4", "--temperature", "0", "-i", png, stdin="a\nb\n\\tiles\n")
    assert "patches  3 x 3 patches of 8 px" in lines


def test_dry_run_counts_positions_and_memory(toy: str, png: str) -> None:
    found = ask_json(toy, png, "--dry-run")
    assert found["prompt_tokens"] == 20
    assert found["images"][0]["tokens"] == 9
    memory = {name: found["memory"][name] for name in ("weights", "cache", "pictures", "working")}
    assert memory == {
        "weights": 4 * (61_696 + 32_832),  # decoder and head: the rest stays in its file
        "cache": 28 * 4 * 2 * 2 * 2 * 16,  # positions, bytes, keys and values, layers, heads, D
        "pictures": 4 * 9 * 64,
        "working": 256 * 2**20 + 20 * (4 * 64 + 3 * 96) * 4 + 2 * 4 * 512,
    }


def test_inspect_tells_parts_and_bytes(toy: str) -> None:
    found = json.loads(run("inspect", toy, "--json"))
    assert found["parameters_by_part"] == {
        "picture encoder": (192 * 64 + 64) + 9 * 64 + (64 * 96 + 96) + (96 * 64 + 64),
        "decoder": 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64),
        "token embedding": 512 * 64,
        "head": 512 * 64 + 64,
    }
    assert found["weight_bytes"]["bfloat16"] == 2 * 152_672
    # one byte a weight of a linear layer, four a row of it, two for all else
    rows = 2 * (3 * 64 + 2 * 32 + 2 * 96) + 512 + (64 + 96 + 64)
    other = 2 * 2 * 64 + 64 + (9 * 64 + 64 + 96 + 64) + 512 * 64
    assert found["weight_bytes"]["int8"] == 152_672 - other + 4 * rows + 2 * other
    assert "2 layers, 9 patches of 8 px a picture" in run("inspect", toy)


def test_tiles_draws_what_the_model_sees(toy: str, png: str, tmp_path: Path) -> None:
    preview = tmp_path / "preview.png"
    lines = run("tiles", png, "--model", toy, "-o", str(preview)).splitlines()
    assert lines[1:] == [
        "model    toy-model, 9 patches of 8 px",
        "patches  3 x 3 patches of 8 px",
        "tokens   9 to attend to",
    ]
    assert preview.read_bytes().startswith(b"\x89PNG")


def test_list_has_a_row_of_it(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(f"{toy}/params.json")
    monkeypatch.setattr(known, "known_specs", lambda: (spec,))
    row = next(line for line in run("list").splitlines() if line.startswith("toy-model"))
    assert row.split("\t") == ["toy-model", "instruct", "152,672", "24 px", "no", "", ""]


def test_bench_times_pictures_of_its_own_number_of_cells(toy: str) -> None:
    found = json.loads(
        run("bench", toy, "--context", "8", "--vision", "4,9", "--rounds", "1", "--json")
    )
    assert {each["prompt"] for each in found["measured"]} == {"8 tokens", "9 tiles"}
    assert found["left_out"] == ["4 tiles"]


def test_bench_times_its_pictures_unasked(toy: str) -> None:
    found = json.loads(run("bench", toy, "--context", "", "--rounds", "1", "--json"))
    assert {each["prompt"] for each in found["measured"]} == {"9 tiles"}
    assert found["left_out"] == []


def test_dry_run_without_a_tokenizer_counts_the_positions_of_pictures(
    toy: str, png: str, tmp_path: Path
) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    for name in ("params.json", "model.safetensors"):
        (folder / name).write_bytes(Path(toy, name).read_bytes())
    found = ask_json(folder, png, "--dry-run")
    assert found["prompt_tokens"] is None
    assert found["memory"]["cache"] == (9 + 8) * 4 * 128
