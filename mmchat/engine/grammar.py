"""Answers that obey a JSON schema: at each token, those that cannot go on are left out.

llguidance says which these are. It walks the tokens' bytes along the schema, so any tokens that
spell an allowed value may come, and special tokens never do before the value is complete.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from mmchat import limits
from mmchat.engine import schema as schemas
from mmchat.errors import MissingExtra, MmchatError, SchemaError, shortened
from mmchat.strict_json import Where

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

    from mmchat.tokenizers.base import Tokenizer

T = TypeVar("T")
GRAMMARS_KEPT = 16  # that were used last; those of the largest schemas have 6 MiB each
# Models write worse JSON without any white space (arrays end at once), and some write it without
# end where they may: a space, or a line break and an indentation, is enough.
_WHITESPACE = r"( |\n {0,12})?"
# Text that does not begin as a call does; (?s:.) is any character, line breaks too.
_TEXT_OR = "start: TEXT | value\nTEXT: /\\s*[^\\s{{](?s:.)*/\nvalue: %json {}\n"
# A schema bounds neither the digits of a number nor those of its exponent.
_NUMBER = re.compile(rb"-?\d[\d.]*([eE][+-]?\d*)?$")
_NUMBER_BEGIN = re.compile(rb"-?[\d.]+([eE][+-]?\d+)?")
_STRING = re.compile(rb'"([^"\\]|\\.)*"', re.DOTALL)
_SHORT, _LONGEST = 300, 400  # digits of a number: 309 before its point may be infinite
_REASON_CHARACTERS = 160  # a reason may hold all of a value that the schema has
_WHOLE = "$defs", "whole"  # where a schema is put to look at a part of it
_SAID = (
    (r"^NoExtension.*", "no text obeys it"),
    (r"^Unimplemented keys: \[(.*)\]$", r"\1 cannot be enforced; leave it out"),
    (r"^Resource '(.*)' is not present .*", r"$ref to \1; only places of the schema (#/…) can be"),
    (r"^Pointer '(.*)' does not exist$", r"$ref to #\1, which is not there"),
)


class Grammars:
    """Compiles schemas for one model; its tokens are brought into order once, when first needed."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int], vocab_size: int) -> None:
        self._source, self._stop_ids, self._vocab_size = tokenizer, stop_ids, vocab_size
        self._kept = lru_cache(GRAMMARS_KEPT)(self._compile)

    def compile(
        self, schema: object, *, lenient: bool = False, or_text: bool = False, owner: str = ""
    ) -> Grammar:
        """The grammar of a schema, as engine.schema.as_text takes one.

        lenient: leave out what cannot be enforced, and say so in `notices`, instead of refusing it.
        or_text: the answer may be any text instead that does not begin with `{`. owner: each
        compiles for itself, so that nobody can tell by the time what others asked for. Raises
        SchemaError, MissingExtra.
        """
        return self._kept(owner, schemas.as_text(schema), lenient, or_text)

    def _compile(self, _: str, text: str, lenient: bool, or_text: bool) -> Grammar:
        matcher = _compiled(text, self._tokenizer, lenient, or_text)
        unenforced = r"^Unimplemented keys: \[(.*)\]$"
        warnings = matcher.get_grammar_warnings()
        notices = tuple(re.sub(unenforced, r"\1 is not enforced", one) for one in warnings)
        return Grammar(matcher, self._vocab_size, self._source.token_bytes, or_text, notices)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        LLTokenizer = _library().LLTokenizer  # noqa: N806
        stops = sorted(self._stop_ids)
        words = _Words(self._source, stops[0] if stops else 0)
        return LLTokenizer(words, n_vocab=self._vocab_size, eos_token=stops or None)  # type: ignore[arg-type]


def check(schema: object) -> None:
    """Raises SchemaError if no answer can be held to the schema, MissingExtra without llguidance.

    Needs no model: what is wrong with it is known before one is loaded.
    """
    _compiled(schemas.as_text(schema), _library().LLTokenizer("byte"), False, False)


@dataclass(frozen=True, eq=False)
class Grammar:
    """What an answer must be. or_text: as `compile` takes it. notices: what of the schema is not
    enforced."""

    matcher: LLMatcher
    vocab_size: int
    token_bytes: Callable[[int], bytes]
    or_text: bool = False
    notices: tuple[str, ...] = ()

    def begin(self) -> Guide:
        """For one answer."""
        return Guide(self)


class Guide:
    """How far one answer has come in its grammar.

    length: tokens after which the value is complete and nothing can follow; None until then.
    Whatever fails raises SchemaError: some schemas turn out to be too complex on the way.
    """

    def __init__(self, grammar: Grammar) -> None:
        import numpy

        self.length: int | None = None
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._accepted = 0
        self._text = b""
        self._words = numpy.empty((1, (grammar.vocab_size + 31) // 32), dtype=numpy.int32)

    def allowed(self) -> Tensor:
        """bool [V] on the CPU: the tokens that may come next; one at least."""
        import numpy
        import torch
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._words)
        self._check()
        bits = numpy.unpackbits(self._words.view(numpy.uint8)[0], bitorder="little")
        allowed = bits[: self._grammar.vocab_size].view(numpy.bool_)
        if number := self._number():
            infinite = [
                one for one in numpy.flatnonzero(allowed).tolist() if self._is_infinite(number, one)
            ]
            if len(infinite) < allowed.sum():
                allowed[infinite] = False
        return torch.from_numpy(allowed)

    def _number(self) -> bytes:
        """The number that the value ends in so far, if it does: not within a string."""
        text = self._text
        found = _NUMBER.search(text, max(len(text) - _LONGEST, 0))
        if found is None or (self._grammar.or_text and not text.lstrip().startswith(b"{")):
            return b""
        return b"" if b'"' in _STRING.sub(b"", text) else found[0]

    def _is_infinite(self, number: bytes, token_id: int) -> bool:
        """Whether a number that goes on with this token is infinite when it is read as a double."""
        text = number + self._grammar.token_bytes(token_id)
        if len(text) < _SHORT and b"e" not in text and b"E" not in text:
            return False
        found = _NUMBER_BEGIN.match(text)
        return found is not None and math.isinf(float(found[0]))

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        self._matcher.consume_token(token_id)
        self._check()
        self._accepted += 1
        self._text += self._grammar.token_bytes(token_id)
        if self.length is None and self._matcher.is_stopped():
            self.length = self._accepted

    def forced(self) -> list[int]:
        """The tokens of the text that must come next, if there is one: no other text can."""
        return self._matcher.compute_ff_tokens()

    def valid(self, draft: Sequence[int]) -> list[int]:
        """The beginning of a draft that may come."""
        return list(draft[: self._matcher.validate_tokens(list(draft))])

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            if reason.startswith("NoExtension"):
                reason = "no text obeys it from here on"
            raise SchemaError(f"the schema cannot be followed any further: {reason}; change it")


# ---- compiling ----------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtra(
            "answers by a JSON schema need llguidance: pip install 'mmchat[server]'"
        ) from None
    return llguidance


def _compiled(text: str, tokenizer: LLTokenizer, lenient: bool, or_text: bool) -> LLMatcher:
    """Raises SchemaError that names the place."""
    schema = json.loads(text)
    where = Where("schema", error=SchemaError)
    until = time.monotonic() + limits.SCHEMA_SECONDS

    def work() -> LLMatcher:
        matcher = _matcher(schema, tokenizer, lenient, or_text)
        if matcher.is_error():
            raise _refusal(schema, matcher, tokenizer, lenient, until)
        return matcher

    found = _within(limits.SCHEMA_SECONDS, work)
    if found is None:
        raise where.fail(f"takes longer than {limits.SCHEMA_SECONDS:g} s to compile; simplify it")
    return found


def _matcher(schema: Any, tokenizer: LLTokenizer, lenient: bool, or_text: bool) -> LLMatcher:
    """One that may be in error: it is also where no text can begin."""
    llguidance = _library()
    settings = {"whitespace_pattern": _WHITESPACE, "lenient": lenient, "coerce_one_of": True}
    if or_text:
        inner = json.dumps({**schema, "x-guidance": settings})
        grammar = llguidance.LLMatcher.grammar_from_lark(_TEXT_OR.format(inner))
    else:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=settings)
    bounds = llguidance.LLParserLimits(
        max_grammar_size=limits.GRAMMAR_SYMBOLS, verbose_errors=False
    )
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=bounds)
    if matcher.is_error():
        return matcher
    begun = matcher.deep_copy()
    begun.compute_bitmask()
    return begun if begun.is_error() else matcher


def _refusal(
    schema: Any, matcher: LLMatcher, tokenizer: LLTokenizer, lenient: bool, until: float
) -> MmchatError:
    """Why the schema cannot be used, with the innermost place that cannot be alone."""
    where = Where("schema", error=SchemaError)
    reason, found = matcher.get_error(), ()
    whole = schemas.moved(schema, _WHOLE)
    parts = list(schemas.places(schema))
    known = {schemas.pointer(path) for path, _ in parts}
    # those last that only refer to another place, which is the one to be named
    parts.sort(key=lambda part: isinstance(part[1], dict) and str(part[1].get("$ref")) in known)
    for path, _ in parts:
        if time.monotonic() > until:
            break
        part = {"$ref": schemas.pointer((*_WHOLE, *path)), "$defs": {"whole": whole}}
        alone = _matcher(part, tokenizer, lenient, or_text=False)
        if alone.is_error():
            reason, found = alone.get_error(), path
            break
    for key in found:
        where = where.child(key)
    theirs = _first_line(reason).replace(schemas.pointer(_WHOLE)[1:], "")
    said = (re.subn(pattern, ours, theirs) for pattern, ours in _SAID)
    return where.fail(next((ours for ours, count in said if count), f"{theirs}; change that"))


def _first_line(error: str) -> str:
    """The reason without the state of the parser behind it, and without drawings."""
    first, *rest = error.strip().splitlines() or ["no reason is given"]
    detail = next((line.removeprefix("error: ") for line in rest if line.startswith("error: ")), "")
    return shortened(f"{first} {detail}".strip(), _REASON_CHARACTERS)


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """What `work` gives, or None if it takes longer; it may go on alone then, and end some time.

    Raises what it does.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="mmchat schema", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed.pop()  # a list that held it would hold all that its traceback does
    return done[0] if done else None


class _Words:
    """A tokenizer as llguidance takes one."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in ids]
        self.special_token_ids = [token_id for token_id in ids if tokenizer.is_special(token_id)]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode_rest(text)
