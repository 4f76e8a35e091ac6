"""Simulated faults for so many minutes: whole searches that are killed, starved of disk and run
into each other, again and again.

python tests/benchmarks/soak.py --minutes 120

Every search is restarted until it ends, and must then be, bit by bit, the one that met no fault.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kill_harness import Server, labels, outcome, prepare  # noqa: E402

from magus_anharmonic.runs.lock import locked  # noqa: E402

FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "full disk", "other process")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts = Counter()
    with tempfile.TemporaryDirectory() as temporary, Server() as server:
        reference = prepare(Path(temporary) / "reference")
        ended = server.search(reference)
        assert ended.code == 0, ended.text
        expected, draw = outcome(reference), random.Random(given.seed)
        end = time.monotonic() + 60 * given.minutes
        while time.monotonic() < end:
            folder = prepare(Path(temporary) / "search")
            met = one_search(server, folder, ended.seconds, draw, counts, end)
            found = outcome(folder)
            counts["searches"] += 1
            lost = {label[0] for label in expected["labels"]} - {
                label[0] for label in found["labels"]
            }
            counts["labels lost"] += len(lost)
            counts["labels doubled"] += len(found["labels"]) - len(
                {label[0] for label in found["labels"]}
            )
            different = sorted(
                key for key in {*found, *expected} if found.get(key) != expected.get(key)
            )
            if different:
                counts["searches that differ"] += 1
                kept = Path(tempfile.mkdtemp(prefix="soak-differs-")) / "search"
                shutil.copytree(folder, kept)
                print(
                    f"search {counts['searches']} differs in {different}; kept: {kept}", flush=True
                )
                print(f"  met {', '.join(met)}; left over: {found['left over']}", flush=True)
                for failure in found["failures"]:
                    if failure not in expected["failures"]:
                        print(f"  a failure of its own: {failure}"[:600], flush=True)
            shutil.rmtree(folder)
    faults = ", ".join(f"{counts[name]} {name}" for name in FAULTS)
    print(
        f"{given.minutes:g} minutes: {counts['searches']} searches,"
        f" {sum(counts[name] for name in FAULTS)} faults ({faults})"
    )
    print(
        f"labels lost: {counts['labels lost']}, labels doubled: {counts['labels doubled']}, ",
        end="",
    )
    print(
        f"searches that differ: {counts['searches that differ']}, unexpected exit codes:"
        f" {counts['unexpected']}"
    )
    missed = [name for name in FAULTS if not counts[name]]
    if missed:
        print(
            f"no search met {', '.join(missed)}: {given.minutes:g} minutes are too few, or these"
            " faults have no effect here"
        )
    sys.exit(
        bool(
            missed
            or counts["labels lost"]
            + counts["labels doubled"]
            + counts["searches that differ"]
            + counts["unexpected"]
        )
    )


def one_search(server, folder, seconds, draw, counts, end):
    """Start, disturb and restart one search until it ends; the faults it met and their exit
    codes."""
    ours, known, met = folder / "results" / "anharmonic", set[str](), list[str]()
    for attempt in range(1000):
        restart = (ours / "run.json").exists()
        fault = draw.choice(FAULTS) if attempt < 6 and time.monotonic() < end else "none"
        if fault == "other process" and restart:
            with locked(ours, "another search"):
                ended = server.search(folder, restart=True)
        elif fault == "full disk":
            ended = server.search(folder, restart=restart, file_size=draw.randrange(500, 60000))
        elif fault in ("SIGKILL", "SIGTERM", "SIGINT"):
            ended = server.search(
                folder,
                restart=restart,
                number=signal.Signals[fault],
                after=draw.uniform(0, 0.7 * seconds),
            )
        else:
            ended = server.search(folder, restart=restart)
        expected = {
            "SIGKILL": {0, -9},
            "SIGTERM": {0, 143, -15},
            "SIGINT": {0, 130, -2},
            "full disk": {0, 1},
            "other process": {0, 2},
        }
        counts[fault] += ended.code != 0
        met.append(f"{fault} ({ended.code})")
        if ended.code not in expected.get(fault, {0}):
            counts["unexpected"] += 1
            print(f"{fault}: exit code {ended.code}\n{ended.text[-2000:]}", flush=True)
        now = {label[0] for label in labels(ours / "labels")} if ours.exists() else set()
        counts["labels lost"] += len(known - now)
        known = now
        if ended.code == 0 and (fault != "other process" or not restart):
            return met
    raise SystemExit(f"{folder}: did not end in 1000 attempts")


if __name__ == "__main__":
    main()
