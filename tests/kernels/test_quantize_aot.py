"""What XLA makes of the quantizer kernels for Hopper: one call each, no copies, no spills, wide loads."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels import quantize_aot

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def found() -> dict:
    """Of each job: calls, bytes of temporaries, spills, registers, memory and division instructions in its PTX."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.kernels.quantize_aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", quantize_aot.jobs())
def test_compiled_for_hopper(found, name):
    job = found[name]
    assert job["calls"] == 1
    assert job["temp"] <= 1 << 14  # partial amaxes and scalars; the matrix has 40 MiB
    assert job["spills"] == 0
    assert "ld.global.v4.b32" in job["instructions"]  # 16 bytes a thread
    if name != "amax":
        assert "st.global.v4.b32" in job["instructions"]
    if "swizzle" not in name and name != "amax":
        assert "div.rn.f32" in job["instructions"]  # the one division whose bits are those of a CPU
