"""A reader of exported folders written from the formats' descriptions, in numpy; it shares no code with jqopt.

compressed-tensors 0.20 (docs and `compressors/`), ModelOpt 0.47 (`export/quant_utils.py`), OCP MX v1.0 for E2M1, E8M0.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
WIDTH = {"U8": 1, "I8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}


def e4m3(bits: np.ndarray) -> np.ndarray:
    """float8_e4m3fn: sign, four bits of exponent with bias 7, three of mantissa; 0x7f is NaN."""
    sign, exponent, mantissa = bits >> 7, (bits >> 3) & 15, (bits & 7).astype(np.float32)
    normal = (1 + mantissa / 8) * np.exp2(exponent.astype(np.float32) - 7)
    value = np.where(exponent == 0, mantissa / 8 * np.float32(2**-6), normal).astype(np.float32)
    return np.where(bits & 0x7F == 0x7F, np.nan, np.where(sign == 1, -value, value)).astype(np.float32)


class Stored:
    """One tensor of a file: its dtype's word, shape and bytes."""

    def __init__(self, word: str, shape: tuple[int, ...], data: bytes):
        self.word, self.shape, self.data = word, shape, data

    def raw(self) -> np.ndarray:
        plain = {"U8": "u1", "I8": "i1", "F8_E4M3": "u1", "BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4"}
        return np.frombuffer(self.data, plain.get(self.word, "<i8")).reshape(self.shape)

    def values(self) -> np.ndarray:
        x = self.raw()
        if self.word == "BF16":
            return (x.astype(np.uint32) << 16).view(np.float32)
        return e4m3(x) if self.word == "F8_E4M3" else x.astype(np.float32)


def read_file(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file: 8 bytes of length, a JSON header, the data."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    out, end = {}, 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end, "offsets must leave no hole, in the order of the header"
        assert (8 + length + start) % WIDTH[entry["dtype"]] == 0, "torch reads tensors in place: they must be aligned"
        data = whole[8 + length + start : 8 + length + stop]
        out[name], end = Stored(entry["dtype"], tuple(entry["shape"]), data), stop
    assert 8 + length + end == len(whole)
    return out


def write_file(path: Path, tensors: dict[str, Stored]) -> None:
    """A safetensors file of these tensors, wide dtypes first."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, x in sorted(tensors.items(), key=lambda item: -WIDTH[item[1].word]):
        span = [len(data), len(data) + len(x.data)]
        header[name], data = {"dtype": x.word, "shape": list(x.shape), "data_offsets": span}, data + x.data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder; of shards as the index says."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_file(folder / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    files = {name: read_file(folder / name) for name in set(places.values())}
    assert sum(map(len, files.values())) == len(places)
    return {name: files[file][name] for name, file in places.items()}


def nibbles(x: np.ndarray) -> np.ndarray:
    """uint8 [n, b] -> codes [n, 2 b]: element 2 j in the low nibble of byte j."""
    return np.stack([x & 15, x >> 4], -1).reshape(len(x), -1)


def bit_stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 [n, w] -> unsigned fields [n, count]: field i begins at bit i * bits of the row's little-endian stream."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : count * bits].reshape(len(words), count, bits).astype(np.int64)
    return (fields << np.arange(bits)).sum(-1)


def power(bits: np.ndarray) -> np.ndarray:
    return np.exp2(bits.astype(np.float32) - 127).astype(np.float32)


def along(scale: np.ndarray, k: int) -> np.ndarray:
    """A scale for each group of a row, for each element."""
    return np.repeat(scale, k // scale.shape[1], axis=1)


def tiled(scale: np.ndarray, n: int, k: int) -> np.ndarray:
    return np.repeat(np.repeat(scale, 128, 0), 128, 1)[:n, :k]


# {scheme: {suffix: (dtype, shape of a weight [n, k])}} as the formats' descriptions have them.
_BLOCKS = ("F8_E4M3", lambda n, k: (n, k // 16))
_HALF = ("U8", lambda n, k: (n, k // 2))
_MX = ("U8", lambda n, k: (n, k // 32))
_WHOLE8, _INT8 = ("F8_E4M3", lambda n, k: (n, k)), ("I8", lambda n, k: (n, k))
_ONE, _SCALAR = ("F32", lambda n, k: (1,)), ("F32", lambda n, k: ())
_COLUMN, _VECTOR, _PRE = ("F32", lambda n, k: (n, 1)), ("F32", lambda n, k: (n,)), ("F32", lambda n, k: (k,))
_SHAPE = ("I64", lambda n, k: (2,))


def _words(bits: int, group: int | None) -> dict[str, Any]:
    columns = (lambda k: 1) if group is None else (lambda k: k // group)
    return {
        "weight_packed": ("I32", lambda n, k: (n, k * bits // 32)),
        "weight_scale": ("F32", lambda n, k: (n, columns(k))),
        "weight_shape": _SHAPE,
    }


def _zeros(group: int | None) -> dict[str, Any]:
    return {"weight_zero_point": ("I32", lambda n, k: (n * 4 // 32, 1 if group is None else k // group))}


_NV = {"weight_packed": _HALF, "weight_scale": _BLOCKS, "weight_global_scale": _ONE}
_MO_NV = {"weight": _HALF, "weight_scale": _BLOCKS, "weight_scale_2": _SCALAR}
_PAIRS = {"weight": ("U8", lambda n, k: (n // 2, k)), "weight_scale": ("F32", lambda n, k: (n, k // 128))}


def _tiles(n: int, k: int) -> tuple[int, ...]:
    return (-(-n // 128), 1, -(-k // 128), 1)


EXPECTED: dict[str, dict[str, dict[str, Any]]] = {
    "compressed-tensors": {
        "NVFP4A16": _NV,
        "NVFP4": _NV | {"input_global_scale": _ONE},
        "MXFP4A16": {"weight_packed": _HALF, "weight_scale": _MX},
        "MXFP4": {"weight_packed": _HALF, "weight_scale": _MX},
        "MXFP8": {"weight": _WHOLE8, "weight_scale": _MX},
        "FP8": {"weight": _WHOLE8, "weight_scale": _ONE, "input_scale": _ONE},
        "FP8_DYNAMIC": {"weight": _WHOLE8, "weight_scale": _COLUMN},
        "FP8_BLOCK": {"weight": _WHOLE8, "weight_scale": ("F32", lambda n, k: (-(-n // 128), -(-k // 128)))},
        "W4A16": _words(4, 32),
        "W4A16_CHANNEL": _words(4, None),
        "W4A16_ASYM": _words(4, 64) | _zeros(64),
        "W4A16_ASYM_CHANNEL": _words(4, None) | _zeros(None),
        "W8A16": _words(8, 128),
        "W8A16_CHANNEL": _words(8, None),
        "W8A8": {"weight": _INT8, "weight_scale": _COLUMN},
        "W8A8_STATIC": {"weight": _INT8, "weight_scale": _COLUMN, "input_scale": _ONE},
    },
    "modelopt": {
        "NVFP4": _MO_NV | {"input_scale": _SCALAR},
        "W4A16_NVFP4": _MO_NV,
        "NVFP4_AWQ": _MO_NV | {"input_scale": _SCALAR, "pre_quant_scale": _PRE},
        "FP8": {"weight": _WHOLE8, "weight_scale": _SCALAR, "input_scale": _SCALAR},
        "FP8_PER_CHANNEL_PER_TOKEN": {"weight": _WHOLE8, "weight_scale": _VECTOR},
        "FP8_PB_WO": {"weight": _WHOLE8, "weight_scale": ("F32", _tiles)},
        "MXFP8": {"weight": _WHOLE8, "weight_scale": _MX},
        "MXFP4": {"weight": _HALF, "weight_scale": _MX},
        "W4A8_MXFP4_FP8": {"weight": _HALF, "weight_scale": _MX},
        "W4A16_AWQ": _PAIRS | {"pre_quant_scale": _PRE},
        "W4A8_AWQ": _PAIRS | {"weight_scale_2": _SCALAR, "input_scale": _SCALAR, "pre_quant_scale": _PRE},
        "W8A8_SQ_PER_CHANNEL": {
            "weight": _INT8, "weight_scale": _VECTOR, "input_scale": _SCALAR, "pre_quant_scale": _PRE,
        },
        "W8A16": {"weight": _INT8, "weight_scale": _VECTOR},
    },
}  # fmt: skip


def decode(target: str, scheme: str, found: dict[str, Stored], n: int, k: int) -> np.ndarray:
    """float32 [n, k]: what the tensors of one linear layer stand for, on the layer's plain input."""
    value = _compressed(scheme, found, n, k) if target == "compressed-tensors" else _modelopt(scheme, found, n, k)
    return value * found["pre_quant_scale"].values() if "pre_quant_scale" in found else value


def _compressed(scheme: str, t: dict[str, Stored], n: int, k: int) -> np.ndarray:
    if scheme.startswith("NVFP4"):  # a division by the global scale
        codes = E2M1[nibbles(t["weight_packed"].raw())]
        return codes * along(t["weight_scale"].values() / t["weight_global_scale"].values(), k)
    if scheme.startswith("MXFP4"):
        return E2M1[nibbles(t["weight_packed"].raw())] * along(power(t["weight_scale"].raw()), k)
    if scheme == "MXFP8":
        return t["weight"].values() * along(power(t["weight_scale"].raw()), k)
    if scheme == "FP8_BLOCK":
        return t["weight"].values() * tiled(t["weight_scale"].values(), n, k)
    if "weight_packed" in t:
        assert t["weight_shape"].raw().tolist() == [n, k]
        bits = 8 if scheme.startswith("W8") else 4
        zero = 1 << (bits - 1)
        codes = bit_stream(t["weight_packed"].raw(), bits, k) - zero
        if "weight_zero_point" in t:
            packed = np.ascontiguousarray(t["weight_zero_point"].raw().T)
            codes = codes - along((bit_stream(packed, bits, n) - zero).T, k)
        return codes.astype(np.float32) * along(t["weight_scale"].values(), k)
    return t["weight"].values() * t["weight_scale"].values()


def _modelopt(scheme: str, t: dict[str, Stored], n: int, k: int) -> np.ndarray:
    if "NVFP4" in scheme:  # a product with the second scale
        codes = E2M1[nibbles(t["weight"].raw())]
        return codes * along(t["weight_scale"].values() * t["weight_scale_2"].values(), k)
    if "MXFP4" in scheme:
        return E2M1[nibbles(t["weight"].raw())] * along(power(t["weight_scale"].raw()), k)
    if scheme == "MXFP8":
        return t["weight"].values() * along(power(t["weight_scale"].raw()), k)
    if scheme == "FP8_PB_WO":
        return t["weight"].values() * tiled(t["weight_scale"].values().reshape(-(-n // 128), -(-k // 128)), n, k)
    if "AWQ" in scheme:  # rows 2 i and 2 i + 1 in one byte, two's complement
        packed = t["weight"].raw()
        codes = np.empty((n, k), np.int8)
        codes[0::2], codes[1::2] = packed & 15, packed >> 4
        value = np.where(codes > 7, codes - 16, codes).astype(np.float32) * along(t["weight_scale"].values(), k)
        if "weight_scale_2" not in t:
            return value
        second = t["weight_scale_2"].values()  # W4A8: decoded to float8_e4m3fn under the second scale
        steps = np.sort(np.unique(e4m3(np.arange(127, dtype=np.uint8))))
        size = np.abs(value / second)
        near = np.clip(np.searchsorted(steps, size), 1, len(steps) - 1)
        low, high = steps[near - 1], steps[near]
        up = (size - low > high - size) | ((size - low == high - size) & (near % 2 == 0))
        return np.where(up, high, low) * np.sign(value) * second
    scale = t["weight_scale"].values()
    return t["weight"].values() * (scale[:, None] if scale.ndim else scale)
