"""A search of 10^5 structures on disk: what its commands need of memory and time.

python tests/benchmarks/archive.py [--structures 100000]

The search is real in its first generation (embedded host, EMT); the populations after it are that
one displaced at random and written by the search's own code. Each command then runs in a process of
its own, for a quarter of the generations and for all, so that one sees what grows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.long_run import INPUT  # noqa: E402

from magus_anharmonic.campaign.structures import lowest_distinct, n_relaxed, relaxed_structures  # noqa: E402
from magus_anharmonic.report import write_report  # noqa: E402
from magus_anharmonic.runs.status import status  # noqa: E402
from magus_anharmonic.search import run  # noqa: E402
from magus_anharmonic.search.archive import Archive, best_of  # noqa: E402
from magus_anharmonic.settings import parse_settings  # noqa: E402

POPULATION = 1000
BYTES = 1024**3
"""Bar: what any command may take."""


def settings(generations: int) -> Any:
    return parse_settings({**INPUT, "numGen": generations})


def fill(folder: Path, generations: int) -> None:
    """One generation by the search, the others by its own code."""
    run(settings(1), folder)
    archive, rng = Archive(folder.resolve()), np.random.default_rng(0)
    first = archive.load("gen", 1)
    good, keep = archive.load("good", 1), archive.load("keep", 1)
    for generation in range(2, generations + 1):
        population = [
            displaced(first[n % len(first)], f"init{generation}-{n}", generation, rng)
            for n in range(POPULATION)
        ]
        for name in ("init", "raw", "gen"):
            archive.save(name, generation, population)
        archive.save("good", generation, good)
        archive.save("keep", generation, keep)
        archive.add_best(best_of(good, generation), [])
        archive.finish(generation, 2.0, 60.0)


def displaced(atoms: Atoms, identity: str, generation: int, rng: np.random.Generator) -> Atoms:
    """A distinct structure with an enthalpy above that of ``atoms``."""
    other = atoms.copy()
    other.info = {
        **atoms.info,
        "identity": identity,
        "gen": generation,
        "enthalpy": atoms.info["enthalpy"] + rng.exponential(0.2),
    }
    other.positions += rng.normal(0.0, 0.05, (len(atoms), 3))
    return other


def one_more(folder: Path) -> object:
    """``search -r`` with one generation more than are finished."""
    finished, _ = Archive(folder.resolve()).finished()
    return run(settings(finished + 1), folder, restart=True).n_generations


COMMANDS: dict[str, Callable[[Path], object]] = {
    "status": lambda folder: status(folder).state,
    "the 100 lowest distinct (campaign)": lambda folder: len(
        lowest_distinct(relaxed_structures(folder, "search"), 100)
    ),
    "relaxations counted (campaign)": lambda folder: n_relaxed(folder)[0],
    "report": lambda folder: write_report(folder).name,
    "search -r, one generation": one_more,
}


def measured(name: str, folder: Path, answer: Any) -> None:
    """In the child."""
    begun, before = time.process_time(), peak()
    found = COMMANDS[name](folder)
    answer.put((time.process_time() - begun, before, peak(), found))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--structures", type=int, default=100_000)
    given = parser.parse_args()
    generations = given.structures // POPULATION
    within = True
    with tempfile.TemporaryDirectory() as temporary:
        for number in (max(2, generations // 4), generations):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            fill(folder, number)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(
                f"{number} generations of {POPULATION} structures, {size / 1e6:.0f} MB of files",
                flush=True,
            )
            for name in COMMANDS:
                within &= show(name, folder)
            shutil.rmtree(folder)
    print(f"{'within' if within else 'OUTSIDE'} the bar of {BYTES / 1024**3:.0f} GiB each")
    sys.exit(not within)


def show(name: str, folder: Path) -> bool:
    """Run one command in a fresh process and print what it took; whether that is within the bar."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    child = context.Process(target=measured, args=(name, folder, answer))
    child.start()
    seconds, before, after, found = answer.get()
    child.join()
    took = (
        f"{seconds:.1f} s of processor time, peak {after / 1e6:.0f} MB ({before / 1e6:.0f} before"
        " it began)"
    )
    print(f"  {name}: {took}; {found}", flush=True)
    return bool(after < BYTES)


if __name__ == "__main__":
    main()
