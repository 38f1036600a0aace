"""What of the Triton kernels needs no Triton: tiles (which file wins, how the search moves), refusals, parts of x."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt_kernels as kernels
from jqopt_kernels import Operand, Shapes, _tiles, commands, reference, triton_call, triton_dot, tune
from jqopt_kernels._tiles import Tile
from tests.kernels.cases import FLOAT, OPERANDS
from tests.kernels.triton_tools import subprocess_json

NVFP4 = OPERANDS["nvfp4"]
SHAPES = Shapes(1, 4096, 4096)
EXACT = "w4 x16 m1 n4096 k4096"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def shipped(capability: int) -> dict:
    return json.loads((_tiles.FOLDER / f"sm_{capability}.json").read_text())["tiles"]


@pytest.mark.parametrize("capability", _tiles.CAPABILITIES)
def test_every_class_of_every_kernel_has_a_shipped_tile(capability, cache):
    classes = [1, 2, 4, 8, 16, 32, 64, 256, 100_000]
    bits = {"triton_gemv": [(4, 16), (4, 32), (8, 16), (8, 32)], "triton_fp8_block": [(8, 8)]}
    most = {"triton_gemv": triton_dot.GEMV_ROWS, "triton_skinny": triton_dot.SKINNY_ROWS}
    for name in triton_dot.LAUNCHES:
        for weight, activation in bits.get(name, [(w, x) for w in (4, 8) for x in (8, 16, 32)]):
            for m in classes:
                if m <= most.get(name, m):
                    tile = _tiles.find(name, weight, activation, Shapes(m, 4096, 4096), capability)
                    assert tile.bk & (tile.bk - 1) == 0 and tile.bn & (tile.bn - 1) == 0
    blackwells = {"triton_scaled"} if capability >= 100 else set()
    assert set(shipped(capability)) == set(triton_dot.LAUNCHES) | blackwells
    for bits in (4, 8) if blackwells else ():
        for m in (65, 256, 100_000):
            assert _tiles.find("triton_scaled", bits, 8, Shapes(m, 4096, 4096), capability).bn % 128 == 0


def test_a_newer_device_uses_the_last_file_that_is_not_newer():
    assert [_tiles.family(c) for c in (80, 89, 90, 100, 103, 120, 121)] == [None, None, 90, 100, 100, 120, 120]


def test_tuned_tiles_win_where_they_are_precise(cache):
    before = _tiles.find("triton_gemv", 4, 16, SHAPES, 103)
    found = tune.Result("triton_gemv", EXACT, Tile(2, 1024, 2, 5), 7.9, 30, 1)
    path = tune.keep([found], "cuda:103")
    assert path == cache / "jqopt" / "kernels" / "sm_103.json"
    _tiles._read.cache_clear()
    assert _tiles.find("triton_gemv", 4, 16, SHAPES, 103) == found.tile
    assert _tiles.find("triton_gemv", 4, 16, SHAPES._replace(n=1024), 103) == before
    tune.keep([found._replace(kernel="triton_skinny")], "cuda:103")
    assert set(json.loads(path.read_text())["tiles"]) == {"triton_gemv", "triton_skinny"}  # the first is kept
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"tiles": {"triton_gemv": {"w4 x16 m1": {"bn": 8}}}}', '{"tiles": {"triton_gemv": 3}}']
)
def test_a_broken_file_is_named(cache, text):
    path = _tiles.tuned_path(97)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"sm_97.json: not a file of tiles.*jqopt-kernels tune"):
        _tiles.find("triton_gemv", 4, 16, SHAPES, 97)


def test_the_search_ends_at_the_best_and_counts_failures():
    best = Tile(16, 128, 4, 3)

    def seconds(tile: Tile) -> float:
        if tile.warps == 8:
            return float("inf")
        return 1 + sum(abs(getattr(tile, f) - getattr(best, f)) for f in ("bn", "bk", "stages")) + (tile.warps != 4)

    found, time, tried, failed = tune.descend(Tile(64, 512, 4, 4), seconds)
    assert (found.bn, found.bk, found.warps, time) == (16, 128, 4, 2)  # 3 stages are not half or twice of any
    assert 10 < tried < 60 and failed > 0


def test_numbers_that_a_kernel_does_not_read_are_not_searched():
    start = Tile(64, 512, 4, 4)
    moved = {f for tile in tune.neighbours(start, tune.UNUSED["triton_gemv"]) for f in Tile._fields
             if getattr(tile, f) != getattr(start, f)}  # fmt: skip
    assert moved == {"bn", "bk", "warps", "stages"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_parts_of_activations_add_up_exactly(dtype):
    """Under jit, which must not simplify the differences away."""
    rng = np.random.default_rng(0)
    values = np.exp2(rng.uniform(-14, 15, (3, 999))) * rng.choice([-1, 1], (3, 999))
    x = jnp.asarray(values, dtype).at[0, :4].set(jnp.asarray([0, jnp.inf, -jnp.inf, jnp.nan], dtype))
    parts = jax.jit(triton_dot.in_parts)(x)
    assert parts.dtype == jnp.bfloat16 and parts.shape == (3, {"bfloat16": 1, "float16": 2, "float32": 3}[dtype], 999)
    np.testing.assert_array_equal(np.asarray(parts, np.float64).sum(1), np.asarray(x, np.float64))


@pytest.mark.parametrize("name", commands.FORMATS)
@pytest.mark.parametrize("activation", commands.ACTIVATIONS)
def test_what_is_timed_is_a_product_of_finite_numbers(activation, name, monkeypatch):
    monkeypatch.setattr(tune, "CACHE_BYTES", 1 << 10)
    lhs, rhs, dtype = commands.ACTIVATIONS[activation], commands.FORMATS[name], commands.FLOATS.get(activation)
    x, weights = tune._operands(lhs, rhs, Shapes(2, 8, 256), dtype)
    y = reference.qdot(x, weights[0], lhs_spec=lhs, rhs_spec=rhs, n=8, k=256)
    assert len(weights) == 2 and bool(jnp.isfinite(y).all()) and float(jnp.abs(y).max()) > 0


# (activation, weight, [m, n, k], device, the kernels that take it); between them every Triton kernel of `qdot`
SEARCHED = [
    ("bfloat16", "nvfp4", (2, 9, 72), "cuda:90", {"triton_gemv", "triton_skinny", "triton_gemm"}),
    ("fp8_block", "fp8_block", (5, 9, 130), "cuda:90", {"triton_fp8_block", "triton_skinny", "triton_gemm"}),
    ("nvfp4", "nvfp4", (65, 9, 80), "cuda:100", {"triton_scaled", "triton_gemm"}),
    ("mxfp8", "mxfp4", (5, 9, 64), "cuda:120", {"triton_skinny", "triton_gemm"}),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("activation", "weight", "shape", "device", "names"), SEARCHED)
def test_the_search_runs_every_neighbour_of_the_shipped_tile(activation, weight, shape, device, names):
    """In Triton's interpreter, each held to the oracle by the search; nothing is timed."""
    job = {"activation": activation, "weight": weight, "shape": shape, "device": device}
    (found,) = subprocess_json("tests.kernels.triton_tune", json.dumps([job]), TRITON_INTERPRET="1")
    assert {one["kernel"] for one in found} == names
    number = int(device.removeprefix("cuda:"))
    for one in found:
        bits = [int(part[1:]) for part in one["key"].split()[:2]]
        start = _tiles.find(one["kernel"], *bits, Shapes(*shape), number)
        assert one["tile"] == start._asdict() and one["microseconds"] == pytest.approx(0.5e6)
        assert one["tried"] == 1 + len(set(tune.neighbours(start, tune.UNUSED.get(one["kernel"], ()))))
        assert one["key"].endswith(f" n{shape[1]} k{shape[2]}")
        assert one["failed"] == (one["kernel"] == "triton_scaled")  # 64 rows of a weight with scales in tiles of 128


def test_a_product_for_no_triton_kernel_says_why_of_each():
    with pytest.raises(ValueError, match=r"no Triton kernel takes.*triton_gemv: lhs is e2m1.*triton_skinny: m=70"):
        tune.search(NVFP4, Operand("nf4", 64, "float32", "block"), Shapes(70, 8, 64), "cuda:90")


def test_tuning_needs_a_gpu(capsys):
    with pytest.raises(RuntimeError, match="default device here is 'cpu'"):
        tune.gpu()
    assert commands.main(["tune"]) == 1
    assert "error: tuning times kernels on a CUDA GPU" in capsys.readouterr().err


def test_the_command_lists_kernels_with_reasons(capsys):
    assert commands.main(["list", "--device", "cuda:80", "--shape", "256", "512"]) == 0
    text = capsys.readouterr().out
    assert all(k.name in text for k in kernels.KERNELS if k.op == "qdot")
    assert "compute capability 8.0: these kernels need 9.0 or newer" in text


def reason(name: str, lhs: Operand, rhs: Operand, device: str, m: int = 1) -> str | None:
    return dict(kernels.explain("qdot", lhs, rhs, device, Shapes(m, 256, 256)))[name]


def test_refusals_say_what_is_wrong():
    uint4, nf4, odd = OPERANDS["uint4"], OPERANDS["nf4"], NVFP4._replace(block=48)
    assert reason("triton_gemv", FLOAT, NVFP4, "cpu") == "Triton kernels are for CUDA devices, not cpu"
    assert "write 'cuda:90'" in reason("triton_gemv", FLOAT, NVFP4, "gpu")
    assert "compute capability 8.9" in reason("triton_skinny", FLOAT, NVFP4, "cuda:89")
    assert "m=5: more than 4 rows" in reason("triton_gemv", FLOAT, NVFP4, "cuda:90", 5)
    assert "m=65" in reason("triton_skinny", FLOAT, NVFP4, "cuda:90", 65)
    assert "m=1025" in reason("triton_gemm", FLOAT, NVFP4, "cuda:90", 1025)
    assert "zero points, which only triton_gemv subtracts" in reason("triton_skinny", FLOAT, uint4, "cuda:90")
    assert "'nf4' is not decoded in Triton" in reason("triton_gemv", FLOAT, nf4, "cuda:90")
    assert "block 48 is not a power of two" in reason("triton_gemv", FLOAT, odd, "cuda:90")
    assert "lhs is float, not e4m3" in reason("triton_fp8_block", FLOAT, NVFP4, "cuda:90")
    assert "one cuBLASLt call" in reason("triton_fp8_block", OPERANDS["fp8"], OPERANDS["fp8"], "cuda:90")
    assert "too short" in reason("triton_skinny", FLOAT, Operand("int4", 16, "float32", "block"), "cuda:90")


@pytest.mark.skipif(triton_call.missing() is None, reason="jax-triton is installed here")
def test_without_triton_the_reason_says_what_to_install():
    assert "pip install 'jqopt[cuda]'" in reason("triton_gemv", FLOAT, NVFP4, "cuda:90")
    kernel = next(k for k in kernels.KERNELS if k.name == "triton_gemv")
    with pytest.raises(ValueError, match="Triton kernels are for CUDA devices, not cpu"):
        kernel.run(jnp.zeros((1, 16)), None, lhs_spec=FLOAT, rhs_spec=NVFP4, n=1, k=16)
