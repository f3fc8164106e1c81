"""The C++ program in examples/native: the same tokens, pictures and answers as mmchat's."""

import io
import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

import mmchat
from mmchat.checkpoints.manifest import MANIFEST_NAME
from mmchat.evals.scenes import make_scene
from mmchat.export.token_table import write_token_table
from mmchat.images import from_pil, load_image
from mmchat.models.mllama.processor import preprocess
from mmchat.tokenizers import open_tokenizer
from tests.export.conftest import GREEDY
from tests.loading.test_loader import finish
from tests.synthetic_tokenizer import CORPUS, tiktoken_lines, trained_tokens
from tests.test_readme import ENVIRONMENT, ROOT, blocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ASSETS = ROOT / "assets"
QUESTION = "What's in this image?"


def commands_of_the_page(build):
    """The lines of docs/export.md that build the program and run it, with another build folder."""
    [block] = blocks("sh native")
    return block.replace("build/native", str(build)).splitlines()


def run_line(line):
    return subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The folder of the two programs, built as docs/export.md says."""
    has_stb = any(Path(root, "include/stb/stb_image.h").exists() for root in ("/usr", "/usr/local"))
    if not (shutil.which("cmake") and shutil.which("c++") and has_stb):
        pytest.skip("NOT TESTED: examples/native needs cmake, a C++ compiler and libstb-dev")
    out = tmp_path_factory.mktemp("native")
    for line in commands_of_the_page(out)[:-1]:
        done = run_line(line)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "warning:" not in done.stderr
    return out


@pytest.fixture(scope="module")
def exported(tiny_aoti):
    return mmchat.load(tiny_aoti)


def native(programs, *arguments, name="mmchat-native", **options):
    command = [str(programs / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **options)


def answer(programs, folder, question, *pictures, limit=64):
    images = [word for picture in pictures for word in ("--image", picture)]
    done = native(programs, folder, "--prompt", question, *images, "-n", limit)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return done.stdout.decode()


def expected_answer(exported, question, *pictures, limit=64):
    params = replace(GREEDY, max_new_tokens=limit)
    return finish(exported.chat().send(question, pictures, params)).text + "\n"


# The answer


@pytest.mark.parametrize("name", ["dog", "fish", "shapes", "sign", "street"])
def test_it_answers_about_a_jpeg_as_mmchat_does(programs, tiny_aoti, exported, name):
    path = ASSETS / f"{name}.jpg"
    got = answer(programs, tiny_aoti, QUESTION, path)
    assert got == expected_answer(exported, QUESTION, path)
    assert len(got) > 5


@pytest.mark.parametrize("canvas", [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_it_answers_on_every_kind_of_canvas(programs, tiny_aoti, exported, tmp_path, canvas):
    scene = make_scene(7, "heldout", kind="objects", canvas=canvas)
    path = tmp_path / "scene.png"
    scene.pictures[0].save(path)
    for question in scene.questions[:3]:
        got = answer(programs, tiny_aoti, question.text, path)
        assert got == expected_answer(exported, question.text, path)


def test_it_answers_about_two_pictures_and_about_none(programs, tiny_aoti, exported, tmp_path):
    scene = make_scene(5, "heldout", kind="pair")
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for picture, path in zip(scene.pictures, paths, strict=True):
        picture.save(path)
    for question in scene.questions:
        got = answer(programs, tiny_aoti, question.text, *paths)
        assert got == expected_answer(exported, question.text, *paths)
    assert answer(programs, tiny_aoti, "Hello") == expected_answer(exported, "Hello")


def test_it_stops_after_the_tokens_asked_for(programs, tiny_aoti, exported):
    dog = ASSETS / "dog.jpg"
    for limit in (1, 2, 3):
        got = answer(programs, tiny_aoti, QUESTION, dog, limit=limit)
        assert got == expected_answer(exported, QUESTION, dog, limit=limit)


def test_it_stops_where_the_positions_end(programs, tiny_aoti):
    words = " dog" * 1100
    ids = open_tokenizer(tiny_aoti).encode(words)
    assert len(ids) == 1100
    fits = words[: 4 * (1024 - 14)]
    assert answer(programs, tiny_aoti, fits, limit=900)
    done = native(programs, tiny_aoti, "-p", words)
    assert done.returncode == 2
    assert b"--max-seq-len" in done.stderr


def test_the_command_of_the_page_answers(programs, tiny_aoti):
    line = commands_of_the_page(programs)[-1].replace("${TMPDIR:-/tmp}/tiny-aoti", str(tiny_aoti))
    done = run_line(line)
    assert (done.returncode, done.stdout) == (0, "A brown dog.\n"), done.stderr


# What the model is given


def picture_kinds():
    draw = np.random.default_rng(3)
    sizes = [(112, 112), (113, 111), (7, 300), (300, 7), (40, 50), (500, 333), (333, 900), (1, 1)]
    for height, width in sizes:
        rgb = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield f"rgb {height}x{width}", PILImage.fromarray(rgb), {}
    rgba = draw.integers(0, 256, (90, 130, 4), dtype=np.uint8)
    yield "rgba", PILImage.fromarray(rgba), {}
    yield "grey", PILImage.fromarray(rgba[..., 0]), {}
    yield "grey and alpha", PILImage.fromarray(rgba[..., :2]), {}
    deep = draw.integers(0, 65536, (90, 130), dtype=np.uint16)
    yield "grey of 16 bits", PILImage.fromarray(deep), {}
    palette = PILImage.fromarray(rgba[..., :3]).quantize(20)
    yield "palette", palette, {}
    yield "palette with a transparent colour", palette, {"transparency": 3}
    yield "one bit", PILImage.fromarray(rgba[..., 0]).convert("1"), {}


def tiles_of(programs, folder, paths):
    done = native(programs, folder, *paths, name="mmchat-native-inputs")
    assert done.returncode == 0, done.stderr
    return np.frombuffer(done.stdout, np.float32)


def expected_tiles(exported, image):
    config = exported.spec.config
    tiles = preprocess(image, config)
    return tiles.tensors[0].numpy().ravel()


def test_tiles_of_lossless_files_are_mmchats_bit_for_bit(programs, tiny_aoti, exported, tmp_path):
    paths = {}
    for kind, picture, options in picture_kinds():
        paths[kind] = tmp_path / f"{kind}.png"
        picture.save(paths[kind], **options)
    for kind in ("bmp", "gif"):
        paths[kind] = tmp_path / f"picture.{kind}"
        make_scene(3, "heldout", kind="objects", canvas=(1, 2)).pictures[0].save(paths[kind])
    rest = tiles_of(programs, tiny_aoti, paths.values())
    for kind, path in paths.items():
        expected = expected_tiles(exported, load_image(path))
        assert np.array_equal(rest[: len(expected)], expected), kind
        rest = rest[len(expected) :]
    assert not len(rest)


def test_a_jpeg_is_turned_upright(programs, tiny_aoti, exported, tmp_path):
    picture = make_scene(3, "heldout", kind="objects", canvas=(1, 2)).pictures[0]
    for orientation in range(1, 9):
        exif = PILImage.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / f"{orientation}.jpg", quality=95, exif=exif)
    paths = [tmp_path / f"{orientation}.jpg" for orientation in range(1, 9)]
    rest = tiles_of(programs, tiny_aoti, paths)
    for path in paths:
        image = load_image(path)
        right = expected_tiles(exported, image)
        got, rest = rest[: len(right)], rest[len(right) :]
        # decoders of JPEG differ by a level here and there
        assert np.abs(got - right).mean() < 0.01, path.name
        mirrored = from_pil(image.pixels.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT))
        assert np.abs(expected_tiles(exported, mirrored) - right).mean() > 0.1


def random_texts():
    draw = random.Random(5)
    alphabet = "aZ é犬ш🐶'sStTreVEllLLdDmM 019²Ⅷ٣ \t\r\n\u00a0\u2003\u0301.,-_!?\u017f\u200b"
    for length in [*range(1, 9), *[14] * 300, *[60] * 100]:
        yield "".join(draw.choice(alphabet) for _ in range(length))


def test_text_becomes_the_same_tokens(programs, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_lines(trained_tokens()))
    tokenizer = open_tokenizer(tmp_path)
    write_token_table(tmp_path, tokenizer)
    texts = [CORPUS, "<|image|><|eot_id|>", "x" * 20_000, "a  \n\n  b", "end   ", *random_texts()]
    stdin = b"".join(text.encode() + b"\0" for text in texts)
    done = native(programs, tmp_path, name="mmchat-native-inputs", input=stdin)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == len(texts)
    for text, line in zip(texts, lines, strict=True):
        assert list(map(int, line.split())) == tokenizer.encode(text), text


# Errors


@pytest.fixture
def copy(tiny_aoti, tmp_path):
    """The export by links, so that a test may change it."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny_aoti.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def claim(folder, **changes):
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["export"] |= changes
    path.unlink()
    path.write_text(json.dumps(content))


def refused(programs, code, words, *arguments):
    done = native(programs, *arguments)
    text = done.stderr.decode()
    assert (done.returncode, done.stdout) == (code, b""), text
    assert text.startswith("mmchat-native: error: ")
    assert text.count("\n") == 1
    assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme": "int8"}, "with --quantize int8"),
        ({"dtype": "bfloat16"}, "in bfloat16"),
        ({"format": "safetensors"}, "exported as safetensors; export it with --format aoti"),
        ({"torch": "2.3.0"}, "with torch 2.3.0"),
        ({"device": "cuda"}, "for cuda"),
        ({"processor": "riscv64 AVX2"}, "for a processor with riscv64 AVX2"),
    ],
)
def test_what_was_exported_for_another_place_is_refused(programs, copy, changes, words):
    claim(copy, **changes)
    refused(programs, 3, words, copy, "-p", "Hello")


def test_a_damaged_folder_is_refused(programs, copy, tmp_path):
    refused(programs, 3, "is missing", tmp_path / "none", "-p", "Hello")
    (copy / "params.json").unlink()
    refused(programs, 3, "params.json' is missing", copy, "-p", "Hello")
    (copy / "params.json").write_text("{}")
    refused(programs, 3, "not those recorded", copy, "-p", "Hello")
    (copy / MANIFEST_NAME).unlink()
    (copy / MANIFEST_NAME).write_text('{"export": {"format": ')
    refused(programs, 3, "not valid JSON", copy, "-p", "Hello")


def test_a_picture_that_cannot_be_read_is_refused(programs, tiny_aoti, tmp_path):
    ask = (tiny_aoti, "-p", "What is it?", "-i")
    refused(programs, 4, "cannot be opened", *ask, tmp_path / "none.jpg")
    refused(programs, 4, "no file", *ask, tmp_path)
    (tmp_path / "text.jpg").write_text("no picture")
    refused(programs, 4, "no JPEG, PNG, BMP or GIF", *ask, tmp_path / "text.jpg")
    file = io.BytesIO()
    PILImage.open(ASSETS / "dog.jpg").save(file, "PNG")
    (tmp_path / "cut.png").write_bytes(file.getvalue()[:2000])
    refused(programs, 4, "is damaged", *ask, tmp_path / "cut.png")


def test_wrong_usage_is_refused(programs, tiny_aoti):
    refused(programs, 2, "a folder and --prompt are needed", tiny_aoti)
    refused(programs, 2, "no option '--colour'", tiny_aoti, "--colour", "red")
    refused(programs, 2, "'-n' needs a value", tiny_aoti, "-p", "Hello", "-n")
    refused(programs, 2, "'0' is no number from 1", tiny_aoti, "-p", "Hello", "-n", "0")
    refused(programs, 2, "quote a prompt", tiny_aoti, "Hello", "-p", "x")
    pictures = ["-i", ASSETS / "dog.jpg"] * 4
    refused(programs, 2, "exported for 3 pictures", tiny_aoti, "-p", "Hello", *pictures)
    done = native(programs, tiny_aoti, "-p", b"\xff\xfe".decode("utf-8", "surrogateescape"))
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)


def test_help_is_written_to_stdout(programs):
    done = native(programs, "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Usage: mmchat-native DIR --prompt TEXT" in done.stdout
