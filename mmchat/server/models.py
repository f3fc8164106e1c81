"""What programs ask about models, in OpenAI's form and in Ollama's: one, perhaps with adapters.

No model is managed.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256

from starlette.responses import Response

import mmchat
from mmchat import words
from mmchat.checkpoints.checkpoint import is_stored_in_gguf
from mmchat.server import fields
from mmchat.server.call import Call
from mmchat.server.errors import ApiError, invalid
from mmchat.server.heat import tells
from mmchat.server.service import LATEST
from mmchat.server.stream import LINES, Fields, Json, Stream

STARTED = int(time.time())
# What Ollama does where a program says nothing: revived programs answer as they did.
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
VERSION = "0.24.0"  # the last that ran this model; clients compare it with what they need
_is_gguf = cache(is_stored_in_gguf)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def names(call: Call) -> list[str]:
    """That of what answers where none is named comes first."""
    _ = call.model  # it is loaded
    return [name for served in call.service.all for name in served.names.listed]


# ---- OpenAI


def is_known(call: Call, name: str) -> bool:
    """Whether a model is called so."""
    return any(name.casefold() in served.names.known for served in call.service.all)


async def list_models(call: Call) -> Response:
    return Json({"object": "list", "data": [_openai_entry(call, name) for name in names(call)]})


async def one_model(call: Call) -> Response:
    asked = call.request.path_params["id"]
    if not (call.model and is_known(call, asked)):
        raise ApiError("model_not_found", param="model")
    return Json(_openai_entry(call, asked))


def _openai_entry(call: Call, name: str) -> Fields:
    model = call.model
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
            "heat": tells(call),
        },
        "architecture": {
            "input_modalities": ["text"] if model.options.text_only else ["text", "image"],
            "output_modalities": ["text"],
        },
    }


# ---- Ollama


def rfc3339(at: datetime | None = None) -> str:
    """A time of UTC, now by default, as Go's programs read it."""
    return (at or datetime.now(UTC)).isoformat(timespec="microseconds").replace("+00:00", "Z")


_MODIFIED = rfc3339(datetime.fromtimestamp(STARTED, UTC))


class Named(fields.Body):
    model: str = ""
    name: str = ""  # as older clients say it
    stream: fields.Bool = True


async def tags(call: Call) -> Response:
    theirs = call.model.spec.family.ollama_name
    latest = [f"{theirs}:latest"] if theirs else []
    listed = list(dict.fromkeys([*names(call), *latest]))
    capabilities = {"capabilities": _capabilities(call)}
    return Json({"models": [_entry(call, name) | capabilities for name in listed]})


async def ps(call: Call) -> Response:
    model = call.model
    entries = [_entry(call, served.names.listed[0]) for served in call.service.all]
    in_device = entries[0]["size"] if model.device.type != "cpu" else 0
    stays_until = datetime.now(UTC) + timedelta(days=365)  # as long as the server, that is
    running = {"expires_at": rfc3339(stays_until), "context_length": model.max_seq_len}
    running["size_vram"] = in_device
    return Json({"models": [entry | running for entry in entries]})


async def show(call: Call) -> Response:
    await _check(call)
    spec = call.model.spec
    family, chosen = spec.model_type, {**DEFAULTS, **call.service.ollama_sampling}
    return Json(
        {
            "license": "",
            "modelfile": f"# served by mmchat\nFROM {spec.name}\n",
            "parameters": "\n".join(f"{name} {value}" for name, value in chosen.items()),
            "template": "{{ .Prompt }}",
            "details": _details(call),
            "model_info": {
                "general.architecture": family,
                "general.basename": spec.name,
                "general.parameter_count": spec.parameters,
                f"{family}.context_length": call.model.max_seq_len,
                f"{family}.vocab_size": call.model.vocab_size,
            },
            "capabilities": _capabilities(call),
            "modified_at": _MODIFIED,
        }
    )


async def version(call: Call) -> Response:
    return Json({"version": VERSION}, headers={"x-mmchat-version": mmchat.__version__})


async def pull(call: Call) -> Response:
    """The model is here; no other one is fetched."""
    asked = await _check(call)
    if not asked.stream:
        return Json({"status": "success"})

    async def lines():
        for status in ("pulling manifest", "success"):
            yield {"status": status}

    return Stream(lines(), LINES)


async def _check(call: Call) -> Named:
    asked = await read(Named, call)
    check_name(call, asked.model or asked.name)
    return asked


def _entry(call: Call, name: str) -> Fields:
    spec, details = call.model.spec, _details(call)
    level = details["quantization_level"]
    [bits, *_] = re.findall(r"\d+", level)
    return {
        "name": name,
        "model": name,
        "modified_at": _MODIFIED,
        "size": spec.parameters * int(bits) // 8,
        "digest": sha256(f"{spec.name} {level}".encode()).hexdigest(),
        "details": details,
    }


def _details(call: Call) -> Fields:
    model = call.model
    scheme, dtype = model.options.quantize, str(model.dtype).removeprefix("torch.")
    return {
        "parent_model": "",
        "format": "gguf" if _is_gguf(model.spec.source) else "safetensors",
        "family": model.spec.model_type,
        "families": [model.spec.model_type],
        "parameter_size": words.count(model.spec.parameters).replace(" ", ""),
        "quantization_level": _DTYPES.get(dtype, "F32") if scheme == "none" else scheme.upper(),
    }


def _capabilities(call: Call) -> list[str]:
    model = call.model
    sees = [] if model.options.text_only else ["vision"]
    return ["completion", *sees, *(["tools"] if model.processor.takes_tools else [])]


async def read(kind: type[fields.B], call: Call) -> fields.B:
    """Raises ApiError."""
    if not call.body:
        raise invalid(None, "missing request body")
    return await call.digest(fields.read, kind, call.body)


def check_name(call: Call, asked: str) -> None:
    """Raises ApiError unless the served model has this name."""
    if not asked:
        raise invalid("model", "model is required")
    name, theirs = asked.casefold().removesuffix(LATEST), call.model.spec.family.ollama_name
    if not (is_known(call, name) or name.partition(":")[0] == theirs):
        raise ApiError("model_not_found", f"model '{asked}' not found", "model")
