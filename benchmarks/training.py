"""Low-precision training of a small language model against bfloat16: losses in pairs, a broken control, times.

    python -m benchmarks.training --rates 1e-3 2e-3 4e-3 8e-3 --steps 2000 --seeds 3 --out losses.json
    python -m benchmarks.training --times
    python -m benchmarks.training --steps 20000 --size large       # 20 M parameters: for a GPU

The data are the tokens of WikiText-2's test text in examples/tinylm: nine tenths train, the rest validates.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jqopt
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from jqopt.train import _operand

TOKENS = Path(__file__).parents[1] / "examples/tinylm/test_tokens.npy"
SIZES = {"small": (128, 2, 256), "large": (512, 8, 1408)}  # width, layers, feed-forward width
BATCH, LENGTH, WARMUP = 4, 128, 20
RECIPES = ("fp8_current", "fp8_block", "mxfp8", "nvfp4")


@dataclasses.dataclass(frozen=True)
class Setup:
    """One run. `recipe`: None for bfloat16."""

    recipe: Any = None
    steps: int = 40
    seed: int = 0
    rate: float = 2e-3
    size: str = "small"
    dtype: Any = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a run has come to."""

    state: Any
    losses: list[float]
    validation: float

    def same_as(self, other: Run) -> bool:
        """The same weights, optimizer state and losses, bit for bit?"""
        same = jax.tree.map(lambda a, b: bool((a == b).all()), self.state, other.state)
        return all(jax.tree.leaves(same)) and self.losses == other.losses


def recipe(rules: str, train: dict) -> dict:
    """The rules of a shipped training recipe with another section `train`."""
    return {"name": "mine", "extends": [f"train/{rules}"], "train": train}


def model_of(setup: Setup) -> LlamaForCausalLM:
    """A Llama of the setup's size, its layers one scan."""
    width, layers, wide = SIZES[setup.size]
    config = LlamaConfig(4096, width, wide, layers, width // 64, width // 64, 64, tie_word_embeddings=True)
    return LlamaForCausalLM(config, scan_layers=True, dtype=setup.dtype)


def batches(setup: Setup) -> Iterator[np.ndarray]:
    """Windows of the training part, the same for each recipe."""
    tokens = np.load(TOKENS).astype(np.int32)
    tokens = tokens[: len(tokens) * 9 // 10]
    rng = np.random.default_rng(setup.seed)
    while True:
        starts = rng.integers(0, len(tokens) - LENGTH - 1, BATCH)
        yield np.stack([tokens[s : s + LENGTH + 1] for s in starts])


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over tokens, nats."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def pieces(setup: Setup) -> tuple[Any, Any, Any]:
    """(first state, jitted step, jitted evaluation)"""
    model, example = model_of(setup), jnp.zeros((BATCH, LENGTH), jnp.int32)
    variables = model.init(jax.random.key(setup.seed), example)
    apply = lambda v, x, quant_key=None: model.apply(v, x)  # noqa: E731
    if setup.recipe is not None:
        apply = jqopt.train.prepare(model, setup.recipe, variables, example).apply
    tail = max(setup.steps // 5, 1)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, setup.rate, WARMUP), optax.constant_schedule(setup.rate),
         optax.linear_schedule(setup.rate, 0.0, tail)], [WARMUP, max(setup.steps - tail, WARMUP + 1)],
    )  # fmt: skip
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))

    def step(state: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        params, opt, number = state
        key = jax.random.fold_in(jax.random.key(setup.seed + 1), number)
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(apply(p, batch[:, :-1], quant_key=key), batch[:, 1:]))(
            params
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt, number + jnp.uint32(1)), loss

    with jax.numpy_dtype_promotion("standard"):
        first = (variables, tx.init(variables), jnp.uint32(0))
    return first, jax.jit(step), jax.jit(lambda p, batch: cross_entropy(apply(p, batch[:, :-1]), batch[:, 1:]))


def run(setup: Setup, start: Run | None = None, stop: int | None = None) -> Run:
    """Trains from `start` (or the beginning) to step `stop` (or the end), then evaluates."""
    state, step, evaluate = pieces(setup)
    losses: list[float] = []
    if start is not None:
        state, losses = start.state, list(start.losses)
    for number, batch in zip(range(setup.steps if stop is None else stop), batches(setup), strict=False):
        if number >= len(losses):
            state, loss = step(state, batch)
            losses.append(float(loss))
    held = np.load(TOKENS).astype(np.int32)
    held = held[len(held) * 9 // 10 :]
    windows = held[: len(held) // (BATCH * (LENGTH + 1)) * BATCH * (LENGTH + 1)].reshape(-1, BATCH, LENGTH + 1)[:32]
    return Run(state, losses, float(np.mean([evaluate(state[0], w) for w in windows])))


def curve(losses: list[float], points: int = 6) -> str:
    """A loss curve in a few numbers, each the mean of a part of the run."""
    parts = np.array_split(np.asarray(losses), min(points, len(losses)))
    return " ".join(f"{part.mean():.3f}" for part in parts)


@contextlib.contextmanager
def broken() -> Iterator[None]:
    """A control: blocks have the scales of the rows above them (as where scales are tiled instead of repeated)."""
    right = _operand._scales

    def wrong(*args: Any) -> Any:
        scales = right(*args)
        return scales._replace(tiles=None if scales.tiles is None else jnp.roll(scales.tiles, 1, axis=-2))

    _operand._scales = wrong
    jax.clear_caches()
    try:
        yield
    finally:
        _operand._scales = right
        jax.clear_caches()


def compare(options: argparse.Namespace) -> dict:
    """Validation losses {recipe: [one a seed]}, and their paired gaps to bfloat16, printed as they come."""
    runs: dict[str, Any] = {"bfloat16": None, **{r: f"train/{r}" for r in options.recipes}, "broken": "train/nvfp4"}
    found: dict[str, list[float]] = {name: [] for name in runs}
    rate = tuned(options)
    say(f"learning rate {rate:g}, {options.steps} steps of {BATCH} x {LENGTH} tokens, {options.seeds} seeds")
    for seed in range(options.seeds):
        for name, its in runs.items():
            setup = Setup(its, options.steps, seed, rate, options.size)
            with broken() if name == "broken" else contextlib.nullcontext():
                done = run(setup)
            found[name].append(done.validation)
            gap = done.validation / found["bfloat16"][-1] - 1
            say(f"seed {seed} {name:12} {curve(done.losses)} | validation {done.validation:.4f}, gap {gap:+.2%}")
            if options.out:
                Path(options.out).write_text(json.dumps(found))
    for name, values in found.items():
        gaps = np.asarray(values) / np.asarray(found["bfloat16"]) - 1
        say(f"{name:12} mean gap {gaps.mean():+.2%}, spread of the losses over seeds {np.std(values):.4f}")
    return found


def tuned(options: argparse.Namespace) -> float:
    """The learning rate that bfloat16 likes best: a gap at a rate at which the baseline suffers says nothing."""
    if len(options.rates) == 1:
        return options.rates[0]
    found = {}
    for rate in options.rates:
        done = run(Setup(None, options.steps, 0, rate, options.size))
        found[rate] = done.validation
        say(f"bfloat16 at rate {rate:g}: {curve(done.losses)} | validation {done.validation:.4f}")
    return min(found, key=found.__getitem__)


def times(recipes: list[str], rounds: int = 3) -> None:
    """CPU time of a step and of compiling it, as multiples of the float32 model's, compiled by turns: medians."""
    names = (None, *recipes)
    found: dict[str | None, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            setup = Setup(None if name is None else f"train/{name}", dtype=jnp.float32)
            state, step, _ = pieces(setup)
            batch = next(batches(setup))
            began = time.process_time()
            lowered = step.lower(state, batch)
            traced = time.process_time()
            made = lowered.compile()
            compiled = time.process_time()
            took = []
            for _ in range(12):
                start = time.process_time()
                state, _ = jax.block_until_ready(made(state, batch))
                took.append(time.process_time() - start)
            found[name].append((min(took), compiled - traced, traced - began))
    base = np.median(found[None], axis=0)
    for name in names:
        now = np.median(found[name], axis=0)
        each = " ".join(f"{one[1] / plain[1]:.2f}" for one, plain in zip(found[name], found[None], strict=True))
        say(f"{name or 'float32':12} step {now[0] * 1e3:7.1f} ms ({now[0] / base[0]:.2f}x), compile {now[1]:.1f} s "
            f"({now[1] / base[1]:.2f}x; by round {each}), trace {now[2]:.1f} s")  # fmt: skip


def say(text: str) -> None:
    """Prints at once, also into a file."""
    print(text, flush=True)


def main() -> None:
    """The comparison, or the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-3], help="several: bfloat16 chooses among them")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--out", help="a JSON file that grows with each run")
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args()
    times(options.recipes) if options.times else compare(options)


if __name__ == "__main__":
    main()
