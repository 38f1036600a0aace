"""How a device is written where kernels are chosen: "cpu", "tpu", "rocm", "cuda", or "cuda:90" with its capability.

"cpu:interpret" is a CPU that interprets Pallas kernels, as tests of kernels for CUDA do; nobody gets it unasked.
"""

from __future__ import annotations

import jax

GPUS = ("gpu", "cuda", "rocm")  # jax.default_backend() says "gpu"; lowering platforms say "cuda" or "rocm"


def here() -> str:
    """This process's default device; a CUDA device with its compute capability times ten ("cuda:90" is Hopper)."""
    backend = jax.default_backend()
    if backend not in GPUS:
        return backend
    major, dot, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return f"cuda:{major}{minor}" if dot and major.isdigit() else "rocm"


def platform(device: str) -> str:
    """ "cuda:90" -> "cuda"; "gpu", which says no more, counts as "cuda"."""
    name = device.partition(":")[0]
    return "cuda" if name == "gpu" else name


def capability(device: str) -> int | None:
    """ "cuda:90" -> 90; None where the device does not say.

    Raises ValueError for a capability that is no number.
    """
    _, colon, number = device.partition(":")
    return int(number) if colon and not interprets(device) else None


def interprets(device: str) -> bool:
    """Whether Pallas kernels were asked for on a CPU, where they are interpreted: right, and very slow."""
    return device == "cpu:interpret"
