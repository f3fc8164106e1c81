"""Every mistake a user can make: one line on stderr, nothing on stdout, its exit code."""

import base64
import errno
import math
import sys

import pytest
from PIL import Image

from mmchat import errors, limits
from mmchat.cli import model_choice
from mmchat.errors import CheckpointError, DiskError

KEPT = ("--quantize", "none", "--quantize-keep", "head")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ("inspect", "What's in this image?"),
            'mmchat: error: MODEL "What\'s in this image?" looks like a question;'
            " to ask it: mmchat generate --prompt 'What'\"'\"'s in this image?'",
        ),
        (("generate", "Why?", "-p", "x"), "'Why?' and --prompt are two questions; give one of"),
        (("generate", "", "-p", "x"), "mmchat: error: an argument is empty; leave it out, or"),
        (("bench", "", "-q"), "mmchat: error: MODEL is empty;"),
        (
            ("export", "my dog.jfif"),
            "mmchat: error: MODEL 'my dog.jfif' is a picture;"
            " to ask about it: mmchat generate -i 'my dog.jfif' --prompt TEXT\n",
        ),
        (("export", "https://a.b/c.jpg?d=1"), "is a picture; to ask about it: mmchat generate -i "),
        (("chat", "-m", "dog.jpg"), "is a picture; to chat about it: mmchat chat -i dog.jpg\n"),
        (("inspect", "dog.jpg"), "is a picture; to see its tiles: mmchat tiles dog.jpg\n"),
        (("tiles", "--model", "a.png", "x"), "is a picture; give it alone: mmchat tiles a.png\n"),
        (("export", "dog.jpg"), "to ask about it: mmchat generate -i dog.jpg --prompt TEXT\n"),
        (("download", "dog.jpg"), "to ask about it: mmchat generate -i dog.jpg --prompt TEXT\n"),
        (("where", "dog.jpg"), "to ask about it: mmchat generate -i dog.jpg --prompt TEXT\n"),
        (
            ("convert", "x", "--to", "hf"),
            "'convert'; did you mean 'mmchat export --format hf'? (see",
        ),
        (("export", "--format", "huggingface"), "'huggingface'; did you mean --format hf?\n"),
        (
            ("generate", "tiny", "-m", "x", "-p", "?"),
            "MODEL 'tiny' and --model 'x' are two models;",
        ),
        (
            ("generate", "tiny", "mllama-tiny", "-p", "x"),
            "'tiny' and 'mllama-tiny' are two models;",
        ),
        (("inspect", "tiny", "-m", "x"), "MODEL 'tiny' and --model 'x' are two models; give one\n"),
        (
            ("inspect",),
            "mmchat: error: no MODEL is given; 'mmchat list' shows those that are known",
        ),
        (("tiles", "-i", "x"), "No such option: -i; IMAGE stands alone: mmchat tiles IMAGE (see"),
        (("doctor", "--model", "x"), "error: No such option: --model (see 'mmchat doctor --help')"),
        (("pull", "llama3.2-vision"), "'pull'; did you mean 'mmchat download'? (see"),
        (
            ("browser", "llama3.2"),
            "No such command 'browser'; did you mean 'mmchat serve --open'? (see",
        ),
        (("help", "genrate"), "No such command 'genrate'; did you mean 'mmchat generate'? (see"),
        (("eval",), "Missing command; there is TASK and scenes (see 'mmchat eval --help')"),
        (("run", "tiny", "Why?"), "No such command 'run'; did you mean 'mmchat chat'? (see"),
        (("rm", "tiny"), "No such command 'rm'; did you mean 'mmchat remove'? (see"),
        (("ls",), "No such command 'ls'; did you mean 'mmchat list'? (see"),
        (("version",), "No such command 'version'; did you mean 'mmchat --version'? (see"),
        (("ps",), "No such command 'ps'; did you mean 'mmchat doctor'? (see"),
        (("show", "tiny"), "No such command 'show'; did you mean 'mmchat inspect'? (see"),
        (("vision-plain", "-a", "vllama"), "'vision-plain'; did you mean 'mmchat chat'? (see"),
        (
            ("generate", "-a", "vllama"),
            "No such option: -a; the kind of model is read from its fil",
        ),
        (("generate", "--isq", "Q4K"), "No such option: --isq; did you mean --quantize int4? (see"),
        (
            ("generate", "--max-tokens", "9"),
            "--max-tokens; did you mean -n, --max-new-tokens? (see",
        ),
        (("chat", "--n-predict", "9"), "--n-predict; did you mean -n, --max-new-tokens? (see"),
        (
            ("generate", "--quantize", "q4"),
            "scheme 'q4' (did you mean int4?); use one of auto, none, int8",
        ),
        (
            ("generate", "--quantize", "Q8_0"),
            "scheme 'Q8_0' (did you mean int8?); use one of auto, none,",
        ),
        (
            ("generate", "--quantize", "fp16"),
            "'fp16' (a number format, which --dtype takes); use on",
        ),
        (
            ("generate", "--dtype", "fp16"),
            "'fp16' is not one of 'auto', 'float32', 'bfloat16', 'flo",
        ),
        (
            ("generate", "--dtype", "bf16"),
            "'float16'; did you mean bfloat16? (see 'mmchat generate",
        ),
        (
            ("generate", "--dtype", "q4"),
            "'float16'; did you mean --quantize int4? (see 'mmchat gen",
        ),
        (("generate",), "mmchat: error: the prompt is empty; give a question with --prompt TEXT"),
        (("generate", "-p", "  "), "mmchat: error: the prompt is empty;"),
        (("generate", "-i", "-"), "mmchat: error: '-i -' takes the picture from stdin"),
        (("generate", "-p", "x", "-i", "-", "-i", "-"), "mmchat: error: '-i -' is given twice"),
        (
            ("generate", "-p", "x", "-t", "nan"),
            "mmchat: error: Invalid value for '-t' / '--temperature':"
            " 'nan' should be less than or equal to 100 (see 'mmchat generate --help')",
        ),
        (
            ("generate", "-p", "x", "-t", "-1"),
            "'-t' / '--temperature': '-1' should be greater than or equal to 0 (see",
        ),
        (("generate", "-p", "x", "-t", "inf"), "'inf' should be less than or equal to 100"),
        (
            ("generate", "-p", "x", "--top-p", "-0.1"),
            "'--top-p': '-0.1' should be greater than or equal to 0",
        ),
        (("generate", "-p", "x", "--top-p", "1.5"), "'1.5' should be less than or equal to 1"),
        (
            ("generate", "-p", "x", "--min-p", "2"),
            "'--min-p': '2' should be less than or equal to 1",
        ),
        (
            ("generate", "-p", "x", "--top-k", "-1"),
            "mmchat: error: Invalid value for '--top-k':"
            " '-1' should be greater than or equal to 0 (see 'mmchat generate --help')",
        ),
        (
            ("generate", "-p", "x", "-n", "0"),
            "'-n' / '--max-new-tokens': '0' should be greater than or equal to 1 (see",
        ),
        (
            ("generate", "-p", "x", "-n", "many"),
            "'many' should be a valid integer, unable to parse",
        ),
        (("generate", "-p", "x", "-n", "1.5"), "'1.5' should be a valid integer, unable to parse"),
        (("generate", "-p", "x", "-t", "hot"), "'hot' should be a valid number, unable to parse"),
        (("generate", "-p", "x", "--top-p", "x"), "'x' should be a valid number, unable to parse"),
        (("generate", "-p", "x", "--seed", "x"), "'x' should be a valid integer, unable to parse"),
        (("generate", "--logprobs", "21"), "'21' should be less than or equal to 20 (see"),
        (("chat", "--max-seq-len", "x"), "'x' should be a valid integer, unable to parse"),
        (("export", "--format", "hf", "--max-shard-size", "inf"), "than or equal to 1000000"),
        (("export", "--max-seq-len", "63"), "--max-seq-len 63 is too short for a prompt and"),
        (("export", "--format", "safetensors", "--max-seq-len", "64"), "takes any length"),
        (("export", "--format", "executorch", "--dtype", "bfloat16"), "float32, not bfloat16"),
        (("generate", "-p", "x", *KEPT), "head keeps nothing without --quant"),
        (("chat", *KEPT), "--quantize-keep head keeps nothing without --quan"),
        (
            ("export", "--calibrate", "assets"),
            "does nothing with --quantize none, which needs no samples",
        ),
        (
            ("export", "--quantize", "int6", "--calibrate", "assets"),
            "does nothing with --quantize int6, which needs no samples",
        ),
        (
            ("export", "--quantize", "int4", "--calibrate", "no"),
            "--calibrate 'no' is not a folder;",
        ),
        (("export", "--quantize-keep", "head"), "--quantize-keep head keeps nothing without --qu"),
        (("eval", "scenes", *KEPT), "add --quantize int8 or int4, or leave"),
        (
            ("generate", "-p", "x", "--repetition-penalty", "0"),
            "'--repetition-penalty': '0' should be gr",
        ),
        (
            ("generate", "-p", "x", "--presence-penalty", "3"),
            "'--presence-penalty': '3' should be less",
        ),
        (("generate", "-p", "x", "--speculate", "on"), "'on' is not auto, off or a number"),
        (("chat", "--speculate", "65"), "'65' is not auto, off or a number from 0 to 64"),
        (("generate", "-p", "x", "--seed", "-1"), "'-1' should be greater than or equal to 0 (see"),
        (("generate", "-p", "x", "--stop", ""), "'--stop': an empty string would stop at once"),
        (("generate", "-p", "x", "--dtype", "int3"), "'--dtype': 'int3' is not one of 'auto', 'f"),
        (("generate", "-p", "x", "--logprobs", "3"), "--logprobs needs --json or --stream-json"),
        (("generate", "-p", "x", "--json", "--stream-json"), "--json and --stream-json contradict"),
        (("generate", "-p", "x", "--no-stream", "--stream-json"), "contradict each other"),
        (("generate", "-p", "x", "-q", "-v"), "--quiet and --verbose contradict each other"),
        (("generate", "-p", "x", "--raw", "-s", "y"), "--raw and --system contradict each other"),
        (("generate", "-p", "x", "--text-only", "-i", "a.png"), "--text-only and --image-prompt"),
        (("generate", "--tempertaure", "1"), ": --tempertaure; did you mean --temperature? (see"),
        (("generate", "--max-new", "1"), "--max-new; did you mean --max-new-tokens? (see"),
        (("generate", "--foo"), "error: No such option: --foo (see 'mmchat generate --help')"),
        (("chat", "-p", "hi"), "No such option: -p; the question stands alone: mmchat chat TEXT"),
        (("genrate", "-p", "x"), "No such command 'genrate'; did you mean 'mmchat generate'? (see"),
        (("tyni",), "'tyni'; to ask a model: mmchat generate tiny --prompt TEXT (see"),
        (
            ("llama3.2-11B",),
            "mmchat: error: the prompt is empty; give a question with --prompt TEXT",
        ),
        (
            ("frobnicate",),
            "mmchat: error: No such command 'frobnicate'; if it is the question:"
            " mmchat generate --prompt frobnicate (see 'mmchat --help')\n",
        ),
        (("generate", "-p"), "error: Option '-p' requires an argument (see 'mmchat --help')"),
        (("tiles",), "Missing argument 'IMAGE'"),
        (
            ("batch", "in", "-o", "out.jsonl", "--ray", "auto", "--parallel", "2"),
            "--ray gives each actor a model of its own, and --parallel 2 shares one; leave one of",
        ),
        (("eval", "scenes", "--limit", "0"), "'--limit': '0' should be greater than or equal to 1"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(mmchat_command, args, line):
    done = mmchat_command(*args)
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert (done.stdout, done.exit_code) == ("", 2)


ERRORS = [
    (errors.UsageError, 2), (errors.PromptError, 2), (errors.ContextLengthExceeded, 2),
    (errors.ParamsError, 3), (errors.CheckpointError, 3), (errors.ImageError, 4),
    (errors.MemoryError_, 5), (errors.NetworkError, 6), (errors.GatedError, 6),
    (errors.NotFoundError, 6), (errors.DiskError, 7), (errors.DeviceError, 1),
    (errors.MissingExtra, 1), (errors.ExportError, 1), (errors.NumericalError, 1),
]  # fmt: skip


def failing(monkeypatch, error):
    """Let loading raise `error`."""

    def load(*_):
        raise error

    monkeypatch.setattr(model_choice, "load", load)


@pytest.mark.parametrize(("kind", "code"), ERRORS)
@pytest.mark.parametrize("as_json", [False, True])
def test_every_error_has_its_line_and_exit_code(mmchat_command, monkeypatch, kind, code, as_json):
    failing(monkeypatch, kind("what, why; next"))
    done = mmchat_command("generate", "-q", "-p", "x", *(["--json"] if as_json else []))
    assert (done.stdout, done.stderr) == ("", "mmchat: error: what, why; next\n")
    assert done.exit_code == code


def test_running_out_of_memory_is_exit_code_5(mmchat_command, monkeypatch):
    failing(monkeypatch, MemoryError())
    done = mmchat_command("generate", "-q", "-p", "x")
    assert done.exit_code == 5
    assert done.stderr.startswith("mmchat: error: out of memory")


def test_debug_adds_the_traceback(mmchat_command, monkeypatch):
    failing(monkeypatch, errors.CheckpointError("bad file"))
    done = mmchat_command("generate", "-q", "-p", "x", "--debug")
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("mmchat: error: bad file\n")
    assert done.exit_code == 3


def test_debug_of_one_run_does_not_reach_the_next(mmchat_command, monkeypatch):
    failing(monkeypatch, errors.CheckpointError("bad file"))
    mmchat_command("generate", "-q", "-p", "x", "--debug")
    assert "Traceback" not in mmchat_command("generate", "-q", "-p", "x").stderr


def test_a_bug_shows_its_traceback(mmchat_command, monkeypatch):
    failing(monkeypatch, ZeroDivisionError("oops"))
    done = mmchat_command("generate", "-q", "-p", "x")
    assert "ZeroDivisionError: oops" in done.stderr
    assert done.stderr.endswith("this is a bug in mmchat; please report it with the lines above\n")
    assert done.exit_code == 1


def test_a_missing_picture_is_exit_code_4_before_anything_is_loaded(mmchat_command):
    done = mmchat_command("generate", "-q", "-p", "x", "-i", "no-such.png")
    assert (done.stdout, done.exit_code) == ("", 4)
    assert "no-such.png" in done.stderr
    assert mmchat_command.loaded == []


def test_a_damaged_picture_on_stdin_is_exit_code_4(mmchat_command, picture):
    half = picture.read_bytes()[:60]
    done = mmchat_command("generate", "-q", "-p", "x", "-i", "-", stdin=half)
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 4, 1)


def test_an_empty_picture_on_stdin_is_exit_code_4(mmchat_command):
    assert mmchat_command("generate", "-q", "-p", "x", "-i", "-").exit_code == 4


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_picture_in_the_place_of_text_gets_the_command_that_asks_about_it(
    mmchat_command, picture, command
):
    done = mmchat_command(command, "-q", stdin=picture.read_bytes())
    assert done.stderr == (
        "mmchat: error: stdin is a picture (PNG), not text; to ask about it:"
        " mmchat generate -i - --prompt TEXT\n"
    )
    assert (done.stdout, done.exit_code) == ("", 2)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("encode", [base64.encodebytes, base64.b64encode])
def test_base64_of_a_picture_in_the_place_of_text_is_not_asked_line_by_line(
    mmchat_command, picture, command, encode
):
    done = mmchat_command(command, "-q", stdin=encode(picture.read_bytes()))
    assert done.stderr == (
        "mmchat: error: stdin is a picture (PNG) as base64 text; to ask about it:"
        " base64 -d | mmchat generate -i - --prompt TEXT\n"
    )
    assert (done.stdout, done.exit_code) == ("", 2)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("stdin", "reason"),
    [
        ("What?\n".encode("utf-16"), "is UTF-16, not UTF-8 text; save it as UTF-8"),
        ("What?\n".encode("utf-16-le"), "is not text (byte 0x00 at 1); save it as UTF-8"),
        ("Où?\n".encode("latin-1"), "is not UTF-8 text (byte 0xf9 at 1); save it as UTF-8"),
    ],
)
def test_text_that_is_not_utf8_is_refused(mmchat_command, command, stdin, reason):
    done = mmchat_command(command, "-q", stdin=stdin)
    assert reason in done.stderr
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 2, 1)


@pytest.mark.parametrize("option", ["-p", "-s", "--stop"])
def test_an_argument_that_is_not_utf8_is_refused(mmchat_command, option):
    done = mmchat_command("generate", "-q", "-p", "x", option, "caf\udce9")
    assert "is not UTF-8 text (byte 0xe9 at 3)" in done.stderr
    assert (done.stdout, done.exit_code, mmchat_command.loaded) == ("", 2, [])


def test_an_output_that_cannot_be_written_is_exit_code_7_before_anything_is_loaded(
    mmchat_command, tmp_path
):
    done = mmchat_command("generate", "-q", "-p", "x", "-o", str(tmp_path / "no" / "a.txt"))
    assert (done.stdout, done.exit_code) == ("", 7)
    assert mmchat_command.loaded == []


def test_the_output_may_not_replace_the_picture(mmchat_command, picture):
    before = picture.read_bytes()
    done = mmchat_command("generate", "-p", "x", "-i", str(picture), "-o", str(picture))
    assert done.exit_code == 2
    assert "would replace the picture" in done.stderr
    assert picture.read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [("generate", "-p", "x", "-i", "a.png", "--draw-boxes"), ("eval", "scenes", "--wrong")],
)
def test_two_outputs_are_two_files(command, mmchat_command, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.rename("a.png")
    (tmp_path / "link.png").symlink_to("b.png")
    done = mmchat_command(*command, "b.png", "-o", "link.png")
    assert (done.exit_code, mmchat_command.loaded) == (2, [])
    assert "would both write 'link.png'; name two files" in done.stderr


def test_what_keeps_nothing_may_be_both(mmchat_command):
    both = ("-o", "/dev/null", "--wrong", "/dev/null")
    assert mmchat_command("eval", "scenes", "--limit", "1", *both).exit_code == 0


def test_nor_by_its_file_address(mmchat_command, picture):
    address, before = picture.absolute().as_uri(), picture.read_bytes()
    done = mmchat_command("generate", "-p", "x", "-i", address, "-o", str(picture))
    assert (done.exit_code, picture.read_bytes() == before) == (2, True)
    assert "would replace the picture" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "-p", "x", "-o"),
        ("bench", "-o"),
        ("eval", "scenes", "-o"),
        ("eval", "scenes", "--wrong"),
        ("batch", "a.png", "--force", "-o"),
    ],
)
@pytest.mark.parametrize("option", ["--checkpoint-path", "--tokenizer-path", "--params-path"])
def test_no_output_replaces_a_file_of_the_model(command, option, mmchat_command, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    done = mmchat_command(*command, str(tmp_path / "link"), option, str(tmp_path / "mine"))
    assert (done.exit_code, (tmp_path / "mine").read_text()) == (2, "mine")
    assert "would replace a file of the model" in done.stderr


@pytest.mark.parametrize("command", [("bench", "-o"), ("eval", "scenes", "-o"), ("export", "-o")])
def test_stdout_is_no_place_for_what_has_one_of_its_own(
    command, mmchat_command, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    done = mmchat_command(*command, "-")
    assert "stdout is not possible here" in done.stderr
    assert (done.exit_code > 0, [*tmp_path.iterdir()], mmchat_command.loaded) == (True, [], [])


def test_a_base_model_is_said_to_continue_the_text_unless_that_is_asked(mmchat_command):
    mmchat_command.use(b"x", b"x", params="llama3.2-11B-vision")
    note = "Llama-3.2-11B-Vision is a base model, which continues the text; llama3.2-11B answers\n"
    assert mmchat_command("generate", "-p", "x").stderr.endswith(note)
    assert note not in mmchat_command("generate", "-p", "x", "--raw").stderr


def test_a_base_model_takes_no_system_message(mmchat_command):
    mmchat_command.use(b"x", params="llama3.2-11B-base")
    done = mmchat_command("generate", "-q", "-p", "x", "-s", "y")
    assert done.exit_code == 2
    assert "a base model has no roles" in done.stderr


def test_an_error_in_the_middle_keeps_what_was_printed(mmchat_command):
    mmchat_command.use(b"abcdef").runtime.fail_at = 4
    done = mmchat_command("generate", "-q", "-p", "x")
    assert done.stdout == "abc"
    assert done.exit_code == 1


def test_too_many_pictures_are_refused(mmchat_command, picture):
    done = mmchat_command("generate", "-q", "-p", "x", *["-i", str(picture)] * 17)
    assert done.exit_code == 2
    assert "17 pictures are given; one prompt takes at most 16" in done.stderr


def test_pictures_that_are_too_large_together_are_refused(mmchat_command, picture, monkeypatch):
    with Image.open(picture) as opened:
        pixels = math.prod(opened.size)
    monkeypatch.setattr(limits, "IMAGES_PIXELS", 2 * pixels)
    done = mmchat_command("generate", "-q", "-p", "x", *["-i", str(picture)] * 3)
    assert (done.exit_code, done.stdout) == (5, "")
    assert f"{3 * pixels:,} pixels together; at most {2 * pixels:,} fit" in done.stderr


def test_an_unknown_model_is_exit_code_3_with_the_nearest_name(run_real):
    done = run_real("generate", "llama3.2-11C", "-p", "x")
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 3, 1)
    assert "llama3.2-11B" in done.stderr


def test_a_model_that_is_not_here_is_exit_code_3(run_real):
    done = run_real("generate", "llama3.2-90B", "-p", "x")
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 3, 1)
    assert "not on this machine" in done.stderr


def test_a_wrong_checkpoint_path_is_exit_code_3(run_real):
    done = run_real("generate", "llama3.2-11B", "-p", "x", "--checkpoint-path", "nowhere.pth")
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", 3, 1)
    assert "'nowhere.pth': no such file or folder" in done.stderr


LONG = "x" * 300
# from Python 3.14 on such a name exists as little as any other
MISSING, NOT_YET = (2, 3)[sys.version_info >= (3, 14)], (2, 6)[sys.version_info >= (3, 14)]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("tiles", "http://example.com/\udcff.png"), 4),
        (("tiles", "file://[x/a.png"), 4),
        (("tiles", "data:,\udcff"), 4),
        (("generate", "-q", "-p", "x", "-i", LONG, "-o", "a.txt"), 4),
        (("generate", "-q", "-p", "x", "-i", "~nosuch/x.png", "-o", "a.txt"), 4),
        (("generate", "-p", "x", "-o", LONG), 7),
        (("where", LONG), MISSING),
        (("remove", f"./{LONG}"), MISSING),
        (("export", "tiny", "--format", "safetensors", "-o", LONG), 2),
        (("export", "tiny", "--format", "hf", "-o", LONG), 2),
        (("download", "acme/x", "--offline", "--local-dir", LONG), NOT_YET),
        (("download", "acme/x", "--offline", "--local-dir", "~nosuch/x"), 2),
    ],
)
def test_what_is_no_possible_name_or_address_is_one_line(
    run_real, args, code, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = run_real(*args)
    assert (done.stdout, done.exit_code, done.stderr.count("\n")) == ("", code, 1), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_removed_is_said(run_real, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    done = run_real("export", "tiny", "--format", "safetensors")
    assert done.stderr == (
        "mmchat: error: the folder that you are in was removed; change to another\n"
    )
    assert done.exit_code == 7


def _refused(*_: object, **__: object):
    raise PermissionError(errno.EACCES, "Permission denied", "their/config.json")


def test_a_model_that_may_not_be_read_is_a_missing_checkpoint(run_real, monkeypatch, tmp_path):
    from mmchat.catalog import find

    monkeypatch.setattr(find, "_params_beside", _refused)
    done = run_real("generate", "-m", str(tmp_path), "x")
    assert done.stderr.endswith(
        "error: 'their/config.json': permission denied; change its permissions, or its owner\n"
    )
    assert done.exit_code == CheckpointError.exit_code


def test_what_the_system_refuses_anywhere_is_no_bug(run_real, monkeypatch):
    from mmchat.hub import holdings

    monkeypatch.setattr(holdings, "recorded_repos", _refused)
    done = run_real("list")
    assert done.stderr.startswith("mmchat: error: 'their/config.json': permission denied")
    assert done.exit_code == DiskError.exit_code
