"""Our reader and writer of safetensors files against the library's."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalepeft.core import safetensors
from scalepeft.core.safetensors import DamagedFile, SafetensorsFile

TENSORS = {
    "b": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "codes": torch.tensor([1, 2, 255], dtype=torch.uint8),
}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


def data(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def write(path: Path, metadata: dict[str, str] | None = None) -> dict[str, object]:
    header = [(n, NAMES[t.dtype], t.shape, len(data(t))) for n, t in TENSORS.items()]
    wholes = [data(tensor) for tensor in TENSORS.values()]
    pieces = (part for whole in wholes for part in (whole[:5], whole[5:]))
    return safetensors.write(path, header, pieces, metadata)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    info = write(file, {"format": "pt"})
    assert info["bytes"] == file.stat().st_size
    assert info["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    for name, tensor in load_file(file).items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file, {"format": "pt"})
    found = SafetensorsFile(file)
    assert found.metadata == {"format": "pt"} and found.tensors.keys() == TENSORS.keys()
    for name, stored in found.tensors.items():
        assert (stored.dtype, stored.shape) == (NAMES[TENSORS[name].dtype], TENSORS[name].shape)
        assert b"".join(found.pieces(stored, 7)) == data(TENSORS[name])
    assert found.bytes_read == sum(len(data(t)) for t in TENSORS.values())


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "its header is garbage"),
        (b'{"x": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}', "its header is garbage"),
        (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "truncated or damaged"),
    ],
)
def test_a_damaged_file_says_why(header: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DamagedFile, match=reason):
        SafetensorsFile(file)


def test_a_file_that_lacks_tensors_is_our_own_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        safetensors.write(tmp_path / "x", [("a", "U8", (4,), 4)], [b"123"])
