"""What benchmarks share that say what was measured beside a bar.

Import it first: it takes this folder off the path, where it comes first and holds a file with the
name of python-sscha's package.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]


def beside(name):
    """A script of this folder, which is not on the path."""
    specification = importlib.util.spec_from_file_location(f"{name}_benchmark", HERE / f"{name}.py")
    module = sys.modules[specification.name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def on_one_thread():
    """Begin this process anew with one thread where it has more: BLAS reads the number when NumPy
    is imported."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **threads})


def options_of(description):
    """The parser of a script that is described by its docstring."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=kind)


@dataclass(frozen=True)
class Bar:
    """One line of the table; ``value`` is None where nothing could be measured."""

    what: str
    value: float | None
    low: float
    high: float
    text: str

    @property
    def holds(self):
        return self.value is not None and self.low <= self.value <= self.high

    def line(self):
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        wanted = f">= {self.low:g}" if self.high == np.inf else f"{self.low:g} to {self.high:g}"
        verdict = "holds" if self.holds else "MISSED"
        return f"{self.what:58s} {value:>12s} (bar {wanted}: {verdict}) {self.text}"


def main(description, rows, limit):
    """Print the bars that each of the ``rows`` (by name) gives, none begun after ``limit`` seconds;
    the exit code is 0 only if all hold."""
    parser = options_of(description)
    parser.add_argument("--only", nargs="+", choices=rows, help="rows to run")
    parser.add_argument(
        "--limit", type=float, default=limit, help="seconds after which no further row begins"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    begun, bars = time.monotonic(), []
    for name in options.only or rows:
        if time.monotonic() - begun > options.limit:
            found = [Bar(name, None, 0.0, np.inf, "no time was left")]
        else:
            found = rows[name]()
        bars += found
        print("\n".join(bar.line() for bar in found), flush=True)
    print(f"{sum(bar.holds for bar in bars)} of {len(bars)} bars hold")
    return 0 if all(bar.holds for bar in bars) else 1
