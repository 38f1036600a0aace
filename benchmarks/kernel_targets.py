"""What the kernels are to reach, and whether the rows of `benchmarks.kernels` show it: a line for each target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

Rows = list[dict]


class Verdict(NamedTuple):
    """One target. measured: None where rows that it needs are missing. worst: the row that decides."""

    target: str
    asked: float
    measured: float | None
    worst: str = ""

    def line(self) -> str:
        if self.measured is None:
            return f"{self.target}: at least {self.asked:.2f}: not measured"
        met = "met" if self.measured >= self.asked else "NOT MET"
        return f"{self.target}: at least {self.asked:.2f}, measured {self.measured:.2f} ({self.worst}): {met}"


def verdicts(rows: Rows, bandwidth: float | None, is_gpu: bool) -> Iterator[Verdict]:
    """The targets of a device; bandwidth: bytes a second of its memory, None where that is unknown."""
    ok = [row for row in rows if row.get("status") == "ok"]
    return _gpu(ok, bandwidth) if is_gpu else _cpu(ok)


def _gpu(ok: Rows, bandwidth: float | None) -> Iterator[Verdict]:
    decode = [row for row in _op(ok, "qdot", "float x nvfp4") if row["m"] <= 16]
    yield _least("NVFP4 weights, up to 16 rows: times as fast as bfloat16", 2.5, decode, "vs_float")
    one = [row for row in decode if row["m"] == 1 and row["n"] * row["k"] >= 28672 * 4096]
    yield _least("NVFP4 weights, one row: share of memory bandwidth", 0.7, one, _share(bandwidth))
    fp8 = [r for r in _op(ok, "qdot", "fp8 x fp8") if r["m"] >= 4096 and min(r["n"], r["k"]) >= 8192]
    yield _least("FP8, 8192-class: times as fast as bfloat16", 1.6, _ours(fp8), "vs_float")
    others = _by_sizes([row for row in fp8 if row["kernel"] in ("cublaslt", "torch._scaled_mm")])
    yield _least("FP8, 8192-class: of cuBLASLt's speed", 0.95, _ours(fp8), _against(others))
    blocks = [r for r in _op(ok, "qdot", "fp8_block x fp8_block") if r["m"] >= 4096 and min(r["n"], r["k"]) >= 8192]
    yield _least("FP8 in blocks, 8192-class: of FP8's speed", 0.8, blocks, _against(_by_sizes(_ours(fp8))))
    makers = [r for r in ok if r["op"] == "quantize" and (r["m"], r["k"]) == (8192, 8192)]
    yield _least("quantizers, 8192 x 8192: share of memory bandwidth", 0.6, makers, _share(bandwidth))


def _cpu(ok: Rows) -> Iterator[Verdict]:
    one = [r for r in _op(ok, "qdot", "float x nvfp4") if (r["m"], r["n"], r["k"]) == (1, 4096, 4096)]
    plain = [row for row in one if row["family"] == "xla"]
    yield _least("NVFP4 weights, one row, 4096 x 4096, XLA only: times as fast as float32", 0.9, plain, "vs_float")
    built = [row for row in one if row["family"] == "ffi"]
    yield _least("NVFP4 weights, one row, 4096 x 4096, C++: times as fast as float32", 2.0, built, "vs_float")


def _least(target: str, asked: float, rows: Rows, measure: str | Callable[[dict], float | None]) -> Verdict:
    """The best kernel of each case counts, and of the cases the worst."""
    best: dict[tuple, tuple[float, dict]] = {}
    for row in _ours(rows):
        value = row[measure] if isinstance(measure, str) else measure(row)
        if value is not None and value > best.get(_case(row), (float("-inf"), row))[0]:
            best[_case(row)] = value, row
    if not best:
        return Verdict(target, asked, None)
    value, row = min(best.values(), key=lambda found: found[0])
    return Verdict(target, asked, value, f"{row['kernel']}, {row['formats']}, m={row['m']} n={row['n']} k={row['k']}")


def _case(row: dict) -> tuple:
    return row["formats"], row["m"], row["n"], row["k"]


def _op(rows: Rows, op: str, formats: str) -> Rows:
    return [row for row in rows if (row["op"], row["formats"]) == (op, formats)]


def _ours(rows: Rows) -> Rows:
    return [row for row in rows if row["kernel"] not in ("float", "cublaslt", "torch._scaled_mm")]


def _share(bandwidth: float | None) -> Callable[[dict], float | None]:
    return lambda row: None if bandwidth is None else row["gb_s"] * 1e9 / bandwidth


def _by_sizes(rows: Rows) -> dict[tuple[int, int, int], float]:
    """The least time of each size."""
    found: dict[tuple[int, int, int], float] = {}
    for row in rows:
        sizes = row["m"], row["n"], row["k"]
        found[sizes] = min(row["microseconds"], found.get(sizes, float("inf")))
    return found


def _against(others: dict[tuple[int, int, int], float]) -> Callable[[dict], float | None]:
    """Times as fast as the others' best of the same size."""

    def times(row: dict) -> float | None:
        other = others.get((row["m"], row["n"], row["k"]))
        return None if other is None else other / row["microseconds"]

    return times
