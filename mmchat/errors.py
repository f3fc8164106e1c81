"""Everything that can go wrong for a reason the user can act on.

MmchatError                    exit 1
├── UsageError                 exit 2   arguments that contradict each other
│   └── SchemaError            exit 2   a JSON schema that no answer can be held to
├── PromptError                exit 2   text or pictures that cannot form a prompt
│   └── ContextLengthExceeded  exit 2
├── ParamsError                exit 3   a params JSON or config is wrong
├── CheckpointError            exit 3   weights or tokenizer files missing or damaged
├── SavedChatError             exit 1   a saved chat is missing or damaged
├── ImageError                 exit 4   a picture cannot be read
├── MemoryError_               exit 5   the model does not fit
├── NetworkError               exit 6   a server did not give what was asked
│   ├── GatedError             exit 6
│   └── NotFoundError          exit 6
├── DiskError                  exit 7   no space, or a file cannot be written
├── DeviceError                exit 1   the device or dtype cannot be had
├── MissingExtra               exit 1   an optional dependency is not installed
├── CompileError               exit 1   torch.compile cannot be used here
├── ExportError                exit 1
├── NumericalError             exit 1   the model produced NaN or infinity
└── RankError                  exit 1   a process that shares the model failed; 5 without memory

A message says which value, why not, and what to do next, in one line. Any other exception is a bug.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED_EXIT_CODE = 130  # after Ctrl-C
_WITHOUT_QUOTES = (int, float, bytes, list, tuple, dict, type(None))
_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")


class MmchatError(Exception):
    """Base of all errors that a user can cause; `str(error)` is one line without a traceback."""

    exit_code = 1


class UsageError(MmchatError):
    """Arguments that contradict each other or miss something."""

    exit_code = 2


class SchemaError(UsageError):
    """A JSON schema that is none, is too large, or asks for what cannot be enforced."""


class PromptError(MmchatError):
    """Text or pictures from which no prompt can be made."""

    exit_code = 2


class ContextLengthExceeded(PromptError):
    """The prompt, or the prompt and the answer asked for, is longer than the context."""


class ParamsError(MmchatError):
    """A params JSON, config.json or params.json that is wrong, or an unknown model name."""

    exit_code = 3


class CheckpointError(MmchatError):
    """Weights or tokenizer files that are missing, damaged or do not fit the configuration."""

    exit_code = 3


class SavedChatError(MmchatError):
    """A saved chat that is missing, damaged or not one."""


class ImageError(MmchatError):
    """A picture that cannot be opened, decoded or is over the limits."""

    exit_code = 4


class MemoryError_(MmchatError):
    """The model or the conversation does not fit into memory."""

    exit_code = 5


class NetworkError(MmchatError):
    """A server could not be reached or did not give what was asked."""

    exit_code = 6


class GatedError(NetworkError):
    """The repository is gated and access was not granted."""


class NotFoundError(NetworkError):
    """The server says that the repository, revision or file does not exist."""


class DiskError(MmchatError):
    """A file cannot be written, or there is no space for it."""

    exit_code = 7


class DeviceError(MmchatError):
    """The device or dtype asked for cannot be had."""


class MissingExtra(MmchatError):
    """An optional dependency is not installed; the message names the extra."""


class CompileError(MmchatError):
    """The model cannot be compiled on this machine."""


class ExportError(MmchatError):
    """An export cannot be made or run."""


class NumericalError(MmchatError):
    """The model produced NaN or infinite logits."""


class RankError(MmchatError):
    """A process that shares the model is gone or does not answer, so that nothing can go on."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def disk_errors(what: str, advice: str = "") -> Iterator[None]:
    """Within the block, an OSError becomes a DiskError: `what` cannot be done, why, the advice."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DiskError(f"{what}: {reason}{advice and f'; {advice}'}") from None


@contextmanager
def permission_errors(kind: type[MmchatError]) -> Iterator[None]:
    """Within the block or decorated function, what may not be read is an error of `kind`."""
    try:
        yield
    except PermissionError as error:
        raise kind(not_permitted(error)) from None


def not_permitted(error: PermissionError) -> str:
    """Which file or folder the system keeps from the user, and what helps."""
    return f"{quoted(error.filename, 300)}: permission denied; change its permissions, or its owner"


def check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise UsageError if the argument `name` is not one of `kinds`; wanted: these, in words.

    True and False are no numbers.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        kind = type(value).__name__
        raise UsageError(f"{name} must be {wanted}, not {kind} {quoted(value)}")


def quoted(value: object, width: int = 100) -> str:
    """A value from outside, for a message: escaped, and the middle of a long one cut.

    Text and paths are in quotes, and addresses without passwords; numbers and lists are as in code.
    """
    if not isinstance(value, _WITHOUT_QUOTES):
        return repr(shortened(str(value), width))
    try:
        return shortened(repr(value[:width] if isinstance(value, bytes | list) else value), width)
    except ValueError:
        return f"{type(value).__name__} of very many digits"


def shortened(text: str, width: int) -> str:
    """`text`, the middle of a long one cut."""
    text = without_password(text)
    return text if len(text) <= width else f"{text[: width // 2]}…{text[len(text) - width // 2 :]}"


def without_password(text: str) -> str:
    """`text` with what addresses in it say before the host, name and password, as `…`."""
    return _LOGIN.sub("…@", text)
