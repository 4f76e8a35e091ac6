"""Many generations of the embedded host on a cheap potential: does memory stay flat, and do files
stay bounded?

python tests/benchmarks/long_run.py --generations 500
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from magus_anharmonic.search import run
from magus_anharmonic.settings import parse_settings

INPUT: dict[str, Any] = {
    "symbols": ["Cu", "Al"],
    "formula": [1, 1],
    "min_n_atoms": 2,
    "max_n_atoms": 4,
    "spacegroup": [123, 166, 221, 225],
    "pressure": 10,
    "popSize": 3,
    "saveGood": 1,
    "randRatio": 0.5,
    "seed": 1,
    "MainCalculator": {"calculator": "emt", "jobPrefix": "EMT", "maxStep": 3},
}
WARM_UP = 0.2
"""Share of the generations that is not measured."""


class Memory(logging.Handler):
    """Writes down the resident memory (MB) and the time whenever a generation is done."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        match = re.match(r"generation (\d+) of \d+ done", record.getMessage())
        if match:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.found.append((int(match[1]), pages * 4096 / 1e6, time.monotonic()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="kept; left out: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        memory, text = Memory(), logging.FileHandler(folder / "log.txt")
        ours = logging.getLogger("magus_anharmonic")
        ours.setLevel(logging.INFO)
        ours.addHandler(memory)
        ours.addHandler(text)
        began = time.process_time()
        run(parse_settings({**INPUT, "numGen": given.generations}), folder)
        cpu = time.process_time() - began
        report(memory, folder, given.generations, cpu)


def report(memory: Memory, folder: Path, n: int, cpu: float) -> None:
    numbers = np.array(memory.found)
    warm = numbers[int(WARM_UP * len(numbers)) :]
    slope = np.polyfit(warm[:, 0], warm[:, 1], 1)[0] * 100
    print(f"{n} generations, {cpu:.0f} s of CPU ({cpu / n:.2f} s each)")
    print(
        f"memory after warm-up {warm[0, 1]:.1f} MB, at the end {warm[-1, 1]:.1f} MB, slope"
        f" {slope:+.2f} MB per 100 generations (bar: 1)"
    )
    steps = np.diff(numbers[:, 2])
    tenth = max(1, len(steps) // 10)
    print(
        f"seconds per generation: first tenth {steps[:tenth].mean():.2f}, last tenth"
        f" {steps[-tenth:].mean():.2f}"
    )
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"]
    size = sum(path.stat().st_size for path in files)
    best = (folder / "results/best.traj").stat().st_size
    lines = (folder / "log.txt").read_text().count("\n")
    print(
        f"files: {len(files)} ({len(files) / n:.1f} per generation), {size / 1e6:.2f} MB, of which"
        f" best.traj {best / 1e6:.2f} MB"
    )
    print(
        f"log: {lines} lines ({lines / n:.1f} per generation),"
        f" {(folder / 'log.txt').stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
