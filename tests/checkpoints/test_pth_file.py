import io
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.pickle_scan import scan
from mmchat.errors import CheckpointError
from tests.checkpoints.hostile_files import (
    members_of,
    pth_with_pickle,
    small_tensors,
    tensor_pickle,
    write_pth,
    write_zip,
)


def refusal(path: Path) -> str:
    """The message with which `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert path.name in message
    assert message.isprintable()
    return message


@pytest.fixture
def path(tmp_path):
    return tmp_path / "consolidated.00.pth"


def assert_reads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "meta"
        assert checkpoint.entries.keys() == expected.keys()
        for name, tensor in expected.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_tensors_equal_those_that_torch_wrote(path):
    write_pth(path)
    assert_reads(path, torch.load(path, weights_only=True))


def test_every_pickle_protocol_of_torch_is_read(path):
    for protocol in (2, 3, 4, 5):
        torch.save(small_tensors(), path, pickle_protocol=protocol)
        assert_reads(path, small_tensors())


def test_a_state_dict_with_metadata_and_parameters_is_read(path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    write_pth(path, module.state_dict())
    assert_reads(path, dict(module.state_dict()))
    write_pth(path, OrderedDict(module.named_parameters()))
    assert_reads(path, {name: p.detach() for name, p in module.named_parameters()})


def test_parts_of_one_storage_are_read(path):
    flat = torch.randn(30)
    parts = {"first": flat[:12].view(3, 4), "second": flat[12:27].view(5, 3)}
    write_pth(path, parts)
    assert_reads(path, parts)


def test_a_pickle_written_by_hand_is_read(path):
    values = torch.arange(6, dtype=torch.float32)
    pth_with_pickle(path, tensor_pickle(), {"0": values.numpy().tobytes()})
    assert_reads(path, {"w": values.view(2, 3)})


# A file that lies about its tensors

SIX = {"0": bytes(24)}
LIES = {
    "stride 0": (tensor_pickle(stride=(0, 0)), SIX, "strides [0, 0]"),
    "stride 0 makes 4 GiB of 4 bytes": (
        tensor_pickle(storage=("FloatStorage", "0", 1), shape=(2**30,), stride=(0,)),
        {"0": bytes(4)},
        "strides [0]",
    ),
    "transposed": (tensor_pickle(shape=(3, 2), stride=(1, 3)), SIX, "strides [1, 3]"),
    "negative stride": (tensor_pickle(stride=(-3, 1)), SIX, "whole number"),
    "negative size": (tensor_pickle(shape=(-2, 3)), SIX, "whole number"),
    "negative offset": (tensor_pickle(offset=-1), SIX, "whole number"),
    "huge size": (tensor_pickle(shape=(2**40, 2**40), stride=(2**40, 1)), SIX, "do not fit"),
    "size beyond 64 bits": (tensor_pickle(shape=(2**200, 1)), SIX, "whole number"),
    "offset beyond the end": (tensor_pickle(offset=1), SIX, "do not fit"),
    "storage too small": (tensor_pickle(), {"0": bytes(20)}, "20 bytes of data, 24 declared"),
    "storage too large": (tensor_pickle(), {"0": bytes(28)}, "28 bytes of data, 24 declared"),
    "declared too small": (
        tensor_pickle(storage=("FloatStorage", "0", 5)), {"0": bytes(20)}, "6 elements do not fit",
    ),
    "other dtype": (tensor_pickle(storage=("HalfStorage", "0", 6)), SIX, "12 declared"),
    "storage missing": (tensor_pickle(storage=("FloatStorage", "1", 6)), SIX, "is not in the file"),
    "storage outside": (
        tensor_pickle(storage=("FloatStorage", "../../0", 6)), SIX, "is not in the file",
    ),
    "empty": (tensor_pickle(shape=(0, 3)), SIX, "empty"),
    "five axes": (tensor_pickle(shape=(1,) * 5, stride=(1,) * 5), SIX, "5 axes"),
    "fewer strides": (tensor_pickle(stride=(1,)), SIX, "refused"),
    "quantised": (tensor_pickle(storage=("QInt8Storage", "0", 24)), SIX, "QInt8Storage"),
    "complex": (tensor_pickle(storage=("ComplexFloatStorage", "0", 3)), SIX, "ComplexFloat"),
    "long name": (tensor_pickle("n" * 257), SIX, "longer than 256"),
    "surrogate in a name": (tensor_pickle("\ud800"), SIX, "not text"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_tensor_is_refused(path, lie):
    pickled, storages, expected = LIES[lie]
    assert expected in refusal(pth_with_pickle(path, pickled, storages))


def test_escape_sequences_in_a_name_are_shown_escaped(path):
    pickled = tensor_pickle("\x1b]0;title\x07../w", stride=(0, 0))
    assert r"\x1b]0;title\x07../w" in refusal(pth_with_pickle(path, pickled, SIX))


def test_tensors_that_share_data_are_refused(path):
    flat = torch.randn(10)
    write_pth(path, {"a": flat[:6], "b": flat[4:]})
    assert "'a' and 'b' share" in refusal(path)
    write_pth(path, {"a": flat, "b": flat})
    assert "share" in refusal(path)


NOT_PLAIN = {
    "a sparse tensor": lambda: {"w": torch.eye(3).to_sparse()},
    "a compressed sparse tensor": lambda: {"w": torch.tensor([[0.0, 2.0]]).to_sparse_csr()},
    "a conjugate": lambda: {"w": torch.ones(2, dtype=torch.complex64).conj()},
    "a float8 tensor": lambda: {"w": torch.ones(2).to(torch.float8_e4m3fn)},
    "a view of a transposed matrix": lambda: {"w": torch.ones(2, 3).T},
    "a whole module": lambda: torch.nn.Linear(2, 3),
    "a list of tensors": lambda: [torch.ones(2)],
    "a single tensor": lambda: torch.ones(2),
    "tensors one level deeper": lambda: {"model": {"w": torch.ones(2)}},
    "numbers among the tensors": lambda: {"w": torch.ones(2), "step": 3},
    "numbers for names": lambda: {1: torch.ones(2)},
    "nothing": lambda: {},
    "a string of text": lambda: "weights",
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("what", NOT_PLAIN)
def test_a_file_that_holds_something_else_is_refused(path, what):
    write_pth(path, NOT_PLAIN[what]())
    refusal(path)


# A file that would run code


class Evil:
    """Unpickling it creates the file `canary`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def evil_objects(canary: Path) -> dict[str, object]:
    import subprocess

    return {
        "os.system": Evil(os.system, f"touch {canary}"),
        "open": Evil(open, str(canary), "w"),
        "exec": Evil(exec, f"open({str(canary)!r}, 'w')"),
        "getattr": Evil(getattr, "text", "upper"),
        "subprocess": Evil(subprocess.Popen, ["touch", str(canary)]),
        "mkdir": Evil(Path.mkdir, canary),
        "torch.load": Evil(torch.load, str(canary)),
        "torch.hub": Evil(torch.hub.load, "a/b", "c"),
    }


@pytest.mark.parametrize("name", evil_objects(Path("x")))
@pytest.mark.parametrize("place", ["the value", "a name", "beside tensors", "a list"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, path, name, place):
    canary = tmp_path / "canary"
    evil = evil_objects(canary)[name]
    for protocol in (2, 4):
        content = {
            "the value": evil,
            "a name": {(evil,): torch.ones(2)},
            "beside tensors": {**small_tensors(), "extra": evil},
            "a list": OrderedDict(w=torch.ones(2), _metadata=[evil]),
        }[place]
        torch.save(content, path, pickle_protocol=protocol)
        assert "refused" in refusal(path)
        assert not canary.exists()


@pytest.mark.process
def test_the_canary_would_sing(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(evil_objects(canary)["os.system"]))
    assert canary.exists()


@pytest.mark.parametrize(
    "opcode",
    ["INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "PERSID", "APPENDS", "BINFLOAT", "DUP", "POP",
     "LONG4", "EMPTY_LIST", "BINBYTES", "BYTEARRAY8", "NEXT_BUFFER", "STRING"],
)  # fmt: skip
def test_opcodes_that_no_checkpoint_needs_are_refused(opcode):
    code = next(op.code for op in pickletools.opcodes if op.name == opcode)
    arguments = {"INST": b"os\nsystem\n", "PERSID": b"0\n", "STRING": b"'a'\n"}
    content = arguments.get(opcode, bytes(8))
    with pytest.raises(ValueError, match=f"{opcode} at 3 has no place"):
        scan(b"\x80\x02(" + code.encode("latin-1") + content + b".")


# A tuple in a tuple, 2,000 times; a pair of twice the pair before, 60 times.
DEEP = b")" + b"\x85" * 2_000
DOUBLING = b")q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60))

BROKEN_PICKLES = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "something after the end": tensor_pickle() + b".",
    "stack underflow": b"\x80\x02u.",
    "tuple of nothing": b"\x80\x02\x86.",
    "no mark": b"\x80\x02}}t.",
    "reduce of nothing": b"\x80\x02R.",
    "memo of nothing": b"\x80\x02h\x07.",
    "memo of an empty stack": b"\x80\x02q\x07.",
    "odd number of items": b"\x80\x02}(K\x01u.",
    "item of a tuple": b"\x80\x02)X\x01\x00\x00\x00aK\x01s.",
    "the same name twice": tensor_pickle()[:-1] + tensor_pickle()[3:-2] + b"s.",
    "itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "unknown opcode": b"\x80\x02\xff.",
    "text that is cut off": b"\x80\x02X\xff\xff\xff\x7fa.",
    "global without a name": b"\x80\x02ctorch\n.",
    "storage from the wrong module": tensor_pickle().replace(b"ctorch\n", b"ctorch.x\n"),
    "persistent id of a string": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "call of an ordered dict with items": b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.",
    "rebuild without arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "attributes": b"\x80\x02}}X\x08\x00\x00\x00__dict__K\x01sb.",
    "too long": b"\x80\x02" + b"N" * 2_000_001 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "a deep tuple for a name": b"\x80\x02}" + DEEP + b"K\x01s.",
    "a doubling tuple for a name": b"\x80\x02}" + DOUBLING + b"K\x01s.",
    "a doubling tuple among many items": b"\x80\x02}(" + DOUBLING + b"K\x01u.",
    "a doubling tuple for a module": b"\x80\x02" + DOUBLING + b"\x8c\x01a\x93.",
    "numbers for a module and a name": b"\x80\x02K\x01K\x01\x93.",
    "a doubling tuple for a shape": tensor_pickle().replace(b"(\x8a\x01\x02", b"(" + DOUBLING),
    "a long tuple": b"\x80\x02(" + b"N" * 1000 + b"t.",
    "a doubling dictionary": b"\x80\x02}q\x00" + b"".join(
        b"}(\x8c\x01ah%c\x8c\x01bh%cuq%c" % (i, i, i + 1) for i in range(60)
    ) + b".",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN_PICKLES)
def test_a_broken_pickle_is_refused(path, kind):
    assert "refused" in refusal(pth_with_pickle(path, BROKEN_PICKLES[kind], SIX))


# A zip that is not what torch writes


def test_compressed_members_are_refused(path):
    members = members_of(write_pth(path))
    write_zip(path, members, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)
    content = bytearray(write_pth(path).read_bytes())
    content[content.index(b"PK\x01\x02") + 10] = zipfile.ZIP_DEFLATED  # of the same size
    path.write_bytes(content)
    assert "compressed" in refusal(path)


def test_a_file_cut_off_anywhere_is_refused(path):
    whole = write_pth(path).read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.unlink(missing_ok=True)
        path.write_bytes(whole[:size])
        assert "download it again" in refusal(path)


def test_the_formats_of_old_torch_are_refused(tmp_path, path):
    torch.save(small_tensors(), path, _use_new_zipfile_serialization=False)
    assert "bare pickle" in refusal(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    assert "bare pickle" in refusal(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "tar" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(path):
    members = members_of(write_pth(path))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*members.items(), *members.items()]:
            archive.writestr(name, content)
    assert "occurs twice" in refusal(path)


def test_zips_without_one_pickle_are_refused(path):
    assert "0 data.pkl" in refusal(write_zip(path, {"readme.txt": b"hello"}))
    pickles = {"a/data.pkl": tensor_pickle(), "b/data.pkl": tensor_pickle()}
    assert "2 data.pkl" in refusal(write_zip(path, pickles))


def test_a_pickle_over_the_limit_is_refused(path):
    pth_with_pickle(path, b"\x80\x02" + bytes(17 * 2**20))
    assert "at most 16,777,216" in refusal(path)


def test_the_other_byte_order_is_refused(path):
    members = members_of(write_pth(path))
    name = next(name for name in members if name.endswith("byteorder"))
    assert "big-endian" in refusal(write_zip(path, members | {name: b"big"}))


def test_a_damaged_pickle_is_noticed_by_its_checksum(path):
    content = bytearray(write_pth(path).read_bytes())
    content[content.index(b"wide.weight")] ^= 1
    path.write_bytes(content)
    assert "checksum" in refusal(path)


def test_an_encrypted_member_is_refused(path):
    content = bytearray(write_pth(path).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in refusal(path)


def test_members_that_overlap_are_refused(path):
    """The second entry of the table points to a header inside the first one's data."""
    inner = b"PK\x03\x04" + struct.pack("<22xHH", 8, 0) + b"a/data/0" + bytes(24)
    write_zip(path, {"a/data.pkl": tensor_pickle() + inner, "a/data/0": bytes(24)})
    content = bytearray(path.read_bytes())
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    content[second + 42 : second + 46] = struct.pack("<I", content.index(b"PK\x03\x04", 4))
    path.write_bytes(content)
    assert "outside its place" in refusal(path)


def test_a_member_with_another_name_in_its_own_header_is_refused(path):
    content = bytearray(write_pth(path).read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    assert "two names" in refusal(path)
