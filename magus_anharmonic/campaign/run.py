"""The driver of a campaign and where it stands.

``campaign status``: steps, counts, times and cost, also while another process runs; what is
missing.

The driver: every step once, in order, skipped when done, begun anew when what it depends on has
changed.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from magus_anharmonic.campaign.steps import (
    FOLDER,
    Context,
    Outcome,
    Step,
    assemble,
    plan,
    read_records,
    step_key,
    write_part,
    write_records,
)
from magus_anharmonic.errors import (
    DamagedFile,
    InputError,
    MagusAnharmonicError,
    is_machine_error,
    typed_line,
)
from magus_anharmonic.io.digests import time_stamp
from magus_anharmonic.io.files import set_aside
from magus_anharmonic.paper.tables import Cost, FailureRow
from magus_anharmonic.runs.folder import CampaignFolder
from magus_anharmonic.runs.lock import locked
from magus_anharmonic.runs.record import (
    StepRecord,
    check_results_version,
    read_run_record,
    record_file,
    write_run_record,
)
from magus_anharmonic.runs.status import deserted
from magus_anharmonic.settings import SCRATCH
from magus_anharmonic.settings.campaign import load_campaign
from magus_anharmonic.units import duration, ev_to_mev


@dataclass(frozen=True)
class CampaignStatus:
    """Rows for a table (one per step, the sum last), and sentences on what is missing."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    missing: list[str]


COUNTS = ("n_structures", "n_evaluations", "n_labels")
COLUMNS = ("step", "status", "time", "structures", "force evaluations", "DFT calls", "remark")


def status(path: str | Path) -> CampaignStatus:
    """The state of the campaign of ``path`` (``campaign.yaml`` or its folder). Reads only; raises
    ``InputError``."""
    file = campaign_file(path)
    settings = load_campaign(file)
    root = file.resolve().parent / FOLDER
    records = read_records(root)
    steps = plan(settings, known_cycles(records))
    known = {
        step.id: records.get(step.id, StepRecord("open", step.kind, step.pressure))
        for step in steps
    }
    # a step that says it is running does so as long as its campaign is at work: `magus-anharmonic
    # status` asks the same
    gone = any(record.status == "running" for record in known.values()) and deserted(root)
    rows = [_row(step, known, root, gone) for step in steps]
    return CampaignStatus(COLUMNS, [*rows, _total(known)], missing(steps, known, gone))


def campaign_file(path: str | Path) -> Path:
    """The campaign file itself; raises ``InputError`` when there is none."""
    file = Path(path)
    file = file / "campaign.yaml" if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"{file}: no such file; give campaign.yaml or the folder that holds it")
    return file


def known_cycles(records: Mapping[str, StepRecord]) -> int:
    """Cycles of learning that were begun."""
    return max(
        [1, *(int(match[1]) for name in records if (match := re.search(r"-cycle(\d+)$", name)))]
    )


def _row(step: Step, records: Mapping[str, StepRecord], root: Path, gone: bool) -> tuple[str, ...]:
    record = records[step.id]
    word, remark, wall = record.status, record.reason, record.wall_s
    if record.status == "running" and gone:
        word, remark = "interrupted", "goes on when the campaign is started again"
    elif record.status == "running":
        wall += _since(record)
        from magus_anharmonic.campaign.learning import progress

        remark = progress(step, root)
    elif record.status == "done" and step_key(step, records) not in (record.key, None):
        word, remark = "outdated", "what it depends on has changed: it will run again"
    numbers = (str(getattr(record, name) or "") for name in COUNTS)
    return step.id, word, duration(wall) if wall else "", *numbers, remark


def _since(record: StepRecord) -> float:
    try:
        began = datetime.fromisoformat(record.started)
    except ValueError:
        return 0.0
    return max(0.0, (datetime.now(UTC) - began).total_seconds() - record.wall_s)


def _total(records: Mapping[str, StepRecord]) -> tuple[str, ...]:
    values = list(records.values())
    done = sum(record.status == "done" for record in values)
    sums = (str(sum(getattr(record, name) for record in values)) for name in COUNTS)
    wall = duration(sum(record.wall_s for record in values))
    return "all", f"{done} of {len(values)} done", wall, *sums, ""


WHAT = {
    "learn": "labels and a model that learned",
    "merge": "the data set of the final model",
    "final": "the final model and Table I",
    "produce": "structures of the final model",
    "foundation": "the enthalpy-volume figure",
    "relax": "enthalpies over pressure",
    "sscha": "free energies",
    "dft": "the check of changed space groups by DFT",
    "hessian": "modes over pressure and dispersions",
    "errors": "gradient errors and the correction of G",
    "report": "figures and report",
}
"""What each kind of step makes."""


def missing(steps: list[Step], records: Mapping[str, StepRecord], gone: bool = False) -> list[str]:
    """What a half-finished campaign lacks, step by step; empty when everything is done. ``gone``:
    nobody works on it."""
    found = []
    for step in steps:
        record = records[step.id]
        if record.status != "done":
            word = "interrupted" if gone and record.status == "running" else record.status
            reason = f" ({record.reason})" if record.reason else ""
            found.append(f"{step.id} is {word}: {WHAT[step.kind]} missing{reason}")
    return found


log = logging.getLogger(__name__)


def report(context: Context, step: Step) -> Outcome:
    """The page of everything that is there; whoever writes it has the figures drawn that the page
    shows."""
    from magus_anharmonic.report.page import write_report

    write_report(context.root)
    folder = CampaignFolder(context.root).figures
    n = len(list(folder.glob("*.svg")))
    log.info("%d figures in %s; report: %s", n, folder, context.root / "report.html")
    return Outcome(output=f"{n} figures")


Run = Callable[[Context, Step], Outcome]


def runners() -> Mapping[str, Run]:
    """What is called for each kind of step."""
    from magus_anharmonic.campaign import learning, modes, production, structures

    return {
        "learn": learning.learn,
        "merge": structures.merge,
        "final": learning.final,
        "produce": learning.produce,
        "foundation": production.foundation,
        "relax": production.relax,
        "sscha": production.sscha,
        "dft": production.dft,
        "hessian": modes.hessian,
        "errors": modes.errors,
        "report": report,
    }


SEARCHES = ("learn", "produce")
"""Kinds whose folder is moved away when the step is asked for again; the others know their own
files by content."""


def run_campaign(path: str | Path, *, only: str | None = None) -> dict[str, StepRecord]:
    """Run the campaign of ``path`` (``campaign.yaml``) in its folder, or go on with it; returns the
    records of all steps.

    only
        Run this step alone, again if it is done; the steps it needs must be done.

    A step that fails is recorded with its reason; the others that do not need it still run. Raises
    ``InputError`` for wrong input (also for a labeler of other DFT settings than the labels here),
    before any work where it can be known then, and for a second process in the folder.
    """
    file = Path(path)
    settings = load_campaign(file)
    root = file.resolve().parent / FOLDER
    with locked(root, "campaign"):
        context = Context(settings, root)
        _check(context, root)
        return Campaign(context).run(only)


def _check(context: Context, root: Path) -> None:
    """What can be wrong before the first step: version, phases, foundation, host, labeler."""
    from magus_anharmonic.campaign.structures import phases_of
    from magus_anharmonic.doctor import uses_magus
    from magus_anharmonic.sscha.phonons import check_irreps

    settings = context.settings
    check_results_version(root)
    phases = {phase.name: phase for phase in phases_of(settings.phases)}
    for wanted in settings.hessian.phases if settings.hessian else []:
        check_irreps(phases[wanted.name].atoms, wanted.irreps)
    uses_magus(settings.host, "host: magus")
    settings_hash = None
    if settings.labeler is not None:
        with context.labeler(root) as labeler:
            settings_hash = labeler.settings_hash
    model_id = SCRATCH if context.foundation is None else context.foundation.model_id
    if record_file(root).is_file():
        earlier = read_run_record(root).labeler_settings_hash
        if earlier and settings_hash and earlier != settings_hash and _holds_labels(root):
            raise InputError(
                f"labeler: {root} holds results of other DFT settings ({earlier}, now"
                f" {settings_hash}); results of two settings must not be mixed: give the earlier"
                " settings, or start in another folder"
            )
        settings_hash = settings_hash or earlier
    write_run_record(
        root,
        settings,
        seed=settings.seed,
        model_id=model_id,
        extra={"labeler_settings_hash": settings_hash},
    )


def _holds_labels(root: Path) -> bool:
    return any(root.glob("learn-*/results/anharmonic/labels/**/*.xyz")) or any(
        record.n_labels for record in read_records(root).values()
    )


class Campaign:
    """One sitting: the steps, their records, and the order in which they run."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.runners = runners()
        self.earlier = read_records(context.root)
        self.cycles = 1
        self.steps: list[Step] = []
        self.records: dict[str, StepRecord] = {}
        self._plan()

    def _plan(self) -> None:
        """The steps as far as they are known, with what is known of each."""
        self.steps = plan(self.context.settings, self.cycles)
        known = {**self.earlier, **self.records}
        self.records = {
            step.id: known.get(step.id, StepRecord("open", step.kind, step.pressure))
            for step in self.steps
        }

    def run(self, only: str | None = None) -> dict[str, StepRecord]:
        """All steps that are not done, or ``only`` one."""
        self._more_cycles()
        if only is not None:
            self._run_alone(only)
            return self.records
        position = 0
        while position < len(self.steps):
            step = self.steps[position]
            self._settle(step)
            if step.kind == "final" and self._more_cycles():
                continue
            position += 1
        self._save()
        return self.records

    def _run_alone(self, name: str) -> None:
        step = next((step for step in self.steps if step.id == name), None)
        if step is None:
            raise InputError(
                f"--only: {name}: no such step; there are"
                f" {', '.join(step.id for step in self.steps)}"
            )
        key = step_key(step, self.records)
        if key is None and step.kind != "report":
            missing = [need for need in step.needs if self.records[need].status != "done"]
            raise InputError(
                f"--only: {name}: needs {', '.join(missing)}, which"
                f" {'is' if len(missing) == 1 else 'are'} not done"
            )
        if step.kind in SEARCHES and self.records[name].status == "done":
            self.context.move_away(self.context.folder(step))
        self._execute(step, key or "")

    def _settle(self, step: Step) -> None:
        """Run the step unless it is done or cannot run."""
        record, key = self.records[step.id], step_key(step, self.records)
        if step.kind == "report":
            # whatever is missing is said in the report
            key = key or "incomplete"
            if any(
                self.records[need].status == "open" and not self.records[need].reason
                for need in step.needs
            ):
                return
        if key is None:
            waiting = [need for need in step.needs if self.records[need].status != "done"]
            self._put(step, record.changed(status="open", reason=f"waits for {', '.join(waiting)}"))
            return
        if record.status == "done" and record.key == key and key != "incomplete":
            log.info("%s: done before", step.id)
            return
        self._execute(step, key)

    def _execute(self, step: Step, key: str) -> None:
        before = self.records[step.id]
        if before.status == "done":
            before = before.changed(wall_s=0.0, started="")
        began = time.perf_counter()
        self._put(
            step,
            before.changed(
                status="running",
                started=before.started or time_stamp(),
                finished="",
                reason="",
                key=key,
            ),
        )
        log.info("%s begins (%d of %d)", step.id, self.steps.index(step) + 1, len(self.steps))
        try:
            outcome = self.runners[step.kind](self.context, step)
        except InputError as error:
            self._failed(step, str(error), began)
            raise
        except (
            Exception
        ) as error:  # one step must not take the others with it, but all need the machine
            if is_machine_error(error):
                self._stopped(step, before, began)
                raise
            reason = str(error) if isinstance(error, MagusAnharmonicError) else typed_line(error)
            log.error("%s failed: %s", step.id, reason)
            log.debug("traceback", exc_info=True)
            self._failed(step, reason, began)
            return
        except BaseException:
            self._stopped(step, before, began)
            raise
        failures = [FailureRow(step.id, *failure) for failure in outcome.failures]
        write_part(self.context.folder(step), FailureRow, failures)
        wall = before.wall_s + time.perf_counter() - began
        record = self.records[step.id].changed(
            status="done",
            finished=time_stamp(),
            wall_s=round(wall, 2),
            **{name: getattr(outcome, name) for name in COUNTS},
            output=outcome.output,
            reason=outcome.reason,
        )
        self._put(step, record)
        self._assemble(step)
        log.info("%s done in %.0f s: %s", step.id, time.perf_counter() - began, counts(record))

    def _stopped(self, step: Step, before: StepRecord, began: float) -> None:
        self._put(
            step, self.records[step.id].changed(wall_s=before.wall_s + time.perf_counter() - began)
        )

    def _failed(self, step: Step, reason: str, began: float) -> None:
        record = self.records[step.id]
        wall = round(record.wall_s + time.perf_counter() - began, 2)
        self._put(
            step, record.changed(status="failed", finished=time_stamp(), wall_s=wall, reason=reason)
        )
        if step.kind != "report":
            self._assemble(step)

    def _assemble(self, step: Step) -> None:
        """``tables/`` from the steps that are done; the failed ones are in ``failures.csv``."""
        done = [step for step in self.steps if self.records[step.id].status == "done"]
        folders = list(dict.fromkeys(self.context.folder(step) for step in done))
        state = self.context.root / ".overview"
        records = self.records.items()
        costs = (
            Cost(name, r.n_structures, r.n_evaluations, r.n_labels, r.wall_s)
            for name, r in records
            if r.status == "done"
        )
        write_part(state, Cost, costs)
        failed = (FailureRow(name, "", r.reason) for name, r in records if r.status == "failed")
        write_part(state, FailureRow, failed)
        assemble(CampaignFolder(self.context.root).tables, [*folders, state])

    def _more_cycles(self) -> bool:
        """Plan another cycle of learning when the final model of the last one misses the target;
        whether one was added."""
        from magus_anharmonic.campaign.learning import validation_rmse

        learning, begun = self.context.settings.learning, self.cycles
        if learning is None or learning.target_rmse is None:
            return False
        while self.cycles < learning.max_cycles:
            last = "final" if self.cycles == 1 else f"final-cycle{self.cycles}"
            record = self.records.get(last)
            step = next(step for step in self.steps if step.id == last)
            key = step_key(step, self.records)
            if record is None or record.status != "done" or record.key != key:
                break
            scores = self.context.folder(last) / f"errors-cycle{self.cycles}.json"
            try:
                rmse = validation_rmse(scores)
            except DamagedFile as error:
                set_aside(scores, str(error))
                self._put(step, record.changed(status="open"))
                break
            shown = "no validation labels" if rmse is None else f"{ev_to_mev(rmse):.1f} meV/atom"
            target = f"target_rmse of {ev_to_mev(learning.target_rmse):.1f} meV/atom"
            if rmse is not None and rmse <= learning.target_rmse:
                log.info("%s reached (%s) after cycle %d", target, shown, self.cycles)
                break
            self.cycles += 1
            log.info("%s not reached (%s): cycle %d of learning", target, shown, self.cycles)
            self._plan()
        return self.cycles > begun

    def _put(self, step: Step, record: StepRecord) -> None:
        self.records[step.id] = record
        self._save()

    def _save(self) -> None:
        write_records(self.context.root, self.records)


def counts(record: StepRecord) -> str:
    """What a step did, in words."""
    words = ("structures", "force evaluations", "DFT calls")
    numbers = [(getattr(record, name), word) for name, word in zip(COUNTS, words, strict=True)]
    parts = [f"{number} {word}" for number, word in numbers if number]
    return ", ".join(parts) or record.output or "finished"


def unfinished(records: Mapping[str, StepRecord]) -> list[str]:
    """One line per step that failed or waits."""
    return [
        f"{name}: {record.status}: {record.reason}"
        for name, record in records.items()
        if record.status != "done"
    ]
