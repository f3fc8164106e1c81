"""Ask an exported model and the one it was made from the same, and compare their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmchat.conversation import Image, Message, Text
from mmchat.engine.reading import encode, rest_of
from mmchat.errors import ExportError
from mmchat.models.base import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.loading.loader import LoadedModel
    from mmchat.runtime.base import Runtime

# Largest difference of two logits, as a share of the largest logit. Kernels for quantised weights
# round the activations too, so that a difference in the last bit of one of them grows.
_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_QUANTISED_TOLERANCE = 1e-1
_DECODED = 3


def check_same(original: LoadedModel, exported: LoadedModel, max_images: int = 2) -> float:
    """The largest difference of logits, as a share of the largest one, over a short conversation.

    It reads text, a small picture, a large one and another, and decodes. max_images:
    pictures that the export may see at once. Raises ExportError if the two differ by more than
    rounding does.
    """
    import torch

    allowed = _TOLERANCE[str(original.dtype).removeprefix("torch.")]
    if original.options.quantize != "none":
        allowed = _QUANTISED_TOLERANCE
    worst = 0.0
    with torch.inference_mode():
        pairs = zip(*(_logits(m, original, max_images) for m in (original, exported)), strict=True)
        for own, other in pairs:
            difference = float((own - other).abs().max() / own.abs().max())
            if not difference <= allowed:  # NaN too
                raise ExportError(
                    f"the exported programs differ from the model by {difference:.2g} of the"
                    f" largest logit (at most {allowed:g} is rounding); nothing was written; please"
                    " report this"
                )
            worst = max(worst, difference)
    return worst


def _logits(model: LoadedModel, reference: LoadedModel, max_images: int) -> Iterator[Tensor]:
    """Logits of each step; the tokens read are the same for both models."""
    import torch

    for prompt in _prompts(reference, max_images):
        runtime: Runtime = model.runtime
        cache = runtime.new_cache(1, len(prompt.token_ids) + _DECODED)
        encode(runtime, prompt, cache)
        yield runtime.forward(rest_of(prompt, cache, runtime.device), cache).clone()
        for token in prompt.token_ids[1 : 1 + _DECODED]:
            ids = torch.tensor([token], device=runtime.device)
            yield runtime.forward(Batch.last_of(ids, cache.lengths[0]), cache).clone()


def _prompts(model: LoadedModel, max_images: int) -> Iterator[Any]:
    family, config = model.spec.family, model.spec.config
    side = family.describe(config).image_size
    largest = family.sizes(config).largest_picture.size
    for pictures in ((), (_picture(side, side),), (_picture(*largest), _picture(2 * side, side))):
        message = Message("user", (*pictures[:max_images], Text("What is here?")))
        if model.spec.chat_format == "base":
            yield model.processor.raw(message)
        else:
            yield model.processor.chat([message])


def _picture(height: int, width: int) -> Image:
    """A gradient, so that no two patches are alike."""
    import PIL.Image

    from mmchat.images import from_pil

    down = PIL.Image.linear_gradient("L").resize((width, height))
    across = PIL.Image.linear_gradient("L").rotate(90).resize((width, height))
    round_ = PIL.Image.radial_gradient("L").resize((width, height))
    return from_pil(PIL.Image.merge("RGB", (down, across, round_)))
