"""Findings in words.

A ranking as the page shows it: one line per structure, energies in meV/atom above the lowest.

What a campaign found, in plain sentences, each from the numbers of one table alone.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from magus_anharmonic.io.tables import Column, columns_of
from magus_anharmonic.paper.quantities import new_space_group
from magus_anharmonic.ranking.candidate import Candidate, by_composition, numbered
from magus_anharmonic.report.raw_tables import number
from magus_anharmonic.report.summary import hull_sentences, sentences
from magus_anharmonic.sscha.record import WITH_ERROR
from magus_anharmonic.units import GPa, duration, ev_to_mev

SHOWN = 200
"""Most lines of one ranking on the page; the file holds all."""


@dataclass(frozen=True)
class RankingView:
    """The first `SHOWN` lines of one ranking at one pressure (GPa) and temperature (K), the lowest
    first."""

    file: str
    pressure: GPa
    temperature: float
    rows: Sequence[Candidate] = field(repr=False)
    composition: str = ""
    """Empty where the file holds one alone."""

    @property
    def lines(self) -> Sequence[Candidate]:
        """Those that are shown."""
        return self.rows[:SHOWN]

    @property
    def columns(self) -> list[Column]:
        """Those of the file in which a line has something."""
        return [c for c in columns_of(Candidate) if any(c.text(row) for row in self.lines)]

    @functools.cached_property
    def _lowest(self) -> tuple[float, float | None]:
        static = [row.enthalpy for row in self.rows if row.enthalpy is not None]
        return min(static, default=0.0), min(
            (row.gibbs for row in self.rows if row.phase_ranked and row.gibbs is not None),
            default=None,
        )

    def enthalpy(self, row: Candidate) -> float | None:
        """Above the lowest, meV/atom."""
        return None if row.enthalpy is None else ev_to_mev(row.enthalpy - self._lowest[0])

    def gibbs(self, row: Candidate) -> float | None:
        """Above the lowest phase, meV/atom; None for what failed."""
        lowest = self._lowest[1]
        if row.gibbs is None or lowest is None or row.status == "failed":
            return None
        return ev_to_mev(row.gibbs - lowest)

    def error(self, row: Candidate) -> float | None:
        """Of a G of its own, meV/atom."""
        known = row.gibbs_error is not None and row.status in WITH_ERROR
        return ev_to_mev(row.gibbs_error) if known else None

    def status(self, row: Candidate) -> str:
        """In words."""
        if row.same_as:
            return f"same phase as {row.same_as[:8]}"
        return row.status

    @property
    def title(self) -> str:
        """Pressure and temperature in words, after the composition where there are several."""
        where = f"{self.pressure:g} GPa, {self.temperature:g} K"
        return f"{self.composition}, {where}" if self.composition else where

    @property
    def total(self) -> int:
        """Structures in the file at this pressure and temperature."""
        return len(self.rows)

    @property
    def hidden(self) -> int:
        """Structures that are in the file alone."""
        return self.total - len(self.lines)


def ranking_views(file: str, rows: Sequence[Candidate]) -> list[RankingView]:
    """One view per pressure, temperature and composition of a ranking's file, the first two in
    rising order."""
    conditions: dict[tuple[float, float], list[Candidate]] = {}
    for row in rows:
        conditions.setdefault((row.pressure, row.temperature), []).append(row)
    views = []
    for condition, group in sorted(conditions.items()):
        blocks = by_composition(numbered(group))
        several = len(blocks) > 1
        views += [
            RankingView(file, *condition, block, block[0].composition if several else "")
            for block in blocks
        ]
    return views


SPELLED_OUT = 12
"""Rankings with more computed structures than this are summed up instead of told one by one."""


def ranking_sentences(view: RankingView) -> list[str]:
    """One ranking in words: every structure where they are few, numbers where they are many."""
    done = [row for row in view.rows if row.free_energy.computed]
    if len(done) <= SPELLED_OUT:
        return sentences(view.rows)
    changed = [row for row in done if new_space_group(row)]
    lines = [f"{len(changed)} of {len(done)} structures changed their space group with SSCHA."]
    if changed:
        group, count = Counter(new_space_group(row) for row in changed).most_common(1)[0]
        lines.append(f"{count} of them became {group}, the most frequent.")
    shifts = sorted(
        ev_to_mev(row.gibbs - row.enthalpy)
        for row in done
        if row.enthalpy is not None and row.gibbs is not None
    )
    if shifts:
        middle = shifts[len(shifts) // 2]
        lines.append(
            f"The motion of the ions adds {shifts[0]:.0f} to {shifts[-1]:.0f} meV/atom (median"
            f" {middle:.0f}) to the static enthalpy."
        )
    ranked = sorted((row for row in done if row.phase_ranked), key=lambda row: row.gibbs or 0.0)
    if ranked:
        best = ranked[0]
        at_rest = min(
            (row for row in done if row.enthalpy is not None),
            key=lambda row: row.enthalpy or 0.0,
            default=best,
        )
        same = ", which becomes the same phase" if at_rest.same_as == best.id else ""
        tail = (
            "as with static ions"
            if at_rest is best
            else f"while {at_rest.label} ({at_rest.spg_static}) is with static ions{same}"
        )
        lines.append(
            f"{best.label} ({best.spg_quantum or best.spg_static}) is lowest in free energy,"
            f" {tail}."
        )
    unconverged = sum(row.status == "unconverged" for row in view.rows)
    if unconverged:
        lines.append(
            f"{unconverged} more did not converge within the budget and are not ranked: their free"
            " energies are upper bounds."
        )
    return lines


def step_sentence(steps: dict[str, dict[str, object]]) -> list[str]:
    """How far a campaign has come."""
    if not steps:
        return []
    counts = Counter(str(step.get("status", "open")) for step in steps.values())
    words = {
        "failed": "failed",
        "running": "running",
        "interrupted": "interrupted",
        "open": "not begun",
    }
    rest = [f"{counts[status]} {word}" for status, word in words.items() if counts[status]]
    if not rest:
        return [f"All {len(steps)} steps of the campaign are done."]
    return [
        f"{counts['done']} of {len(steps)} steps of the campaign are done ({', '.join(rest)}): what"
        " follows is what there is so far."
    ]


def hull_parts(views: Sequence[RankingView]) -> list[tuple[str, list[str]]]:
    """Titled sentences on the hull of each pressure and temperature at which there are several
    compositions."""
    conditions: dict[tuple[str, float, float], list[Candidate]] = defaultdict(list)
    for view in views:
        conditions[view.file, view.pressure, view.temperature].extend(view.rows)
    parts = [
        (f"Hull at {pressure:g} GPa, {heat:g} K", hull_sentences(rows))
        for (_, pressure, heat), rows in conditions.items()
    ]
    return [(title, lines) for title, lines in parts if lines]


class EnthalpyTally:
    """Counts and lowest enthalpies of ``enthalpies.csv``, taken up row by row."""

    def __init__(self) -> None:
        self.count = 0
        self.lowest: dict[float, tuple[float, str]] = {}
        self.groups: dict[float, set[str]] = defaultdict(set)

    def add(self, row: dict[str, str]) -> None:
        """Take up one row; one without pressure or enthalpy is only counted. The foundation model's
        are another energy scale."""
        self.count += 1
        pressure, enthalpy = (
            number(row.get("pressure_GPa")),
            number(row.get("enthalpy_eV_per_atom")),
        )
        if pressure is None or enthalpy is None or row.get("source") == "foundation":
            return
        self.groups[pressure].add(row.get("space_group", ""))
        name = row.get("phase") or row.get("space_group") or row.get("id", "")
        if pressure not in self.lowest or enthalpy < self.lowest[pressure][0]:
            self.lowest[pressure] = (enthalpy, name)

    def sentences(self) -> list[str]:
        """How many structures at which pressures, and what is lowest in static enthalpy."""
        if not self.lowest:
            return []
        pressures = sorted(self.lowest)
        span = f"{len(pressures)} pressures from {pressures[0]:g} to {pressures[-1]:g}"
        where = f"at {f'{pressures[0]:g}' if len(pressures) == 1 else span} GPa"
        lines = [f"{self.count:,} relaxed structures {where} are stored."]
        runs: list[tuple[str, float, float]] = []
        for pressure in pressures:
            name = self.lowest[pressure][1]
            if runs and runs[-1][0] == name:
                runs[-1] = (name, runs[-1][1], pressure)
            else:
                runs.append((name, pressure, pressure))
        told = [
            f"{name} at {low:g} GPa" if low == high else f"{name} from {low:g} to {high:g} GPa"
            for name, low, high in runs
        ]
        return [*lines, f"Lowest in static enthalpy: {', '.join(told)}."]


def cost_sentence(rows: Sequence[dict[str, str]]) -> list[str]:
    """What everything took together."""
    if not rows:
        return []
    evaluations, labels, seconds = (
        _total(rows, name) for name in ("n_evaluations", "n_labels", "wall_s")
    )
    return [
        f"All of it took {evaluations:,.0f} force evaluations, {labels:,.0f} DFT labels and"
        f" {duration(seconds)}."
    ]


def _total(rows: Iterable[dict[str, str]], column: str) -> float:
    return sum(number(row.get(column)) or 0.0 for row in rows)
