"""Everything that the page of a report says, gathered from a folder; whatever is absent or
unreadable is named, never fatal."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ase import Atoms

from magus_anharmonic.errors import InputError, MagusAnharmonicError, reason_of
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import read_json_if_there, read_jsonl
from magus_anharmonic.io.tables import text_rows
from magus_anharmonic.paper import findings
from magus_anharmonic.paper.tables import DISPERSIONS, RANKINGS, ranking_files
from magus_anharmonic.ranking.candidate import read_ranking
from magus_anharmonic.report import figures, text
from magus_anharmonic.report import structures as found_crystals
from magus_anharmonic.report.figures import Picture
from magus_anharmonic.report.raw_tables import RawTable, number, read_raw_table
from magus_anharmonic.report.structures import Crystal
from magus_anharmonic.report.text import RankingView, ranking_views
from magus_anharmonic.runs.status import present_steps

ROWS = 200
"""Most rows of a table on the page; the file holds all."""

EXPECTED = (
    ("model_errors.csv", "errors of the models (Table I)"),
    ("parity.csv", "model against DFT (Fig. 3)"),
    ("enthalpies.csv", "relaxed structures and their enthalpies (Figs. 2 and 5)"),
    (RANKINGS, "rankings by free energy (Fig. 6)"),
    ("space_groups.csv", "space groups as found, after DFT, and with SSCHA"),
    ("modes.csv", "soft modes against pressure (Fig. 4a)"),
    (DISPERSIONS, "anharmonic dispersions (Fig. 4b)"),
    ("gradient_errors.csv", "what averaging leaves of the errors (Figs. 7 and 8)"),
    ("gibbs_correction.csv", "corrections of G by DFT labels"),
    ("learning.csv", "learning curves"),
    ("cost.csv", "cost of the steps"),
    ("structures.extxyz", "the structures themselves"),
)
"""Files of ``campaign/tables`` and what is missing on the page without them."""

TABLES = (
    ("model_errors.csv", "Errors of the models"),
    ("space_groups.csv", "Space groups"),
    ("modes.csv", "Soft modes"),
    ("gradient_errors.csv", "Errors of forces and of free-energy gradients"),
    ("gibbs_correction.csv", "Corrections of the free energies by DFT labels"),
)
"""Tables that the page shows as they are."""

Result = TypeVar("Result")


@dataclass
class Contents:
    """What the page shows. ``folder`` holds the page and its ``structures/``."""

    folder: Path
    kind: str
    title: str
    summary: list[tuple[str, list[str]]] = field(default_factory=list)
    rankings: list[RankingView] = field(default_factory=list)
    crystals: list[Crystal] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[tuple[str, RawTable]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    failures: RawTable = field(default_factory=lambda: RawTable("failures"))
    reasons: list[tuple[str, int]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    hashes: list[tuple[str, str]] = field(default_factory=list)

    def attempt(self, work: Callable[[], Result], otherwise: Result) -> Result:
        """``work()``, or ``otherwise`` and a line in ``problems`` when a file is not what it should
        be or cannot be read now."""
        try:
            return work()
        except InputError as error:
            self.problems.extend(error.problems)
        except (MagusAnharmonicError, OSError) as error:
            self.problems.append(reason_of(error))
        return otherwise


def gather(folder: str | Path) -> Contents:
    """Contents of a campaign (``folder``, ``folder/campaign``), a search (``folder``, ``results``,
    ``results/anharmonic``) or a ranking.

    Raises ``InputError``: no such folder, or nothing of ours in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    for campaign in (root / "campaign", root):
        if (campaign / "steps.json").is_file() or (campaign / "tables").is_dir():
            return campaign_contents(campaign)
    for anharmonic in (root / "results" / "anharmonic", root / "anharmonic", root):
        if (anharmonic / "run.json").is_file() or (anharmonic / "ranking.csv").is_file():
            return search_contents(anharmonic)
    raise InputError(
        f"{root}: neither a campaign (campaign/steps.json, campaign/tables) nor a search"
        " (results/anharmonic/run.json) nor a ranking (ranking.csv); give the folder in which one"
        " of them was run"
    )


def campaign_contents(folder: Path) -> Contents:
    """Contents of ``campaign/``."""
    contents = Contents(folder, "campaign", f"Campaign {folder.resolve().parent.name}")
    tables = folder / "tables"
    contents.record = contents.attempt(lambda: read_json_if_there(folder / "run.json"), {})
    steps = contents.attempt(lambda: read_json_if_there(folder / "steps.json"), {})
    steps = present_steps(
        folder,
        {
            name: step
            for name, step in steps.items()
            if isinstance(step, dict) and not _writes_this(name, step)
        },
    )
    contents.steps = _steps(
        steps, contents.attempt(lambda: read_raw_table(tables / "cost.csv"), RawTable("cost.csv"))
    )
    for path in ranking_files(tables):
        contents.rankings += contents.attempt(
            lambda path=path: ranking_views(path.name, read_ranking(path)), []
        )
    contents.rankings.sort(key=lambda view: (view.pressure, view.temperature))
    raw_tables = {}
    for name, title in TABLES:
        raw_tables[name] = contents.attempt(
            lambda name=name: read_raw_table(tables / name, ROWS), RawTable(name)
        )
        if raw_tables[name]:
            contents.tables.append((title, raw_tables[name]))
    contents.crystals = contents.attempt(
        lambda: found_crystals.campaign_crystals(tables / "structures.extxyz", contents.rankings),
        [],
    )
    _failures(contents, tables / "failures.csv")
    contents.summary = _campaign_summary(contents, tables, steps)
    contents.pictures = _campaign_pictures(contents, folder)
    contents.missing = [*_campaign_missing(tables, steps, contents), *contents.missing]
    contents.models = _models(contents, raw_tables["model_errors.csv"])
    contents.hashes = _hashes(sorted(tables.glob("*")) if tables.is_dir() else [])
    return contents


def _writes_this(name: str, step: dict[str, Any]) -> bool:
    """The step that writes the page, which cannot be done before the page is: with everything else
    done nothing is missing."""
    return name == "report" and step.get("status") == "running"


def _steps(steps: dict[str, dict[str, Any]], cost: RawTable) -> list[dict[str, Any]]:
    """One row per step: its state from steps.json, its numbers from there or from cost.csv."""
    spent = {row.get("step", ""): row for row in cost.rows}
    rows = []
    for name in [*steps, *(name for name in spent if name not in steps)]:
        step, paid = steps.get(name, {}), spent.get(name, {})
        row: dict[str, Any] = {
            "step": name,
            "status": step.get("status", "done"),
            "reason": step.get("reason") or "",
        }
        for key in ("n_structures", "n_evaluations", "n_labels", "wall_s"):
            row[key] = (
                number(str(step.get(key)))
                if number(str(step.get(key))) is not None
                else number(paid.get(key))
            )
        rows.append(row)
    return rows


def _campaign_summary(
    contents: Contents, tables: Path, steps: dict[str, Any]
) -> list[tuple[str, list[str]]]:
    tally = text.EnthalpyTally()
    if (tables / "enthalpies.csv").is_file():
        contents.attempt(
            lambda: [
                tally.add(row)
                for row in text_rows(tables / "enthalpies.csv", shown="enthalpies.csv")
            ].clear(),
            None,
        )
    parts = [
        (
            "",
            [
                *text.step_sentence(steps),
                *tally.sentences(),
                *contents.attempt(lambda: findings.models(tables), []),
            ],
        ),
        *((view.title, text.ranking_sentences(view)) for view in contents.rankings),
        (
            "Checks",
            [
                line
                for check in findings.CHECKS
                for line in contents.attempt(functools.partial(check, tables), [])
            ],
        ),
        ("Cost", text.cost_sentence(contents.steps)),
    ]
    return [(title, lines) for title, lines in parts if lines]


def _campaign_pictures(contents: Contents, folder: Path) -> list[Picture]:
    pictures = _analysed(contents, folder)
    drawn = {picture.name for picture in pictures}
    pictures += [
        picture
        for picture in figures.stored_pictures(folder / "figures")
        if picture.name not in drawn
    ]
    names = " ".join(picture.name for picture in pictures)
    if "learning" not in names:
        raw = contents.attempt(
            lambda: read_raw_table(folder / "tables" / "learning.csv"), RawTable("learning.csv")
        )
        points = [
            {
                "step": row.get("step", ""),
                "generation": number(row.get("generation")) or 0,
                "energy": number(row.get("energy_rmse_eV_per_atom")),
                "force": number(row.get("force_rmse_eV_per_A")),
            }
            for row in raw.rows
            if row.get("set") == "validation"
        ]
        learning = figures.learning_picture(points, "tables/learning.csv")
        pictures += [learning] if learning else []
    return pictures


def _analysed(contents: Contents, folder: Path) -> list[Picture]:
    """Have the analysis draw every figure that the tables allow; what it cannot draw is missing,
    with its reason (once: not for a table that is said to be missing anyway)."""
    if not (folder / "tables").is_dir():
        return []
    from magus_anharmonic.paper import script

    figures_made, figures_missing = script("figures").make_figures(folder)
    named = [name for name, _ in EXPECTED if not any((folder / "tables").glob(name))]
    told = [
        one
        for one in figures_missing
        if not any(one.reason.startswith(f"{name} is not there") for name in named)
    ]
    contents.missing += [f"Figure {one.name}: {one.reason}." for one in told]
    pictures = [
        figures.stored_picture(folder / "figures", one.name, title=one.title, alt=one.alt)
        for one in figures_made
    ]
    return [picture for picture in pictures if picture is not None]


def _campaign_missing(tables: Path, steps: dict[str, Any], contents: Contents) -> list[str]:
    lines = []
    for name, step in steps.items():
        status = step.get("status", "open")
        if status != "done":
            reason = f": {step['reason']}" if step.get("reason") else ""
            lines.append(f"Step {name} is {'not begun' if status == 'open' else status}{reason}.")
    missing = [f"{what} ({name})" for name, what in EXPECTED if not any(tables.glob(name))]
    lines += [f"Not there yet: {what}." for what in missing]
    shown = {crystal.line.id for crystal in contents.crystals}
    lacking = {
        line.id for view in contents.rankings for line in view.lines[: found_crystals.FILES]
    } - shown
    if contents.rankings and lacking and any(tables.glob("structures.extxyz")):
        lines.append(
            f"{len(lacking)} of the lowest structures of the rankings are not in structures.extxyz."
        )
    return lines


def search_contents(folder: Path) -> Contents:
    """Contents of ``results/anharmonic/`` or of a folder of ``rank``."""
    absolute = folder.resolve()
    name = absolute.parent.parent.name if absolute.name == "anharmonic" else absolute.name
    kind = "search" if absolute.name == "anharmonic" else "ranking"
    contents = Contents(folder, kind, f"{kind.capitalize()} {name}")
    contents.record = contents.attempt(lambda: read_json_if_there(folder / "run.json"), {})
    ranking = folder / "ranking.csv"
    if ranking.is_file():
        contents.rankings = contents.attempt(
            lambda: ranking_views(ranking.name, read_ranking(ranking)), []
        )
    else:
        contents.missing.append(
            "No ranking yet: ranking.csv is written at the end of the first generation."
        )

    def starts() -> dict[str, Atoms]:
        return contents.attempt(lambda: found_crystals.stored_starts(folder), {})

    contents.crystals = contents.attempt(
        lambda: found_crystals.search_crystals(folder, contents.rankings, starts), []
    )
    _failures(contents, folder / "failures.jsonl")
    progress = contents.attempt(lambda: read_json_if_there(folder / "search.json"), {})
    contents.summary = [
        *_progress(contents, progress),
        *((view.title, text.ranking_sentences(view)) for view in contents.rankings),
        *text.hull_parts(contents.rankings),
    ]
    contents.pictures = _search_pictures(contents, folder)
    contents.models = _models(contents, RawTable(""))
    contents.hashes = _hashes(
        [
            path
            for path in (ranking, folder / "metrics.jsonl", folder / "quantum.traj")
            if path.is_file()
        ]
    )
    return contents


def _progress(contents: Contents, progress: dict[str, Any]) -> list[tuple[str, list[str]]]:
    finished, planned = progress.get("finished"), _setting(contents.record, "num_gen")
    if not isinstance(finished, int) or not isinstance(planned, int):
        return []
    if finished < planned:
        contents.missing.append(
            f"Generations {finished + 1} to {planned}: the search is not finished (start it again"
            " with -r)."
        )
    return [("", [f"{finished} of {planned} generations are finished."])]


def _setting(record: dict[str, Any], key: str) -> Any:
    settings = record.get("settings")
    return settings.get(key) if isinstance(settings, dict) else None


def _search_pictures(contents: Contents, folder: Path) -> list[Picture]:
    slope_chart = [
        figures.slope_chart_picture(view.rows, view.title, view.file) for view in contents.rankings
    ]
    records = read_jsonl(folder / "metrics.jsonl")[-ROWS:]
    points = []
    for record in records:
        scores = (record.get("new") or {}).get("validation") or {}
        if isinstance(record.get("generation"), int):
            energy, force = scores.get("energy_rmse"), scores.get("force_rmse")
            points.append(
                {
                    "step": "search",
                    "generation": record["generation"],
                    "energy": energy,
                    "force": force,
                }
            )
    pictures = [*slope_chart, figures.learning_picture(points, "metrics.jsonl")]
    best = {
        line.sscha_folder: line
        for view in contents.rankings
        for line in view.lines[:3]
        if line.sscha_folder and line.rank_quantum
    }
    for name, line in best.items():
        convergence = figures.stored_picture(folder / "sscha" / Path(name).name, "convergence")
        if convergence is not None:
            title = f"Convergence of {line.label} ({line.spg_quantum or line.spg_static})"
            alt = convergence.alt.replace(convergence.title, title, 1)
            pictures.append(
                Picture(
                    f"convergence-{line.id}",
                    title,
                    alt,
                    convergence.uri,
                    f"sscha/{name}/convergence.csv",
                )
            )
    return [picture for picture in pictures if picture is not None]


def _failures(contents: Contents, path: Path) -> None:
    """Failures of a file (CSV or JSON lines) and of the rankings, and how often each reason
    occurs."""
    reasons: Counter[str] = Counter()
    rows: list[dict[str, str]] = []
    total = 0
    if path.suffix == ".jsonl":
        records = read_jsonl(path)
        total = len(records)
        lines = [
            {
                "step": str(r.get("stage", "")),
                "id": str(r.get("id", "")),
                "reason": str(r.get("reason", "")),
            }
            for r in records
        ]
        reasons.update(line["reason"] for line in lines)
        rows = lines[:ROWS]
    elif path.is_file():

        def count() -> None:
            nonlocal total
            for line in text_rows(path, shown=path.name):
                total += 1
                reasons[line.get("reason", "")] += 1
                if total <= ROWS:
                    rows.append(line)

        contents.attempt(count, None)
    listed = {row.get("id") for row in rows}
    for view in contents.rankings:
        failed = [row for row in view.rows if row.status == "failed" and row.id not in listed]
        total += len(failed)
        reasons.update(row.reason for row in failed)
        rows += [
            {"step": f"ranking, {view.title}", "id": row.id, "reason": row.reason}
            for row in failed[:ROWS]
        ]
    contents.failures = RawTable(path.name, ("step", "id", "reason"), rows[:ROWS], total)
    contents.reasons = reasons.most_common(10)


def _models(contents: Contents, errors: RawTable) -> list[str]:
    """Ids of all models of which numbers are shown, in the order in which they appear."""
    named = [row.get("model_id", "") for row in errors.rows]
    named += [row.model for view in contents.rankings for row in view.rows]
    started = contents.record.get("model")
    return [name for name in dict.fromkeys([str(started or ""), *named]) if name]


def _hashes(paths: Sequence[Path]) -> list[tuple[str, str]]:
    return [(path.name, digest(path)) for path in paths if path.is_file()]
