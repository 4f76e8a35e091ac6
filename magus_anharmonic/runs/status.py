"""Where a search or a campaign is, from its files alone: reads, never writes, and works beside the
process that runs it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magus_anharmonic.errors import DamagedFile, InputError, one_line, reason_of
from magus_anharmonic.io.files import read_json, read_jsonl
from magus_anharmonic.runs.failures import read_failures
from magus_anharmonic.runs.lock import HEARTBEAT, lives
from magus_anharmonic.runs.owner import NAME, Owner, read_owner
from magus_anharmonic.runs.record import CampaignFolder
from magus_anharmonic.units import duration

log = logging.getLogger(__name__)

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
        if (ours / "run.json").is_file() and ours.name == "anharmonic":
            return _search(ours)
    raise InputError(
        f"{root}: holds neither a search (results/anharmonic/run.json) nor a campaign"
        " (campaign/steps.json)"
    )


# --- a search -------------------------------------------------------------------------------------


def _search(ours: Path) -> Status:
    results, record = ours.parent, _json(ours / "run.json")
    settings = record.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    history = read_jsonl(ours / "generations.jsonl", ("generation",)) or _rounds(results)
    last = max((_number(line["generation"]) or 0 for line in history), default=0)
    finished = _number(_json(ours / "search.json").get("finished")) or last
    total = _number(settings.get("num_gen")) or 0
    done = total > 0 and finished >= total
    owner, state = holder(ours, done)
    generation = finished + 1
    if done:
        where, waits = f"all {total} generations are done", "nothing"
    else:
        step, waits = _step(results, ours, generation, settings)
        where = f"generation {generation} of {total or '?'}: {step}"
    errors, counts = _errors(ours)
    return Status(
        results.parent if results.name == "results" else ours,
        "search",
        state,
        where,
        waits,
        owner,
        _rates(ours, history),
        _left(history, total - finished),
        errors,
        counts,
        _since_change(ours, results),
        _command(record),
    )


def _command(record: dict[str, Any]) -> str:
    """What goes on with a search; the embedded one has always said that it is the host."""
    if record.get("host", "magus") == "embedded" or not record:
        return "magus-anharmonic search -r"
    return f"{one_line(str(record.get('command', 'magus search')), 80)} -r"


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


def _step(results: Path, ours: Path, generation: int, settings: dict[str, Any]) -> tuple[str, str]:
    """What a generation is at, and what it needs to go on, by the files that it has."""
    if not (results / f"init{generation}.traj").exists():
        return "making structures", "random structures and offspring"
    if not any((results / f"{name}{generation}.traj").exists() for name in ("raw", "mlraw")):
        if not (ours / "relax").exists():
            return "relaxing", "the relaxations of this generation"
        chunks = len(list((ours / "relax" / str(generation)).glob("chunk-*.traj")))
        return f"relaxing, {chunks} chunks done", "the next chunk of relaxations"
    learning = settings.get("learning")
    if isinstance(learning, dict) and not (ours / "checkpoints" / f"gen{generation}.pth").exists():
        return _learning_step(ours, generation, learning)
    if isinstance(settings.get("sscha"), dict):
        folders = [path for path in (ours / "sscha").glob("*") if path.is_dir()]
        open_runs = [path for path in folders if not (path / "result.json").exists()]
        populations = sum(len(list(path.glob("population_*.npz"))) for path in open_runs)
        text = (
            f"free energies, {len(folders) - len(open_runs)} runs finished, {len(open_runs)} open"
            f" with {populations} populations"
        )
        return text, "the next population of SSCHA"
    return "ranking", "the populations of this generation"


def _learning_step(ours: Path, generation: int, learning: dict[str, Any]) -> tuple[str, str]:
    wanted = (_number(learning.get("n_sample")) or 0) * (_number(learning.get("n_perturb")) or 0)
    pending = len(list((ours / "labels" / "pending" / f"gen{generation:03d}").glob("*.xyz")))
    batches = list((ours / "labels").glob(f"gen{generation:03d}*.xyz"))
    failed = sum(
        record.get("stage") == "label" and record.get("generation") == generation
        for record in read_failures(ours)
    )
    if not batches:
        return (
            f"labelling, {pending} of at most {wanted} labels done, {failed} failed",
            "the labeler (learning.labeler)",
        )
    epoch = (
        "a checkpoint of its epochs is there"
        if list((ours / "training").glob(f"gen{generation}.pth*"))
        else "no epoch done yet"
    )
    return f"training, {epoch}", "the next epoch of finetuning"


def _rates(ours: Path, history: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Labels and SSCHA populations of the last hour, from the times of their files."""
    now = time.time()
    found = []
    labels = [_changed(path) for path in (ours / "labels").glob("pending/*/*.xyz")]
    populations = [_changed(path) for path in (ours / "sscha").glob("*/population_*.npz")]
    for what, times in (("labels", labels), ("SSCHA populations", populations)):
        # a clock that was set back makes times of the future: they count as now
        recent = [min(moment, now) for moment in times if moment > now - RECENT]
        span = now - min(recent, default=now)
        if len(recent) > 1 and span > 1:
            found.append(f"{3600 * len(recent) / span:.0f} {what} per hour")
    seconds = [
        value for line in history[-5:] if isinstance(value := line.get("seconds"), int | float)
    ]
    if seconds:
        found.append(
            f"{duration(sum(seconds) / len(seconds))} per generation (last {len(seconds)})"
        )
    return tuple(found)


def _left(history: Sequence[dict[str, Any]], generations: int) -> float | None:
    seconds = [
        value
        for line in history[-5:]
        if isinstance(value := line.get("seconds"), int | float) and value > 0
    ]
    return sum(seconds) / len(seconds) * generations if seconds and generations > 0 else None


# --- a campaign -----------------------------------------------------------------------------------


def _campaign(file: Path) -> Status:
    steps = {name: step for name, step in _json(file).items() if isinstance(step, dict)}
    if not steps:
        raise InputError(f"{file}: damaged: holds no step of a campaign")
    states = Counter(str(step.get("status")) for step in steps.values())
    running = [name for name, step in steps.items() if step.get("status") == "running"]
    waiting = [name for name, step in steps.items() if step.get("status") == "open"]
    failed = {
        name: one_line(str(step.get("reason") or "no reason given"))
        for name, step in steps.items()
        if step.get("status") == "failed"
    }
    done = states["done"] == len(steps)
    owner, state = holder(file.parent, done)
    where = f"{states['done']} of {len(steps)} steps done, {states['failed']} failed"
    if running:
        where += f"; in {', '.join(running)}"
    inner = None
    for name in running:
        with contextlib.suppress(InputError):
            inner = status(file.parent / name)
            where += f" ({inner.where})"
    waits = (
        "nothing"
        if done
        else (
            inner.waits_for
            if inner is not None
            else (running or waiting or ["a failed step to be mended"])[0]
        )
    )
    spent = [
        value
        for step in steps.values()
        if step.get("status") == "done" and isinstance(value := step.get("wall_s"), int | float)
    ]
    left = sum(spent) / len(spent) * (len(running) + len(waiting)) if spent else None
    errors = tuple(f"{name}: {reason}" for name, reason in failed.items())[-LAST_ERRORS:]
    counts = {"step": len(failed)} if failed else {}
    if inner is not None:
        errors, counts = (*errors, *inner.errors)[-LAST_ERRORS:], {**inner.counts, **counts}
    rates = inner.rates if inner is not None else ()
    age = time.time() - _changed(file)
    return Status(
        file.parent,
        "campaign",
        state,
        where,
        waits,
        owner,
        rates,
        left,
        errors,
        counts,
        age,
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


def _json(file: Path) -> dict[str, Any]:
    """A JSON file, or nothing: a running search may be about to write it, and a damaged one must
    not hide the rest."""
    try:
        return read_json(file)
    except DamagedFile:
        return {}


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and abs(value) < 1e9 else None
