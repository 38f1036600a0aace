"""Speed of every kernel of the table on the device at hand: rates, ratios to the hardware and to the alternatives.

    python -m benchmarks.kernels [--quick] [--budget-s 450] [--row-s 30] [--only nvfp4] [--rows 1 16] [--json out.json]

One row is one kernel on one product. All kernels of one product, and the float product in whose place they stand, run
in turns within one process, and the best of each counts: on a busy machine only such ratios mean something. Weights are
rotated, so that no cache holds them. Every result is compared with the oracle before it is timed. What was refused,
over its time, or left out for the budget has a line. At the end the targets (`benchmarks.kernel_targets`).

    vs float    time of the same product in bfloat16 (GPU) or float32 (CPU) through XLA, over the kernel's
    vs decode   time of "decode the weight, then multiply" (kernel xla_decode), over the kernel's
    of limit    time the hardware needs at least, for the bytes or for the arithmetic, over the kernel's
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jqopt_kernels as kernels
from benchmarks.kernel_cases import Case, dot, oracle, targeted, telling, wrong
from benchmarks.kernel_ops import CASES
from benchmarks.kernel_targets import verdicts

ROTATED_BYTES = {"gpu": 160e6, "cpu": 64e6}  # of weights in turn: more than the last cache holds
MOST_COPIES = 16
COMPILING = 8  # programs at the same time, on a GPU's host
CHUNK_S, ROUNDS = 0.2, 3  # of timing at least, for each kernel
STEP_S = 5e-3  # of a GPU's work in one step at least, where it takes less to do than to start


class Limit(NamedTuple):
    """What a device can do: bytes and operations a second (dense), the latter by the width of the factors."""

    bytes: float
    flops: dict[int, float]


# NVIDIA's data sheets, without sparsity; B200: 8 TB/s, fp4 twice fp8
LIMITS = {
    "H200": Limit(4.8e12, {16: 989e12, 8: 1979e12}),
    "H100 PCIe": Limit(2.0e12, {16: 756e12, 8: 1513e12}),
    "H100": Limit(3.35e12, {16: 989e12, 8: 1979e12}),
    "B200": Limit(8.0e12, {16: 2250e12, 8: 4500e12, 4: 9000e12}),
}


def limit_of(device: Any) -> Limit | None:
    """A GPU's data sheet; a CPU's float32 rates as measured; None for a GPU that is not in the table."""
    if device.platform == "cpu":
        return Limit(_read_rate(), {32: _multiply_rate()})
    return next((limit for name, limit in LIMITS.items() if name in device.device_kind), None)


def _read_rate() -> float:
    """Bytes a second that a product of a row with a large float32 matrix reads."""
    n, k = 16384, 4096
    w, x = jnp.ones((n, k), jnp.float32), jnp.ones((1, k), jnp.float32)
    return 4.0 * n * k / _best(jax.jit(dot), x, w)


def _multiply_rate() -> float:
    w = jnp.ones((2048, 2048), jnp.float32)
    return 2.0 * 2048**3 / _best(jax.jit(dot), w, w)


def _best(f: Callable, *arguments: Any) -> float:
    jax.block_until_ready(f(*arguments))
    end, best = time.perf_counter() + 1.0, float("inf")
    while time.perf_counter() < end:
        best = min(best, _seconds(lambda: f(*arguments)))
    return best


def _seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------- one row


class Runner(NamedTuple):
    """Something to time: `step()` runs `each` products, on other weights than those before."""

    name: str
    family: str
    step: Callable[[], Any]
    each: int
    bytes: float
    width: int  # bits of the factors that are multiplied


def lowered(f: Callable, sets: list[tuple], is_gpu: bool, times: int = 1) -> Any:
    """What is timed, before it is compiled: `f` of x and one weight, or on a GPU of x and each of them, `times` over.

    On a GPU all sets are products of one executable, since starting one takes longer than a small product. Each waits
    for the one before, as a model's do: without that XLA merges products of one x, concatenating their weights.
    On a CPU they are started one by one.
    """
    x, weights = sets[0][0], [w for _, w in sets]
    if not is_gpu:
        return jax.jit(f).lower(x, weights[0])

    def once(_: Any, before: tuple, x: Any, weights: list[Any]) -> tuple:
        done, y = [], before[-1]
        for w in weights:
            now, y = jax.lax.optimization_barrier(((x, w), y))
            done.append(y)  # as the barrier gives it: what nobody reads, XLA takes out of it
            y = f(*now)
        return (*done[1:], y)

    def chain(x: Any, weights: list[Any]) -> tuple:
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(f, x, weights[0]))
        step = functools.partial(once, x=x, weights=weights)
        start = (nothing,) * len(weights)
        # several rounds in a loop's body: counting takes a kernel
        inner = next(n for n in range(max(1, MOST_COPIES // len(weights)), 0, -1) if times % n == 0)

        def body(i: Any, done: tuple) -> tuple:
            for _ in range(inner):
                done = step(i, done)
            return done

        return body(0, start) if times == inner else jax.lax.fori_loop(0, times // inner, body, start)

    return jax.jit(chain).lower(x, weights)


def runner(
    name: str, family: str, run: Any, sets: list[tuple], width: int, is_gpu: bool, times: int = 1
) -> tuple[Runner, Any]:
    """A runner of a compiled program (`lowered`) over its sets of arguments, and the first result."""
    x, weights = sets[0][0], [w for _, w in sets]
    y = jax.block_until_ready(run(x, weights)[0] if is_gpu else run(x, weights[0]))
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((x, weights[0], y)))
    if is_gpu:
        return Runner(name, family, lambda: run(x, weights), len(weights) * times, moved, width), y
    turn = iter(int(i) for i in np.resize(np.arange(len(weights)), 1 << 20))
    return Runner(name, family, lambda: run(x, weights[next(turn)]), 1, moved, width), y


def repeats(moved: float, flops: float, copies: int, limit: Limit | None) -> int:
    """How often an executable goes through its weights, so that a GPU at its limit works for STEP_S."""
    if limit is None:
        return 1
    least = max(moved / limit.bytes, flops / max(limit.flops.values()))
    times, round_to = STEP_S / (least * copies), max(1, MOST_COPIES // copies)
    return int(min(200, -(-times // round_to) * round_to)) if times > 2 else 1


def race(runners: list[Runner], deadline: float) -> list[float]:
    """Best seconds of one product of each, in turns, until each has had CHUNK_S and ROUNDS, or the time is over."""
    best, spent, rounds = [float("inf")] * len(runners), [0.0] * len(runners), 0
    while rounds < ROUNDS or min(spent) < CHUNK_S:
        for i, one in enumerate(runners):
            if rounds < ROUNDS or spent[i] < CHUNK_S:
                took = _seconds(one.step)
                best[i], spent[i] = min(best[i], took / one.each), spent[i] + took
        rounds += 1
        if time.perf_counter() > deadline:
            break
    return best


# ------------------------------------------------------------------------------------------------- one product


class Attempt(NamedTuple):
    """One kernel on its way to a row: what it is made of, its program as far as it came, and how long that took.

    sets: activations and weights, the latter as the kernel's `prepare` makes them, once.
    """

    row: dict
    kernel: kernels.Kernel
    width: int
    sets: list[tuple]
    program: Any = None
    seconds: float = 0.0
    why: str | None = None
    options: dict | None = None

    def then(self, step: Callable[[Any], Any]) -> Attempt:
        """The next step of the program; a kernel that fails in it is a row of the table, not the end of it."""
        if self.why is not None:
            return self
        start = time.perf_counter()
        try:
            program, why = step(self.program), None
        except Exception as error:
            program, why = None, failure(error)
        return self._replace(program=program, why=why, seconds=self.seconds + time.perf_counter() - start)


def failure(error: Exception) -> str:
    """FAILED, with the first line of the reason."""
    return f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def measure(case: Case, limit: Limit | None, row_s: float) -> Iterator[dict]:
    """The rows of one product: timed, failed (wrong ones too), over the time of a row, or refused.

    All its programs are compiled at the same time where there are cores to do so.
    """
    is_gpu, device = jax.default_backend() != "cpu", kernels.here()
    about = {"op": case.op, "formats": case.label, **case.shapes._asdict()}
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(case.arrays(0, 1)[1]))
    sets = [case.arrays(i, None) for i in range(_copies(weight_bytes, is_gpu))]
    width = {jnp.dtype(jnp.bfloat16): 16}.get(jnp.dtype(case.dtype), 32)
    plain_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(case.baseline(0)[1]))
    floats = [case.baseline(i) for i in range(_copies(plain_bytes, is_gpu))]
    again = repeats(plain_bytes, case.flops, len(floats), limit) if is_gpu else 1
    plain = lowered(case.plain, floats, is_gpu, again).compile()
    running = [runner("float", "xla", plain, floats, width, is_gpu, again)[0]]
    again = repeats(weight_bytes, case.flops, len(sets), limit) if is_gpu else 1
    attempts, want = [], None
    for kernel, why in _candidates(case, device):
        row = {**about, "kernel": kernel.name, "family": kernel.backend}
        if why is not None:
            yield {**row, "status": "refused", "why": why}
            continue
        own = [(x, kernel.prepare(w)) for x, w in sets] if case.op == "qdot" else sets
        one = Attempt(row, kernel, _bits(case, kernel) if is_gpu else width, own)
        attempts.append(one.then(lambda _, kernel=kernel, own=own: lowered(case.run(kernel), own, is_gpu, again)))
    if is_gpu and case.label == "fp8 x fp8":
        attempts.append(_cublaslt(case, about, sets).then(lambda _: lowered(cublaslt(case), sets, is_gpu, again)))
    with ThreadPoolExecutor(COMPILING if is_gpu else 1) as pool:
        attempts = list(pool.map(lambda one: one.then(lambda program: program.compile(one.options)), attempts))
    for one in attempts:
        named = one.kernel.name, one.kernel.backend
        one = one.then(lambda p, one=one, named=named: runner(*named, p, one.sets, one.width, is_gpu, again))
        if one.why is None:
            want = oracle(case) if want is None else want
            one = one.then(lambda made, want=want, kernel=one.kernel: (made[0], wrong(case, made[1], want, kernel)))
        said = one.why or one.program[1]
        if said is not None:
            yield {**one.row, "status": "failed", "why": said}
        elif one.seconds > row_s:
            why = f"over the {row_s:.0f} s of a row: compiling and checking took {one.seconds:.1f} s"
            yield {**one.row, "status": "left out", "why": why}
        else:
            running.append(one.program[0])
    times = race(running, time.perf_counter() + row_s)
    decode = next((s for one, s in zip(running, times, strict=True) if one.name == "xla_decode"), None)
    for one, s in zip(running, times, strict=True):
        yield {**about, **_rates(case, one, s, limit), "vs_float": times[0] / s, "vs_decode": decode and decode / s}


def _copies(size: float, is_gpu: bool) -> int:
    return int(min(MOST_COPIES, max(2, -(-ROTATED_BYTES["gpu" if is_gpu else "cpu"] // size))))


def _candidates(case: Case, device: str) -> Iterator[tuple[kernels.Kernel, str | None]]:
    """Every kernel of the op but the oracle, bound to the device, or its reason why not."""
    for kernel in kernels.KERNELS:
        if kernel.op == case.op and kernel.backend != "reference":
            why = kernel.supports(case.lhs, case.rhs, device, case.shapes)
            if why is None:
                kernel = kernels.find(case.op, case.lhs, case.rhs, device, case.shapes, backend=kernel.name)
                if kernel.name == "triton_gemm_large" and case.shapes.m <= 1024:
                    why = "up to 1024 rows it is triton_gemm"
            yield kernel, why


def cublaslt(case: Case) -> Callable[[Any, Any], jax.Array]:
    """The product in float32 of converted and scaled codes, which XLA makes one cuBLASLt call where it has no other."""

    def value(side: Any, spec: Any) -> jax.Array:
        kind = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}[spec.element]
        return jax.lax.bitcast_convert_type(side.data, kind).astype(jnp.float32) * side.scale.reshape(())

    def product(x: Any, w: Any) -> jax.Array:
        pair = value(x, case.lhs), value(w, case.rhs)
        out = jax.lax.dot_general(*pair, (((1,), (1,)), ((), ())), precision="highest")
        return out.astype(case.dtype)

    return product


def _cublaslt(case: Case, about: dict, sets: list[tuple]) -> Attempt:
    kernel = next(one for one in kernels.KERNELS if one.name == "xla_fp8")._replace(name="cublaslt")
    row = {**about, "kernel": kernel.name, "family": "xla"}
    return Attempt(row, kernel, 8, sets, options={"xla_gpu_enable_triton_gemm": False})


def _bits(case: Case, kernel: kernels.Kernel) -> int:
    """Of the factors, at best: codes of 8 bits where codes are multiplied, else bfloat16."""
    return 8 if kernel.low_precision and case.lhs.element not in ("float", "nf4") else 16


def _rates(case: Case, one: Runner, seconds: float, limit: Limit | None) -> dict:
    row = {
        "kernel": one.name, "family": one.family, "status": "ok", "microseconds": seconds * 1e6,
        "gb_s": one.bytes / seconds / 1e9, "tflop_s": case.flops / seconds / 1e12, "of_limit": None,
    }  # fmt: skip
    if limit is not None:
        computing = case.flops / limit.flops[one.width] if case.flops else 0.0  # quantizers only move bytes
        row["of_limit"] = max(one.bytes / limit.bytes, computing) / seconds
    return row


def torch_scaled_mm(case: Case) -> dict | None:
    """torch._scaled_mm on the same sizes, where torch has a CUDA device and the formats are its own; else None."""
    if case.label != "fp8 x fp8" or jax.default_backend() == "cpu":
        return None
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or case.shapes.m % 16:
        return None
    m, n, k, _ = case.shapes
    one = torch.ones((), device="cuda")
    a = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
    bs = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn).t() for _ in range(_copies(n * k, True))]

    def step() -> None:
        for b in bs:
            torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        torch.cuda.synchronize()

    step()
    seconds = min(_seconds(step) for _ in range(10)) / len(bs)
    return {
        "op": case.op, "formats": case.label, **case.shapes._asdict(), "kernel": "torch._scaled_mm", "family": "torch",
        "status": "ok", "microseconds": seconds * 1e6, "gb_s": (m + n) * k / seconds / 1e9,
        "tflop_s": case.flops / seconds / 1e12, "of_limit": None, "vs_float": None, "vs_decode": None,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the table

COLUMNS = ("formats", "m", "n", "k", "kernel", "family", "us", "GB/s", "TFLOP/s", "of limit", "vs float", "vs decode")
WIDTHS = (22, 5, 6, 6, 20, 8, 10, 8, 8, 8, 8, 9)


def line(row: dict) -> str:
    """A row as text; what was not timed with its reason in place of the numbers."""
    head = [row["formats"], row["m"], row["n"], row["k"], row["kernel"], row["family"]]
    cells = [str(cell).ljust(width) for cell, width in zip(head, WIDTHS, strict=False)]
    if row["status"] != "ok":
        return " ".join([*cells, f"{row['status']}: {row['why']}"])
    share = "-" if row["of_limit"] is None else f"{row['of_limit']:.0%}"
    ratios = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("vs_float", "vs_decode")]
    numbers = [f"{row['microseconds']:.1f}", f"{row['gb_s']:.1f}", f"{row['tflop_s']:.3g}", share, *ratios]
    return " ".join([*cells, *(cell.rjust(width) for cell, width in zip(numbers, WIDTHS[6:], strict=True))])


def guarded(case: Case, limit: Limit | None, row_s: float) -> Iterator[dict]:
    """All rows of a case; where the case itself fails (its float product, memory), a row that says so ends them."""
    try:
        yield from measure(case, limit, row_s)
        if (extra := torch_scaled_mm(case)) is not None:
            yield extra
    except Exception as error:
        row = {"op": case.op, "formats": case.label, **case.shapes._asdict(), "kernel": "-", "family": "-"}
        yield {**row, "status": "failed", "why": failure(error)}


def table(
    chosen: list[Case], limit: Limit | None, end: float, row_s: float, refusals: bool, keep: Callable[[list], None]
) -> list[dict]:
    """All rows, printed as they come and kept after each case; what was not begun before `end` has a line."""
    rows, left, refused = [], [], {}
    print(" ".join(name.ljust(width) for name, width in zip(COLUMNS, WIDTHS, strict=True)))
    for case in chosen:
        if time.perf_counter() > end:
            left.append(case)
            continue
        for row in guarded(case, limit, row_s):
            if row["status"] == "refused":
                refused.setdefault(row["kernel"], []).append(row)
            if row["status"] != "refused" or refusals:
                print(line(row), flush=True)
            rows.append(row)
        keep(rows)
    for kernel, some in {} if refusals else refused.items():
        reasons = len({row["why"] for row in some})
        more = f" (other reasons: {reasons - 1}, see --refusals)" if reasons > 1 else ""
        first = some[0]
        about = f"{len(some)} products, such as {first['formats']}, m={first['m']}"
        print(f"refused by {kernel} ({about}): {first['why']}{more}")
    if left:
        some = ", ".join(f"{c.label} {tuple(c.shapes)}" for c in left[:6])
        print(f"not run, the budget is over: {len(left)} products: {some} ...")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints one table; writes it as JSON where asked. Returns 1 where a row failed, else 0."""
    asked, start = _parser().parse_args(argv), time.perf_counter()
    is_gpu = jax.default_backend() != "cpu"
    device, cases = jax.devices()[0], []
    for op in dict.fromkeys(kernel.op for kernel in kernels.KERNELS):
        if op not in CASES:
            print(f"no case for op {op!r}: {', '.join(k.name for k in kernels.KERNELS if k.op == op)} not measured")
        elif asked.op in (None, op):
            shapes = ((asked.size, asked.size),) if asked.size else ((1024, 1024),) if asked.quick else None
            rows = tuple(asked.rows) if asked.rows else (1, 16) if asked.quick else None
            some = list(CASES[op](is_gpu, shapes, rows))
            if not (shapes or rows or asked.full):
                some = [case for case in some if telling(case)]
            # products have a hundred times as many: one case of each other op after every few of theirs
            cases += [(not targeted(case), i if op == "qdot" else 4 * i + 3, case) for i, case in enumerate(some)]
    cases = [c for *_, c in sorted(cases, key=lambda one: one[:2])]
    cases = [c for c in cases if asked.only is None or any(word in c.label for word in asked.only)]
    limit = limit_of(device)
    about = f"jax {jax.__version__}, {device.device_kind} ({kernels.here()}), {time.strftime('%Y-%m-%d')}"
    rates = limit and ", ".join(f"{bits} bit {rate / 1e12:.3g} TFLOP/s" for bits, rate in limit.flops.items())
    known = f"limits: {limit.bytes / 1e9:.0f} GB/s, {rates}" if limit else "limits of this device are unknown"
    print(f"{about}; {known}", flush=True)
    head = {"about": about, "limit": None if limit is None else limit._asdict()}

    def keep(rows: list[dict]) -> None:
        if asked.json is not None:
            asked.json.write_text(json.dumps({**head, "rows": rows}, indent=1))

    keep([])
    rows = table(cases, limit, start + asked.budget_s, asked.row_s, asked.refusals, keep)
    for verdict in verdicts(rows, None if limit is None else limit.bytes, is_gpu):
        print(verdict.line())
    failed = [row for row in rows if row["status"] == "failed"]
    print(f"{len(rows)} rows, {len(failed)} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="size 1024, one and 16 rows")
    parser.add_argument("--full", action="store_true", help="on a GPU: every shape with every format (hours)")
    parser.add_argument("--budget-s", type=float, default=450.0, help="no product is begun after so many seconds")
    parser.add_argument("--row-s", type=float, default=30.0, help="to compile, check and time one row")
    parser.add_argument("--op", help="this op of the table only")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="products in whose formats one of the words stands")
    parser.add_argument("--rows", type=int, nargs="+", help="of the activation")
    parser.add_argument("--size", type=int, help="one square weight of this size")
    parser.add_argument("--refusals", action="store_true", help="a line for each kernel that refused each product")
    parser.add_argument("--json", type=Path, help="also write all rows, those refused too, to this file")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
