"""Writers of checkpoint files, whole and broken, that do not use mmchat's own code."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file


def small_tensors() -> dict[str, torch.Tensor]:
    """Five tensors, no two alike: several dtypes, ranks 0 to 4, odd sizes."""
    generator = torch.Generator().manual_seed(7)

    def random(shape: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "wide.weight": random([3, 5]),
        "half": random([7], dtype=torch.bfloat16),
        "gate": random([], torch.float16),
        "patch.weight": random([2, 3, 4, 1], dtype=torch.bfloat16),
        "ids": torch.arange(11),
    }


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    save_file(small_tensors() if tensors is None else tensors, path)
    return path


def write_pth(path: Path, tensors: object = None) -> Path:
    torch.save(small_tensors() if tensors is None else tensors, path)
    return path


def header_file(
    path: Path, header: object, data: bytes = b"", *, length: int | None = None
) -> Path:
    """A safetensors file with this header: an object, or the text of one."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def item(begin: int, end: int, dtype: str = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def write_zip(
    path: Path, members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def pth_with_pickle(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A .pth of these pickle bytes and storages, otherwise as torch writes it."""
    members = {
        "archive/data.pkl": pickled,
        "archive/byteorder": b"little",
        "archive/version": b"3\n",
    }
    members |= {f"archive/data/{key}": value for key, value in (storages or {}).items()}
    return write_zip(path, members)


def tensor_pickle(
    name: str = "w",
    *,
    storage: tuple[str, str, int] = ("FloatStorage", "0", 6),
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
) -> bytes:
    """The pickle of {name: tensor}, written by hand, so that it can lie."""
    kind, key, numel = storage

    def number(value: int) -> bytes:
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)

    def text(value: str) -> bytes:
        raw = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    persistent = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    persistent += number(numel) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + number(offset)
    tensor += numbers(shape) + numbers(stride) + b"\x89" + hooks + b"tR"
    return b"\x80\x02}" + text(name) + tensor + b"s."
