import io
import json

import pytest
from PIL import Image


def test_the_facts_are_printed(mmchat_command, picture):
    done = mmchat_command("tiles", str(picture), "--model", "llama3.2-11B")
    assert done.stdout == (
        f"picture        {picture}, 200 x 100 px\n"
        "model          Llama-3.2-11B-Vision-Instruct, tiles of 560 px\n"
        "canvas         560 x 560 px, 1 tile\n"
        "on the canvas  560 x 280 px at the top left, 50% padding\n"
        "tokens         1,601 to attend to\n"
    )
    assert (done.stderr, done.exit_code) == ("", 0)


def test_json_gives_height_before_width(run_real, tmp_path):
    path = tmp_path / "tall.png"
    Image.new("RGB", (500, 1800)).save(path)
    done = run_real("tiles", str(path), "--model", "llama3.2-11B-base", "--json")
    assert json.loads(done.stdout) == {
        "model": "Llama-3.2-11B-Vision",
        "source": str(path),
        "size": [1800, 500],
        "resized": [1612, 448],
        "canvas": [1792, 448],
        "tile_grid": [4, 1],
        "tile_size": 448,
        "tokens": 4 * 1025,
    }


def test_a_picture_can_come_from_stdin(mmchat_command, picture):
    done = mmchat_command("tiles", "-", "--json", stdin=picture.read_bytes())
    assert json.loads(done.stdout)["source"] == "stdin"


def test_a_document_of_several_pages_is_asked_for_one(mmchat_command, tmp_path):
    path = tmp_path / "pages.tiff"
    first, second = (Image.new("RGB", (60, 30), color) for color in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second])
    done = mmchat_command("tiles", str(path))
    assert done.stderr.endswith(
        f"'{path}' is 2 pictures, and tiles shows one; name a page, as in 'paper.pdf#1'\n"
    )
    assert (done.stdout, done.exit_code) == ("", 4)
    assert mmchat_command("tiles", f"{path}#2").exit_code == 0


def test_the_preview_is_a_png_of_its_own(mmchat_command, picture, tmp_path):
    path = tmp_path / "preview.png"
    done = mmchat_command("tiles", str(picture), "-o", str(path))
    assert done.exit_code == 0
    preview = Image.open(io.BytesIO(path.read_bytes()))
    assert preview.format == "PNG"
    assert min(preview.size) > 200


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("tiles", "no-such.png"), 4),
        (("tiles", "-"), 4),
        (("tiles", "{picture}", "-o", "out.jpg"), 2),
        (("tiles", "{picture}", "-o", "{picture}"), 2),
        (("tiles", "{picture}", "-o", "no/such/out.png"), 7),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(mmchat_command, picture, args, code):
    done = mmchat_command(*(arg.format(picture=picture) for arg in args))
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", code, 1)


def test_an_unknown_model_is_exit_code_3(run_real, picture):
    assert run_real("tiles", str(picture), "--model", "llama9").exit_code == 3
