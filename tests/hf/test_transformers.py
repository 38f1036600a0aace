"""Every family and setting of zoo.py beside transformers itself: logits to 1e-4, greedy tokens the same.

Needs torch and transformers 5 in the environment (`make clients`): without them these tests fail.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jqopt.hf import generate, load_model
from tests.hf.zoo import CASES, GOLDEN, UNEVEN

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> its folder, as transformers saves it, with what transformers computes."""
    from tests.hf.make_golden import save

    root = tmp_path_factory.mktemp("transformers")

    def make(case):
        if not (root / case).is_dir():
            save(case, root / case)
        return root / case, load_file(root / case / "reference.safetensors")

    return make


@pytest.mark.parametrize("case", CASES)
def test_logits(case, saved):
    folder, reference = saved(case)
    for scan in (False, True)[: 1 if case in UNEVEN else 2]:
        module, variables = load_model(folder, scan_layers=scan)
        found = jax.jit(module.apply)(variables, reference["ids"])
        np.testing.assert_allclose(found, reference["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [*GOLDEN, "phi3_long", "phi3_partial", "llama_yarn", "qwen3_moe_mixed", "gpt2_act"])
def test_greedy_tokens(case, saved):
    folder, reference = saved(case)
    module, variables = load_model(folder)
    found = generate(module, variables, reference["ids"], max_new_tokens=6)
    np.testing.assert_array_equal(found.tokens, reference["greedy"][:, 12:])


@pytest.mark.parametrize("case", GOLDEN)
def test_the_golden_files_are_what_transformers_says_today(case, saved):
    folder = Path(__file__).parent / "golden" / case
    _, reference = saved(case)
    committed = load_file(folder / "reference.safetensors")
    np.testing.assert_array_equal(committed["ids"], reference["ids"])
    np.testing.assert_array_equal(committed["greedy"], reference["greedy"])
    np.testing.assert_allclose(committed["logits"], reference["logits"], rtol=0, atol=2e-5)
