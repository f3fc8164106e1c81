"""Which rows an input holds, under which names, and what is refused before a model is loaded."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from mmchat.batch.rows import Asked, read_rows
from mmchat.errors import UsageError
from tests.batch.drawn import draw


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ids(*inputs: str) -> list[str]:
    return [row.custom_id for row in read_rows(inputs)]


def lines(*rows: object, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return name


def test_a_folder_is_its_pictures_by_name_or_content_in_order():
    for name in ("b.png", "a.png", "sub/c.png", "plain", ".hidden.png", ".cache/d.png"):
        draw(name)
    Path("broken.JPG").write_text("no picture")
    Path("notes.txt").write_text("no picture")
    assert ids(".") == ["./a.png", "./b.png", "./broken.JPG", "./plain", "./sub/c.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_refused():
    draw("photos/a.png")
    draw("photos/closed/b.png")
    Path("photos/closed").chmod(0)
    with pytest.raises(UsageError, match="'photos/closed' cannot be read: Permission denied"):
        ids("photos")


def test_unicode_names_and_names_that_are_no_text_are_kept():
    draw("Ähre 日本.png")
    draw(os.fsdecode(b"\xff.png"))
    assert ids(".") == ["./Ähre 日本.png", "./\udcff.png"]


def test_links_are_followed_and_circles_end():
    draw("real/a.png")
    Path("photos").symlink_to("real")
    Path("real/b.png").symlink_to("a.png")
    Path("real/round").symlink_to(Path().resolve() / "real")
    Path("real/gone.png").symlink_to("nowhere")
    assert ids("photos") == ["photos/a.png", "photos/b.png", "photos/gone.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that cannot be read")
def test_what_a_disk_does_not_give_is_no_picture_and_no_rows():
    unreadable = Path("/proc/self/mem")  # begins where nothing is
    draw("in/a.png")
    Path("in/notes").symlink_to(unreadable)
    assert ids("in") == ["in/a.png"]
    for name in ("in.jsonl", "in.csv"):
        Path(name).symlink_to(unreadable)
        with pytest.raises(UsageError, match=rf"{name}' cannot be read: Input/output error"):
            read_rows([name])


def test_a_glob_and_pictures_are_rows_too():
    for name in ("a.png", "x/b.png", "x/y/c.png"):
        draw(name)
    assert ids("**/*.png") == ["a.png", "x/b.png", "x/y/c.png"]
    assert ids("x/y/c.png", "a.png") == ["x/y/c.png", "a.png"]


def test_a_name_with_the_letters_of_a_glob_is_a_name():
    draw("a[1].png")
    assert ids("a[1].png") == ["a[1].png"]


def test_rows_of_a_jsonl_have_their_own_words():
    name = lines(
        {"image": "a.png", "prompt": "What?", "label": 7},
        {"image": ["a.png", "b.png"], "custom_id": "two", "system": "Be short."},
        {"image": "data:image/png;base64,AAAA"},
        {"prompt": "Hello"},
    )
    rows = read_rows([name])
    assert [row.custom_id for row in rows] == ["a.png", "two", "line 3", "line 4"]
    assert rows[0].read() == Asked(("a.png",), "What?")
    assert rows[1].read() == Asked(("a.png", "b.png"), None, "Be short.")


def test_a_request_of_openai_is_read_when_it_is_its_turn():
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    row = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    name = lines({"prompt": "before", "custom_id": "ä"}, row)
    found = read_rows([name])[1]
    assert (found.custom_id, found.read()) == ("r1", Asked(body=body))
    lines({"prompt": "before", "custom_id": "ä"}, {**row, "custom_id": "r2"})
    with pytest.raises(UsageError, match=r"line 2 of 'rows.jsonl' was changed meanwhile"):
        found.read()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"image": "a.png"}\n\n{"image": "b.png"', "rows.jsonl: line 3: not valid JSON"),
        ("[1]\n", "line 1: expected an object"),
        ('{"image": 7}', "line 1: image .* must be texts"),
        ('{"label": "x"}', "line 1: has neither image nor prompt"),
        (
            '{"prompt": "a", "images": ["b.jpg"]}',
            "line 1: has 'images' and no image; name it image",
        ),
        ('{"prompt": "a", "Image_Path": "b"}', "line 1: has 'Image_Path' and no image"),
        ('{"body": {}}', "line 1: needs a custom_id"),
        ('{"custom_id": "x", "url": "/v1/embeddings", "body": {}}', "url is '/v1/embeddings'"),
        (
            '{"image": "a.png"}\n{"image": "a.png", "prompt": "x"}',
            "'a.png': line 1 of 'rows.jsonl' and line 2 of 'rows.jsonl'; give each",
        ),
        ("", "'rows.jsonl' holds no rows"),
        ("\xff", "line 1: not UTF-8|line 1: not valid JSON"),
    ],
)
def test_a_jsonl_that_is_wrong_is_refused_with_its_line(text, reason):
    Path("rows.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=reason):
        read_rows(["rows.jsonl"])


def test_rows_of_two_inputs_with_one_custom_id_are_named_by_their_files(tmp_path):
    Path("r.jsonl").write_text('{"prompt": "x"}\n{"image": "dog.jpg"}\n')
    draw("dog.jpg")
    for inputs in (["r.jsonl", "dog.jpg"], ["dog.jpg", "r.jsonl"]):
        with pytest.raises(UsageError, match=r"'dog.jpg': .*line 2 of 'r.jsonl'") as refused:
            read_rows(inputs)
        assert "a picture" in str(refused.value)


def test_a_csv_has_a_column_image():
    Path("rows.csv").write_text(
        '\ufeffimage,label,prompt\na.png,cat,"What,\nthen?"\nb.png,dog,\n', "utf-8"
    )
    rows = read_rows(["rows.csv"])
    assert [row.read() for row in rows] == [
        Asked(("a.png",), "What,\nthen?"),
        Asked(("b.png",)),
    ]
    Path("rows.tsv").write_text("custom_id\timage\n7\ta.png\n")
    assert ids("rows.tsv") == ["7"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"path,label\na.png,1\n", "no column image; its columns are 'path', 'label'"),
        (b'image\n"a\n', "line 2: unexpected end of data"),
        (b"image\n\xff\n", "not UTF-8"),
        (b"image\n", "holds no rows"),
    ],
)
def test_a_csv_that_is_wrong_is_refused(text, reason):
    Path("rows.csv").write_bytes(text)
    with pytest.raises(UsageError, match=reason):
        read_rows(["rows.csv"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("empty", "'empty' holds no pictures"), ("none", "does not exist"), ("*.png", "no file")],
)
def test_an_input_without_rows_is_refused(name, reason):
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=reason):
        read_rows([name])


def test_shards_are_all_rows_once_and_stay_when_others_come():
    for number in range(40):
        draw(f"{number}.png")
    rows = read_rows(["."])
    shards = [{row.custom_id for row in rows if row.is_in((i, 3))} for i in range(3)]
    assert sum(map(len, shards)) == len(set.union(*shards)) == 40
    assert all(len(shard) > 4 for shard in shards)


def test_a_digest_is_of_the_content_and_the_words():
    draw("a.png")
    one = Asked(("a.png",), "What?")
    before = one.digest()
    assert before == one.digest() != Asked(("a.png",), "Who?").digest()
    draw("a.png", colour=(1, 2, 3))
    assert one.digest() != before
    assert Asked(("https://example.org/a.png",)).digest()  # without the network


def test_a_digest_is_of_the_files_that_a_body_names_too():
    draw("a.png")
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    one = Asked(body={"messages": [{"role": "user", "content": parts}]})
    before = one.digest()
    assert before == one.digest()
    draw("a.png", colour=(1, 2, 3))
    assert one.digest() != before
    parts[0]["image_url"]["url"] = "https://example.org/a.png"
    assert one.digest()  # without the network
