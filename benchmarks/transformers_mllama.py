"""transformers' Mllama on the very same tensors: what mmchat is compared with.

Two of its faults are kept out without a change to its code. Vision states are taken one layer
later than the checkpoints mean them, so the configuration that it gets names the layers before.
Text before a picture sees it, so every prompt with a picture begins with the picture.
Calls go to `forward`, which leaves out what `generate` adds for each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.clock import Elapsed, Stopwatch
from benchmarks.contestants import DECODE_ROOM, Context, PicturePrompt
from benchmarks.random_mllama import RandomContext, config_of
from mmchat.errors import MissingExtra
from mmchat.models.mllama.translate import hub_documents

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec


class TransformersMllama:
    """transformers' model, run eagerly with its default attention and dynamic cache."""

    reads_context = False

    def __init__(self, name: str, model: Any, config: Any, device: torch.device) -> None:
        self.name = name
        self.model = model
        self.config = config
        self.device = device
        self._clock = Stopwatch(device)

    @torch.inference_mode()
    def prefill(self, input_ids: tuple[int, ...]) -> Tensor:
        return self._last(input_ids=self._ids(input_ids), **self._cache())

    @torch.inference_mode()
    def prefill_picture(self, prompt: PicturePrompt) -> tuple[Tensor, Mapping[str, Elapsed]]:
        inputs = self._picture_inputs(prompt)
        seen: list[Elapsed] = []
        hook = self.model.model.multi_modal_projector.register_forward_hook(
            lambda *_: seen.append(self._clock.now())
        )
        try:
            begin = self._clock.now()
            logits = self._last(**inputs, **self._cache())
            end = self._clock.now()
        finally:
            hook.remove()
        stages = {"vision": seen[0] - begin, "prefill": end - seen[0], "total": end - begin}
        return logits, stages

    @torch.inference_mode()
    def begin(self, context: Context, rows: int) -> Any:
        if not isinstance(context, RandomContext):
            given = self._cache(len(context) + DECODE_ROOM)
            self._last(input_ids=self._ids(context).repeat(rows, 1), **given)
            return given
        given = self._cache(context.length + DECODE_ROOM)
        cache: Any = next(iter(given.values()))
        text: Iterator[Any] = iter(context.text)
        image: Iterator[Any] = iter(context.image or ())
        for index in range(self.config.text_config.num_hidden_layers):
            if index not in self.config.text_config.cross_attention_layers:
                pair = next(text)
            elif context.image is not None:
                tokens = self._tokens_per_tile()
                slots = self.config.vision_config.max_num_tiles
                seen = torch.zeros(rows, 1, 1, slots, dtype=torch.long, device=self.device)
                pair = next(image)
                seen[..., : pair[0].shape[2] // tokens] = 1
                given["cross_attention_mask"] = seen
                pair = tuple(_padded(x, slots * tokens) for x in pair)
            else:
                continue
            cache.update(*(x.repeat(rows, 1, 1, 1) for x in pair), index)
        return given

    @torch.inference_mode()
    def decode(self, token_ids: tuple[int, ...], cache: Any) -> Tensor:
        return self._last(input_ids=self._ids(token_ids).T, **cache)

    def _last(self, **inputs: Any) -> Tensor:
        """Logits of the last position, as `generate` asks for them."""
        return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    def _cache(self, positions: int = 0) -> dict[str, Any]:  # noqa: ARG002  it grows
        """An empty cache by the name of forward's argument: `past_key_values` before 5.24."""
        from transformers import DynamicCache

        known = inspect.signature(self.model.forward).parameters
        keyword = "cache" if "cache" in known else "past_key_values"
        return {keyword: DynamicCache(config=self.config.text_config)}

    def _ids(self, input_ids: tuple[int, ...]) -> Tensor:
        return torch.tensor([input_ids], device=self.device)

    def _tokens_per_tile(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1

    def _picture_inputs(self, prompt: PicturePrompt) -> dict[str, Tensor]:
        """The picture padded with empty tiles, as transformers' processor gives it."""
        tiles, aspect_ratio_ids = prompt.image.tensors
        slots = self.config.vision_config.max_num_tiles
        pixels = tiles.new_zeros(1, 1, slots, *tiles.shape[1:])
        pixels[0, 0, : len(tiles)] = tiles
        used = torch.zeros(1, 1, slots, dtype=torch.long)
        used[..., : len(tiles)] = 1
        seen = used[:, None].expand(1, len(prompt.token_ids), 1, slots)
        inputs = {
            "input_ids": torch.tensor([prompt.token_ids]),
            "pixel_values": pixels,
            "aspect_ratio_ids": aspect_ratio_ids[None],
            "aspect_ratio_mask": used,
            "cross_attention_mask": seen,
        }
        return {name: value.to(self.device) for name, value in inputs.items()}


class CompiledMllama(TransformersMllama):
    """Its decode step as `generate` compiles it for a static cache, on CUDA as one CUDA graph.

    Prompts are read eagerly, as there.
    """

    def __init__(self, eager: TransformersMllama) -> None:
        super().__init__(f"{eager.name} compiled", eager.model, eager.config, eager.device)
        self._step = torch.compile(self.model, mode="reduce-overhead")

    def _cache(self, positions: int = 0) -> dict[str, Any]:
        from transformers.cache_utils import Cache, StaticLayer

        if not positions:
            return super()._cache()
        [keyword] = super()._cache()
        text = self.config.text_config
        picture = self.config.vision_config.max_num_tiles * self._tokens_per_tile()
        lengths = [
            picture if index in text.cross_attention_layers else positions
            for index in range(text.num_hidden_layers)
        ]
        return {keyword: Cache(layers=[StaticLayer(length) for length in lengths])}

    @torch.inference_mode()
    def decode(self, token_ids: tuple[int, ...], cache: Any) -> Tensor:
        inputs = {"input_ids": self._ids(token_ids).T, **cache, "use_cache": True}
        return self._step(**inputs, logits_to_keep=1).logits[:, -1].float()


def build(
    spec: ModelSpec,
    read: Callable[[str], Tensor],
    names: list[str],
    dtype: torch.dtype,
    device: torch.device,
) -> TransformersMllama:
    """transformers' model around the tensors that `read` gives by Hub name; none is copied.

    Raises MissingExtra without transformers, UsageError for another family.
    """
    _check_installed()
    from transformers import MllamaForConditionalGeneration

    config = _config(spec, dtype)
    with torch.device("meta"):
        model = MllamaForConditionalGeneration._from_config(config, dtype=dtype)
    tensors = {_in_memory(name): read(name) for name in names}
    model.load_state_dict(tensors, strict=True, assign=True)
    text = model.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config.text_config).to(device)
    label = f"transformers {str(dtype).removeprefix('torch.')}"
    return TransformersMllama(label, model.requires_grad_(False).eval(), config, device)


def version() -> str:
    """The version of transformers. Raises MissingExtra."""
    _check_installed()
    import transformers

    return transformers.__version__


def _check_installed() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingExtra(
            "--vs transformers needs the package transformers; "
            "install it with: pip install 'mmchat[bench]'"
        ) from None


def _config(spec: ModelSpec, dtype: torch.dtype) -> Any:
    from transformers import MllamaConfig

    config = config_of(spec)
    no_tokens: Any = SimpleNamespace(special_id=lambda _name: 0)  # forward reads none
    how = {"is_chat": True, "dtype": str(dtype), "generation": vars(spec.generation)}
    documents = hub_documents(config, no_tokens, **how)
    document = documents["config.json"]
    vision, text = document["vision_config"], document["text_config"]
    vision["intermediate_layers_indices"] = [
        index - 1 for index in vision["intermediate_layers_indices"]
    ]
    vision["supported_aspect_ratios"] = [
        list(canvas) for canvas in config.vision_config.aspect_ratios
    ]
    text["cross_attention_layers"] = list(text["cross_attention_layers"])
    text["rope_parameters"] = {
        **(text.pop("rope_scaling") or {"rope_type": "default"}),
        "rope_theta": text.pop("rope_theta"),
    }
    sections = {"vision_config": vision, "text_config": text}
    return MllamaConfig(**sections, image_token_index=document["image_token_index"])


def _in_memory(name: str) -> str:
    """transformers 4.52 and later rename the Hub's parameters in memory."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def _padded(x: Tensor, length: int) -> Tensor:
    """Zeros after the positions of [1, G, N, D] up to `length`."""
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2]))
