"""Train the tiny Llama on WikiText-2 tokens on a CPU, and write it as a Hugging Face checkpoint.

    python examples/tinylm/train.py --tokens TOKENS_DIR --config examples/tinylm/config.json --out OUT_DIR

TOKENS_DIR holds train_tokens.npy, valid_tokens.npy and test_tokens.npy (see make_tokens.py). Compute is
bfloat16, master weights and optimizer state are float32. Hidden matrices are trained by Muon, the embedding
and the norms by Adam. The learning rate follows progress = max(steps done, time spent), so a slow machine
still ends its decay.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors.numpy import save_file

from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM

Params = dict[str, Any]


def arguments() -> argparse.Namespace:
    """What the command line says; the defaults are what the shipped model was trained with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=57.0, help="the decay ends here even if steps are left")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of the hidden matrices")
    parser.add_argument("--adam-rate", type=float, default=8e-3, help="learning rate of embedding and norms")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the hidden matrices")
    parser.add_argument("--compute", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--steady", type=float, default=0.2, help="fraction of the run before the decay")
    parser.add_argument("--every", type=int, default=200, help="steps between validations and snapshots")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def batches(tokens: np.ndarray, window: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless int32 ids [batch, window + 1]; each epoch cuts the text at a new offset and shuffles."""
    rng = np.random.default_rng(seed)
    while True:
        starts = np.arange(rng.integers(window), len(tokens) - window, window)
        rng.shuffle(starts)
        for at in range(0, len(starts) - batch + 1, batch):
            yield np.stack([tokens[s : s + window + 1] for s in starts[at : at + batch]]).astype(np.int32)


def losses(model: LlamaForCausalLM, params: Params, ids: jax.Array) -> jax.Array:
    """Loss in nats of each of ids[:, 1:], float32 [batch, window]; logits accumulate in float32."""
    hidden = model.apply({"params": params}, ids[:, :-1], method="hidden")
    table = params["embed_tokens"]["embedding"].astype(hidden.dtype)
    logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])


def optimizer(args: argparse.Namespace, params: Params) -> optax.GradientTransformation:
    """Gradient clipping, then Muon on the hidden matrices and Adam elsewhere; rates are peaks."""
    matrices = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    clip = optax.clip_by_global_norm(1.0)
    if args.optimizer == "adamw":
        adam = optax.adamw(args.adam_rate, b1=0.9, b2=0.95, weight_decay=args.weight_decay, mask=matrices)
        return optax.chain(clip, adam)
    muon = optax.contrib.muon(
        args.rate,
        weight_decay=args.weight_decay,
        adam_learning_rate=args.adam_rate,
        adam_b2=0.95,
        muon_weight_dimension_numbers=jax.tree.map(
            lambda matrix: optax.contrib.MuonDimensionNumbers() if matrix else None, matrices
        ),
    )
    return optax.chain(clip, muon)


def decay(step: int, progress: float, warmup: int, steady: float) -> float:
    """Factor on the peak learning rate: linear warm-up, constant, then linear to zero at progress 1."""
    return min(1.0, (step + 1) / warmup, max(0.0, 1.0 - progress) / (1.0 - steady))


def mean_loss(evaluate: Any, params: Params, tokens: np.ndarray, window: int, limit: int | None = None) -> float:
    """Mean loss over windows that do not overlap, window - 1 predictions each; the ragged end is left out."""
    count = len(tokens) // window
    windows = tokens[: count * window].reshape(count, window).astype(np.int32)[:limit]
    total = sum(float(evaluate(params, windows[at : at + 16]).sum()) for at in range(0, len(windows), 16))
    return total / (len(windows) * (window - 1))


def hugging_face_tensors(params: Params) -> dict[str, np.ndarray]:
    """The unrolled Flax parameters under Hugging Face names, matrices [out, in], rounded to bfloat16."""
    tensors = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        *modules, leaf = (key.key for key in path)
        name = "model." + ".".join(modules).replace("layers_", "layers.") + ".weight"
        array = np.asarray(value).T if leaf == "kernel" else np.asarray(value)
        tensors[name] = np.ascontiguousarray(array).astype(ml_dtypes.bfloat16)
    return tensors


def rounded(params: Params) -> Params:
    """The parameters as a reader of the bfloat16 checkpoint sees them."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)


def save(out: Path, params: Params, config: dict[str, Any], log: dict[str, Any]) -> None:
    """Write the checkpoint and the log; called now and then, so that a broken run loses little."""
    save_file(hugging_face_tensors(params), str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")


def stepper(model: LlamaForCausalLM, transform: optax.GradientTransformation) -> Callable[..., Any]:
    """(params, state, ids, factor) to (params, state, loss): one step at `factor` times the peak rates."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, ids: jax.Array, factor: jax.Array) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: losses(model, p, ids).mean())(params)
        updates, state = transform.update(grads, state, params)
        updates = jax.tree.map(lambda u: u * factor, updates)
        return optax.apply_updates(params, updates), state, loss

    return step


def train(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    params: Params,
    tokens: np.ndarray,
    report: Callable[[Params, dict[str, Any], list[float]], None],
) -> tuple[Params, dict[str, Any]]:
    """Run to the end of steps or time; `report(params, log, [step, seconds, train loss])` now and then."""
    transform = optimizer(args, params)
    step, state = stepper(model, transform), transform.init(params)
    source, done, smooth, spent = batches(tokens, args.window, args.batch, args.seed), 0, math.nan, 0.0
    start = time.monotonic()
    while (progress := max(done / args.steps, (time.monotonic() - start) / (60 * args.minutes))) < 1:
        factor = jnp.float32(decay(done, progress, args.warmup, args.steady))
        params, state, loss = step(params, state, next(source), factor)
        smooth = float(loss) if done == 0 else 0.95 * smooth + 0.05 * float(loss)
        done += 1
        spent = time.monotonic() - start
        if done % args.every == 0:
            report(params, {"steps": done}, [done, round(spent, 1), round(smooth, 4)])
    return params, {"steps": done, "tokens": done * args.batch * args.window, "seconds": round(spent)}


def main() -> None:
    """Train, validate now and then, and measure the rounded weights in the end."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    splits = {split: np.load(args.tokens / f"{split}_tokens.npy") for split in ("train", "valid", "test")}
    config = json.loads(args.config.read_text())
    model = LlamaForCausalLM(LlamaConfig.from_hf(config), dtype=jnp.dtype(args.compute))
    params = model.init(jax.random.key(args.seed), jnp.zeros((1, 2), jnp.int32))["params"]
    evaluate = jax.jit(partial(losses, model.clone(dtype=jnp.float32)))
    base = {"arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)}}
    rows: list[list[float]] = []

    def report(params: Params, log: dict[str, Any], row: list[float]) -> None:
        held = mean_loss(evaluate, rounded(params), splits["valid"], args.window, 64)
        rows.append([*row, round(held, 4)])
        print("step {} {}s train {} valid {}".format(*rows[-1]), flush=True)
        save(args.out, params, config, base | log | {"log": rows})

    params, log = train(args, model, params, splits["train"], report)
    for split in ("valid", "test"):
        log[f"{split}_loss"] = mean_loss(evaluate, rounded(params), splits[split], args.window)
        log[f"{split}_perplexity"] = math.exp(log[f"{split}_loss"])
    save(args.out, params, config, base | log | {"log": rows})
    print(json.dumps(log))


if __name__ == "__main__":
    main()
