"""What a conversation becomes for a model: token ids, with pictures among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.conversation import Box, Image, Message, NameTags


@dataclass(frozen=True)
class MediaFacts:
    """What people are told about a picture; sizes are (height, width) in pixels.

    resized: the picture as the encoder sees it. grid: the (rows, columns) that it is cut into.
    tokens: what the text can attend to, or is given in its place. positions: what the picture takes
    of the context. In the family's own words: placed, how the picture lies there; cut, the grid;
    lines, both as (label, value); details, its own numbers by their names in JSON.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    grid: tuple[int, int]
    tokens: int
    positions: int
    placed: str = ""
    cut: str = ""
    lines: tuple[tuple[str, str], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PatchMap:
    """Which of a picture's vision tokens stand for which part of it.

    token: number of the token of each patch, [rows][columns]; those of nothing but padding are not
    among them. cell: height and width of a patch in pixels of the picture; the last ones may reach
    beyond its edge.
    """

    token: tuple[tuple[int, ...], ...]
    cell: tuple[float, float]


class Media(Protocol):
    """A picture as the family's encoder takes it."""

    @property
    def content_hash(self) -> str: ...

    @property
    def facts(self) -> MediaFacts: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that the encoder reads."""
        ...


@dataclass(frozen=True)
class PlacedMedia:
    """A picture in a prompt: at `position`, where it takes `count` positions of the cache.

    Pictures of one content take the same number.
    """

    position: int
    count: int
    media: Media

    @property
    def end(self) -> int:
        return self.position + self.count


@dataclass(frozen=True, eq=False)
class Prompt:
    """A whole conversation, ready to be read.

    media: its pictures in order. context: what else the keys and values of every position depend
    on, such as a rotary base that follows from the length. It is only compared: prompts that differ
    in it share nothing. lead: what the first tokens of an answer may begin with in this format and
    is no part of its text.
    """

    token_ids: tuple[int, ...]
    media: tuple[PlacedMedia, ...] = ()
    context: str = ""
    lead: str = ""

    @property
    def fingerprint(self) -> tuple[int | str, ...]:
        """One mark a position: its token id, or the content hash of its picture."""
        marks: list[int | str] = list(self.token_ids)
        for placed in self.media:
            marks[placed.position : placed.end] = [placed.media.content_hash] * placed.count
        if self.context and marks:
            marks[0] = f"{self.context} {marks[0]}"
        return tuple(marks)

    def unread(self, length: int) -> list[Media]:
        """The pictures that reading on from position `length` needs to be encoded."""
        return [placed.media for placed in self.media if placed.end > length]


@dataclass(frozen=True)
class PromptIds:
    """A prompt: `starts[k]` is where in `input_ids` the positions of `images[k]` begin."""

    input_ids: tuple[int, ...]
    starts: tuple[int, ...]
    images: tuple[Image, ...]


class Processor(Protocol):
    """Makes prompts. Raises PromptError and ImageError.

    stop_ids end an answer. alpha: what is done with transparent pictures when they are opened.
    takes_tools: whether its models were taught to call tools. image_tag: what its prompts hold in
    place of a picture, and people write there; "" for nothing. name_tags: what encloses the name of
    a picture where its prompts have one.
    """

    stop_ids: frozenset[int]
    alpha: Literal["white", "drop"]
    takes_tools: bool
    image_tag: str
    name_tags: NameTags | None

    def boxes(self, text: str) -> Sequence[Box] | None:
        """The places that an answer names in a picture; None where answers never do."""
        ...

    def chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        """The prompt that lets the assistant answer `messages`, in the chat format.

        tools: functions that it may call, as OpenAI's chat declares them: `{"type": "function",
        "function": {"name", "description", "parameters"}}`; UsageError unless it takes_tools.
        """
        ...

    def raw(self, message: Message) -> Prompt:
        """The prompt that a base model continues: no chat format."""
        ...

    def of_ids(self, token_ids: Sequence[int]) -> Prompt:
        """The prompt that these tokens are, none of which is a picture's."""
        ...

    def facts(self, image: Image) -> MediaFacts: ...


def followed(processor: Processor, prompt: Prompt, token_ids: Sequence[int]) -> Prompt:
    """`prompt` with these tokens behind it, none of which is a picture's."""
    return replace(processor.of_ids((*prompt.token_ids, *token_ids)), media=prompt.media)
