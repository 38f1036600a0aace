"""Train a small language model on WikiText-2 in several precisions: same seeds, same data, the gaps of the losses.

python examples/train_lm.py --steps 40
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import training

PLAIN = {"input": "nvfp4", "weight": "nvfp4", "grad": "nvfp4"}  # no Hadamard transform, no stochastic rounding, no 2-D


def main() -> None:
    """Prints the loss curves and gaps, and whether a run resumed in the middle is the straight one, bit for bit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    recipes = {name: f"train/{name}" for name in ("fp8_current", "mxfp8", "nvfp4")}
    recipes["nvfp4 plain"] = training.recipe("nvfp4", PLAIN)
    reference = training.run(training.Setup(steps=steps))
    print(f"{'bfloat16':12} {training.curve(reference.losses)}")
    for name, recipe in recipes.items():
        found = training.run(training.Setup(recipe, steps=steps))
        gap = found.validation / reference.validation - 1
        print(f"{name:12} {training.curve(found.losses)} | loss {found.validation:.4f}, gap {gap:+.2%}")
    setup = training.Setup("train/nvfp4", steps=4)
    half = training.run(setup, stop=2)
    print("resumed in the middle, bit for bit:", training.run(setup, start=half).same_as(training.run(setup)))


main()
