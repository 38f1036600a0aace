"""The benchmark of kernels: every kernel of the table has rows with numbers or a reason, and a wrong one is caught."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jqopt_kernels as kernels
from benchmarks import kernel_cases, kernel_ops, kernel_targets
from benchmarks import kernels as benchmark


def rows_of(path, *flags: str) -> list[dict]:
    benchmark.main(["--op", "qdot", "--size", "64", "--json", str(path), *flags])
    return json.loads(path.read_text())["rows"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(benchmark, "CHUNK_S", 0.0)
    monkeypatch.setattr(benchmark, "limit_of", lambda device: benchmark.Limit(1e9, {32: 1e9}))


@pytest.mark.usefixtures("quick")
def test_every_kernel_has_rows(tmp_path, capsys):
    rows = rows_of(tmp_path / "out.json", "--only", "float x nvfp4", "int8 x int8", "--rows", "1", "5")
    assert {r["kernel"] for r in rows} - {"float"} == {
        k.name for k in kernels.KERNELS if k.op == "qdot" and k.backend != "reference"
    }
    timed = [r for r in rows if r["status"] == "ok"]
    assert {"float", "xla_tiled", "xla_int8", "xla_decode"} <= {r["kernel"] for r in timed}
    for r in timed:
        least = max(2 * r["m"] * 64 * 64 / 1e9, r["gb_s"] * r["microseconds"] * 1e-6)  # of 1 GFLOP/s and 1 GB/s
        assert r["of_limit"] == pytest.approx(least / (r["microseconds"] * 1e-6))
        assert r["tflop_s"] == pytest.approx(2 * r["m"] * 64 * 64 / r["microseconds"] / 1e6)
    said = capsys.readouterr().out
    assert "refused by xla_int8 (3 products, such as float x nvfp4, m=1): lhs is float, not int8 (other re" in said
    assert "NVFP4 weights, one row, 4096 x 4096, C++: times as fast as float32: at least 2.00: not measured" in said


@pytest.mark.usefixtures("quick")
def test_what_the_budget_leaves_out_is_told(tmp_path, capsys):
    assert rows_of(tmp_path / "out.json", "--budget-s", "0", "--rows", "1") == []
    said = capsys.readouterr().out
    assert f"not run, the budget is over: {len(kernel_cases.PAIRS)} products: float x nvfp4" in said


def test_an_op_without_a_case_is_told(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CASES", {})
    monkeypatch.setattr(benchmark, "limit_of", lambda device: None)
    benchmark.main([])
    said = capsys.readouterr().out
    for op in {k.op for k in kernels.KERNELS}:
        assert f"no case for op {op!r}" in said


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_other_ops_are_held_to_their_oracle_and_timed(tmp_path):
    def timed(op: str, size: int) -> dict:
        path = tmp_path / f"{op}.json"
        benchmark.main(["--op", op, "--size", str(size), "--rows", "16", "--json", str(path)])
        rows = json.loads(path.read_text())["rows"]
        assert not [r for r in rows if r["status"] == "failed"]
        return {(r["kernel"], r["formats"]): r for r in rows if r["status"] == "ok"}

    quantized, grouped = timed("quantize", 64), timed("ragged", 64)
    assert {f for name, f in quantized if name == "xla_quantize"} == set(kernel_ops.TARGETS)
    one = quantized["xla_quantize", "mxfp8"]
    assert one["tflop_s"] == 0 and one["gb_s"] * one["microseconds"] == pytest.approx(64 * (2 * 64 + 64 + 2) / 1e3)
    assert ("xla_ragged", "float x 8 nvfp4") in grouped


def test_wrong_codes_are_seen():
    case = next(kernel_ops.CASES["quantize"](False, ((4, 64),)))
    kernel = next(k for k in kernels.KERNELS if k.name == "xla_quantize")
    y = case.run(kernel)(*case.arrays(0, None))
    assert kernel_cases.wrong(case, y) is None
    off = y._replace(data=y.data.at[1, 3].add(1))
    assert "WRONG: 1 of" in str(kernel_cases.wrong(case, off))


def test_a_wrong_result_is_seen():
    case = next(kernel_cases.qdot(False, ((64, 64),), (3,)))
    kernel = next(k for k in kernels.KERNELS if k.name == "xla_decode")
    y = case.run(kernel)(*case.arrays(0, None))
    assert kernel_cases.wrong(case, y) is None
    assert "WRONG" in str(kernel_cases.wrong(case, y.at[2, 7].multiply(1.001) + jnp.float32(0)))


@pytest.mark.parametrize("times", [1, 2, 15])
def test_the_way_of_a_gpu(times):
    """bfloat16, and all copies in one executable, some times over, each after the one before; here on the CPU."""
    for case in kernel_cases.qdot(True, ((64, 128),), (40,)):
        if case.label in ("float x nvfp4", "fp8 x fp8"):
            kernel = kernels.find("qdot", case.lhs, case.rhs, "cpu", case.shapes, backend="xla_decode")
            sets = [case.arrays(i, None) for i in range(3)]
            program = benchmark.lowered(case.run(kernel), sets, True, times).compile()
            one, y = benchmark.runner("xla_decode", "xla", program, sets, 16, True, times)
            assert (y.dtype, y.shape, one.each) == (jnp.bfloat16, (40, 64), 3 * times)
            assert kernel_cases.wrong(case, y) is None
            for x, got in zip(sets, one.step(), strict=True):
                want = case.run(kernel)(*x)
                np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7)
            assert benchmark._rates(case, one, 1e-3, None)["of_limit"] is None
            if case.label == "fp8 x fp8":
                y = jnp.asarray(benchmark.cublaslt(case)(*sets[0]))
                assert kernel_cases.wrong(case, y) is None
    assert {name for name, limit in benchmark.LIMITS.items() if {8, 16} <= set(limit.flops)} == set(benchmark.LIMITS)


def test_small_products_are_repeated_until_a_gpu_is_busy():
    limit = benchmark.LIMITS["H200"]
    for n, k, copies in ((28672, 4096, 3), (4096, 4096, 16)):
        moved = n * k * 9 / 16
        times = benchmark.repeats(moved, 2.0 * n * k, copies, limit)
        assert times * copies * moved / limit.bytes > 4e-3 and times % (16 // copies) == 0
    assert benchmark.repeats(470e6, 2.0 * 4096 * 57344 * 8192, 2, limit) == 1
    assert benchmark.repeats(1e6, 1e6, 2, None) == 1


def test_every_row_of_a_large_product_may_be_the_one_compared():
    case = next(kernel_cases.qdot(False, ((64, 64),), (200,)))
    kernel = next(k for k in kernels.KERNELS if k.name == "xla_decode")
    rows = kernel_cases.checked(case)
    assert rows[0] == 0 and rows[-1] == 199 and len(rows) == 16
    y = case.run(kernel)(*case.arrays(0, None))
    assert kernel_cases.wrong(case, y) is None
    assert "WRONG" in str(kernel_cases.wrong(case, y.at[199].multiply(1.001)))


def test_sums_of_fp8_tensor_cores_have_a_tolerance_of_their_own():
    """Sums of 128 products, of which 14 bits are kept from the highest one's place on (docs/kernels.md, Hopper)."""
    case = next(c for c in kernel_cases.qdot(True, ((64, 4096),), (16,)) if c.label == "fp8 x fp8")
    x, w = case.arrays(0, None)
    a, b = (np.asarray(p.data).view(ml_dtypes.float8_e4m3fn).astype(np.float64) for p in (x, w))
    total = np.zeros((16, 64))
    for k in range(0, 4096, 128):
        part = np.zeros((16, 64))
        for j in range(k, k + 128, 32):
            terms = a[:, None, j : j + 32] * b[None, :, j : j + 32]
            unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(terms).max(-1), np.abs(part)))) - 13)
            part = np.floor(part / unit) * unit + (np.floor(terms / unit[..., None]) * unit[..., None]).sum(-1)
        total += part
    y = jnp.asarray(total * float(x.scale[0, 0]) * float(w.scale[0, 0]), jnp.bfloat16)
    cores, exact = (next(k for k in kernels.KERNELS if k.name == name) for name in ("xla_fp8", "xla_decode"))
    assert kernel_cases.wrong(case, y, None, cores) is None
    assert "WRONG" in str(kernel_cases.wrong(case, y, None, exact))


def test_bfloat16_attention_may_round_the_softmaxs_weights():
    small = kernel_ops._attend("fp8", 2, 256, jnp.bfloat16)
    for name in ("xla_attend", "pallas_attend"):
        kernel = kernels.find("attend", small.lhs, small.rhs, "cpu:interpret", small.shapes, backend=name)
        y = small.run(kernel)(*small.arrays(0, None))
        assert kernel_cases.wrong(small, y, None, kernel) is None
        assert "WRONG" in str(kernel_cases.wrong(small, y * jnp.bfloat16(1.05), None, kernel))


def row(kernel: str, formats: str, sizes: tuple[int, int, int], microseconds: float, **more) -> dict:
    m, n, k = sizes
    family = kernel.split("_")[0]
    return {"op": "qdot", "formats": formats, "m": m, "n": n, "k": k, "kernel": kernel, "family": family,
            "status": "ok", "microseconds": microseconds, "gb_s": 1.0, "vs_float": 1.0} | more  # fmt: skip


def test_targets_take_the_best_kernel_of_the_worst_case():
    big, wide = (4096, 8192, 8192), (4096, 57344, 8192)
    rows = [
        row("float", "float x nvfp4", (1, 28672, 4096), 50.0, gb_s=4000.0),
        row("triton_gemv", "float x nvfp4", (1, 28672, 4096), 18.0, gb_s=3600.0, vs_float=2.8),
        row("pallas_gemv", "float x nvfp4", (1, 28672, 4096), 30.0, gb_s=2100.0, vs_float=1.7),
        row("triton_skinny", "float x nvfp4", (16, 28672, 4096), 22.0, gb_s=3000.0, vs_float=2.4),
        row("xla_fp8", "fp8 x fp8", big, 400.0, vs_float=1.7),
        row("cublaslt", "fp8 x fp8", big, 390.0, vs_float=1.75),
        row("xla_fp8", "fp8 x fp8", wide, 2900.0, vs_float=1.65),
        row("triton_fp8_block", "fp8_block x fp8_block", big, 600.0),
    ]
    found = {v.target: v for v in kernel_targets.verdicts(rows, 4.8e12, True)}
    measured = [None if v.measured is None else round(v.measured, 3) for v in found.values()]
    assert measured == [2.4, 0.75, 1.65, 0.975, 0.667, None]
    lines = [v.line() for v in found.values()]
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["NOT MET", "met", "met", "met", "NOT MET", "not measured"]
    assert "triton_skinny, float x nvfp4, m=16 n=28672 k=4096" in lines[0]


@pytest.mark.usefixtures("quick")
def test_what_fails_has_a_row_and_the_table_goes_on(tmp_path, monkeypatch, capsys):
    """A kernel that fails, one that is wrong, and a case whose float product fails."""

    def fails(*_, **__):
        raise RuntimeError("out of patience\nand more")

    broken = {"xla_tiled": fails, "xla_decode": lambda x, w, *, n, **_: jnp.ones((x.shape[0], n))}
    monkeypatch.setattr(
        kernels.table, "KERNELS", tuple(k._replace(run=broken.get(k.name, k.run)) for k in kernels.KERNELS)
    )
    monkeypatch.setattr(kernels, "KERNELS", kernels.table.KERNELS)
    cases = list(kernel_cases.qdot(False, ((64, 64),), (5,)))[:2]
    cases[1] = cases[1]._replace(plain=fails)
    monkeypatch.setattr(benchmark, "CASES", {"qdot": lambda *_: cases})
    path = tmp_path / "out.json"
    assert benchmark.main(["--op", "qdot", "--json", str(path)]) == 1
    why = {
        (r["formats"], r["kernel"]): r["why"] for r in json.loads(path.read_text())["rows"] if r["status"] == "failed"
    }
    assert why["float x nvfp4", "xla_tiled"] == "FAILED: RuntimeError: out of patience"
    assert why["float x nvfp4", "xla_decode"].startswith("WRONG")
    assert why["fp8 x fp8", "-"] == "FAILED: RuntimeError: out of patience"
    assert "FAILED: RuntimeError: out of patience" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "CASES", {})
    assert benchmark.main([]) == 0


@pytest.mark.slow
def test_a_gpu_has_no_more_cases_than_one_call_can_run(monkeypatch):
    """Some seven seconds each, in nine minutes; every format, every op, all rows of the first target among them."""
    monkeypatch.setattr(kernel_cases.jax, "default_backend", lambda: "gpu")
    chosen = [c for op, make in kernel_ops.CASES.items() for c in make(True) if kernel_cases.telling(c)]
    assert len(chosen) * 7 <= 540 + 60
    assert {c.op for c in chosen} == set(kernel_ops.CASES)
    products = [c for c in chosen if c.op == "qdot"]
    assert {c.label for c in products} == {f"{a} x {b}" for a, b in kernel_cases.PAIRS}
    rows = {c.shapes.m for c in products if c.label == "float x nvfp4"}
    assert rows == {1, 2, 4, 8, 16, 32, 64, 256, 4096}
    assert {c.shapes[1:3] for c in products if c.label == "float x nvfp4"} == set(kernel_cases.LLAMA)


def test_the_most_telling_products_come_first():
    first = kernel_cases.order(kernel_cases.LLAMA, kernel_cases.GPU_ROWS)[:6]
    assert first[0] == (("float", "nvfp4"), (28672, 4096), 1)
    assert (("float", "nvfp4"), (28672, 4096), 16) in first and (("fp8", "fp8"), (28672, 4096), 1) in first
