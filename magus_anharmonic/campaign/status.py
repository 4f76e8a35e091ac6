"""``campaign status``: steps, counts, times and cost, also while another process runs; what is missing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from magus_anharmonic.campaign.context import FOLDER
from magus_anharmonic.campaign.found import populations
from magus_anharmonic.campaign.plan import Step, plan, step_key
from magus_anharmonic.campaign.record import StepRecord, read_records
from magus_anharmonic.errors import InputError
from magus_anharmonic.settings.campaign import CampaignSettings, load_campaign
from magus_anharmonic.status import deserted
from magus_anharmonic.units import duration


@dataclass(frozen=True)
class CampaignStatus:
    """Rows for a table (one per step, the sum last), and sentences on what is missing."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    missing: list[str]


COLUMNS = ("step", "status", "time", "structures", "force evaluations", "DFT calls", "remark")


def status(path: str | Path) -> CampaignStatus:
    """The state of the campaign of ``path`` (``campaign.yaml`` or its folder). Reads only; raises ``InputError``."""
    file = campaign_file(path)
    settings = load_campaign(file)
    root = file.resolve().parent / FOLDER
    records = read_records(root)
    steps = plan(settings, known_cycles(records))
    known = {step.id: records.get(step.id, StepRecord("open", step.kind, step.pressure)) for step in steps}
    # a step that says it is running does so as long as its campaign is at work: `magus-anharmonic status` asks the same
    gone = any(record.status == "running" for record in known.values()) and deserted(root)
    rows = [_row(step, known, root, settings, gone) for step in steps]
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
    return max([1, *(int(match[1]) for name in records if (match := re.search(r"-cycle(\d+)$", name)))])


def _row(step: Step, records: Mapping[str, StepRecord], root: Path, settings: CampaignSettings, gone: bool) -> tuple[str, ...]:
    record = records[step.id]
    word, remark, wall = record.status, record.reason, record.wall_s
    if record.status == "running" and gone:
        word, remark = "interrupted", "goes on when the campaign is started again"
    elif record.status == "running":
        wall += _since(record)
        remark = progress(step, root, settings)
    elif record.status == "done" and step_key(step, records) not in (record.key, None):
        word, remark = "outdated", "what it depends on has changed: it will run again"
    numbers = (str(value) if value else "" for value in (record.n_structures, record.n_evaluations, record.n_labels))
    return step.id, word, duration(wall) if wall else "", *numbers, remark


def _since(record: StepRecord) -> float:
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(record.started)).total_seconds() - record.wall_s)
    except ValueError:
        return 0.0


def progress(step: Step, root: Path, settings: CampaignSettings) -> str:
    """How far a running search is, from its files; an empty string for other steps."""
    if step.kind not in ("learn", "produce"):
        return ""
    folder = root / step.id
    generations = step.settings["input"].get("numGen", step.settings["input"].get("num_gen"))
    done = max([0, *(number for number, _ in populations(folder))])
    labels = folder / "results" / "anharmonic" / "labels"
    waiting = len(list(labels.glob("pending/*/*.xyz")))
    shown = f", {waiting} labels of this one" if waiting else ""
    return f"generation {done} of {generations} reached{shown}"


def _total(records: Mapping[str, StepRecord]) -> tuple[str, ...]:
    values = list(records.values())
    done = sum(record.status == "done" for record in values)
    sums = (str(sum(getattr(record, name) for record in values)) for name in ("n_structures", "n_evaluations", "n_labels"))
    return "all", f"{done} of {len(values)} done", duration(sum(record.wall_s for record in values)), *sums, ""


def missing(steps: list[Step], records: Mapping[str, StepRecord], gone: bool = False) -> list[str]:
    """What a half-finished campaign lacks, step by step; empty when everything is done. ``gone``: nobody works on it."""
    what = {
        "learn": "labels and a model that learned", "merge": "the data set of the final model", "final": "the final model and Table I",
        "produce": "structures of the final model", "foundation": "the enthalpy-volume figure", "relax": "enthalpies over pressure",
        "sscha": "free energies", "dft": "the check of changed space groups by DFT", "hessian": "modes over pressure and dispersions",
        "errors": "gradient errors and the correction of G", "report": "figures and report",
    }  # fmt: skip
    return [
        f"{step.id} is {'interrupted' if gone and records[step.id].status == 'running' else records[step.id].status}: "
        f"{what[step.kind]} missing" + (f" ({records[step.id].reason})" if records[step.id].reason else "")
        for step in steps
        if records[step.id].status != "done"
    ]
