"""`tune.search` in Triton's interpreter, where every tile takes as long: the shipped one and each neighbour are run.

    TRITON_INTERPRET=1 python -m tests.kernels.triton_tune < jobs.json > results.json

A process of its own, as `triton_interpret`. What is checked is the search itself: it holds each tile to the oracle.
"""

import json
import sys
import warnings

import numpy as np


def through_interpreter(launch, _):
    """What `triton_call.call` gives on a GPU."""
    import jax

    from tests.kernels.triton_interpret import interpret

    def host(*arrays) -> np.ndarray:
        given = iter(arrays)
        operands = tuple(o if isinstance(o, int) else np.asarray(next(given)) for o in launch.operands)
        return interpret(launch._replace(operands=operands))

    return jax.pure_callback(host, launch.out, *(o for o in launch.operands if not isinstance(o, int)))


def job(what: dict) -> list[dict]:
    """{"activation", "weight", "shape": [m, n, k], "device"} -> for each kernel its name, key and number of tiles."""
    from jqopt_kernels import Shapes, commands, tune

    lhs, rhs = commands.ACTIVATIONS[what["activation"]], commands.FORMATS[what["weight"]]
    found = tune.search(lhs, rhs, Shapes(*what["shape"]), what["device"], commands.FLOATS.get(what["activation"]))
    return [one._asdict() | {"tile": one.tile._asdict()} for one in found]


if __name__ == "__main__":
    warnings.simplefilter("error")
    from jqopt_kernels import triton_call, tune
    from tests.kernels.triton_interpret import read_scales_by_their_type

    read_scales_by_their_type()
    triton_call.call = through_interpreter
    tune._timed, tune.CACHE_BYTES = lambda *_: 1.0, 1
    json.dump([job(what) for what in json.load(sys.stdin)], sys.stdout)
