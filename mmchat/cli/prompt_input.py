"""Put the prompt together from --prompt and stdin, and read the pictures."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from mmchat import limits
from mmchat.cli import console
from mmchat.errors import ImageError, PromptError, UsageError
from mmchat.input_text import NotTextError, checked, decoded
from mmchat.loading.options import PATHS, LoadOptions
from mmchat.storage import atomic_file
from mmchat.words import TEXT_ALONE, USUAL_QUESTION

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.conversation import Image

STDIN = "-"
SILENT_STDIN_SECONDS = 2.0
BASE64_LETTERS = 64  # of a line of base64, where it has lines


@dataclass(frozen=True)
class PromptInput:
    """The question and where its pictures are; `stdin_image` are the bytes of the source `-`.

    typed: what of the text stood on the command line. notes: what was taken for granted.
    """

    text: str
    sources: tuple[str, ...]
    stdin_image: bytes | None
    notes: tuple[str, ...] = ()
    typed: str = ""


def gather(prompt: str | None, sources: list[str], *, allow_blank: bool) -> PromptInput:
    """Join stdin and --prompt, stdin first; stdin is the picture instead if a source is `-`.

    A picture on stdin beside a prompt is the first picture. Pictures without any text, where no
    text can come, get the usual question. Raises UsageError if there is no prompt or stdin is asked
    for two things, PromptError if the text is too long or not UTF-8, or the pictures are too many.
    """
    prompt = None if prompt is None else checked(prompt, "--prompt")
    notes: tuple[str, ...] = ()
    may_ask = sources and STDIN not in sources and not allow_blank
    if prompt is None and may_ask and not console.is_piped(True):
        prompt = USUAL_QUESTION
        notes = (f'no question is given; asking "{prompt}"',)
    if sources.count(STDIN) > 1:
        raise UsageError(
            "'-i -' is given twice, but stdin holds one picture; give the other a path"
        )
    if STDIN in sources:
        if prompt is None:
            raise UsageError("'-i -' takes the picture from stdin, so give the text with --prompt")
        image = read_image_bytes()
        text = prompt
    else:
        piped, image = _stdin_text(have_prompt=prompt is not None)
        text = piped if prompt is None else prompt
        if prompt is not None and piped.strip():
            text = f"{piped.rstrip()}\n\n{prompt}"
        sources = sources if image is None else [STDIN, *sources]
    if len(sources) > limits.IMAGES_PER_PROMPT:
        count, limit = len(sources), limits.IMAGES_PER_PROMPT
        raise PromptError(f"{count} pictures are given; one prompt takes at most {limit}")
    if len(text.encode()) > limits.PROMPT_BYTES:
        raise PromptError(f"the prompt is longer than {limits.PROMPT_BYTES // limits.MIB} MiB")
    if not text.strip() and not (allow_blank and sources):
        raise UsageError("the prompt is empty; give a question with --prompt TEXT or on stdin")
    return PromptInput(text, tuple(sources), image, notes, prompt or "")


def read_image_bytes() -> bytes:
    """The picture on stdin; UsageError if stdin is a terminal, ImageError if it is empty."""
    if console.is_terminal(sys.stdin):
        raise UsageError("'-' reads a picture from stdin, which is a terminal; pipe a file into it")
    data = _read_stdin(limits.IMAGE_BYTES, ImageError, "picture")
    if not data:
        raise ImageError("stdin is empty; pipe the bytes of a picture into it")
    return data


def expect_pictures() -> None:
    """Start the process that decodes pictures, so that it is ready when the first one comes."""
    from mmchat.images import worker

    worker.pool.start()


def check_pictures(sources: Sequence[str]) -> None:
    """See that files are there and are pictures, before anything slow is begun; fetches nothing.

    Raises ImageError.
    """
    from mmchat.images.sources import check_file

    for source in sources:
        if source != STDIN:
            check_file(source)


def check_output(
    file: Path | None,
    option: str,
    sources: Sequence[str] = (),
    endings: Sequence[str] = (),
    model: LoadOptions | None = None,
) -> None:
    """See that a file that `option` names, if it does, can be written later.

    It replaces none of `sources`, the pictures asked about, and none of the files of `model`.
    endings: those that its name may have; any if there are none. Raises UsageError, DiskError.
    """
    if file is None:
        return
    if endings and file.suffix.lower() not in endings:
        raise UsageError(f"{option} {str(file)!r}: end the name in {' or '.join(endings)}")
    atomic_file.check_writable(file)
    refuse_overwriting(file, sources, option)
    if model is not None:
        keep_own_files(file, option, model)


def refuse_overwriting(
    output: Path, sources: Iterable[str], option: str, what: str = "the picture that is asked about"
) -> None:
    """Raises UsageError if a file that is to be written is one of those that are read.

    Whatever it is called there: by a link, another path, a `file:` address or with pages behind it.
    """
    from mmchat.images.sources import file_of

    try:
        written = output.stat()
    except (OSError, ValueError):
        return
    for source in sources:
        with suppress(OSError, ValueError, RuntimeError, ImageError):  # not there, or no name
            file = file_of(source)
            if file is not None and os.path.samestat(file.stat(), written):
                raise UsageError(f"{option} {str(output)!r} would replace {what}")


def refuse_one_file(option: str, file: Path | None, other: str, second: Path | None) -> None:
    """Raises UsageError if two options would write one regular file."""
    if file is None or second is None or os.path.realpath(file) != os.path.realpath(second):
        return
    if file.is_file() or not file.exists():  # /dev/null may be both
        raise UsageError(f"{option} and {other} would both write {str(file)!r}; name two files")


def keep_own_files(
    output: Path | None, option: str, model: LoadOptions, schema: str | None = None
) -> None:
    """Raises UsageError if `output` is a file that the model or a schema is read from."""
    if output is not None:
        named = [str(path) for name in PATHS if (path := getattr(model, name)) is not None]
        refuse_overwriting(output, named, option, "a file of the model")
        refuse_overwriting(output, [schema] if schema else [], option, "the schema")


def check_model(
    spec: ModelSpec, *, has_pictures: bool, system: str | None = None, chats: bool = False
) -> None:
    """Raises UsageError for what this model does not take, before it is loaded."""
    if chats and spec.chat_format == "base":
        from mmchat.catalog.known import answering_sibling

        raise UsageError(
            f"{spec.name} is a base model, which continues text and cannot chat;"
            f" {answering_sibling(spec) or 'an Instruct model'} can, and mmchat generate lets it"
            " continue"
        )
    if has_pictures and spec.text_only:
        raise UsageError(f"{spec.name}: {TEXT_ALONE}; leave them out, or take a whole model")
    if system is not None and spec.chat_format == "base":
        raise UsageError(f"--system does not fit {spec.name}: a base model has no roles")


def load_pictures(given: PromptInput, alpha: Literal["white", "drop"]) -> list[Image]:
    """Decode every picture in order, and note what was seen. Raises as `images.load_images`."""
    if not given.sources:
        return []
    from mmchat.images import load_images

    piped = given.stdin_image
    sources = [s if s != STDIN or piped is None else piped for s in given.sources]
    names = ["stdin" if source is piped else None for source in sources]
    with console.Stages() as stages:
        stages.show("reading the picture" + "s" * (len(sources) > 1))
        images = load_images(sources, alpha=alpha, names=names)
    console.note(*(f"{one.source}: {notice}" for one in images for notice in one.notices))
    return images


def _stdin_text(*, have_prompt: bool) -> tuple[str, bytes | None]:
    """Text piped into stdin, without its last newline, or else a picture beside a prompt.

    Nothing if stdin is a terminal.
    """
    if console.is_terminal(sys.stdin):
        if not have_prompt:
            raise UsageError("no prompt is given; use --prompt TEXT or pipe the text into stdin")
        return "", None
    data = _read_stdin(limits.PROMPT_BYTES, PromptError, "text", or_picture=have_prompt)
    if have_prompt and _is_picture(data):
        return "", data
    with picture_named():
        text = decoded(data, "stdin")
    refuse_base64(data)
    return text.removesuffix("\n").removesuffix("\r"), None


def _is_picture(data: bytes) -> bool:
    from mmchat.images.formats import picture_format

    head = data[:512]
    is_binary = b"\0" in head or head.startswith(b"%PDF-")  # "BMW" begins like a BMP
    return is_binary and picture_format(head) is not None


@contextmanager
def picture_named() -> Iterator[None]:
    """Within the block, a picture in the place of text gets the command that asks about it."""
    try:
        yield
    except NotTextError as error:
        from mmchat.images.formats import picture_format

        kind = picture_format(error.data)
        if kind is None:
            raise
        raise PromptError(
            f"stdin is a picture ({kind}), not text; to ask about it:"
            " mmchat generate -i - --prompt TEXT"
        ) from None


def refuse_base64(data: bytes) -> None:
    """Raise PromptError for text that is a picture in base64, which is no question.

    A `data:` URL names a picture, with a question behind it perhaps.
    """
    from mmchat.images.formats import format_in_base64, is_data_url

    line = data[:1024].strip().partition(b"\n")[0].rstrip()
    is_one_word = len(line) >= BASE64_LETTERS and len(line.split()) == 1
    kind = format_in_base64(line) if is_one_word and not is_data_url(line) else None
    if kind is not None:
        raise PromptError(
            f"stdin is a picture ({kind}) as base64 text; to ask about it:"
            " base64 -d | mmchat generate -i - --prompt TEXT"
        )


def _read_stdin(
    limit: int, error: type[Exception], what: str, *, or_picture: bool = False
) -> bytes:
    """All bytes of stdin; says that it waits when nothing comes for a while.

    or_picture: where they are one, it may be as large as a picture.
    """
    stream: BinaryIO = sys.stdin.buffer
    waiting = threading.Timer(SILENT_STDIN_SECONDS, _say_waiting, [stream])
    waiting.daemon = True
    waiting.start()
    try:
        data = stream.read(limit + 1)
        if or_picture and len(data) > limit and _is_picture(data):
            limit, error, what = limits.IMAGE_BYTES, ImageError, "picture"
            data += stream.read(limit + 1 - len(data))
    except OSError as problem:
        raise error(f"stdin cannot be read: {problem.strerror or problem}") from None
    finally:
        waiting.cancel()
    if len(data) > limit:
        raise error(f"the {what} on stdin is longer than {limit // limits.MIB} MiB")
    return data


def _say_waiting(stream: BinaryIO) -> None:
    try:
        silent = not select.select([stream], [], [], 0)[0]
    except (OSError, ValueError):
        return
    if silent:
        console.note("reading stdin until it ends (write '< /dev/null' to give none)")
