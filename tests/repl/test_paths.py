r"""Every form in which terminals and people name pictures, as one table."""

import pytest

from mmchat.repl import paths
from mmchat.repl.paths import Found, read_argument, read_line

NARROW = "Screenshot 2026-11-20 at 6.10.00\u202fPM.png"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name in (
        "dog.png",
        "My Dog.png",
        "CAT.JPG",
        "it's.png",
        "notes.txt",
        "ä.png",
        NARROW,
        "both,two.png",
        "paper.pdf",
    ):
        (tmp_path / name).write_bytes(b"x")
    for name in ("photo", "dog.jfif"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a b.webp").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


ATTACHED = [
    ("paper.pdf", ["paper.pdf"]),
    ("paper.pdf#2", ["paper.pdf#2"]),
    ("./paper.pdf#3-5 dog.png", ["paper.pdf#3-5", "dog.png"]),
    ("paper.pdf#1,4", ["paper.pdf#1,4"]),
    ("dog.png", ["dog.png"]),
    ("dog.png ", ["dog.png"]),
    ("./dog.png", ["dog.png"]),
    ("{d}/dog.png", ["{d}/dog.png"]),
    ("~/dog.png", ["{d}/dog.png"]),
    ("'{d}/My Dog.png'", ["{d}/My Dog.png"]),
    ('"{d}/My Dog.png" ', ["{d}/My Dog.png"]),
    ("{d}/My\\ Dog.png ", ["{d}/My Dog.png"]),
    ("{d}/My Dog.png", ["{d}/My Dog.png"]),
    ("My Dog.png", ["My Dog.png"]),
    ("file://{d}/My%20Dog.png", ["{d}/My Dog.png"]),
    ("file://localhost{d}/dog.png", ["{d}/dog.png"]),
    ("FILE://{d}/dog.png", ["{d}/dog.png"]),
    ("CAT.JPG", ["CAT.JPG"]),
    ("{d}/it\\'s.png", ["{d}/it's.png"]),
    ('"{d}/it\'s.png"', ["{d}/it's.png"]),
    ("{d}/dog.png {d}/CAT.JPG", ["{d}/dog.png", "{d}/CAT.JPG"]),
    ("'{d}/My Dog.png' '{d}/sub/a b.webp' ", ["{d}/My Dog.png", "{d}/sub/a b.webp"]),
    ("{d}/dog.png\n{d}/CAT.JPG\n", ["{d}/dog.png", "{d}/CAT.JPG"]),
    ("{d}/Screenshot 2026-11-20 at 6.10.00\u202fPM.png", ["{d}/" + NARROW]),
    ("{d}/Screenshot 2026-11-20 at 6.10.00 PM.png", ["{d}/" + NARROW]),
    ("{d}/Screenshot\\ 2026-11-20\\ at\\ 6.10.00\u202fPM.png", ["{d}/" + NARROW]),
    ("a\u0308.png", ["ä.png"]),
    ("dog.png,CAT.JPG", ["dog.png", "CAT.JPG"]),
    ("{d}/dog.png;{d}/My\\ Dog.png,ä.png", ["{d}/dog.png", "{d}/My Dog.png", "ä.png"]),
    ("both,two.png", ["both,two.png"]),
    ("{d}/notes.txt", ["{d}/notes.txt"]),
    ("https://example.org/dog.png", ["https://example.org/dog.png"]),
    ("https://example.org/dog.JPG?w=100&h=2#x", ["https://example.org/dog.JPG?w=100&h=2#x"]),
    ("https://example.org/picture", ["https://example.org/picture"]),
    ("data:image/png;base64,AAAA", ["data:image/png;base64,AAAA"]),
]


@pytest.mark.parametrize(("line", "sources"), ATTACHED)
def test_a_line_of_pictures_attaches_them(line, sources, folder):
    expected = tuple(s.replace("{d}", str(folder)) for s in sources)
    assert read_line(line.replace("{d}", str(folder))) == Found(expected)


PROSE = [
    ("dog.png what is this?", ["dog.png"], "what is this?"),
    ("{d}/dog.png what is this?", ["{d}/dog.png"], "what is this?"),
    ("{d}/My\\ Dog.png what is this?", ["{d}/My Dog.png"], "what is this?"),
    ("{d}/My Dog.png what is this?", ["{d}/My Dog.png"], "what is this?"),
    ("What is in {d}/dog.png?", ["{d}/dog.png"], "What is in dog.png?"),
    ("What is this? {d}/dog.png", ["{d}/dog.png"], "What is this?"),
    ("What is this? '{d}/My Dog.png' ", ["{d}/My Dog.png"], "What is this?"),
    ("What is this? {d}/My Dog.png", ["{d}/My Dog.png"], "What is this?"),
    ("What changed? (dog.png, CAT.JPG)", ["dog.png", "CAT.JPG"], "What changed?"),
    ("What changed?\ndog.png\nCAT.JPG", ["dog.png", "CAT.JPG"], "What changed?"),
    ("dog.png,CAT.JPG What changed?", ["dog.png", "CAT.JPG"], "What changed?"),
    ("Tell me what this is dog.png", ["dog.png"], "Tell me what this is dog.png"),
    ("Is it CAT.JPG? Or not? dog.png", ["CAT.JPG", "dog.png"], "Is it CAT.JPG? Or not? dog.png"),
    ("What is in {d}/My Dog.png ?", ["{d}/My Dog.png"], "What is in My Dog.png ?"),
    ("What is in My Dog.png?", ["My Dog.png"], "What is in My Dog.png?"),
    ("I named it dog.png yesterday", ["dog.png"], "I named it dog.png yesterday"),
    ("dog.png CAT.JPG What changed?", ["dog.png", "CAT.JPG"], "What changed?"),
    ("compare dog.png and CAT.JPG", ["dog.png", "CAT.JPG"], "compare dog.png and CAT.JPG"),
    ("compare {d}/dog.png and {d}/CAT.JPG", ["{d}/dog.png", "{d}/CAT.JPG"],
     "compare dog.png and CAT.JPG"),
    ("dog.png and CAT.JPG: which is older?", ["dog.png", "CAT.JPG"],
     "dog.png and CAT.JPG: which is older?"),
    ("{d}/dog.png, what is this?", ["{d}/dog.png"], "what is this?"),
    ("{d}/dog.jfif what is this?", ["{d}/dog.jfif"], "what is this?"),
    ("see {d}/photo and say what it is", ["{d}/photo"], "see photo and say what it is"),
    ("what's in dog.png, it's mine", ["dog.png"], "what's in dog.png, it's mine"),
    ('"What is in {d}/dog.png?"', ["{d}/dog.png"], '"What is in dog.png?"'),
    ("Look ({d}/dog.png) here", ["{d}/dog.png"], "Look (dog.png) here"),
    ("Here is\n{d}/dog.png\nwhat is it?", ["{d}/dog.png"], "Here is\ndog.png\nwhat is it?"),
    ("https://example.org/200 what is this?", ["https://example.org/200"], "what is this?"),
    ("dog.png https://example.org/200 which?", ["dog.png", "https://example.org/200"], "which?"),
    ("data:image/png;base64,AA/BB what is this?", ["data:image/png;base64,AA/BB"], "what is this?"),
    ("what is data:image/png;base64,AA/BB please", ["data:image/png;base64,AA/BB"],
     "what is picture please"),
    ("Compare ./dog.png, with ./CAT.JPG please", ["dog.png", "CAT.JPG"],
     "Compare dog.png, with CAT.JPG please"),
    ("What is https://example.org/a.png?x=1 about", ["https://example.org/a.png?x=1"],
     "What is a.png about"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "sources", "text"), PROSE)
def test_paths_in_prose_are_attached(line, sources, text, folder):
    found = read_line(line.replace("{d}", str(folder)))
    assert found == Found(tuple(s.replace("{d}", str(folder)) for s in sources), text)


@pytest.mark.parametrize(
    "line",
    [
        "is 'don't' spelled right",
        "Tell me about e.g. cats/dogs and/or 1/2.",
        "README",
        "/",
        "it costs 3.99",
        'an open "quote',
    ],
)
def test_prose_is_left_alone(line):
    assert read_line(line) == Found(text=line)


@pytest.mark.parametrize(
    ("line", "mentioned"),
    [
        ("What does the name IMG_1234.jpg mean?", ["IMG_1234.jpg"]),
        ("see https://example.org/page for more", ["https://example.org/page"]),
        ("first line\nsecond line with ./gone.png in it", ["./gone.png"]),
        ("is http://[bad a page", ["http://[bad"]),
        ("what is on paper.pdf#x", ["paper.pdf#x"]),
    ],
)
def test_what_may_name_a_picture_and_is_not_attached_is_told(line, mentioned):
    assert read_line(line) == Found((), line, (), tuple(mentioned))


@pytest.mark.parametrize("ending", ["jfif", "pjpeg", "mpo", "apng", "dib", "hif", "JPG"])
def test_every_ending_of_a_picture_is_known(ending):
    assert read_line(f"what is in /gone/dog.{ending}").missing == (f"/gone/dog.{ending}",)


def test_names_of_windows_are_said_and_found_where_linux_sees_the_drive(monkeypatch, folder):
    line = r"C:\Users\me\my dog.jpg what is it?"
    assert read_line(line).missing == (r"C:\Users\me\my dog.jpg",)
    real = paths.Path
    moved = {"/mnt/c": str(folder), "/mnt/d": str(folder)}
    monkeypatch.setattr(paths, "Path", lambda first, *more: real(moved.get(first, first), *more))
    assert read_line(r"D:\dog.png what is it?").sources == (f"{folder}/dog.png",)


def test_the_disk_is_asked_a_bounded_number_of_times(monkeypatch):
    asked = []
    monkeypatch.setattr(paths, "existing", lambda name, listings: asked.append(name))
    for line in ("a.png " * 5_000, "/x/a.png b " * 5_000, "./a/b " * 5_000):
        asked.clear()
        read_line(line)
        read_argument(line)
        assert len(asked) <= 800


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("dgo.png", ["dgo.png"]),
        ("~/gone.HEIC", ["~/gone.HEIC"]),
        ("'/gone/My Dog.png'", ["/gone/My Dog.png"]),
        ("/gone/My Dog.png", ["/gone/My Dog.png"]),
        ("file:///gone/dog.png", ["file:///gone/dog.png"]),
        ("what is in ./dgo.png?", ["./dgo.png"]),
        ("dog.png gone.png", ["gone.png"]),
        ("What is in /gone/my dog.jpg ?", ["/gone/my dog.jpg"]),
    ],
)
def test_what_looks_like_a_picture_but_is_no_file_is_said(line, missing):
    assert list(read_line(line).missing) == missing


ARGUMENTS = [
    ("dog.png", ["dog.png"], ""),
    ("dog.png What is it?", ["dog.png"], "What is it?"),
    ("My Dog.png What is it?", ["My Dog.png"], "What is it?"),
    ("'My Dog.png' What is it?", ["My Dog.png"], "What is it?"),
    ("My\\ Dog.png What is it?", ["My Dog.png"], "What is it?"),
    ("dog.png CAT.JPG Which is older?", ["dog.png", "CAT.JPG"], "Which is older?"),
    ("notes.txt", ["notes.txt"], ""),
    ("clipboard What is it?", ["clipboard"], "What is it?"),
    ("https://e.org/f.jpg <|image|>What type of flower is this?", ["https://e.org/f.jpg"],
     "<|image|>What type of flower is this?"),
    ("dog.png <|image|>What is it?", ["dog.png"], "<|image|>What is it?"),
    ("gone.png What?", ["gone.png"], "What?"),
    ("dog.png Is it as old as CAT.JPG?", ["dog.png", "CAT.JPG"],
     "dog.png Is it as old as CAT.JPG?"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "sources", "question"), ARGUMENTS)
def test_the_image_command_takes_pictures_and_a_question(argument, sources, question):
    assert read_argument(argument) == Found(tuple(sources), question)


def test_the_image_command_without_a_picture_names_the_word():
    assert read_argument("what is this").missing == ("what",)
