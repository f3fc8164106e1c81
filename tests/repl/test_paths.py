r"""Every form in which terminals and people name pictures, as one table."""

import pytest

from mmchat.repl.paths import Found, read_argument, read_line

NARROW = "Screenshot 2026-11-20 at 6.10.00\u202fPM.png"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name in ("dog.png", "My Dog.png", "CAT.JPG", "it's.png", "notes.txt", "ä.png", NARROW):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a b.webp").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


ATTACHED = [
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
    ("What is in {d}/dog.png?", ["{d}/dog.png"], "What is in"),
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
        "What does the name IMG_1234.jpg mean?",
        "is 'don't' spelled right",
        "Tell me about e.g. cats/dogs and/or 1/2.",
        "see https://example.org/page for more",
        "README",
        "first line\nsecond line with ./gone.png in it",
        "/",
        "it costs 3.99",
        'an open "quote',
    ],
)
def test_prose_is_left_alone(line):
    assert read_line(line) == Found(text=line)


def test_a_file_that_prose_speaks_of_is_not_attached_but_told():
    line = "I named it dog.png yesterday"
    assert read_line(line) == Found((), line, (), ("dog.png",))


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
]  # fmt: skip


@pytest.mark.parametrize(("argument", "sources", "question"), ARGUMENTS)
def test_the_image_command_takes_pictures_and_a_question(argument, sources, question):
    assert read_argument(argument) == Found(tuple(sources), question)


def test_the_image_command_without_a_picture_names_the_word():
    assert read_argument("what is this").missing == ("what",)
