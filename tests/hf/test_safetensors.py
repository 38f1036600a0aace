"""The safetensors reader: files of the reference writer, every dtype, and damaged or hostile files."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jqopt.errors import CheckpointError
from jqopt.hf.safetensors import DTYPES, INDEX, SINGLE, open_file, open_folder


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_reference_writes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "f32": rng.normal(size=(3, 5)).astype(np.float32),
        "bf16": rng.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
        "i64": rng.integers(-9, 9, (7,)),
        "scalar": np.asarray(2.5, np.float16),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    entries = open_folder(tmp_path)
    assert set(entries) == set(tensors)
    for name, tensor in tensors.items():
        found = entries[name].read()
        assert found.dtype == tensor.dtype
        np.testing.assert_array_equal(found, tensor)
        assert entries[name].nbytes == tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_bit_for_bit(dtype, tmp_path):
    """An odd first byte in the data makes every wider tensor unaligned."""
    size = DTYPES[dtype].itemsize
    raw = bytes(range(2)) * size if dtype == "BOOL" else bytes(range(0x31, 0x31 + 2 * size))
    header = {"pad": entry(shape=[1], offsets=[0, 1]), "x": entry(dtype, [2, 1], [1, 1 + 2 * size])}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found = open_file(write(tmp_path / "a", text, b"\0" + raw))["x"]
    assert found.offset % 2 == 1
    assert found.read().tobytes() == raw
    assert found.read().shape == (2, 1)


def test_fp8_values(tmp_path):
    """Codes from the OCP definitions: e4m3 0x7e = 448, e5m2 0x7b = 57344, e8m0 0x80 = 2."""
    names = {"F8_E4M3": (0x7E, 448.0), "F8_E5M2": (0x7B, 57344.0), "F8_E8M0": (0x80, 2.0)}
    header = {name: entry(name, [1], [i, i + 1]) for i, name in enumerate(names)}
    entries = open_file(write(tmp_path / "a", header, bytes(code for code, _ in names.values())))
    assert {n: float(e.read().astype(np.float32)[0]) for n, e in entries.items()} == {
        n: value for n, (_, value) in names.items()
    }


def test_the_view_is_read_only(tmp_path):
    found = open_file(write(tmp_path / "a", {"x": entry()}, b"abcd"))["x"].read()
    assert not found.flags.writeable


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[1]", "its JSON is a list"),
        (b"{", "JSON cannot be read"),
        (b"[" * 100_000, "JSON cannot be read"),
        (b'{"\xff": 1}', "JSON cannot be read"),
        (b'{"x": 1, "x": 2}', "'x' stands there twice"),
        ({"x": 3}, "x: shape None"),
        ({"x": entry(shape=[-4])}, r"shape \[-4\]"),
        ({"x": entry(shape=[2.0, 2])}, "is not a list of sizes"),
        ({"x": entry(shape=[True, 4])}, "is not a list of sizes"),
        ({"x": entry(offsets=[0])}, r"data_offsets \[0\]"),
        ({"x": entry("F5")}, "dtype 'F5' is not read; known are BOOL"),
        ({"x": entry(dtype=["U8"])}, "is not read"),
        ({"x": entry(offsets=[0, 3])}, "should span the 4 bytes"),
        ({"x": entry(offsets=[4, 0])}, "should span the 4 bytes"),
        ({"x": entry(offsets=[2, 6])}, "damaged or cut short"),
        ({"x": entry(shape=[1 << 60], offsets=[0, 1 << 60])}, "damaged or cut short"),
        ({"x": entry(), "y": entry(shape=[2], offsets=[2, 4])}, "the data of x and y overlap"),
    ],
)
def test_damaged_headers(header, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        open_file(write(tmp_path / "a", header, b"abcd"))


def test_elements_narrower_than_a_byte(tmp_path):
    """F4: two a byte, the first in the low nibble; F6: four in three bytes. The shape counts elements."""
    header = {"x": entry("F4", [2, 3, 4], [0, 12]), "y": entry("F6_E2M3", [4, 4], [12, 24])}
    entries = open_file(write(tmp_path / "a", header, bytes(range(24))))
    assert (entries["x"].shape, entries["x"].bits, entries["x"].dtype) == ((2, 3, 4), 4, np.uint8)
    np.testing.assert_array_equal(entries["x"].read(), np.arange(12).reshape(2, 3, 2))
    np.testing.assert_array_equal(entries["x"].read(1), np.arange(6, 12).reshape(1, 3, 2))
    np.testing.assert_array_equal(entries["y"].read(), np.arange(12, 24).reshape(4, 3))
    for shape in ([3], []):
        with pytest.raises(CheckpointError, match="F4.*does not fill whole bytes"):
            open_file(write(tmp_path / "b", {"x": entry("F4", shape, [0, 2])}, b"ab"))


@pytest.mark.parametrize("pad", [0, 1])
def test_slices(pad, tmp_path):
    """By the first axis, as numpy slices; also where the tensor starts at an odd byte."""
    x = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    header = {"p": entry(shape=[pad], offsets=[0, pad]), "x": entry("F32", [6, 2, 2], [pad, pad + 96])}
    found = open_file(write(tmp_path / "a", header, bytes(pad) + x.tobytes()))["x"]
    for part in (slice(None), slice(2, 5), slice(-2, None), slice(4, 99), slice(3, 3), slice(5, 2)):
        np.testing.assert_array_equal(found.read(part.start or 0, part.stop), x[part])


def test_a_slice_reads_no_more_than_itself(tmp_path):
    """The file is cut off behind the slice's last byte after it was opened: the slice is read all the same."""
    x = np.arange(1 << 14, dtype=np.int64).reshape(1 << 10, 16)
    save_file({"x": x}, tmp_path / "a")
    found = open_file(tmp_path / "a")["x"]
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(found.offset + 10 * 128)
    np.testing.assert_array_equal(found.read(2, 10), x[2:10])
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        found.read(2, 11)


def test_damaged_files(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_file(tmp_path / "a")
    with pytest.raises(CheckpointError, match="announces a header of 1152921504606846976 bytes"):
        open_file(write(tmp_path / "b", {}, length=1 << 60))


def sharded(folder: Path) -> dict[str, np.ndarray]:
    tensors = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abc")}
    save_file({n: tensors[n] for n in "ab"}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": tensors["c"]}, folder / "model-00002-of-00002.safetensors")
    places = {n: f"model-0000{1 if n in 'ab' else 2}-of-00002.safetensors" for n in "abc"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


def test_shards(tmp_path):
    tensors = sharded(tmp_path)
    entries = open_folder(tmp_path)
    assert list(entries) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(entries[name].read(), tensor)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"a": "gone.safetensors"}, "names the file 'gone.safetensors'"),
        ({"a": "../x.safetensors"}, "names the file '../x.safetensors'"),
        ({"a": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"a": "model-00002-of-00002.safetensors"}, "places a in model-00002.*does not hold it"),
        ({"a": "model-00001-of-00002.safetensors"}, "also hold b"),
        ({"a": 3}, "'weight_map' should map"),
        (None, "'weight_map' should map"),
    ],
)
def test_wrong_index(place, words, tmp_path):
    sharded(tmp_path)
    (tmp_path.parent / "x.safetensors").write_bytes(b"")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": place}))
    with pytest.raises(CheckpointError, match=words):
        open_folder(tmp_path)


def test_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="it holds nothing"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"it holds pytorch_model\.bin.*safe_serialization=True"):
        open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        open_folder(tmp_path / "gone")
