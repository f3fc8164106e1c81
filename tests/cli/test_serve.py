"""`mmchat serve`: what its options become, before anything listens."""

import sys

import pytest

from mmchat.server import running

REMOTE = "--allow-remote-images"
KEY = "a-key-of-somebody-1"


@pytest.fixture
def served(monkeypatch):
    """What would be served: (ServerOptions, what loads the model) of each run."""
    calls = []

    def serve(options, sockets, load, ready):
        calls.append((options, load()))
        return 0

    monkeypatch.setattr(running, "bind", lambda options: [None])
    monkeypatch.setattr(running, "url", lambda bound: "http://127.0.0.1:5000")
    monkeypatch.setattr(running, "serve", serve)
    return calls


def test_options_become_what_is_served(mmchat_command, served, tmp_path, monkeypatch):
    monkeypatch.setenv("MMCHAT_API_KEY", KEY)
    keys = tmp_path / "keys"
    keys.write_text(f"phone: {KEY}2\n")
    done = mmchat_command(
        "serve", "--host", "0.0.0.0", "--port", "0", "--ollama", "--max-rows", "3",
        "--kv-memory", "1.5G", "--queue", "7", "--drain", "2.5", "--api-key-file", str(keys),
        "--allow-remote-images", "--media-dir", str(tmp_path), "--allowed-host", "box",
        "--allow-origin", "https://a.example", "--strict-model", "--no-page", "--log-content",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    [(options, _)] = served
    assert (options.host, options.port, options.ollama_port) == ("0.0.0.0", 0, 11434)
    assert (options.rows, options.kv_memory, options.queue) == (3, 3 * 2**29, 7)
    assert options.keys == {"phone": f"{KEY}2", "key": KEY}
    assert options.remote_images == frozenset()
    assert options.allowed_hosts == {"box"}
    assert options.allowed_origins == {"https://a.example"}
    assert (options.strict_model, options.page, options.log_content) == (True, False, True)
    assert KEY not in repr(options)


def test_a_page_that_is_not_served_is_not_opened(mmchat_command, served):
    done = mmchat_command("serve", "--open", "--no-page")
    assert (done.exit_code, served) == (2, [])
    assert "there is no page to --open" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--media-dir", "nowhere", "no folder"),
        ("--allowed-host", "http://box/", "write it as box.example"),
        ("--allowed-host", "box:5000", "write it as box.example"),
        ("--media-dir", "", "it is empty"),
        ("--allow-remote-images", "", "is empty"),
        ("--kv-memory", "0", "'0' is no size"),
        ("--kv-memory", "0.1", "'0.1' is no size"),
        ("--api-key-file", "", "it is empty"),
        ("--allow-remote-images", "https://a.example", "write it as a.example"),
        ("--allow-origin", "https://app.example/", "write it as https://app.example"),
        ("--allow-origin", "app.example", "write it as https://app.example"),
        ("--allow-origin", "*", "is never what a request says"),
    ],
)
def test_what_would_never_hold_is_refused_at_once(mmchat_command, served, option, value, word):
    done = mmchat_command("serve", f"{option}={value}")
    assert (done.exit_code, served) == (2, []), done.stderr
    assert option in done.stderr
    assert word in done.stderr


def test_what_is_left_out_is_closed(mmchat_command, served):
    assert mmchat_command("server").exit_code == 0
    [(options, _)] = served
    assert options == type(options)()
    assert (options.remote_images, options.media_dir, options.ollama_port) == (None, None, None)


@pytest.mark.parametrize(
    "given", ["--allow-remote-images=a.example, b.example", "--allow-remote-images"]
)
def test_hosts_of_pictures_may_be_named(mmchat_command, served, given):
    assert mmchat_command("serve", given, "tiny").exit_code == 0
    [(options, _)] = served
    assert options.remote_images == ({"a.example", "b.example"} if "=" in given else frozenset())


def test_the_context_of_a_request_is_not_the_models_whole_one(mmchat_command, served):
    mmchat_command("serve")
    mmchat_command("serve", "--max-seq-len", "100")
    assert [loaded.max_seq_len for loaded in mmchat_command.loaded] == [8_192, 100]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--host", "192.168.1.5"), 2, "give keys with --api-key-file"),
        (("--kv-memory", "lots"), 2, "'lots' is no size; write 8G"),
        (("--queue", "-1"), 2, "--queue"),
        (("--max-rows", "65"), 2, "--max-rows"),
        (("--api-key-file", "/no/such/file"), 2, "no such file"),
    ],
)
def test_what_cannot_be_served_is_said(mmchat_command, served, arguments, code, said):
    done = mmchat_command("serve", *arguments)
    assert done.exit_code == code
    assert said in done.stderr
    assert served == []


def test_without_the_extra_it_is_named(mmchat_command, monkeypatch):
    found = {"uvicorn": None}
    monkeypatch.setattr("mmchat.cli.serve.find_spec", lambda name: found.get(name, name))
    done = mmchat_command("serve")
    assert done.exit_code == 1
    assert done.stderr == "mmchat: error: a server needs uvicorn: pip install 'mmchat[server]'\n"


def test_the_page_is_opened_when_it_is_ready(mmchat_command, served, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(
        running, "serve", lambda options, sockets, load, ready: (ready(None) and 0) or 0
    )
    mmchat_command("serve", "-q", "--open")
    assert opened == ["http://127.0.0.1:5000"]
    assert "mmchat.cli.serve" in sys.modules
