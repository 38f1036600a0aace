"""Text from the tiny language model: greedy and drawn, from float weights, and from 4-bit weights over an FP8 cache."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import jqopt
from jqopt.hf import generate, load_model

FOLDER = Path(__file__).parent / "tinylm"
PROMPTS = ["The storm", "In the early years of the century , the town"]

model, variables = load_model(FOLDER)
tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
lengths = [len(row) for row in rows]
ids = np.array([row + [0] * (max(lengths) - len(row)) for row in rows], np.int32)  # padded on the right


def show(name, parameters, **options):
    """Generates, and prints each prompt with what follows."""
    found = generate(model, parameters, ids, lengths=lengths, max_new_tokens=24, eos=0, **options)
    print(f"--- {name}")
    for prompt, tokens, count in zip(PROMPTS, np.asarray(found.tokens), np.asarray(found.lengths), strict=True):
        print(f"{prompt}{tokenizer.decode(tokens[:count].tolist())}".replace("\n", " "))


show("float, greedy", variables)
show("float, drawn", variables, temperature=0.8, top_p=0.9, seed=1)

# Weights of 4 bits, keys and values of 8: calibrated, then generated with the same function.
batches = [jnp.asarray(np.load(FOLDER / "calib_tokens.npy")[:8, :128].astype(np.int32))]
int4 = {"match": "*_proj/kernel", "weight": {"format": "int4", "block": 64}}
recipe = {"schema": 1, "name": "int4_kv_fp8", "rules": [int4], "kv_cache": "fp8"}
qm = jqopt.quantize_model(model, recipe, params=variables, batches=batches)
show("INT4 weights, FP8 cache, greedy", qm)
