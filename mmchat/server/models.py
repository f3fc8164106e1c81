"""GET /v1/models: the one model that is served, under each of its names."""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import Response

from mmchat.server.call import Call
from mmchat.server.errors import ApiError
from mmchat.server.stream import Json

STARTED = int(time.time())


async def list_models(call: Call) -> Response:
    return Json({"object": "list", "data": [_entry(call, name) for name in names(call)]})


async def one_model(call: Call) -> Response:
    asked = call.request.path_params["id"]
    if asked not in names(call):
        raise ApiError("model_not_found", param="model")
    return Json(_entry(call, asked))


def names(call: Call) -> list[str]:
    """The id comes first."""
    spec = call.service.model.spec
    return [spec.name, *(alias for alias in spec.aliases if alias != spec.name)]


def _entry(call: Call, name: str) -> dict[str, Any]:
    model = call.service.model
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "mmchat",
        "meta": {
            "n_ctx_train": model.spec.config.max_position_embeddings,
            "n_ctx": model.max_seq_len,
            "n_params": model.spec.parameters,
            "n_vocab": model.vocab_size,
        },
        "architecture": {
            "input_modalities": ["text"] if model.options.text_only else ["text", "image"],
            "output_modalities": ["text"],
        },
    }
