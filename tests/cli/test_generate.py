import json
import signal

import pytest

from mmchat.catalog.known import data_path
from mmchat.cli import model_choice, prompt_input

DOG = data_path("assets", "dog.jpg")
BUILT_IN_NOTE = "using the built-in model 'Llama-3.2-11B-Vision-Instruct'; see 'mmchat list'\n"


def test_stdout_is_the_answer_and_one_newline(mmchat_command):
    done = mmchat_command("generate", "-p", "What is this?")
    assert (done.stdout, done.stderr, done.exit_code) == ("A brown dog.\n", BUILT_IN_NOTE, 0)


def test_an_answer_that_ends_its_line_gets_no_second_newline(mmchat_command):
    mmchat_command.use(b"A dog.\n")
    assert mmchat_command("generate", "-p", "x").stdout == "A dog.\n"


def test_an_empty_answer_is_one_newline(mmchat_command):
    mmchat_command.use(b"")
    assert mmchat_command("generate", "-p", "x").stdout == "\n"


def test_a_named_model_is_loaded_without_a_note(mmchat_command):
    done = mmchat_command("generate", "llama3.2-11B", "-p", "x")
    assert (done.stderr, done.exit_code) == ("", 0)
    assert mmchat_command.loaded[0].name == "llama3.2-11B"


def test_a_tag_that_names_small_weights_is_said_to_get_the_published_ones(mmchat_command):
    mmchat_command.use(b"1", b"2")
    name = "llama3.2-vision:11b-instruct-q4_K_M"
    note = f"{name}: weights as they are published; --quantize makes them small\n"
    assert mmchat_command("generate", name, "-p", "x").stderr == note
    assert mmchat_command("generate", name, "-p", "x", "--quantize", "int4").stderr == ""


def test_quiet_drops_the_note(mmchat_command):
    assert mmchat_command("generate", "-q", "-p", "x").stderr == ""


def test_verbose_gives_the_stages_on_stderr(mmchat_command):
    done = mmchat_command("generate", "-v", "-p", "x")
    lines = done.stderr.splitlines()[1:]
    assert lines[0] == "device       cpu, float32 (scripted), weights in int8"
    assert [line[:13].strip() for line in lines] == [
        "device", "load", "pictures", "vision", "prompt", "first token", "answer", "speed",
        "memory", "seed",
    ]  # fmt: skip
    assert done.stdout == "A brown dog.\n"


def test_what_is_unusual_about_the_weights_is_said_with_verbose(mmchat_command):
    mmchat_command.use(b"A dog.").remarks = ("the tables are filled",)
    assert "the tables are filled\n" in mmchat_command("generate", "-v", "-p", "x").stderr
    assert "tables" not in mmchat_command("generate", "-p", "x").stderr


def test_where_and_how_to_load_reaches_the_loader(mmchat_command):
    mmchat_command(
        "generate", "-p", "x", "--checkpoint-path", "w.pth", "--tokenizer-path", "t.model",
        "--params-path", "p.json", "--device", "cpu", "--dtype", "float32", "--max-seq-len", "99",
        "--text-only", "--alpha", "drop",
    )  # fmt: skip
    choice = mmchat_command.loaded[0]
    assert (str(choice.checkpoint_path), str(choice.tokenizer_path)) == ("w.pth", "t.model")
    assert (choice.name, str(choice.params_path)) == (None, "p.json")
    assert (choice.device, choice.dtype, choice.max_seq_len) == ("cpu", "float32", 99)
    assert (choice.text_only, choice.alpha) == (True, "drop")


def sampled_with(mmchat_command, *options):
    """The SamplingParams that a run with `options` hands to the engine."""
    model, seen = mmchat_command.use(b"x"), []
    chat = model.chat

    def spying(system=None):
        session = chat(system)
        ask = session.ask
        session.ask = lambda message, sampling: (
            seen.append(sampling),
            ask(message, sampling),
        )[1]
        return session

    model.chat = spying
    done = mmchat_command("generate", "-p", "x", *options)
    assert done.exit_code == 0, done.stderr
    return seen[0]


def test_sampling_options_reach_the_engine(mmchat_command):
    params = sampled_with(
        mmchat_command,
        "-n", "7", "-t", "0.5", "--top-k", "3", "--top-p", "0.8", "--min-p", "0.1",
        "--repetition-penalty", "1.1", "--frequency-penalty", "-0.5", "--presence-penalty", "0.25",
        "--seed", "0", "--stop", "END", "--stop", "\n\n", "--speculate", "6",
    )  # fmt: skip
    assert (params.max_new_tokens, params.temperature, params.top_k) == (7, 0.5, 3)
    assert (params.top_p, params.min_p, params.seed) == (0.8, 0.1, 0)
    assert (params.repetition_penalty, params.frequency_penalty) == (1.1, -0.5)
    assert (params.presence_penalty, params.stop) == (0.25, ("END", "\n\n"))
    assert params.speculate == 6


def test_the_models_own_sampling_is_the_default(mmchat_command):
    params = sampled_with(mmchat_command)
    assert (params.temperature, params.top_p, params.seed) == (0.6, 0.9, None)
    assert params.speculate == "auto"
    assert sampled_with(mmchat_command, "--speculate", "off").speculate == "off"


def test_seed_zero_is_a_seed(mmchat_command):
    mmchat_command.use(b"x")
    done = mmchat_command("generate", "-p", "x", "--seed", "0", "--json")
    assert json.loads(done.stdout)["seed"] == 0


# Where the prompt comes from


def prompt_of(mmchat_command, *args, stdin=b""):
    """The prompt text that the model read."""
    model = mmchat_command.use(b"x")
    done = mmchat_command("generate", *args, stdin=stdin)
    assert done.exit_code == 0, done.stderr
    return bytes(i for i in model.runtime.prefills[0] if i < 256).decode()


def test_the_prompt_can_come_from_stdin(mmchat_command):
    assert prompt_of(mmchat_command, stdin="Grüße?\n".encode()) == "Grüße?"


@pytest.mark.parametrize("text", ["Qk0x", "Qk0x" * 8, "Qk0x " * 40, "iVBORw0KGgo=", "a" * 200])
def test_text_that_could_be_base64_is_a_question(mmchat_command, text):
    assert prompt_of(mmchat_command, stdin=text.encode()) == text


def test_stdin_comes_before_the_prompt(mmchat_command):
    assert prompt_of(mmchat_command, "-p", "Sum it up.", stdin="a, b\n") == "a, b\n\nSum it up."


def test_a_byte_order_mark_is_no_text(mmchat_command):
    plain = prompt_of(mmchat_command, "-p", "What?")
    assert prompt_of(mmchat_command, stdin="\ufeffWhat?".encode()) == plain
    assert prompt_of(mmchat_command, "-p", "\ufeffWhat?") == plain


def test_the_system_message_comes_first(mmchat_command):
    assert prompt_of(mmchat_command, "-p", "Hi", "-s", "Be brief. ") == "Be brief. Hi"


def test_raw_prompts_keep_their_spaces(mmchat_command):
    assert prompt_of(mmchat_command, "--raw", "-p", " Once ") == " Once "


def test_base_models_get_the_raw_prompt(mmchat_command):
    model = mmchat_command.use(b"x", params="llama3.2-11B-base")
    mmchat_command("generate", "-p", "Once")
    assert model.runtime.prefills[0] == list(b"Once")


# Pictures


@pytest.mark.parametrize("option", ["-i", "--image", "--image-prompt", "--image-prompts"])
def test_every_name_of_the_picture_option_works(mmchat_command, picture, option):
    done = mmchat_command("generate", "-p", "x", option, str(picture), "--json")
    assert json.loads(done.stdout)["usage"]["image_count"] == 1


def test_a_picture_can_come_from_stdin(mmchat_command, picture):
    done = mmchat_command("generate", "-p", "x", "-i", "-", "--json", stdin=picture.read_bytes())
    [image] = json.loads(done.stdout)["images"]
    assert (image["source"], image["size"]) == ("stdin", [100, 200])


def test_pictures_keep_their_order(mmchat_command, picture, tmp_path):
    tall = tmp_path / "tall.png"
    from PIL import Image

    Image.new("RGB", (10, 300)).save(tall)
    done = mmchat_command("generate", "-p", "x", "-i", str(tall), "-i", str(picture), "--json")
    assert [image["size"] for image in json.loads(done.stdout)["images"]] == [[300, 10], [100, 200]]


def test_what_was_done_to_a_picture_is_said_on_stderr(mmchat_command, tmp_path):
    from PIL import Image

    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (20, 20), (i * 90, 0, 0)) for i in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    done = mmchat_command("generate", "-p", "x", "-i", str(path))
    assert done.stdout == "A brown dog.\n"
    assert "moving.gif: " in done.stderr
    assert "frame" in done.stderr


# Forms of output


def test_json_is_one_object_with_every_fact(mmchat_command, picture):
    done = mmchat_command("generate", "-p", "Hi", "-i", str(picture), "--json", "--seed", "5")
    record = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    timings = record.pop("timings")
    assert record == {
        "text": "A brown dog.",
        "finish_reason": "stop",
        "model": "Llama-3.2-11B-Vision-Instruct",
        "device": "cpu",
        "dtype": "float32",
        "kv": "auto",
        "seed": 5,
        "usage": {
            "prompt_tokens": 3,
            "cached_tokens": 0,
            "completion_tokens": 13,
            "image_count": 1,
            "image_tokens": 130,
            "draft_tokens": 0,
            "accepted_tokens": 0,
        },
        "images": [
            {
                "source": str(picture),
                "size": [100, 200],
                "resized": [100, 200],
                "canvas": [112, 224],
                "tile_grid": [1, 2],
                "tile_size": 112,
                "tokens": 130,
            }
        ],
        "prompt_ids": [*b"Hi", 256],
        "output_ids": [*b"A brown dog.", 256],
    }
    assert set(timings) == {
        "load_seconds", "preprocessing_seconds", "vision_seconds", "prefill_seconds",
        "time_to_first_token", "decode_seconds", "tokens_per_second", "peak_memory_bytes",
    }  # fmt: skip


def test_logprobs_name_the_token_and_its_rivals(mmchat_command):
    mmchat_command.use(b"A")
    done = mmchat_command("generate", "-p", "x", "--json", "--logprobs", "2")
    first = json.loads(done.stdout)["logprobs"][0]
    assert (first["token"], first["token_id"]) == ("A", ord("A"))
    assert first["logprob"] <= 0
    assert first["top"][0]["token"] == "A"
    assert len(first["top"]) == 2


@pytest.mark.parametrize("form", ["--json", "--stream-json"])
def test_logprobs_hold_the_bytes_of_tokens_that_are_half_a_character(mmchat_command, form):
    mmchat_command.use("né 🐕".encode())
    done = mmchat_command("generate", "-p", "x", form, "--logprobs", "2")
    if form == "--json":
        entries = json.loads(done.stdout)["logprobs"]
    else:
        lines = map(json.loads, done.stdout.splitlines())
        entries = [line["logprob"] for line in lines if line["type"] == "text"]
    text = [entry for entry in entries if entry["token_id"] < 256]
    assert bytes(b for entry in text for b in entry["bytes"]).decode() == "né 🐕"
    half = "\N{REPLACEMENT CHARACTER}"
    assert "".join(entry["token"] for entry in text) == f"n{half * 2} {half * 4}"
    for entry in entries:
        for rival in entry["top"]:
            assert bytes(rival["bytes"]).decode(errors="replace") == rival["token"]


def test_stream_json_is_a_line_for_each_token_and_the_whole_at_the_end(mmchat_command):
    mmchat_command.use("né".encode())
    done = mmchat_command("generate", "-p", "x", "--stream-json")
    *deltas, last = map(json.loads, done.stdout.splitlines())
    assert [d["text"] for d in deltas] == ["n", "", "é", ""]
    assert all(d["type"] == "text" for d in deltas)
    assert (last["type"], last["text"], last["finish_reason"]) == ("finished", "né", "stop")


def test_no_stream_prints_the_same_answer(mmchat_command):
    assert mmchat_command("generate", "-p", "x", "--no-stream").stdout == "A brown dog.\n"


def test_length_is_reported_as_such(mmchat_command):
    done = mmchat_command("generate", "-p", "x", "-n", "3", "--json")
    assert json.loads(done.stdout)["finish_reason"] == "length"
    assert json.loads(done.stdout)["text"] == "A b"


def test_an_answer_that_was_cut_is_said_to_be(mmchat_command):
    said = "cut at 3 tokens; -n N (--max-new-tokens) allows more\n"
    for options in ((), ("--no-stream",)):
        done = mmchat_command("generate", "-p", "x", "-n", "3", *options)
        assert (done.stdout, done.stderr) == ("A b\n", BUILT_IN_NOTE + said)
        mmchat_command.use(b"A brown dog.")
    assert said not in mmchat_command("generate", "-p", "x").stderr


@pytest.mark.parametrize("option", ["-q", "--json", "--stream-json"])
def test_a_cut_is_not_said_to_a_program(mmchat_command, option):
    assert "cut" not in mmchat_command("generate", "-p", "x", "-n", "3", option).stderr


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (("--max-seq-len", "64"), "--max-seq-len N allows more"),
        ((), "a shorter prompt leaves more room"),
    ],
)
def test_a_full_context_is_said_to_have_cut_the_answer(mmchat_command, given, remedy):
    model = mmchat_command.use(b"A brown dog.")
    most = model.spec.config.text_config.max_position_embeddings
    model.max_seq_len = 64 if given else most
    prompt = "x" * (model.max_seq_len - 5)
    done = mmchat_command("generate", "-p", prompt, *given)
    positions = f"{model.max_seq_len:,} positions"
    assert f"cut because the context of {positions} is full; {remedy}\n" in done.stderr


def test_stop_strings_are_not_printed(mmchat_command):
    assert mmchat_command("generate", "-p", "x", "--stop", "wn d").stdout == "A bro\n"


@pytest.mark.parametrize(
    ("options", "content"),
    [((), "A brown dog.\n"), (("--no-stream",), "A brown dog.\n")],
)
def test_output_goes_to_the_file_and_not_to_stdout(mmchat_command, tmp_path, options, content):
    path = tmp_path / "answer.txt"
    path.write_text("old")
    done = mmchat_command("generate", "-q", "-p", "x", "-o", str(path), *options)
    assert (done.stdout, done.stderr, done.exit_code) == ("", "", 0)
    assert path.read_text() == content
    assert sorted(tmp_path.iterdir()) == [path]


def test_output_holds_json_or_json_lines_too(mmchat_command, tmp_path):
    path = tmp_path / "answer.json"
    mmchat_command("generate", "-p", "x", "--json", "-o", str(path))
    assert json.loads(path.read_text())["text"] == "A brown dog."
    mmchat_command.use(b"ab")
    mmchat_command("generate", "-p", "x", "--stream-json", "-o", str(path))
    assert [json.loads(line)["type"] for line in path.read_text().splitlines()] == [
        "text", "text", "text", "finished",
    ]  # fmt: skip


def test_output_dash_is_stdout(mmchat_command):
    assert mmchat_command("generate", "-p", "x", "-o", "-").stdout == "A brown dog.\n"


def test_a_failure_leaves_the_output_file_as_it_was(mmchat_command, tmp_path):
    path = tmp_path / "answer.txt"
    path.write_text("old")
    mmchat_command.use(b"abcdef").runtime.fail_at = 3
    assert mmchat_command("generate", "-p", "x", "-o", str(path)).exit_code == 1
    assert path.read_text() == "old"


def test_pipes_get_control_characters_untouched(mmchat_command):
    mmchat_command.use(b"\x1b]52;c;aGk=\x07red")
    assert mmchat_command("generate", "-p", "x").stdout == "\x1b]52;c;aGk=\x07red\n"


# Ctrl-C


def interrupting(mmchat_command, after, times=1):
    """A model during whose token number `after` SIGINT comes."""
    model, seen = mmchat_command.use(b"A brown dog."), []

    def hook(logits):
        seen.append(1)
        if len(seen) == after:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return logits

    model.runtime.logits_hook = hook


@pytest.mark.process
def test_ctrl_c_keeps_what_was_said_and_exits_130(mmchat_command):
    interrupting(mmchat_command, after=4)
    done = mmchat_command("generate", "-q", "-p", "x")
    assert (done.stdout, done.stderr, done.exit_code) == ("A br\n", "", 130)


@pytest.mark.process
def test_ctrl_c_with_json_still_prints_the_object(mmchat_command):
    interrupting(mmchat_command, after=4)
    done = mmchat_command("generate", "-q", "-p", "x", "--json")
    assert json.loads(done.stdout)["finish_reason"] == "interrupted"
    assert done.exit_code == 130


@pytest.mark.process
def test_a_second_ctrl_c_aborts_at_once(mmchat_command):
    interrupting(mmchat_command, after=4, times=2)
    done = mmchat_command("generate", "-q", "-p", "x")
    assert (done.stdout, done.exit_code) == ("A b", 130)


@pytest.mark.process
def test_ctrl_c_means_the_usual_again_afterwards(mmchat_command):
    before = signal.getsignal(signal.SIGINT)
    interrupting(mmchat_command, after=2)
    mmchat_command("generate", "-p", "x")
    assert signal.getsignal(signal.SIGINT) is before


def test_pictures_are_read_while_loading_begins(mmchat_command, monkeypatch):
    mmchat_command.use(b"x")
    order = []
    read, load = prompt_input.load_pictures, model_choice.load
    monkeypatch.setattr(prompt_input, "expect_pictures", lambda: order.append("expect"))
    monkeypatch.setattr(model_choice, "begin_loading", lambda *_: order.append("begin"))
    monkeypatch.setattr(
        prompt_input, "load_pictures", lambda *a: (order.append("pictures"), read(*a))[1]
    )
    monkeypatch.setattr(model_choice, "load", lambda *a: (order.append("load"), load(*a))[1])
    done = mmchat_command("generate", "-p", "x", "-i", str(DOG))
    assert done.exit_code == 0, done.stderr
    assert order == ["expect", "begin", "pictures", "load"]
    order.clear()
    mmchat_command("generate", "-p", "x")
    assert "expect" not in order
    order.clear()
    assert mmchat_command("generate", "-p", "x", "-i", __file__).exit_code == 4
    assert "load" not in order  # a bad picture is said before anything is loaded
    order.clear()
    mmchat_command("generate", "-p", "x", "-i", str(DOG), "--dry-run")
    assert "begin" not in order


@pytest.mark.parametrize(
    "prompt", ["What is in ./dog.png?", "dog.png what is it?", "Is\n./dog.png"]
)
def test_a_picture_that_the_prompt_names_and_nobody_sends_is_said(
    mmchat_command, picture, prompt, monkeypatch
):
    monkeypatch.chdir(picture.parent)
    said = "'dog.png' in the prompt is not attached; -i dog.png does that\n"
    assert mmchat_command("generate", "-p", prompt).stderr.endswith(said)
    for arguments in (["-p", prompt, "-i", "dog.png"], ["-p", prompt, "-q"], ["-p", "see dog"]):
        assert "not attached" not in mmchat_command("generate", *arguments).stderr
    address = f"data:image/png;base64,{'iVBO' * 99} what?"
    mmchat_command.use(b"A dog.")
    line = mmchat_command("generate", "-p", address).stderr.splitlines()[-1]
    assert line.count("'data:image/png;base64,iVBO") == 2
    assert len(line) < 300
    page = "see https://example.org/page"
    assert "not attached" not in mmchat_command("generate", "-p", page).stderr


def test_pages_of_a_document_are_pictures(mmchat_command, tmp_path):
    from PIL import Image

    first, *rest = [Image.new("RGB", (30, 40), colour) for colour in ("red", "lime", "blue")]
    paper = tmp_path / "paper.pdf"
    first.save(paper, "PDF", save_all=True, append_images=rest)
    shown = mmchat_command("generate", "-p", "x", f"{paper}#2-3", "--dry-run", "--json")
    sources = [picture["source"] for picture in json.loads(shown.stdout)["images"]]
    assert sources == [f"{paper} page 2", f"{paper} page 3"]
    piped = mmchat_command("generate", "-p", "x", "--dry-run", "--json", stdin=paper.read_bytes())
    sources = [picture["source"] for picture in json.loads(piped.stdout)["images"]]
    assert sources == ["stdin page 1", "stdin page 2", "stdin page 3"]
    asked = mmchat_command("generate", f"Is it in {paper}?", f"{paper}#2")
    assert (asked.exit_code, "is not attached" in asked.stderr) == (0, False)
    before = paper.read_bytes()
    over = mmchat_command("generate", "-p", "x", "-i", f"{paper}#2", "-o", str(paper))
    assert "would replace the picture" in over.stderr
    assert (over.exit_code, paper.read_bytes() == before) == (2, True)
