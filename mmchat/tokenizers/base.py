"""What every tokenizer can do, and decoding that never shows half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from mmchat import limits
from mmchat.errors import CheckpointError, MmchatError, PromptError, quoted

IMAGE_TOKEN = "<|image|>"  # noqa: S105
REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer:
    """Text to token ids and back. Text never becomes a special token, whatever it says.

    tokens: bytes of the ordinary tokens by id. special_tokens: names and ids, behind the ordinary
    ones, as the tokenizer's own format names them. tags: names of special tokens that mark up text,
    and so are text: `encode` gives them where they are typed, and answers show them. vocab_size:
    ordinary and special tokens, without the model's image token, which has this id.
    """

    def __init__(
        self, tokens: Sequence[bytes], special_tokens: Mapping[str, int], tags: Collection[str] = ()
    ) -> None:
        self.tokens = tokens
        self.special_tokens = dict(special_tokens)
        self.tags = {name: self.special_tokens[name] for name in tags}
        self._tag_ids = frozenset(self.tags.values())
        self._special_bytes = {i: name.encode() for name, i in self.special_tokens.items()}
        size = max([len(tokens) - 1, *self.special_tokens.values()]) + 1
        # In the Hub's files the image token comes behind the ids that the model can produce.
        image_is_last = self.special_tokens.get(IMAGE_TOKEN) == size - 1
        self.vocab_size = size - 1 if image_is_last else size
        self._special_bytes[self.vocab_size] = IMAGE_TOKEN.encode()

    def encode(self, text: str) -> list[int]:
        """Ordinary token ids of `text`: the names of special tokens in it, but for tags, are text.

        Raises PromptError over the size limit.
        """
        return self._encoded(text, self._ids)

    def _ids(self, text: str) -> list[int]:
        """What the library that runs it makes of clean text."""
        raise NotImplementedError

    def _encoded(self, text: str, ids_of: Callable[[str], list[int]]) -> list[int]:
        """What `ids_of` makes of clean text, after making sure that no special id is among them."""
        text = clean_text(text)
        with refusals(lambda reason: PromptError(f"the text cannot be encoded: {reason}")):
            ids = ids_of(text)
        ordinary, special = len(self.tokens), self._special_bytes
        if any((i >= ordinary or i in special) and i not in self._tag_ids for i in ids):
            raise PromptError("the text encodes to a special token; this must not happen")
        return ids

    def encode_rest(self, text: str) -> list[int]:
        """The same where `text` goes on behind other tokens: their bytes are its bytes."""
        return self.encode(text)

    def special_id(self, name: str) -> int:
        """Id of one special token. Raises CheckpointError if there is none of that name."""
        if name not in self.special_tokens:
            raise CheckpointError(f"the tokenizer has no special token {name!r}")
        return self.special_tokens[name]

    def is_special(self, token_id: int) -> bool:
        """Whether `token_id` is a special token or the image token."""
        return token_id in self._special_bytes and token_id not in self._tag_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token: the name of a special one, U+FFFD for an unknown id."""
        if 0 <= token_id < len(self.tokens):
            return self.tokens[token_id]
        return self._special_bytes.get(token_id, REPLACEMENT)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 and unknown ids become U+FFFD."""
        wanted = (i for i in ids if not (skip_special and self.is_special(i)))
        return b"".join(map(self.token_bytes, wanted)).decode("utf-8", "replace")


@contextmanager
def refusals(refused: Callable[[str], MmchatError]) -> Iterator[None]:
    """Within the block, what a library raises becomes an error, made of its reason.

    Panics of Rust are no subclass of Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refused(quoted(str(error))) from None


def clean_text(text: str) -> str:
    """`text` as it can be encoded: lone surrogates become U+FFFD, pairs of them one character.

    Raises PromptError if it is over the size limit.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        size = len(text.encode())
    if size > limits.PROMPT_BYTES:
        raise PromptError(
            f"the text has {size:,} bytes; at most {limits.PROMPT_BYTES:,} are possible"
        )
    return text


class StreamDecoder:
    """Text of token ids that come one by one; a character appears when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes; '' for a special token that is left out."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def extend(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete."""
        return "".join(map(self.push, ids))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character. Ready for new text then."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
