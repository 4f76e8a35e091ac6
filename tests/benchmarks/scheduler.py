"""How well tasks fill the workers: ``python tests/benchmarks/scheduler.py [labels sscha many memory
cost]`` (all of them without names).

labels, sscha : one worker against two, taking turns. "speed-up" is the ratio of wall times, "busy"
the seconds spent inside tasks over the wall time. "processor" is twice the share of all processor
time (client, scheduler and workers) that is spent inside tasks with two workers: what the scheduler
costs, however many other programs share the cores; it does not see time lost by waiting. many : 256
places that sleep. memory : resident memory of the process that holds client and Dask scheduler,
over 100,000 tasks. cost : hours of the paper's campaign at ``--atoms-per-second`` (``potential.py``
prints that number), and of one ten times its size.
"""

import argparse
import contextlib
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from ase import Atoms
from ase.build import bulk
from dask import config
from distributed import LocalCluster

from magus_anharmonic.labelers.base import Recipe
from magus_anharmonic.labelers.pool import label_on_worker
from magus_anharmonic.potential.relax import serialised
from magus_anharmonic.ranking.jobs import Job, _remote_job, _run_elsewhere
from magus_anharmonic.scheduler import LocalScheduler
from magus_anharmonic.scheduler.cluster import DaskScheduler
from magus_anharmonic.scheduler.queues import QUIET, extensions
from magus_anharmonic.settings import WorkerSettings


def timed(item, shared=None):
    """Wall and processor seconds of a task, the processes that it started included."""
    task, inner = item
    begun, used = time.perf_counter(), processor_seconds()
    task(inner, shared)
    return time.perf_counter() - begun, processor_seconds() - used


def processor_seconds():
    """Processor time of this process and all below it so far."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


@contextlib.contextmanager
def dask(n_workers, **options):
    """``n_workers`` Dask workers on this machine, one thread each, configured as in the jobs of a
    queue system."""
    options = {
        "threads_per_worker": 1,
        "host": "127.0.0.1",
        "dashboard_address": ":0",
        "silence_logs": 50,
        **options,
    }
    with (
        config.set(QUIET),
        LocalCluster(
            n_workers=n_workers, scheduler_kwargs={"extensions": extensions()}, **options
        ) as cluster,
    ):
        with contextlib.closing(
            DaskScheduler.connect(cluster.scheduler_address, WorkerSettings())
        ) as scheduler:
            yield scheduler


def load():
    return f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"


def one_against_two(name, task, items, shared, rounds):
    """Print speed-up and busy share for local processes and Dask."""
    kinds = {"local": lambda n: contextlib.closing(LocalScheduler(n, threads=1)), "dask": dask}
    for kind, make in kinds.items():
        with make(1) as one, make(2) as two:
            for scheduler in (one, two):
                spend(scheduler, task, items[:2], shared)
            found = [
                (spend(one, task, items, shared), spend(two, task, items, shared))
                for _ in range(rounds)
            ]
        for (wall_1, busy_1, used_1, _), (wall_2, busy_2, used_2, all_2) in found:
            print(
                f"{name:7s} {kind:5s} {len(items)} tasks of {used_1 / len(items):.2f} s: one worker"
                f" {wall_1:.1f} s, two {wall_2:.1f} s, speed-up {wall_1 / wall_2:.2f} of 2, busy"
                f" {busy_1 / wall_1:.2f} of 1 and {busy_2 / wall_2:.2f} of 2, processor"
                f" {2 * used_2 / all_2:.2f} of 2; {load()}",
                flush=True,
            )
        middle = np.median([one[0] / two[0] for one, two in found])
        print(
            f"{name:7s} {kind:5s} median of {rounds} rounds: speed-up {middle:.2f} of 2 (bar 1.7)",
            flush=True,
        )


def spend(scheduler, task, items, shared):
    """Wall time of a run, wall and processor seconds in its tasks, and processor seconds of
    everything."""
    begun, before, busy, used = time.perf_counter(), processor_seconds(), 0.0, 0.0
    for done in scheduler.map(timed, [(task, item) for item in items], shared):
        if done.reason:
            raise RuntimeError(done.reason)
        busy, used = busy + done.value[0], used + done.value[1]
    return time.perf_counter() - begun, busy, used, processor_seconds() - before


def labels(rounds, number):
    """EMT on 1,372 copper atoms: half a second, far less than any DFT label (13 s and more)."""
    recipe = Recipe("ase.calculators.emt.EMT", {}, None, {})
    items = []
    for seed in range(number):
        atoms = bulk("Cu", cubic=True).repeat(7)
        atoms.rattle(0.05, seed=seed)
        items.append(({"task": "label", "atoms": atoms, "recipe": recipe}, 600.0))
    one_against_two("labels", label_on_worker, items, None, rounds)


def sscha(rounds):
    """One population of 50 configurations of H3S in 2x2x2 with the shipped model, and its start."""
    from magus_anharmonic.potential import load as load_model
    from magus_anharmonic.sscha import free_energy

    potential = load_model("h3s-gpaw-small", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "pressure": 150.0,
            "supercell": (2, 2, 2),
            "cell": "fixed",
            "n_configs": 50,
            "max_populations": 1,
        }
        jobs = [
            Job(
                str(n),
                h3s(3.0 + 0.01 * n),
                (0.0,),
                (Path(folder) / str(n),),
                {**options, "seed": n},
            )
            for n in range(8)
        ]
        items = [(_remote_job(job), free_energy) for job in jobs]
        one_against_two("sscha", _run_elsewhere, items, serialised(potential, remote=True), rounds)


def h3s(a):
    cell = 0.5 * a * np.array([[-1.0, 1, 1], [1, -1, 1], [1, 1, -1]])
    return Atoms("SH3", positions=[np.zeros(3), *(0.5 * a * np.eye(3))], cell=cell, pbc=True)


def pause(item, shared=None):
    """A task that costs time and no processor."""
    time.sleep(item)


def many(seconds, waves, workers=256):
    """Tasks of 0.7 to 1.3 times ``seconds`` in 256 places (4 processes of 64 threads)."""
    rng = np.random.default_rng(1)
    times = rng.uniform(0.7, 1.3, waves * workers) * seconds
    with dask(4, threads_per_worker=workers // 4) as scheduler:
        list(scheduler.map(pause, [0.0] * workers))
        begun, used = time.perf_counter(), processor_seconds()
        wall_of_end = [time.perf_counter() - begun for _ in scheduler.map(pause, times)]
        used = processor_seconds() - used
    # The tail, where there are fewer tasks than workers, belongs to the tasks and not to the
    # scheduler. At any moment before it each worker has, on average, half of a task behind it that
    # has not ended.
    until = len(times) - 2 * workers
    ideal = times.mean() * (until + workers / 2) / workers
    overhead = wall_of_end[until - 1] / ideal - 1
    print(
        f"many    {len(times)} tasks of {seconds:g} s (+-30 %) in {workers} places:"
        f" {wall_of_end[-1]:.1f} s; overhead before the tail {overhead:.1%} (bar 5 %), with the"
        f" tail {wall_of_end[-1] / (times.sum() / workers) - 1:.1%}; {1000 * used / len(times):.1f}"
        f" ms of processor time a task, client, scheduler and workers; {load()}",
        flush=True,
    )


def memory(total):
    """Resident memory after every tenth of ``total`` tasks."""
    page = resource.getpagesize()
    sizes = []
    begun = time.perf_counter()
    with dask(2) as scheduler:
        for number, _ in enumerate(scheduler.map(pause, (0.0 for _ in range(total))), start=1):
            if number % (total // 10) == 0:
                sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6)
    shown = " ".join(f"{size:.0f}" for size in sizes)
    rate = total / (time.perf_counter() - begun)
    print(
        f"memory  {total} tasks, client and Dask scheduler: {shown} MB after each tenth; {rate:.0f}"
        f" tasks/s; {load()}",
        flush=True,
    )


MEAN_ATOMS = 18  # of 4 to 32
STEPS = 30  # evaluations of a relaxation: docs/performance.md, "Relaxation"
# times fewer evaluations than 30 populations of 1,000 for everybody: docs/performance.md, "Ranking"
ELIMINATION = 35


def cost(rate, label_seconds):
    """Hours of one core or GPU that evaluates ``rate`` atoms per second, by step of the paper
    (Secs. IV A and B)."""
    evaluations = {  # atoms times evaluations
        "two searches that learn: 2 x 10 x 1,000 relaxations": 20_000 * STEPS * MEAN_ATOMS,
        "three searches: 3 x 10,000 relaxations": 30_000 * STEPS * MEAN_ATOMS,
        "SSCHA, 100 candidates x 30 x 1,000, 2x2x2": 100 * 30 * 1_000 * 8 * MEAN_ATOMS,
        "Im-3m, 3x3x3, 20 x 1,000, five pressures": 5 * 20 * 1_000 * 27 * 4,
    }
    hours = {name: n / rate / 3600 for name, n in evaluations.items()}
    sscha_hours = hours["SSCHA, 100 candidates x 30 x 1,000, 2x2x2"]
    everybody = sum(hours.values())
    raced = everybody - sscha_hours + sscha_hours / ELIMINATION
    for name, value in hours.items():
        print(f"cost    {name}: {value:.1f} h")
    print(
        "cost    with elimination instead of 30 x 1,000 for everybody:"
        f" {sscha_hours / ELIMINATION:.1f} h instead of {sscha_hours:.1f} h"
    )
    print(
        f"cost    the campaign at {rate:g} atoms/s: {everybody:.0f} h, with elimination"
        f" {raced:.0f} h"
    )
    print(
        f"cost    ten times its size: {10 * everybody:.0f} h, with elimination {10 * raced:.0f} h"
    )
    labels = 2_000 * label_seconds / 3600
    print(
        f"cost    2,000 labels of {label_seconds:g} core seconds: {labels:.0f} core hours; ten"
        f" times: {10 * labels:.0f} core hours"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=["labels", "sscha", "many", "memory", "cost"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a task of row many")
    parser.add_argument("--waves", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=100_000, help="of row memory")
    parser.add_argument("--n-labels", type=int, default=30, help="of row labels")
    parser.add_argument("--atoms-per-second", type=float, default=193.0, help="of row cost")
    parser.add_argument(
        "--label-seconds", type=float, default=65.0, help="core seconds of a label, of row cost"
    )
    given = parser.parse_args()
    rows = {
        "labels": lambda: labels(given.rounds, given.n_labels),
        "sscha": lambda: sscha(given.rounds),
        "many": lambda: many(given.seconds, given.waves),
        "cost": lambda: cost(given.atoms_per_second, given.label_seconds),
        "memory": lambda: memory(given.tasks),
    }
    for row in given.rows:
        rows[row]()


if __name__ == "__main__":
    main()
