"""Where a search or a campaign is, from its files alone: reads, never writes, and works beside the
process that runs it."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from magus_anharmonic.errors import DamagedFile, InputError, one_line, reason_of
from magus_anharmonic.io.files import read_as, read_jsonl
from magus_anharmonic.runs.folder import CampaignFolder, SearchFolder
from magus_anharmonic.runs.lock import HEARTBEAT, NAME, Owner, lives, read_owner
from magus_anharmonic.runs.record import (
    RecordedSettings,
    RunRecord,
    SearchState,
    StepRecord,
    read_failures,
    read_steps,
)
from magus_anharmonic.units import duration

log = logging.getLogger(__name__)

T = TypeVar("T")

LAST_ERRORS = 5
RECENT = 3600.0
"""Seconds over which a rate is measured."""
WATCH = HEARTBEAT + 5
"""Seconds for which a process on another machine is watched for a sign of life."""


@dataclass(frozen=True)
class Status:
    """What `status` found in a folder.

    kind : search or campaign; state : running, dead (its process is gone, or shows no sign of
    life), finished, stopped (nobody holds the lock, not finished), or unknown (the lock cannot be
    read), some with the reason in brackets; where : the step in words; waits_for : what has to come
    next; rates : lines with numbers per hour; seconds_left : estimate, None where there is nothing
    to base it on; errors : the last ones, newest last; go_on : the command that goes on.
    """

    folder: Path
    kind: str
    state: str
    where: str
    waits_for: str
    owner: Owner | None = None
    rates: tuple[str, ...] = ()
    seconds_left: float | None = None
    errors: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    last_change: float | None = None
    go_on: str = ""

    def lines(self) -> list[str]:
        """The report, one fact a line."""
        found = [
            f"{self.kind} in {self.folder}: {self.state}",
            f"where: {self.where}",
            f"waits for: {self.waits_for}",
        ]
        if self.owner is not None:
            found.append(f"held by: {self.owner.described()}")
        elif self.state == "stopped":
            found.append("held by: nobody")
        if self.last_change is not None:
            found.append(f"last file written: {duration(max(0.0, self.last_change))} ago")
        found += [f"rate: {rate}" for rate in self.rates]
        if self.seconds_left is not None and self.state != "finished":
            found.append(f"about {duration(self.seconds_left)} left at this rate")
        if self.counts:
            found.append(
                "failures: "
                + ", ".join(f"{count} {stage}" for stage, count in sorted(self.counts.items()))
            )
        found += [f"  {error}" for error in self.errors]
        if self.go_on and self.state.startswith(("dead", "stopped")):
            found.append(f"to go on: {self.go_on}")
        return found


def status(folder: str | Path) -> Status:
    """Status of the search or campaign in ``folder`` (the folder of the input, ``results``,
    ``results/anharmonic``, or ``campaign``).

    Raises ``InputError`` when it holds neither.
    """
    root, campaign = Path(folder), CampaignFolder.find(folder)
    if campaign is not None and campaign.steps.is_file():
        return _campaign(campaign.steps)
    for ours in (root, root / "anharmonic", root / "results" / "anharmonic"):
        if SearchFolder(ours).record.is_file() and ours.name == "anharmonic":
            return _search(ours)
    raise InputError(
        f"{root}: holds neither a search (results/anharmonic/run.json) nor a campaign"
        " (campaign/steps.json)"
    )


# --- a search -------------------------------------------------------------------------------------


def _search(ours: Path) -> Status:
    files = SearchFolder(ours)
    results, record = ours.parent, _read(RunRecord, files.record) or RunRecord(version="")
    state = _read(SearchState, files.state)
    settings, total = record.settings, record.settings.num_gen or 0
    history = read_jsonl(files.history, {"generation": int}) or _rounds(results)
    last = max((line["generation"] for line in history), default=0)
    finished = (state.finished if state else 0) or last
    seconds = _numbers(line.get("seconds") for line in history[-5:])
    done = 0 < total <= finished
    owner, word = holder(ours, done)
    if done:
        where, waits = f"all {total} generations are done", "nothing"
    else:
        step, waits = _step(results, files, finished + 1, settings)
        where = f"generation {finished + 1} of {total or '?'}: {step}"
    errors, counts = _errors(ours)
    # the embedded host has always said that it is the host
    embedded = record.host == "embedded" or not record.version
    command = "magus-anharmonic search" if embedded else one_line(record.command, 80)
    worked = [pace for pace in seconds if pace > 0]
    return Status(
        results.parent if results.name == "results" else ours,
        "search",
        word,
        where,
        waits,
        owner,
        _rates(ours, seconds),
        sum(worked) / len(worked) * (total - finished) if worked and total > finished else None,
        errors,
        counts,
        _since_change(ours, results),
        f"{command} -r",
    )


def _rounds(results: Path) -> list[dict[str, Any]]:
    """A line for each generation that MAGUS has finished, from its files and their times.

    ``keep{g}.traj`` comes last but one; a restart repeats the last generation, and then
    ``init{g}.traj`` is the newer one.
    """
    found = []
    for file in results.glob("keep*.traj"):
        number = file.stem.removeprefix("keep")
        begun, ended = _changed(results / f"init{number}.traj"), _changed(file)
        if number.isdecimal() and ended >= begun:
            found.append({"generation": int(number), "seconds": ended - begun if begun else None})
    return sorted(found, key=lambda line: line["generation"])


def _step(
    results: Path, files: SearchFolder, generation: int, settings: RecordedSettings
) -> tuple[str, str]:
    """What a generation is at, and what it needs to go on, by the files that it has."""
    if not (results / f"init{generation}.traj").exists():
        return "making structures", "random structures and offspring"
    if not any((results / f"{name}{generation}.traj").exists() for name in ("raw", "mlraw")):
        if not files.relaxing.exists():
            return "relaxing", "the relaxations of this generation"
        chunks = len(list((files.relaxing / str(generation)).glob("chunk-*.traj")))
        return f"relaxing, {chunks} chunks done", "the next chunk of relaxations"
    learned = files.checkpoint(generation)
    if settings.learning is not None and not learned.exists():
        return _learning_step(files, generation, settings.learning)
    if settings.sscha is not None:
        folders = [path for path in files.sscha.glob("*") if path.is_dir()]
        open_runs = [path for path in folders if not (path / "result.json").exists()]
        populations = sum(len(list(path.glob("population_*.npz"))) for path in open_runs)
        text = (
            f"free energies, {len(folders) - len(open_runs)} runs finished, {len(open_runs)} open"
            f" with {populations} populations"
        )
        return text, "the next population of SSCHA"
    return "ranking", "the populations of this generation"


def _learning_step(
    files: SearchFolder, generation: int, learning: dict[str, Any]
) -> tuple[str, str]:
    wanted = math.prod(_numbers(learning.get(key) for key in ("n_sample", "n_perturb")))
    pending = len(list((files.labels / "pending" / f"gen{generation:03d}").glob("*.xyz")))
    failed = sum(
        record.get("stage") == "label" and record.get("generation") == generation
        for record in read_failures(files.root)
    )
    if not any(files.labels.glob(f"gen{generation:03d}*.xyz")):
        return (
            f"labelling, {pending} of at most {wanted} labels done, {failed} failed",
            "the labeler (learning.labeler)",
        )
    epoch = (
        "a checkpoint of its epochs is there"
        if any(files.training.glob(f"gen{generation}.pth*"))
        else "no epoch done yet"
    )
    return f"training, {epoch}", "the next epoch of finetuning"


def _rates(ours: Path, seconds: Sequence[float]) -> tuple[str, ...]:
    """Labels and SSCHA populations of the last hour, from the times of their files, and the
    ``seconds`` of the last generations."""
    now, found = time.time(), []
    for what, pattern in (
        ("labels", "labels/pending/*/*.xyz"),
        ("SSCHA populations", "sscha/*/population_*.npz"),
    ):
        # a clock that was set back makes times of the future: they count as now
        times = [min(_changed(path), now) for path in ours.glob(pattern)]
        recent = [moment for moment in times if moment > now - RECENT]
        span = now - min(recent, default=now)
        if len(recent) > 1 and span > 1:
            found.append(f"{3600 * len(recent) / span:.0f} {what} per hour")
    if seconds:
        mean = duration(sum(seconds) / len(seconds))
        found.append(f"{mean} per generation (last {len(seconds)})")
    return tuple(found)


# --- a campaign -----------------------------------------------------------------------------------


def _campaign(file: Path) -> Status:
    steps = read_steps(file)
    if not steps:
        raise InputError(f"{file}: damaged: holds no step of a campaign")

    def of(status: str) -> dict[str, StepRecord]:
        return {name: step for name, step in steps.items() if step.status == status}

    running, waiting, failed, done = map(of, ("running", "open", "failed", "done"))
    owner, state = holder(file.parent, len(done) == len(steps))
    where = f"{len(done)} of {len(steps)} steps done, {len(failed)} failed"
    where += f"; in {', '.join(running)}" if running else ""
    inner = None
    for name in running:
        with contextlib.suppress(InputError):
            inner = status(file.parent / name)
            where += f" ({inner.where})"
    errors = tuple(
        f"{name}: {one_line(step.reason or 'no reason given')}" for name, step in failed.items()
    )
    if len(done) == len(steps):
        waits = "nothing"
    elif inner is not None:
        waits = inner.waits_for
    else:
        waits = [*running, *waiting, "a failed step to be mended"][0]
    wall = [step.wall_s for step in done.values()]
    return Status(
        file.parent,
        "campaign",
        state,
        where,
        waits,
        owner,
        () if inner is None else inner.rates,
        sum(wall) / len(wall) * (len(running) + len(waiting)) if wall else None,
        (errors if inner is None else (*errors, *inner.errors))[-LAST_ERRORS:],
        ({} if inner is None else inner.counts) | ({"step": len(failed)} if failed else {}),
        time.time() - _changed(file),
        "magus-anharmonic campaign campaign.yaml",
    )


# --- both -----------------------------------------------------------------------------------------


def holder(folder: Path, done: bool) -> tuple[Owner | None, str]:
    """Who holds the lock of ``folder``, and what that means (`Status.state`); ``done``: whether
    nothing is left to be done there."""
    try:
        owner = read_owner(folder)
        if owner is None:
            return None, "finished" if done else "stopped"
        if lives(folder, NAME, owner, WATCH):
            return owner, "running"
    except OSError as error:
        return None, f"unknown ({reason_of(error)})"
    if done:
        return owner, "finished"
    return owner, "dead" if owner.here else f"dead (no sign of life for {WATCH:g} s)"


def present_steps(folder: Path, steps: dict[str, Any]) -> dict[str, Any]:
    """``steps`` of the ``steps.json`` in ``folder``, "interrupted" where one is said to be running
    and nobody works on the campaign."""
    running = [
        name
        for name, step in steps.items()
        if isinstance(step, dict) and step.get("status") == "running"
    ]
    if not running or not deserted(folder):
        return steps
    return {
        name: {**step, "status": "interrupted"} if name in running else step
        for name, step in steps.items()
    }


def deserted(folder: Path) -> bool:
    """Whether nobody holds the lock of ``folder`` any more."""
    return holder(folder, False)[1].startswith(("dead", "stopped"))


def _errors(ours: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    records = read_failures(ours)
    counts = Counter(one_line(str(record.get("stage", "?")), 40) for record in records)
    last = [
        one_line(
            " ".join(
                str(part)
                for part in (record.get("time", ""), record.get("stage", "?"), record.get("id", ""))
                if part
            ),
            120,
        )
        + f": {one_line(str(record.get('reason', 'no reason given')))}"
        for record in records[-LAST_ERRORS:]
    ]
    return tuple(last), dict(counts)


def _since_change(*folders: Path) -> float | None:
    """Seconds since a file in one of these folders, or one level below, was written; None when
    there is none."""
    times = [
        _changed(path)
        for folder in folders
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.name != "lock.json"
    ]
    return time.time() - max(times) if times else None


def _changed(path: Path) -> float:
    """When a file was written, in seconds; 0 when it vanished meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(kind: type[T], file: Path) -> T | None:
    """A record, or None: a running search may be about to write it, and a damaged one must not hide
    the rest."""
    try:
        return read_as(kind, file)
    except DamagedFile:
        return None


def _numbers(values: Iterable[Any]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if isinstance(value, int | float) and abs(value) < 1e9]
