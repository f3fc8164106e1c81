"""Find the tensors of a .pth file (a zip written by torch.save) without unpickling it.

The zip must hold its members uncompressed, so that a tensor is a range of bytes of the file. Its
pickle is read by pickle_scan, and what that says is compared with the zip before it is believed.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

from mmchat import limits
from mmchat.checkpoints.mapped_file import ITEM_BYTES, MappedFile, TensorEntry, shown
from mmchat.checkpoints.pickle_scan import StridedTensor, scan

_FLAGS = 0x0808  # sizes after the data, UTF-8 names; no encryption


def read_entries(file: MappedFile) -> list[TensorEntry]:
    """The tensors of `file` in the order of their data. Raises CheckpointError."""
    members = _zip_members(file)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise file.error(f"is a zip archive with {len(pickles)} data.pkl, no checkpoint of torch")
    prefix = pickles[0].removesuffix("/data.pkl")
    byte_order = members.get(f"{prefix}/byteorder")
    if byte_order and file.read_at(byte_order[0], min(byte_order[1], 16)) != b"little":
        raise file.error("was written on a big-endian machine, which mmchat does not read")
    offset, size, checksum = members[f"{prefix}/data.pkl"]
    if size > limits.PTH_PICKLE_BYTES:
        raise file.error(f"its data.pkl has {size:,} bytes, at most {limits.PTH_PICKLE_BYTES:,}")
    data = file.read_at(offset, size)
    if zlib.crc32(data) != checksum:
        raise file.error("is damaged: the checksum of data.pkl is wrong; download it again")
    try:
        tensors = scan(data)
    except ValueError as error:
        raise file.error(f"its pickle is refused: {error}") from None
    data = {name: members.get(f"{prefix}/data/{t.storage.key}") for name, t in tensors.items()}
    return file.in_order(_place(file, name, t, data[name]) for name, t in tensors.items())


# The zip


class _Capped(io.FileIO):
    """A file that refuses to read much at once: zipfile believes the lengths it finds."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0 or size > limits.PTH_PICKLE_BYTES:
            here = self.tell()
            rest = self.seek(0, io.SEEK_END) - here
            self.seek(here)
            if rest > limits.PTH_PICKLE_BYTES:
                raise zipfile.BadZipFile("its table of contents is too long")
        return super().read(-1 if size is None else size) or b""


def _zip_members(file: MappedFile) -> dict[str, tuple[int, int, int]]:
    """Name -> (offset of the data, bytes, CRC-32); every member stored, none overlapping."""
    head = file.read_at(0, min(file.size, 512))
    if head[:4] != b"PK\x03\x04":
        what = "no .pth file of torch (it does not begin as a zip archive); download it again"
        if head[:1] == b"\x80" or head[257:262] == b"ustar":
            what = "a bare pickle or tar, which may run code; save it again with torch 1.6 or newer"
        raise file.error(f"is {what}")
    try:
        with _Capped(file.duplicate()) as raw, zipfile.ZipFile(raw) as archive:
            infos = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, struct.error,
            EOFError, OverflowError, IndexError, MemoryError) as error:  # fmt: skip
        raise file.error(
            f"is damaged or cut off at {file.size:,} bytes ({shown(error)}); download it again"
        ) from None
    if len(infos) > limits.TENSORS_PER_FILE + 16:
        raise file.error(
            f"{len(infos):,} zip members, at most {limits.TENSORS_PER_FILE:,} are read"
        )
    members: dict[str, tuple[int, int, int]] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        offset = _data_offset(file, info)
        is_plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & ~_FLAGS
        if not is_plain or info.compress_size != info.file_size:
            raise file.error(
                f"zip member {shown(info.filename)} is compressed or encrypted; torch never does"
                " that"
            )
        is_apart = info.header_offset >= end and info.filename not in members
        end = offset + info.file_size
        if not is_apart or end > file.size:
            raise file.error(
                f"zip member {shown(info.filename)} occurs twice or lies outside its place;"
                " download it again"
            )
        members[info.filename] = (offset, info.file_size, info.CRC)
    return members


def _data_offset(file: MappedFile, info: zipfile.ZipInfo) -> int:
    """Where the data of a member begins: after its own copy of the header."""
    fixed = file.read_at(info.header_offset, 30)
    name_length, extra_length = struct.unpack("<26xHH", fixed)
    name = file.read_at(info.header_offset + 30, name_length)
    if fixed[:4] != b"PK\x03\x04" or name != info.orig_filename.encode("utf-8", "replace"):
        raise file.error(
            f"zip member {shown(info.filename)} is not where the table says, or has two names;"
            " download it again"
        )
    return info.header_offset + 30 + name_length + extra_length


def _place(
    file: MappedFile,
    name: str,
    tensor: StridedTensor,
    member: tuple[int, int, int] | None,
) -> TensorEntry:
    """Where the data of a tensor lies; its strides and its storage must fit what it says."""
    file.check_tensor(name, tensor.shape)
    storage = tensor.storage
    if member is None:
        raise file.error(f"tensor {shown(name)}: its data {shown(storage.key)} is not in the file")
    offset, size, _ = member
    item = ITEM_BYTES[storage.dtype]
    if size != storage.numel * item:
        raise file.error(
            f"tensor {shown(name)}: {size:,} bytes of data, {storage.numel * item:,} declared"
        )
    step = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if length > 1 and stride != step:
            raise file.error(
                f"tensor {shown(name)}: strides {list(tensor.stride)} are not contiguous"
            )
        step *= length
    if tensor.offset + step > storage.numel:
        raise file.error(f"tensor {shown(name)}: {step:,} elements do not fit into its data")
    return TensorEntry(name, storage.dtype, tensor.shape, file.path, offset + tensor.offset * item)
