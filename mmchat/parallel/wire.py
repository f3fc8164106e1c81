"""What rank 0 tells the others: a line of JSON, and tensors behind it. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmchat.parallel.group import Group

_HEAD_BYTES = 1024  # most calls fit into one message
_LENGTH_BYTES = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)


def say(group: Group, message: Sequence[Any], tensors: Sequence[Tensor] = ()) -> None:
    """Send a call to all other ranks, which `hear` it."""
    told = [[DTYPES.index(t.dtype), t.is_cpu, *t.shape] for t in tensors]
    data = json.dumps([message, told], separators=(",", ":")).encode()
    framed = bytearray(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
    framed += bytes(max(0, _HEAD_BYTES - len(framed)))
    whole = torch.frombuffer(framed, dtype=torch.uint8)
    group.announce(whole[:_HEAD_BYTES])
    if len(whole) > _HEAD_BYTES:
        group.send(whole[_HEAD_BYTES:].contiguous())
    for tensor in tensors:
        group.send(tensor.contiguous())


def hear(group: Group, device: torch.device) -> tuple[list[Any], list[Tensor]]:
    """The next call, and its tensors: on the CPU, or on `device` where they are sent from one."""
    head = torch.empty(_HEAD_BYTES, dtype=torch.uint8)
    group.announce(head)
    data = head.numpy().tobytes()
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    rest = _LENGTH_BYTES + length - _HEAD_BYTES
    if rest > 0:
        more = torch.empty(rest, dtype=torch.uint8)
        group.send(more)
        data += more.numpy().tobytes()
    message, told = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    tensors = []
    for dtype, is_cpu, *shape in told:
        tensor = torch.empty(shape, dtype=DTYPES[dtype], device="cpu" if is_cpu else device)
        group.send(tensor)
        tensors.append(tensor)
    return message, tensors
