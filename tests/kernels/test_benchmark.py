"""The benchmark of kernels: every kernel of the table has rows with numbers or a reason, and a wrong one is caught."""

import json

import jax.numpy as jnp
import pytest

import jqopt_kernels as kernels
from benchmarks import kernel_cases, kernel_ops
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
    assert "refused by xla_int8 (2 products, such as float x nvfp4, m=1): lhs is float, not int8" in said


@pytest.mark.usefixtures("quick")
def test_what_the_budget_leaves_out_is_told(tmp_path, capsys):
    assert rows_of(tmp_path / "out.json", "--budget-s", "0", "--rows", "1") == []
    assert f"not run, the budget of 0 s is over: {len(kernel_cases.PAIRS)} products: float x nvfp4" in (
        capsys.readouterr().out
    )


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


def test_the_way_of_a_gpu():
    """bfloat16, and all copies in one executable; here on the CPU."""
    for case in kernel_cases.qdot(True, ((64, 128),), (16,)):
        if case.label in ("float x nvfp4", "fp8 x fp8"):
            kernel = kernels.find("qdot", case.lhs, case.rhs, "cpu", case.shapes, backend="xla_decode")
            sets = [case.arrays(i, None) for i in range(3)]
            program = benchmark.lowered(case.run(kernel), sets, True).compile()
            one, y = benchmark.runner("xla_decode", "xla", program, sets, 16, True)
            assert (y.dtype, y.shape, one.each) == (jnp.bfloat16, (16, 64), 3)
            assert kernel_cases.wrong(case, y) is None
            assert len(one.step()) == 3 and benchmark._rates(case, one, 1e-3, None)["of_limit"] is None
    assert {name for name, limit in benchmark.LIMITS.items() if {8, 16} <= set(limit.flops)} == set(benchmark.LIMITS)


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
