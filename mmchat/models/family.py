"""What the rest of the program may ask of a model family, before and without loading its math.

A family describes its models: it reads and writes their configurations, counts, and tells people
about pictures. That needs no torch. `Family.build` imports what makes and fills a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, cast

from mmchat.errors import CheckpointError
from mmchat.models.prompt import MediaFacts, PatchMap
from mmchat.models.sizes import Sizes
from mmchat.parallel.slices import Cuts
from mmchat.strict_json import Where

if TYPE_CHECKING:
    from PIL.Image import Image as Drawing

    from mmchat.conversation import Image
    from mmchat.models.build import Build
    from mmchat.tokenizers.base import Tokenizer

Alpha = Literal["white", "drop"]

# In front of the names of tensors that come from the repository of Family.companion.
COMPANION = "companion."


class Config(Protocol):
    """All that one model's config says to those outside of its family; frozen, compared by value.

    It holds the sizes of the model and how its pictures are prepared.
    """

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can write."""
        ...

    @property
    def readable_tokens(self) -> int:
        """Ids that a prompt may hold, which are more where tokens were added to the embedding."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Positions of prompt and answer, at most."""
        ...


class Heads:
    """Part of the config of layers whose heads share their width evenly."""

    hidden_size: int
    num_attention_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class TextSizes:
    """The part of a Config that follows from its `text_config`."""

    text_config: Any

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def readable_tokens(self) -> int:
        return self.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        return self.text_config.max_position_embeddings


C = TypeVar("C")  # the family's config
M = TypeVar("M")  # the family's model


class OtherConfigError(CheckpointError):
    """The checkpoint was made for another config of its family, which is `fitting`."""

    def __init__(self, message: str, fitting: Config) -> None:
        super().__init__(message)
        self.fitting = fitting


@dataclass(frozen=True)
class Translated(Generic[C]):
    """What a file of others says of a model. is_chat: None where it leaves that open.

    text_only: the weights are those of the language model alone. fit: the config where only the
    weights tell the sizes, from their shapes by stored name; None where the file says all.
    """

    config: C
    is_chat: bool | None
    text_only: bool = False
    fit: Callable[[Mapping[str, tuple[int, ...]]], C] | None = None


@dataclass(frozen=True)
class Description:
    """A model in its family's own words.

    image_size: side in pixels of the square that the encoder sees at once. pictures: what a picture
    becomes, such as "tiles of 560 px". lines: (label, value) of the architecture; details: the same
    for JSON. cache_lines, cache_details: what a picture takes in the cache, in 16 bits.
    sees_earlier: whether text also sees the pictures before the last ones that stand together.
    """

    image_size: int
    pictures: str
    lines: tuple[tuple[str, str], ...]
    details: Mapping[str, Any]
    cache_lines: tuple[tuple[str, str], ...]
    cache_details: Mapping[str, int]
    sees_earlier: bool = True


def parameter_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(map(math.prod, shapes.values()))


class Family(Protocol[C, M]):
    """One model family. Methods that take parsed JSON take a Where, and raise ParamsError.

    What has a value or a body here is what most families give, who inherit it.
    """

    # Its name in params files and in the Hub's config.json.
    model_type: str
    # What Ollama calls its models, with any tag; None if it has none.
    ollama_name: str | None
    # Of its weights as they were published.
    released_dtype: Literal["bfloat16", "float16"]
    # temperature and top_p where a file of others says nothing of them.
    generation: Mapping[str, float]
    # What `Build.programs` has.
    program_formats: tuple[Literal["aoti", "executorch"], ...] = ()
    # Whether its weights are read as other programs pack them, by checkpoints.packed.
    takes_packed: bool = True
    # A dataclass, each field of which is a section of a params file; one is `image_processor`, with
    # a field `alpha`.
    config_type: type[Any]

    @property
    def sections(self) -> tuple[str, ...]:
        """Keys of a params file that `parse` reads."""
        return tuple(field.name for field in fields(self.config_type))

    @staticmethod
    def parse(sections: Mapping[str, Any], where: Where) -> C: ...

    @staticmethod
    def from_hub(
        found: Mapping[str, Any],
        preprocessor: Mapping[str, Any] | None,
        where: Where,
        preprocessor_where: Where,
    ) -> Translated[C]:
        """Translate the Hub's config.json, and preprocessor_config.json if there is one."""
        ...

    @staticmethod
    def from_makers(found: Mapping[str, Any], folders: str, where: Where) -> Translated[C] | None:
        """Translate the params file of the model's makers; None if this is not theirs.

        folders: the names of those that it lies in, in lower case.
        """
        return None

    @staticmethod
    def from_gguf(found: Mapping[str, Any], where: Where) -> Translated[C] | None:
        """Translate the metadata of a GGUF file; None if it is of another architecture."""
        return None

    def companion(self, config: C) -> str | None:
        """The repository whose weights the model needs beside its own; None for nothing."""
        return None

    def to_sections(self, config: C) -> dict[str, Any]:
        """The JSON that `parse` reads."""
        return asdict(cast(Any, config))

    @staticmethod
    def hub_documents(
        config: C,
        tokenizer: Tokenizer,
        *,
        is_chat: bool,
        dtype: str,
        generation: Mapping[str, float],
    ) -> dict[str, dict[str, Any]]:
        """File name -> content of the JSON files of a folder of the Hub."""
        ...

    @staticmethod
    def shapes(config: C) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor, by the Hub's names."""
        ...

    @staticmethod
    def hub_name(name: str) -> str | None:
        """The Hub's name of a tensor in another spelling of it; None for what no model needs."""
        ...

    @staticmethod
    def sizes(config: C) -> Sizes: ...

    def describe(self, config: C) -> Description: ...

    @staticmethod
    def facts(config: C, height: int, width: int) -> MediaFacts:
        """What people are told about a picture of `height` x `width` pixels."""
        ...

    @staticmethod
    def patches(config: C, height: int, width: int) -> PatchMap | None:
        """What text reads of a picture of this size by cross-attention; None if it reads none."""
        return None

    def draw(self, config: C, image: Image) -> Drawing:
        """A picture of what the model sees of `image`."""
        ...

    @staticmethod
    def picture_size(config: C, cells: int) -> tuple[int, int] | None:
        """(height, width) of a picture whose grid has so many cells; None if none has."""
        ...

    def alpha(self, config: C, checkpoint_format: str) -> Alpha:
        """What becomes of transparent pixels with weights in a format of StoredAs."""
        ...

    def with_alpha(self, config: C, alpha: Alpha) -> C:
        """The same, with a rule for alpha that does not depend on the format."""
        given = cast(Any, config)
        return replace(given, image_processor=replace(given.image_processor, alpha=alpha))

    @staticmethod
    def shard_axis(name: str) -> Literal[0, 1] | None:
        """The axis along which the makers' shards cut a tensor; None: each holds all of it."""
        return None

    @staticmethod
    def cuts(config: C) -> Cuts:
        """How the weights are shared by ranks, by the names of the model's layers.

        Empty where nothing is shared yet.
        """
        ...

    def build(self) -> Build[C, M]: ...
