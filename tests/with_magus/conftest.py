"""The folder in which MAGUS runs, programs that play queue systems, and the list of what was
run."""

import os
from importlib import metadata
from pathlib import Path

import magus_run
import pytest

from magus_anharmonic.doctor import find_magus


@pytest.fixture
def work(tmp_path, tiny_checkpoint):
    """A folder with the inputs that every search here needs."""
    info = tmp_path / "site" / "magus_anharmonic-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: magus-anharmonic\nVersion: 0\n")
    (info / "entry_points.txt").write_text(magus_run.ENTRY_POINTS)
    folder = tmp_path / "work"
    (folder / "inputFold/EMT").mkdir(parents=True)
    (folder / "inputFold/EMT/emt.yaml").write_text("eps: 0.05\n")
    (folder / "model.pth").write_bytes(Path(tiny_checkpoint).read_bytes())
    return folder


QUEUE = """#!/bin/bash
# Plays a queue system for tests: runs the job at once and waits for it.
echo "$(basename "$0") $*" >> "$QUEUE_LOG"
case $(basename "$0") in
    bsub) cat > queued.sh; bash queued.sh > queued.out 2>&1; echo "Job <$$> is submitted to queue <normal>.";;
    sbatch) bash "$1" > queued.out 2>&1; echo "Submitted batch job $$";;
    qsub) PBS_NODEFILE=/dev/null bash "$1" > queued.out 2>&1; echo "$$.server";;
    *) ;; # bwait, salloc, squeue, qstat: the job has ended
esac
"""


@pytest.fixture
def queue(work, monkeypatch):
    """The commands of LSF, SLURM and PBS first in PATH; returns the file in which each leaves a
    line per call."""
    folder = work.parent / "queue"
    folder.mkdir()
    for name in ("bsub", "bwait", "sbatch", "salloc", "squeue", "qsub", "qstat"):
        (folder / name).write_text(QUEUE)
        (folder / name).chmod(0o755)
    log = work.parent / "queue.log"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE_LOG", str(log))
    return log


def pytest_terminal_summary(terminalreporter):
    """Say which MAGUS ran what, with which versions."""
    terminalreporter.section("with MAGUS")
    terminalreporter.line(find_magus()[1])
    names = (
        "ase",
        "numpy",
        "scipy",
        "spglib",
        "scikit-learn",
        "pandas",
        "networkx",
        "torch",
        "mattersim",
    )
    known = {
        name: next(iter(metadata.metadata(name).get_all("Version") or ["?"]))
        for name in names
        if _installed(name)
    }
    terminalreporter.line(", ".join(f"{name} {version}" for name, version in known.items()))
    for line in magus_run.RAN or ["nothing was run"]:
        terminalreporter.line(line)


def _installed(name):
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
