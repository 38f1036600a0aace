"""The format table: facts of the standards, honest sizes, and errors that teach."""

import dataclasses

import ml_dtypes
import pytest

from jqopt import formats
from jqopt.errors import JqoptError, UnsupportedError

# Names that recipes, manifests and saved checkpoints carry: removing or renaming one breaks files that exist.
NAMES = (
    *("int8", "int4", "int4_fp8", "uint4", "fp8", "fp8_e5m2", "fp8_block"),
    *("nvfp4", "nvfp4_four_over_six", "nvfp4_swept", "mxfp8", "mxfp6", "mxfp6_e2m3", "mxfp4", "mxint8", "nf4"),
)


def test_names_and_get():
    assert set(NAMES) == set(formats.names())
    for name in NAMES:
        assert formats.get(name).name == name
        assert formats.get(formats.get(name)) is formats.get(name)


@pytest.mark.parametrize(
    ("wrong", "right"), [("nvpf4", "nvfp4"), ("NVFP4", "nvfp4"), ("mxfp-8", "mxfp8"), ("int_8", "int8")]
)
def test_unknown_name_suggests_the_nearest(wrong, right):
    with pytest.raises(UnsupportedError, match=f"{wrong}.*did you mean '{right}'") as error:
        formats.get(wrong)
    assert isinstance(error.value, JqoptError)
    assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        (formats.E2M1, ml_dtypes.float4_e2m1fn),
        (formats.E3M2, ml_dtypes.float6_e3m2fn),
        (formats.E2M3, ml_dtypes.float6_e2m3fn),
        (formats.E4M3, ml_dtypes.float8_e4m3fn),
        (formats.E5M2, ml_dtypes.float8_e5m2),
    ],
)
def test_float_elements_are_the_standard_ones(element, dtype):
    info = ml_dtypes.finfo(dtype)
    assert (element.bits, element.max, element.min) == (info.bits, float(info.max), float(info.min))
    assert (element.exponent_bits, element.mantissa_bits) == (info.nexp, info.nmant)
    assert 1 - element.bias == info.minexp
    assert 1 + element.exponent_bits + element.mantissa_bits == element.bits


@pytest.mark.parametrize(
    ("name", "bits", "low", "largest", "block"),
    [
        ("int8", 8, -128, 127, None),
        ("int4", 4, -8, 7, 128),
        ("uint4", 4, 0, 15, 128),
        ("mxint8", 8, -127, 127, 32),
        ("nvfp4", 4, -6, 6, 16),
        ("mxfp4", 4, -6, 6, 32),
        ("fp8", 8, -448, 448, None),
        ("fp8_block", 8, -448, 448, (128, 128)),
        ("nf4", 4, -1, 1, 64),
    ],
)
def test_ranges_and_blocks(name, bits, low, largest, block):
    fmt = formats.get(name)
    assert (fmt.element.bits, fmt.element.min, fmt.element.max, fmt.block) == (bits, low, largest, block)


def test_nf4_table():
    """Of arXiv 2305.14314: 16 rising values, both ends, and an exact zero as the eighth."""
    table = formats.NF4.table
    assert len(table) == 16
    assert list(table) == sorted(table)
    assert (table[0], table[7], table[15]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "n", "k", "bits"),
    [
        ("nvfp4", 256, 1024, 4 + 8 / 16 + 32 / (256 * 1024)),
        ("mxfp4", 256, 1024, 4.25),
        ("mxfp6", 256, 1024, 6.25),
        ("mxfp8", 256, 1024, 8.25),
        ("mxint8", 256, 1024, 8.25),
        ("int4", 256, 1024, 4.25),
        ("uint4", 256, 1024, 4 + 40 / 128),
        ("nf4", 256, 1024, 4.5),
        ("int8", 256, 1024, 8 + 32 / 1024),
        ("fp8", 256, 1024, 8 + 32 / (256 * 1024)),
        ("fp8_block", 256, 1024, 8 + 32 / 128**2),
        ("mxfp6", 1, 5, (4 * 8 + 8) / 5),  # 30 bits of codes fill 4 bytes
        ("nvfp4", 3, 17, (3 * 9 * 8 + 3 * 2 * 8 + 32) / 51),  # the last block is one value long
    ],
)
def test_bits_per_value_counts_all_that_is_stored(name, n, k, bits):
    assert formats.get(name).bits_per_value(n, k) == pytest.approx(bits)


def test_granularity():
    assert formats.get("int8").granularity == "channel"
    assert formats.get("fp8").granularity == "tensor"
    assert formats.get("int4").granularity == "block"
    assert formats.get("int4").with_block(None).granularity == "channel"
    assert formats.get("fp8").with_block(128).tile == (1, 128)
    assert formats.get("int8").scale_shape(6, 10, "tensor") == (1, 1)
    assert formats.get("int8").scale_shape(6, 10, "token") == (6, 1)
    assert formats.get("fp8_block").scale_shape(130, 136) == (2, 2)
    assert formats.get("nvfp4").with_block(32).scale_shape(2, 40) == (2, 2)


@pytest.mark.parametrize("block", [0, -16, 1.5, "16", (), (1, 2, 3), (16, 0), 10**9])
def test_wrong_block(block):
    with pytest.raises(UnsupportedError, match="not a block size"):
        formats.get("int4").with_block(block)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_block_scales_need_a_block(name):
    with pytest.raises(UnsupportedError, match="needs a block"):
        formats.get(name).with_block(None)
    with pytest.raises(UnsupportedError, match="belong to blocks of"):
        formats.get(name).tile_for(4, 64, "channel")


def test_wrong_granularity():
    with pytest.raises(UnsupportedError, match="did you mean 'channel'"):
        formats.get("int8").tile_for(4, 4, "chanel")
    with pytest.raises(UnsupportedError, match="with_block"):
        formats.get("int8").tile_for(4, 4, "block")


def test_formats_are_values():
    fmt = formats.get("nvfp4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.block = 32
    assert fmt.with_block(32) != fmt
    assert fmt.with_block(16) == fmt
    assert hash(fmt.with_block(16)) == hash(fmt)
