"""The speed table of the potential, stock MatterSim against this package in one run: ``python
tests/benchmarks/potential.py``.

Each row is a ratio with its bar. Rows live in `evaluation`, `relaxation` and `training` beside this
file, each with a table ``ROWS`` of name -> (least ratio, function of the number of rounds -> (ratio
or None, text)). The last line says how many bars hold; the exit code is 1 when one does not.
``--rows`` picks some, ``--list`` names them, ``--limit`` adds the distance to the matrix products.
``--threads 1 2`` measures all rows with one thread on each side, then with two. Stock is the
mattersim of the Python that runs this: with 1.2.5 (Python 3.12) its direct graphs and its compiled
model take part, and the best of all settings counts.
"""

import argparse
import importlib
import sys
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

MODULES = ("evaluation", "relaxation", "training")


def rows():
    """Of all modules that are there and have a table."""
    found = {}
    for name in MODULES:
        if (Path(__file__).parent / f"{name}.py").is_file():
            found |= getattr(importlib.import_module(name), "ROWS", {})
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of which the median counts"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument(
        "--limit", action="store_true", help="also: how far from the matrix products alone"
    )
    options = parser.parse_args()
    table = rows()
    unknown = [name for name in options.rows or () if name not in table]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(table)}")
    if options.list:
        print("\n".join(f"{name:14s} at least {bar:g}x" for name, (bar, _) in table.items()))
        return 0
    print(f"mattersim {version('mattersim')}, torch {torch.__version__}", flush=True)
    held, measured = 0, 0
    names = options.rows or table
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"threads: {threads}", flush=True)
        for name in names:
            bar, measure = table[name]
            ratio, text = measure(options.rounds)
            if ratio is None:
                print(f"{name:14s} {text}", flush=True)
                continue
            measured += 1
            held += ratio >= bar
            print(
                f"{name:14s} {ratio:5.1f}x, at least {bar:g}x:"
                f" {'holds' if ratio >= bar else 'DOES NOT HOLD'} ({text})",
                flush=True,
            )
    if options.limit:
        from evaluation import limit

        print(f"limit          {limit(options.rounds)[1]}", flush=True)
    rest = len(names) * len(options.threads) - measured
    print(f"{held} of {measured} measured bars hold, {rest} not measured")
    return 0 if held == measured else 1


if __name__ == "__main__":
    sys.exit(main())
