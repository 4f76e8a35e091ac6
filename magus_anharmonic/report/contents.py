"""Everything that the page of a report says, gathered from a folder; whatever is absent or
unreadable is named, never fatal."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ase import Atoms

from magus_anharmonic.errors import InputError, MagusAnharmonicError, reason_of
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import read_json_if_there, read_jsonl
from magus_anharmonic.io.tables import number, text_rows
from magus_anharmonic.paper import findings, script
from magus_anharmonic.paper.tables import DISPERSIONS, RANKINGS, learning_points, ranking_files
from magus_anharmonic.ranking.candidate import read_ranking
from magus_anharmonic.report import figures
from magus_anharmonic.report import structures as found_crystals
from magus_anharmonic.report.figures import Picture
from magus_anharmonic.report.structures import Crystal
from magus_anharmonic.report.text import (
    RankingView,
    conditions,
    hull_parts,
    ranking_views,
    sentences,
)
from magus_anharmonic.runs.folder import CampaignFolder, SearchFolder
from magus_anharmonic.runs.status import present_steps
from magus_anharmonic.units import duration, span

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

TABLES = {
    "model_errors.csv": "Errors of the models",
    "space_groups.csv": "Space groups",
    "modes.csv": "Soft modes",
    "gradient_errors.csv": "Errors of forces and of free-energy gradients",
    "gibbs_correction.csv": "Corrections of the free energies by DFT labels",
}
"""Tables of a campaign that the page shows as they are."""

DIAGRAM_TABLES = {
    "boundaries.csv": "Boundaries",
    "stability.csv": "Stable phases",
    "hull.csv": "Convex hull",
    "gibbs.csv": "Free energies",
}
"""Those of a phase diagram."""

COUNTS = ("n_structures", "n_evaluations", "n_labels", "wall_s")
"""What a step costs."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class RawTable:
    """The first rows of a table as text. ``total`` counts all rows of the file, shown or not."""

    name: str
    columns: tuple[str, ...] = ()
    rows: list[dict[str, str]] = field(default_factory=list)
    total: int = 0

    @property
    def hidden(self) -> int:
        """Rows of the file that are not in ``rows``."""
        return self.total - len(self.rows)


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

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, empty where there is none to read."""
        return self.attempt(lambda: read_json_if_there(self.folder / name), {})

    def table(self, path: Path, limit: int | None = ROWS) -> RawTable:
        """The first ``limit`` rows (None: all) of a CSV file; a missing file is an empty table."""
        rows: list[dict[str, str]] = []
        total = 0

        def read() -> None:
            nonlocal total
            for total, line in enumerate(text_rows(path, shown=path.name), start=1):
                if limit is None or total <= limit:
                    rows.append(line)

        if path.is_file():
            self.attempt(read, None)
        return RawTable(path.name, tuple(rows[0]) if rows else (), rows, total)

    def show_tables(self, folder: Path, titles: dict[str, str]) -> None:
        """Those tables of a folder that have rows."""
        found = [(title, self.table(folder / name)) for name, title in titles.items()]
        self.tables = [(title, table) for title, table in found if table.rows]

    def add_rankings(self, paths: Sequence[Path]) -> None:
        """The rankings of these files, by pressure and temperature."""
        for path in paths:
            views = functools.partial(lambda p: ranking_views(p.name, read_ranking(p)), path)
            self.rankings += self.attempt(views, [])
        self.rankings.sort(key=lambda view: (view.pressure, view.temperature))

    def finish(self, parts: Sequence[tuple[str, list[str]]], files: Sequence[Path]) -> Contents:
        """The summary of those ``parts`` that say something, and where everything came from."""
        where = conditions(self.rankings)
        self.title += f": {where}" if where else ""
        self.problems = list(dict.fromkeys(self.problems))
        self.summary = [(title, lines) for title, lines in parts if lines]
        named = [
            row.get("model_id", row.get("model", "")) for _, t in self.tables for row in t.rows
        ]
        named += [row.model for view in self.rankings for row in view.rows]
        self.models = list(filter(None, dict.fromkeys([self.record.get("model"), *named])))
        self.hashes = [(path.name, digest(path)) for path in files if path.is_file()]
        return self

    def cost(self) -> list[str]:
        """What everything took together."""
        evaluations, labels, seconds = (
            sum(step.get(name) or 0.0 for step in self.steps) for name in COUNTS[1:]
        )
        parts = {
            f"{evaluations:,.0f} force evaluations": evaluations,
            f"{labels:,.0f} DFT labels": labels,
            duration(seconds): seconds,
        }
        told = [words for words, value in parts.items() if value]
        return [f"{', '.join(told)} in all."] if told else []


def gather(folder: str | Path) -> Contents:
    """Contents of a campaign (``folder``, ``folder/campaign``), a search (``folder``, ``results``,
    ``results/anharmonic``), a ranking or a phase diagram.

    Raises ``InputError``: no such folder, or nothing of ours in it.
    """
    root, campaign = Path(folder), CampaignFolder.find(folder)
    if campaign is not None:
        return campaign_contents(campaign.root)
    if (root / "summary.json").is_file() and (root / "gibbs.csv").is_file():
        return diagram_contents(root)
    for anharmonic in (root / "results" / "anharmonic", root / "anharmonic", root):
        files = SearchFolder(anharmonic)
        if files.record.is_file() or files.ranking.is_file():
            return search_contents(anharmonic)
    raise InputError(
        f"{root}: neither a campaign (campaign/steps.json, campaign/tables) nor a search"
        " (results/anharmonic/run.json) nor a ranking (ranking.csv) nor a phase diagram"
        " (summary.json); give the folder in which one of them was run"
    )


# --- a campaign -----------------------------------------------------------------------------------


def campaign_contents(folder: Path) -> Contents:
    """Contents of ``campaign/``."""
    contents = Contents(folder, "campaign", f"Campaign {folder.resolve().parent.name}")
    files = CampaignFolder(folder)
    tables = files.tables
    contents.record = contents.json("run.json")
    stored = contents.json("steps.json").items()
    steps = {n: step for n, step in stored if isinstance(step, dict) and not _writes_this(n, step)}
    steps = present_steps(folder, steps)
    contents.steps = _steps(steps, contents.table(tables / "cost.csv", None))
    contents.add_rankings(ranking_files(tables))
    contents.show_tables(tables, TABLES)
    contents.crystals = contents.attempt(
        lambda: found_crystals.campaign_crystals(tables / "structures.extxyz", contents.rankings),
        [],
    )
    _failures(contents, contents.table(tables / "failures.csv", None))
    contents.pictures = _analysed(contents, files)
    contents.missing = [*_campaign_missing(tables, steps, contents), *contents.missing]

    def found(finding: Callable[[Path], list[str]]) -> list[str]:
        return contents.attempt(lambda: finding(tables), [])

    parts = [
        ("", [*_progress(steps), *found(findings.stored), *found(findings.models)]),
        *((view.title, sentences(view.rows)) for view in contents.rankings),
        ("Checks", [line for check in findings.CHECKS for line in found(check)]),
        ("Cost", contents.cost()),
    ]
    return contents.finish(parts, sorted(tables.glob("*")))


def _writes_this(name: str, step: dict[str, Any]) -> bool:
    """The step that writes the page, which cannot be done before the page is: with everything else
    done nothing is missing."""
    return name == "report" and step.get("status") == "running"


def _steps(steps: dict[str, dict[str, Any]], cost: RawTable) -> list[dict[str, Any]]:
    """One row per step: its state from steps.json, its numbers from there or from cost.csv."""
    spent = {row.get("step", ""): row for row in cost.rows}
    rows = []
    for name in dict.fromkeys([*steps, *spent]):
        step, paid = steps.get(name, {}), spent.get(name, {})
        told = {"status": step.get("status", "done"), "reason": step.get("reason") or ""}
        found = ((number(str(step.get(key))), number(paid.get(key))) for key in COUNTS)
        counts = (paid if own is None else own for own, paid in found)
        rows.append({"step": name, **told, **dict(zip(COUNTS, counts, strict=True))})
    return rows


def _progress(steps: dict[str, dict[str, Any]]) -> list[str]:
    """How far a campaign has come."""
    counts = Counter(str(step.get("status", "open")) for step in steps.values())
    rest = [
        f"{counts[status]} {'not begun' if status == 'open' else status}"
        for status in ("failed", "running", "interrupted", "open")
        if counts[status]
    ]
    if not rest:
        return [f"All {len(steps)} steps of the campaign are done."] * bool(steps)
    done = f"{counts['done']} of {len(steps)} steps of the campaign are done"
    return [f"{done} ({', '.join(rest)}): what follows is what there is so far."]


def _analysed(contents: Contents, files: CampaignFolder) -> list[Picture]:
    """Have the analysis draw every figure that the tables allow; what it cannot draw is missing,
    with its reason (once: not for a table that is said to be missing anyway)."""
    made, missing = [], []
    if files.tables.is_dir():
        made, missing = script("figures").make_figures(files.root)
    named = [name for name, _ in EXPECTED if not any(files.tables.glob(name))]
    contents.missing += [
        f"Figure {one.name}: {one.reason}."
        for one in missing
        if not any(one.reason.startswith(f"{name} is not there") for name in named)
    ]
    words = {one.name: {"title": one.title, "alt": one.alt} for one in made}
    return figures.stored_pictures(files.figures, words)


def _campaign_missing(tables: Path, steps: dict[str, Any], contents: Contents) -> list[str]:
    lines = []
    for name, step in steps.items():
        status = step.get("status", "open")
        if status != "done":
            reason = f": {step['reason']}" if step.get("reason") else ""
            lines.append(f"Step {name} is {'not begun' if status == 'open' else status}{reason}.")
    missing = [f"{what} ({name})" for name, what in EXPECTED if not any(tables.glob(name))]
    lines += [f"Not there yet: {what}." for what in missing]
    first = {line.id for view in contents.rankings for line in view.lines[: found_crystals.FILES]}
    lacking = first - {crystal.line.id for crystal in contents.crystals}
    if lacking and any(tables.glob("structures.extxyz")):
        lines.append(
            f"{len(lacking)} of the lowest structures of the rankings are not in structures.extxyz."
        )
    return lines


# --- a search or a ranking ------------------------------------------------------------------------


def search_contents(folder: Path) -> Contents:
    """Contents of ``results/anharmonic/`` or of a folder of ``rank``."""
    absolute = folder.resolve()
    searched = absolute.name == "anharmonic"
    kind, name = ("search", absolute.parents[1].name) if searched else ("ranking", absolute.name)
    title = kind if name == kind else f"{kind} {name}"
    contents = Contents(folder, kind, title[0].upper() + title[1:])
    contents.record = contents.json("run.json")
    files = SearchFolder(folder)
    ranking = files.ranking
    if ranking.is_file():
        contents.add_rankings([ranking])
    else:
        contents.missing.append(
            "No ranking yet: ranking.csv is written at the end of the first generation."
        )

    def starts() -> dict[str, Atoms]:
        return contents.attempt(lambda: found_crystals.stored_starts(folder), {})

    contents.crystals = contents.attempt(
        lambda: found_crystals.search_crystals(folder, contents.rankings, starts), []
    )
    failed = read_jsonl(files.failures)
    _failures(contents, _failed_rows(failed))
    metrics = read_jsonl(files.metrics)
    rounds = [one for one in metrics if isinstance(one.get("generation"), int)]
    contents.steps = _search_cost(contents.rankings, rounds)
    contents.pictures = _search_pictures(contents, rounds[-ROWS:])
    parts = [
        ("", _generations(contents)),
        *((view.title, sentences(view.rows)) for view in contents.rankings),
        *hull_parts(contents.rankings),
        ("Cost", contents.cost() if rounds else []),
    ]
    return contents.finish(parts, [ranking, files.metrics, files.quantum])


def _generations(contents: Contents) -> list[str]:
    settings = contents.record.get("settings")
    finished = contents.json("search.json").get("finished")
    planned = settings.get("num_gen") if isinstance(settings, dict) else None
    if not isinstance(finished, int) or not isinstance(planned, int):
        return []
    if finished < planned:
        contents.missing.append(
            f"Generations {finished + 1} to {planned}: the search is not finished (start it again"
            " with -r)."
        )
    return [f"{finished} of {planned} generations are finished."]


def _search_cost(
    rankings: Sequence[RankingView], rounds: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What each round of learning took, and the SSCHA runs together."""
    latest = {record["generation"]: record for record in rounds}
    rows = [
        {
            **dict.fromkeys(COUNTS),
            "step": f"learning, generation {generation}",
            "n_labels": number(str(record.get("n_labels"))),
            "wall_s": sum(
                number(str(record.get(f"seconds_{part}"))) or 0.0 for part in ("labels", "training")
            ),
        }
        for generation, record in latest.items()
    ]
    runs = [row.free_energy.n_evaluations for view in rankings for row in view.rows]
    if any(runs):
        counts = {"n_structures": sum(map(bool, runs)), "n_evaluations": sum(runs)}
        rows.append({**dict.fromkeys(COUNTS), "step": "SSCHA", **counts})
    return [{"status": "done", "reason": "", **row} for row in rows]


def _search_pictures(contents: Contents, rounds: Sequence[dict[str, Any]]) -> list[Picture]:
    found = [figures.slope_chart_picture(view) for view in contents.rankings]
    points = [point for record in rounds for point in learning_points("search", record)]
    found.append(figures.learning_picture(points, "metrics.jsonl"))
    best = {
        line.sscha_folder: line
        for view in contents.rankings
        for line in view.lines[:3]
        if line.sscha_folder and line.rank_quantum
    }
    for name, line in best.items():
        run = SearchFolder(contents.folder).sscha / Path(name).name
        title = f"Convergence of {line.label} ({line.spg_quantum or line.spg_static})"
        one = figures.stored_picture(run, "convergence", title=title)
        if one is not None:
            data = f"sscha/{run.name}/convergence.csv"
            found.append(replace(one, name=f"convergence-{line.id}", data=data))
    return [picture for picture in found if picture is not None]


# --- a phase diagram ------------------------------------------------------------------------------


def diagram_contents(folder: Path) -> Contents:
    """Contents of a folder of ``phase-diagram``."""
    contents = Contents(folder, "phase diagram", f"Phase diagram {folder.resolve().name}")
    contents.record = contents.json("run.json")
    contents.show_tables(folder, DIAGRAM_TABLES)
    points = contents.table(folder / "gibbs.csv", None).rows
    contents.title += _range_of(points)
    rows: dict[str, dict[str, Any]] = {}
    for point in points:
        name = f"{point.get('phase')} ({point.get('isotopes') or 'natural'})"
        told = {"step": name, "status": "done", "reason": "", "n_structures": 0, "n_evaluations": 0}
        row = rows.setdefault(name, {**dict.fromkeys(COUNTS), **told})
        row["n_structures"] += 1
        row["n_evaluations"] += number(point.get("n_evaluations")) or 0
    contents.steps = list(rows.values())
    _failures(
        contents,
        _failed_rows(
            {
                "stage": f"{one['pressure_GPa']} GPa, {one['temperature_K']} K",
                "id": f"{one['phase']} ({one.get('isotopes') or 'natural'})",
                "reason": one["reason"],
            }
            for one in points
            if one.get("status") == "failed"
        ),
    )
    stored = contents.json("summary.json").get("sentences")
    said = [str(line) for line in stored] if isinstance(stored, list) else []
    names = {"phase-diagram": "Phase diagram", "hull": "Convex hull of the free energies"}
    words = {name: {"title": title, "alt": " ".join(said)} for name, title in names.items()}
    contents.pictures = figures.stored_pictures(folder, words)
    parts = [("", said), ("Cost", contents.cost())]
    return contents.finish(parts, sorted(folder.glob("*.csv")))


def _range_of(points: Sequence[dict[str, str]]) -> str:
    """``": H3S, 50 to 150 GPa, 0 to 300 K"``."""
    parts = [", ".join(dict.fromkeys(filter(None, (one.get("formula") for one in points))))]
    for column, unit in (("pressure_GPa", "GPa"), ("temperature_K", "K")):
        values = (number(one.get(column)) for one in points)
        parts.append(span((value for value in values if value is not None), unit))
    shown = ", ".join(filter(None, parts))
    return f": {shown}" if shown else ""


# --- failures -------------------------------------------------------------------------------------


def _failed_rows(records: Any) -> RawTable:
    """Records of failures.jsonl as a table."""
    keys = {"step": "stage", "id": "id", "reason": "reason"}
    rows = [{name: str(one.get(key, "")) for name, key in keys.items()} for one in records]
    return RawTable("failures.jsonl", tuple(keys), rows, len(rows))


def _failures(contents: Contents, table: RawTable) -> None:
    """Failures of a file and of the rankings, and how often each reason occurs."""
    listed = {row.get("id") for row in table.rows}
    rows = table.rows + [
        {"step": f"ranking, {view.title}", "id": row.id, "reason": row.reason}
        for view in contents.rankings
        for row in view.rows
        if row.status == "failed" and row.id not in listed
    ]
    contents.reasons = Counter(row.get("reason", "") for row in rows).most_common(10)
    contents.failures = RawTable(table.name, ("step", "id", "reason"), rows[:ROWS], len(rows))
