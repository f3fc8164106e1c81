"""Pictures that clients name: nothing leads out of the folder, or to where it must not."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import shutil
import socket
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

import mmchat.images.web.transport
from mmchat import limits
from mmchat.server.ask import Answering
from mmchat.server.errors import ApiError
from mmchat.server.media import read_media
from mmchat.server.options import ServerOptions
from mmchat.server.pictures import Picture, open_pictures
from tests.server.conftest import ASSETS, about

DOG = ASSETS / "dog.jpg"


def opened(source: str, **options):
    [images] = open_pictures([Picture(source, "field")], ServerOptions(**options), "white", "")
    return images


def refusal(source: str, **options) -> ApiError:
    with pytest.raises(ApiError) as caught:
        opened(source, **options)
    assert caught.value.status == 400
    assert caught.value.param == "field"
    return caught.value


def test_pictures_in_the_request_are_taken_however_they_are_labelled():
    data = base64.b64encode(DOG.read_bytes()).decode()
    same = {
        opened(source)[0].content_hash
        for source in (
            f"data:image/jpeg;base64,{data}", f"data:image/unknown;base64,{data}",
            f"data:;base64,{data}", f"DATA:image/png;BASE64,{data}", data,
            "\n".join(data[i : i + 76] for i in range(0, len(data), 76)),
        )
    }  # fmt: skip
    assert len(same) == 1


@pytest.mark.parametrize(
    "source",
    ["", "x", "AAAA", "data:", "data:image/png;base64,", "data:text/html;base64,AAAA", "dog.jpg",
     "/etc/passwd", "file:///etc/passwd", "/9j/!!!!", "data:image/png;base64,%%%", "ftp://x/y.png"],
)  # fmt: skip
def test_what_is_no_picture_is_refused_and_named(source):
    error = refusal(source)
    assert error.code == "invalid_image"
    assert "passwd" not in error.message


def test_a_picture_of_one_pixel_and_others_that_kill(tmp_path):
    """CVE-2026-22773: a 1×1 picture killed the server."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    [image] = opened(base64.b64encode(buffer.getvalue()).decode())
    assert (image.width, image.height) == (1, 1)
    side = (2**31 - 1).to_bytes(4, "big")
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + 2 * side
    assert refusal(base64.b64encode(bomb + b"\x08\x02\0\0\0" + b"x" * 40).decode())


def test_owners_share_no_hash():
    """CVE-2026-46722 hashed pixels without their size; and a hash of others is no proof."""
    picture = Picture(base64.b64encode(DOG.read_bytes()).decode(), "field")
    hashes = {
        open_pictures([picture], ServerOptions(), "white", owner)[0][0].content_hash
        for owner in ("", "one", "two")
    }
    assert len(hashes) == 3


# ---- S6: paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    media = tmp_path / "media"
    (media / "sub").mkdir(parents=True)
    shutil.copy(DOG, media / "dog.jpg")
    shutil.copy(DOG, media / "sub" / "an other.jpg")
    shutil.copy(DOG, tmp_path / "secret.jpg")
    (media / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (media / "inner.jpg").symlink_to(media / "dog.jpg")
    (media / "out").symlink_to(tmp_path)
    os.mkfifo(media / "pipe.jpg")
    return media


def test_files_of_the_folder_are_read_by_each_way_of_saying_them(folder):
    for source in ("dog.jpg", "sub/an other.jpg", f"{folder}/dog.jpg", f"file://{folder}/dog.jpg",
                   f"file://localhost{folder}/sub/an%20other.jpg"):  # fmt: skip
        assert read_media(folder, source) == DOG.read_bytes()
    assert opened("dog.jpg", media_dir=folder)


@pytest.mark.parametrize(
    "source",
    ["../secret.jpg", "sub/../../secret.jpg", "/etc/passwd", "{folder}/../secret.jpg", "link.jpg",
     "inner.jpg", "out/secret.jpg", "pipe.jpg", "sub", "", ".", "./dog.jpg", "sub//dog.jpg", "/",
     "/dev/zero", "/proc/self/environ", "dog.jpg\0", "dog.jpg\0.png", "file://{folder}/%2e%2e/secret.jpg",
     "file://{folder}/..%2fsecret.jpg", "file://evil/dog.jpg", "file:dog.jpg/..", "~/secret.jpg",
     "missing.jpg", "{folder}x/dog.jpg", "file://[", "//etc/passwd", "dog.jpg/"],
)  # fmt: skip
def test_nothing_leads_out_of_the_folder_and_no_answer_tells_what_is_there(folder, source):
    source = source.format(folder=folder)
    assert read_media(folder, source) is None
    error = refusal(source, media_dir=folder)
    assert error.message == "there is no such picture here"


# ---- S5: addresses


def test_addresses_are_off_unless_asked_for():
    error = refusal("https://example.com/x.png")
    assert error.code == "image_fetch_refused"
    assert "--allow-remote-images" in error.message


@pytest.fixture
def looked_up(monkeypatch):
    """Names and what they mean; no connection is made."""
    names = {
        "inside.example": "10.0.0.5", "here.example": "127.0.0.1", "localhost": "127.0.0.1",
        "meta.example": "169.254.169.254", "2130706433": "127.0.0.1", "0": "0.0.0.0",
        "public.example": "93.184.216.34", "other.example": "93.184.216.35",
    }  # fmt: skip
    asked = []

    def look_up(host, port, **_):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names.get(host, host), port))]

    def send(self, request, url, proxy=None):
        raise AssertionError(f"connects to {url}")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(mmchat.images.web.transport.CheckedTransport, "_send", send)
    return asked


@pytest.mark.parametrize(
    "url",
    ["http://public.example/x.png", "https://inside.example/x.png", "https://here.example/x.png",
     "https://meta.example/latest/meta-data", "https://10.0.0.5/x", "https://[::1]/x", "https://0/x",
     "https://localhost/x", "https://127.0.0.1:5000/health", "https://user:pass@public.example/x",
     "https://public.example\\@inside.example/x", "https://", "https://[", "https://x y/", "http:x",
     "https://2130706433/x", "HTTPS://INSIDE.EXAMPLE/x", "https://public.example:99999/x"],
)  # fmt: skip
def test_private_and_strange_addresses_have_one_answer(looked_up, url):
    """CVE-2025-6242, CVE-2026-24779 and -45400: request forgery, and two parsers of one address."""
    error = refusal(url, remote_images=frozenset())
    assert error.code == "image_fetch_refused"
    assert error.message == refusal("http://x/", remote_images=frozenset()).message


def test_only_hosts_of_the_list_are_asked_also_by_a_redirect(looked_up, monkeypatch):
    """CVE-2026-45401: redirects were not checked."""
    import httpx2

    sent = []

    def send(self, request, url, proxy=None):
        sent.append(request.url.host)
        if request.url.path == "/moved":
            return httpx2.Response(302, headers={"Location": "https://other.example/x"})
        return httpx2.Response(200, content=DOG.read_bytes())

    monkeypatch.setattr(mmchat.images.web.transport.CheckedTransport, "_send", send)
    hosts = frozenset({"public.example"})
    assert opened("https://public.example/x", remote_images=hosts)
    refusal("https://other.example/x", remote_images=hosts)
    refusal("https://public.example/moved", remote_images=hosts)
    assert sent == ["public.example", "public.example"]
    assert opened("https://public.example/moved", remote_images=frozenset())


def test_the_fetch_is_short_and_small(monkeypatch):
    given = {}

    def fetch(url, **settings):
        given.update(settings)
        return DOG.read_bytes()

    monkeypatch.setattr(mmchat.images.web, "fetch", fetch)
    opened("https://public.example/x", remote_images=frozenset())
    assert given == {
        "max_bytes": limits.SERVER_FETCH_BYTES, "allow_private": False, "hosts": frozenset(),
        "seconds": limits.SERVER_FETCH_SECONDS,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/api/chat",
                                  "/api/generate"])  # fmt: skip
def test_an_answer_keeps_nothing_of_the_body_that_asked_for_it(client, monkeypatch, path):
    """A request has up to 32 MiB, and its answer may take long."""
    size = 8 * limits.MIB
    data = base64.b64encode(DOG.read_bytes() + bytes(size)).decode()
    url = f"data:image/jpeg;base64,{data}"
    message = about(url)["messages"][0]
    item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
    theirs = {"role": "user", "content": "Hello", "images": [data]}
    body = {
        "/v1/chat/completions": {"messages": [message], "max_tokens": 1},
        "/v1/responses": {"input": [item], "max_output_tokens": 1},
        "/api/chat": {"model": "tiny", "messages": [theirs], "stream": False},
        "/api/generate": {"model": "tiny", "prompt": "Hello", "images": [data], "stream": False},
    }[path]
    body["options"] = {"num_predict": 1}
    content = json.dumps(body).encode()
    kept = []
    end = Answering._count

    def looks(answering):
        gc.collect()
        kept.append(tracemalloc.get_traced_memory()[0] - before)
        end(answering)

    monkeypatch.setattr(Answering, "_count", looks)
    client.post(path, json={**body, "images": None})  # imports
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept.clear()
        assert client.post(path, content=content).status_code == 200
    finally:
        tracemalloc.stop()
    assert len(kept) == 1
    assert kept[0] < size


def test_pages_are_counted_over_all_documents(monkeypatch):
    first, *others = [Image.new("L", (8, 8), shade) for shade in range(limits.IMAGES_PER_PROMPT)]
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=others)
    source = base64.b64encode(buffer.getvalue()).decode()
    documents = [Picture(source, f"field{i}") for i in range(8)]
    opened = []
    real = mmchat.images.load_images
    monkeypatch.setattr(
        mmchat.images,
        "load_images",
        lambda *given, **more: opened.append(1) or real(*given, **more),
    )
    assert len(open_pictures(documents[:1], ServerOptions(), "white", "")[0]) == len(others) + 1
    with pytest.raises(ApiError, match="fewer pages") as caught:
        open_pictures(documents, ServerOptions(), "white", "")
    assert (caught.value.code, caught.value.param) == ("invalid_image", "field1")
    assert len(opened) == 2


def test_pages_that_do_not_fit_are_not_decoded(monkeypatch):
    """Of a picture and a document of 16 pages the document is refused by its count."""
    first, *others = [Image.new("L", (8, 8), shade) for shade in range(limits.IMAGES_PER_PROMPT)]
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=others)
    document = base64.b64encode(buffer.getvalue()).decode()
    decoded = []
    real = mmchat.images._decode
    monkeypatch.setattr(mmchat.images, "_decode", lambda *one: decoded.append(one) or real(*one))
    dog = base64.b64encode(DOG.read_bytes()).decode()
    with pytest.raises(ApiError, match="are 17 together") as caught:
        open_pictures([Picture(dog, "a"), Picture(document, "b")], ServerOptions(), "white", "")
    assert (caught.value.code, caught.value.param) == ("invalid_image", "b")
    assert len(decoded) == 1
