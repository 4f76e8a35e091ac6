"""Searches that are killed: a small one with every real part, run in processes that die where they
are told to.

One server process imports everything once and forks a child per search, so that a run costs its own
seconds only. A child is killed from outside at a time, or kills itself just before a step: every
change of a file (new name, line appended, removal, database) is one, seen by an audit hook, so that
nothing in the library is replaced.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

INPUT = {
    "formulaType": "fix",
    "symbols": ["H", "S"],
    "formula": [3, 1],
    "min_n_atoms": 4,
    "max_n_atoms": 4,
    "spacegroup": [8, 160, 221, 225, 229],
    "pressure": 150,
    "popSize": 2,
    "initSize": 3,
    "saveGood": 1,
    "numGen": 2,
    "randRatio": 0.5,
    "pPri": 0.5,
    "d_ratio": 0.6,
    "volume_ratio": 2.7,
    "dE": 0.001,
    "Fitness": ["SSCHA"],
    "seed": 1,
    "MainCalculator": {
        "calculator": "mattersim",
        "jobPrefix": "M",
        "checkpoint": "h3s-gpaw-small",
        "eps": 0.2,
        "maxStep": 6,
    },
    "learning": {
        "labeler": {"calculator": "toy_labeler.SoftSpheres", "n_workers": 1, "timeout": 900},
        "n_sample": 1,
        "n_perturb": 3,
        "n_replay": 2,
        "epochs": 2,
        "learning_rate": 1.0e-5,
    },
    "sscha": {
        "supercell": [1, 1, 1],
        "cell": "fixed",
        "n_configs": 10,
        "max_populations": 2,
        "max_candidates": 1,
        "hessian": 0,
    },
}
"""The quick start, smaller: shipped checkpoint, toy labels (one of which fails), learning in both
rounds, SSCHA in the last."""


@dataclass(frozen=True)
class Ended:
    """How a search ended: exit code (negative: the signal), seconds, everything it printed, and the
    steps that it made."""

    code: int
    seconds: float
    text: str
    steps: list[str]


class Server:
    """The process that forks searches; use it in a ``with`` block."""

    def __enter__(self):
        here = Path(__file__).resolve().parent
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(here / "kill_harness.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == "ready"
        return self

    def __exit__(self, *exception):
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _send(self, order):
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _answer(self):
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def search(
        self, folder, *, restart=False, step=None, after=None, number=signal.SIGKILL, file_size=None
    ):
        """Run ``magus-anharmonic search`` in ``folder`` to its end.

        ``step``: send signal ``number`` just before the first step of that name; ``after``: send it
        after so many seconds; ``file_size``: no file may grow beyond so many bytes.
        """
        order = {
            "folder": str(folder),
            "restart": restart,
            "step": step,
            "number": int(number),
            "file_size": file_size,
        }
        self._send(order)
        pid = self._answer()
        if after is not None:
            time.sleep(after)
            os.kill(pid, number)  # not waited for yet, so the id is still this child's
        self._send({})
        status, seconds = self._answer()
        # Neither file is there yet when a child is killed at once.
        text, steps = (
            path.read_text(encoding="utf-8") if path.exists() else ""
            for path in (folder / "output.txt", folder / "steps.txt")
        )
        return Ended(os.waitstatus_to_exitcode(status), seconds, text, steps.splitlines())


def prepare(folder, **changes):
    """A folder with ``input.yaml``."""
    folder.mkdir(parents=True)
    (folder / "input.yaml").write_text(yaml.safe_dump({**INPUT, **changes}), encoding="utf-8")
    return folder


def outcome(folder):
    """Everything that a search found, in a form in which two searches can be compared bit by
    bit."""
    from magus_anharmonic.io.files import read_jsonl
    from magus_anharmonic.potential.checkpoint import describe
    from magus_anharmonic.ranking.store import FreeEnergyStore
    from magus_anharmonic.runs.record import identity, read_failures

    ours = folder / "results" / "anharmonic"
    found = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("results/*.traj")
    }
    found["labels"] = labels(ours / "labels")
    for pattern in (
        "*.csv",
        "*.traj",
        "search.json",
        "seeds/*",
        "sscha/*/*.npz",
        "sscha/*/convergence.csv",
    ):
        found |= {str(path.relative_to(folder)): path.read_bytes() for path in ours.glob(pattern)}
    found["models"] = {
        path.name: describe(path).model_id for path in sorted(ours.glob("checkpoints/*.pth"))
    }
    metrics = read_jsonl(ours / "metrics.jsonl")
    found["metrics"] = [
        {key: value for key, value in line.items() if not key.startswith("seconds")}
        for line in metrics
    ]
    found["failures"] = [
        identity(record) for record in read_failures(ours) if record["stage"] != "run"
    ]
    store = FreeEnergyStore(ours / "free_energies.db")
    found["free energies"] = sorted(
        (record.folder, repr(record.gibbs), repr(record.gibbs_error)) for record in store.runs()
    )
    found["families"] = read_jsonl(ours / "labels" / "families.jsonl")
    found["left over"] = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if is_left_over(path)
    )
    return found


def labels(directory):
    """Id, file, energy, forces and stress of every label in every file: one that is lost or doubled
    shows."""
    from ase.io import read

    found = []
    for file in sorted(directory.rglob("*.xyz")):
        for atoms in read(file, index=":", format="extxyz"):
            numbers = (
                atoms.get_potential_energy(),
                atoms.get_forces(),
                atoms.get_stress(voigt=False),
            )
            found.append(
                (
                    str(atoms.info["id"]),
                    str(file.relative_to(directory)),
                    *(repr(value).encode() for value in numbers),
                )
            )
    return sorted(found)


def is_left_over(path):
    """Temporary files, locks, and what belongs to an unfinished unit."""
    return (
        path.name.endswith((".tmp", ".state", ".damaged"))
        or path.name == "lock.json"
        or path.parent.name in ("pending", "training")
    )


# --- the server's side ----------------------------------------------------------------------------

WRITING = re.compile(r"[wax+]")
RANDOM = re.compile(r"(/\.making-)[^/]+")


class Steps:
    """An audit hook that writes down each step and sends this process a signal before one of
    them."""

    def __init__(self, folder, step, number):
        self.folder, self.step, self.number = str(folder), step, number
        self.pid = os.getpid()
        self.record = os.open(folder / "steps.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, event, arguments):
        name = self._named(event, arguments)
        if name is None or os.getpid() != self.pid:
            return
        if name == self.step:
            self.step = None
            os.kill(self.pid, self.number)
        os.write(self.record, f"{name}\n".encode())

    def _named(self, event, arguments):
        if event == "open" and isinstance(arguments[1], str) and WRITING.search(arguments[1]):
            path, what = arguments[0], "open"
        elif event == "os.rename":
            path, what = arguments[1], "rename"
        elif event in ("os.remove", "os.rmdir"):
            path, what = arguments[0], event.removeprefix("os.")
        elif event == "sqlite3.connect":
            path, what = arguments[0], "database"
        else:
            return None
        if not isinstance(path, str | os.PathLike):
            return None
        text = os.path.abspath(path)
        if (
            not text.startswith(self.folder)
            or text.endswith((".tmp", ".log", ".txt"))
            or "lock" in os.path.basename(text)
        ):
            return None
        # Steps must have the same names in the next search.
        return RANDOM.sub(r"\1", f"{what} {os.path.relpath(text, self.folder)}")


def serve():
    """Fork a search for each order on standard input; answer with its process id, and with its
    status once it has ended."""
    # A shell starts what runs in its background with Ctrl-C ignored, and so would every search be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    load_everything()

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer("ready")
    while line := sys.stdin.readline():
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            run_search(json.loads(line))
        answer(child)
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        answer([status, time.monotonic() - began])
    os._exit(0)  # nothing is left to do, and taking torch down costs seconds


def load_everything():
    """The modules that a search imports on its way."""
    import ase.db  # noqa: F401
    import ase.db.sqlite  # noqa: F401
    import ase_ga  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pyxtal  # noqa: F401
    import scipy.optimize  # noqa: F401

    import magus_anharmonic.learning.learn  # noqa: F401
    import magus_anharmonic.potential.finetune  # noqa: F401
    import magus_anharmonic.search.host  # noqa: F401
    import magus_anharmonic.sscha.gibbs  # noqa: F401
    from magus_anharmonic.potential import load

    load("h3s-gpaw-small", device="cpu")


def run_search(order):
    """In the forked child: the command line, as a user starts it, on one core."""
    import resource

    folder = Path(order["folder"])
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    if hasattr(os, "sched_setaffinity"):
        cores, worker = (
            sorted(os.sched_getaffinity(0)),
            int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")),
        )
        os.sched_setaffinity(0, {cores[worker % len(cores)]})
    sys.addaudithook(Steps(folder, order["step"], order["number"]))
    if order["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"], order["file_size"]))
    sys.argv = [
        "magus-anharmonic",
        "search",
        "--host",
        "embedded",
        *(["-r"] if order["restart"] else []),
    ]
    from magus_anharmonic.cli import main

    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
