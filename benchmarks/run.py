"""Every table of README.md and docs/, printed: `python -m benchmarks.run [--quick]`."""

from __future__ import annotations

import argparse

from benchmarks import algorithms, costs, kernels


def main() -> None:
    """Costs of the verbs first, then the kernels, then the algorithms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    flags = ["--quick"] if parser.parse_args().quick else []
    costs.main(flags)
    print()
    failed = kernels.main(flags)
    print()
    algorithms.main(flags)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
