from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from headstart.errors import UsageError
from headstart.formats.gguf_file import GgufFile
from headstart.formats.gguf_header import SUPPORTED_TYPES
from tests.gguf_models import gguf, random_blocks, real_files

U32, STRING, ARRAY = 4, 8, 9
VALUES = {
    "a.number": 7,
    "a.fraction": 0.5,
    "a.flag": True,
    "a.text": "héllo",
    "a.numbers": [1, 2, 3],
    "a.fractions": [0.5, -1.0],
    "a.strings": ["Ġthe", "", "é"],
}


def write(path: Path, kinds=("F32",), rows=5, columns=512, **settings) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **settings)
    for key, value in VALUES.items():
        add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for kind in kinds:
        writer.add_tensor(
            f"{kind}.weight", random_blocks(rows, columns, kind), raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    writer.add_tensor("norm", np.arange(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_those_of_the_package(tmp_path):
    path = write(tmp_path / "m.gguf", SUPPORTED_TYPES)
    file, reader = GgufFile(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(file.metadata) == fields
    assert {key: file.metadata[key] for key in VALUES} == VALUES
    assert (
        file.names == [tensor.name for tensor in reader.tensors] == [*(f"{k}.weight" for k in SUPPORTED_TYPES), "norm"]
    )
    for tensor in reader.tensors:
        assert file.shape(tensor.name) == tuple(int(n) for n in reversed(tensor.shape))
        assert file.type(tensor.name) == tensor.tensor_type
        assert file.stored_bytes(tensor.name) == tensor.n_bytes
        assert file.raw(tensor.name).tobytes() == tensor.data.tobytes()
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(file.dequantized(tensor.name), expected.view(file.shape(tensor.name)))


def test_a_tensor_is_read_in_pieces_and_in_another_dtype(tmp_path, monkeypatch):
    file = GgufFile(write(tmp_path / "m.gguf", ["Q8_0"]))
    whole = file.dequantized("Q8_0.weight")
    monkeypatch.setattr("headstart.formats.gguf_file.PIECE", 3 * 256)
    target = torch.zeros(5, 512, dtype=torch.bfloat16)
    file.read_into("Q8_0.weight", target)
    assert torch.equal(target, whole.bfloat16())


def test_a_split_model_is_opened_by_any_part(tmp_path):
    write(tmp_path / "m.gguf", ["F32", "Q8_0", "Q4_K"], split_max_tensors=2)
    whole = GgufFile(write(tmp_path / "whole.gguf", ["F32", "Q8_0", "Q4_K"]))
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    for part in parts:
        file = GgufFile(part)
        assert file.names == whole.names and file.metadata["a.strings"] == VALUES["a.strings"]
        assert all(torch.equal(file.dequantized(name), whole.dequantized(name)) for name in whole.names)


def test_parts_of_a_split_model_belong_together(tmp_path):
    first, second = (tmp_path / f"m-0000{k}-of-00002.gguf" for k in (1, 2))
    write(tmp_path / "m.gguf", ["F32", "Q8_0", "Q4_K"], split_max_tensors=2)
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    refused(first, "split.no and split.count")
    second.write_bytes(content.replace(b"norm", b"morn"))  # another name is another tensor
    assert "morn" in GgufFile(first).names
    write(tmp_path / "x.gguf", ["F32"], split_max_tensors=1)
    second.write_bytes((tmp_path / "x-00002-of-00002.gguf").read_bytes())
    refused(first, "split.tensors.count")
    second.unlink()
    refused(first, "m-00002-of-00002.gguf: is missing; put all 2 parts")
    first.rename(tmp_path / "alone.gguf")
    refused(tmp_path / "alone.gguf", "split.no and split.count")
    first.with_name("m-00003-of-00002.gguf").touch()
    refused(first.with_name("m-00003-of-00002.gguf"), "part 3 of 2")


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name="x", dims=(32,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(*tensors: bytes, keys: tuple[bytes, ...] = (), version=3, counts: tuple[int, int] | None = None) -> bytes:
    """Return a header, with room for 1,024 bytes of tensors behind it."""
    start = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    content = start + b"".join(keys) + b"".join(tensors)
    return content + bytes(-len(content) % 32 + 1024)


def refused(path: Path, *expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        GgufFile(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and ";" in message
    assert all(part in message for part in expected), message


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


BAD = {
    "empty": (b"", "no GGUF file"),
    "magic": (b"PK\3\4 and more", "no GGUF file"),
    "only magic": (b"GGUF", "cut short"),
    "old version": (header(version=1), "version 1", "convert the model again"),
    "new version": (header(version=9), "version 9"),
    "big endian": (header(version=3 << 24), "big-endian"),
    "10**12 tensors": (header(counts=(10**12, 0)), "1,000,000,000,000 tensors"),
    "2**64 keys": (header(counts=(0, 2**64 - 1)), "keys"),
    "more tensors than bytes": (header(counts=(2**17, 0)), "promises 131,072 tensors"),
    "long name": (header(struct.pack("<Q", 2**60) + b"x", counts=(1, 0)), "name"),
    "long string": (header(keys=(key("a", STRING, struct.pack("<Q", 2**60)),)), "cut short"),
    "long string in a list": (header(keys=(key("a", ARRAY, struct.pack("<IQQ", STRING, 2, 2**63)),)), "cut short"),
    "many numbers": (header(keys=(key("a", ARRAY, struct.pack("<IQ", U32, 2**60)),)), "entries of a"),
    "more numbers than bytes": (header(keys=(key("a", ARRAY, struct.pack("<IQ", U32, 1000)),)), "value of a"),
    "nested list": (header(keys=(key("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "unknown type 9"),
    "unknown value": (header(keys=(key("a", 77, b""),)), "unknown type 77"),
    "key twice": (header(keys=(key("a", STRING, text("b")),) * 2), "key a occurs twice"),
    "tensor twice": (header(tensor(), tensor(offset=128)), "tensor x occurs twice"),
    "no UTF-8": (header(tensor(b"\xff\xfe")), "not UTF-8"),
    "control characters": (header(tensor("a\n\33[2J"), tensor("a\n\33[2J")), r"'a\n\x1b[2J' occurs twice"),
    "no dimension": (header(tensor(dims=())), "0 dimensions"),
    "many dimensions": (header(tensor(dims=(1,) * 5)), "5 dimensions"),
    "2**32 dimensions": (header(text("x") + b"\xff" * 4, counts=(1, 0)), "dimensions"),
    "size 0": (header(tensor(dims=(0, 4))), "shape [4, 0]"),
    "half a block": (header(tensor(dims=(33, 4), kind=8)), "Q8_0 has shape [4, 33], in blocks of 32"),
    "past the end": (header(tensor(dims=(256, 2))), "tensor x lies past its end"),
    "far past the end": (header(tensor(dims=(2**63, 2**63, 2**63))), "tensor x lies past its end"),
    "offset past the end": (header(tensor(offset=2**63)), "tensor x begins at byte"),
    "overlap": (header(tensor(), tensor("y")), "tensor y begins at byte 0, not 128"),
    "unaligned": (header(tensor(dims=(33,)), tensor("y", offset=132)), "tensor y begins at byte 132, not 160"),
    "alignment 0": (header(keys=(key("general.alignment", U32, bytes(4)),)), "power of two"),
    "alignment 48": (header(keys=(key("general.alignment", U32, struct.pack("<I", 48)),)), "power of two"),
    "alignment of text": (header(keys=(key("general.alignment", STRING, text("32")),)), "power of two"),
    "unknown type": (header(tensor(kind=1234)), "tensor x has type number 1234"),
    "IQ": (header(tensor(dims=(256,), kind=20)), "tensor x has type IQ4_NL"),
    "TQ": (header(tensor(dims=(256,), kind=34)), "tensor x has type TQ1_0"),
    "MXFP4": (header(tensor(dims=(256,), kind=39)), "tensor x has type MXFP4"),
    "integers": (header(tensor(kind=26)), "tensor x has type I32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, case):
    content, *expected = BAD[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    refused(path, str(path), *expected)


def test_a_header_that_is_sound_is_read(tmp_path):
    (tmp_path / "m.gguf").write_bytes(header(tensor(), tensor("y", offset=128)))
    assert GgufFile(tmp_path / "m.gguf").names == ["x", "y"]


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", columns=64)
    content = path.read_bytes()
    assert content[-16:] == bytes(16)  # the padding behind the last tensor
    for size in range(len(content) - 16):
        if size < 1200 or size % 97 == 0:
            path.write_bytes(content[:size])
            refused(path)


def test_a_byte_changed_anywhere_in_the_header_is_read_or_refused(tmp_path):
    content = bytearray(write(tmp_path / "m.gguf", ["Q8_0"], rows=1, columns=32).read_bytes())
    path = tmp_path / "changed.gguf"
    for at in range(len(content) - 128):
        for value in (0, 0x7F, 0xFF):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                file = GgufFile(path)
                assert len(dict(file.metadata)) and all(file.dequantized(name).numel() for name in file.names)
            except UsageError as error:
                assert "\n" not in str(error)


def test_what_is_no_file_is_refused(tmp_path):
    refused(tmp_path, "is a directory")
    refused(tmp_path / "none.gguf", "no such file")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "not a regular file")


@pytest.mark.slow
def test_real_files_are_those_of_the_package():
    for path in real_files():
        file, reader = GgufFile(path), gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert dict(file.metadata) == fields
        assert file.names == [each.name for each in reader.tensors]
        for each in reader.tensors:
            expected = torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy())
            assert torch.equal(file.dequantized(each.name), expected)
