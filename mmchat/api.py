"""The Python interface: `mmchat.load(...)` gives a Model to chat with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmchat.chat.session import ChatSession, Event, ImageSource
from mmchat.engine.sampling import SamplingParams
from mmchat.loading.loader import LoadedModel, load_model
from mmchat.progress import ProgressCallback


@dataclass(frozen=True)
class Model(LoadedModel):
    """A loaded model to talk to."""

    def chat(self, system: str | None = None) -> ChatSession:
        """Begin a conversation."""
        return ChatSession(self, system)

    def complete(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
    ) -> Iterator[Event]:
        """Continue raw text, as base models do."""
        return ChatSession(self).complete(text, images, sampling)


def load(
    name: str | Path | None = None,
    *,
    checkpoint_path: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    params_path: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_seq_len: int | None = None,
    text_only: bool = False,
    alpha: Literal["white", "drop"] | None = None,
    quantize: str = "none",
    quantize_keep: Collection[str] = (),
    compile: Literal["auto", "on", "off"] = "auto",
    progress: ProgressCallback | None = None,
) -> Model:
    """Load a model by name, Hub id or folder; without any, the built-in one.

    Arguments and errors as in loader.load_model.
    """
    loaded = load_model(
        name,
        checkpoint_path=checkpoint_path,
        tokenizer_path=tokenizer_path,
        params_path=params_path,
        device=device,
        dtype=dtype,
        max_seq_len=max_seq_len,
        text_only=text_only,
        alpha=alpha,
        quantize=quantize,
        quantize_keep=quantize_keep,
        compile=compile,
        progress=progress,
    )
    return Model(**vars(loaded))
