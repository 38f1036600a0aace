"""The ground all tests stand on: eight CPU devices, strict promotion, repeatable hypothesis runs.

The environment must be set before the first import of JAX, hence here, outside any function. A value that the
caller has set stays, so that a GPU machine can run `JAX_PLATFORMS=cuda pytest tests/kernels`.
"""

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest

DEVICES = "--xla_force_host_platform_device_count=8"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JQOPT_KERNELS_CACHE"] = os.devnull  # a library that someone built is not chosen; tests build their own
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

# No deadline: the first example compiles, the next ones don't. Derandomized: a red run can be repeated.
hypothesis.settings.register_profile("jqopt", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("jqopt")


@pytest.fixture(scope="module", autouse=True)
def still_heap() -> Iterator[None]:
    """What a finished file leaves in JAX's caches is not searched for garbage again: gigabytes, by the end of a run."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """For files whose tests compile much and compute little: LLVM optimizes nothing, a third of their time.

    Not for files that compare bits, whose point is what XLA makes of a program. What was compiled so does not outlive
    the file.
    """
    import jax  # not above: see this file's first lines

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
