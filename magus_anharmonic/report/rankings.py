"""A ranking as the page shows it: one line per structure, energies in meV/atom above the lowest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from magus_anharmonic.ranking.candidate import WITH_ERROR
from magus_anharmonic.report.summary import WORDS, Row, by_composition, quantum_ranks, static_ranks

SHOWN = 200
"""Most lines of one ranking on the page; the file holds all."""


@dataclass(frozen=True)
class Line:
    """One structure; energies in meV/atom above the lowest of the ranking, ``None`` where there is no number."""

    id: str
    formula: str
    natoms: int
    static: str
    quantum: str
    rank: int | None
    rank_static: int | None
    enthalpy: float | None
    gibbs: float | None
    error: float | None
    status: str
    reason: str
    folder: str = ""

    @property
    def changed(self) -> bool:
        """The space group is another one once the ions move."""
        return bool(self.quantum) and self.quantum != self.static


@dataclass(frozen=True)
class RankingView:
    """The first `SHOWN` lines of one ranking at one pressure (GPa) and temperature (K), the lowest first."""

    file: str
    pressure: float
    temperature: float
    rows: Sequence[Row] = field(repr=False)
    lines: Sequence[Line] = field(repr=False)
    composition: str = ""
    """Empty where the file holds one alone."""

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


def ranking_views(file: str, rows: Sequence[Row]) -> list[RankingView]:
    """One view per pressure, temperature and composition of a ranking's file, the first two in rising order."""
    places: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        places.setdefault((row.pressure, row.temperature), []).append(row)
    views = []
    for place, group in sorted(places.items()):
        blocks = by_composition(group)
        views += [RankingView(file, *place, block, _lines(block), block[0].composition if len(blocks) > 1 else "") for block in blocks]
    return views


def _lines(rows: Sequence[Row]) -> list[Line]:
    static, quantum = static_ranks(rows), quantum_ranks(rows)
    reference = min((row.enthalpy for row in rows if row.enthalpy is not None), default=0.0)
    lowest = min((row.gibbs for row in rows if row.ranked), default=None)
    last = len(rows) + 1
    order = sorted(rows, key=lambda row: (quantum.get(row.id, last), row.enthalpy is None, not row.same_as, static.get(row.id, last)))
    return [_line(row, static, quantum, reference, lowest) for row in order[:SHOWN]]


def _line(row: Row, static: dict[str, int], quantum: dict[str, int], reference: float, lowest: float | None) -> Line:
    computed = row.status in WITH_ERROR
    status = f"same phase as {row.same_as[:8]}" if row.same_as else WORDS.get(row.status, row.status)
    return Line(
        id=row.id,
        formula=row.formula,
        natoms=row.natoms,
        static=row.spg_static,
        quantum=row.spg_quantum,
        rank=quantum.get(row.id),
        rank_static=static.get(row.id),
        enthalpy=None if row.enthalpy is None else 1000 * (row.enthalpy - reference),
        gibbs=None if row.gibbs is None or lowest is None or row.status == "failed" else 1000 * (row.gibbs - lowest),
        error=None if row.gibbs_error is None or not computed else 1000 * row.gibbs_error,
        status=status,
        reason=row.reason,
        folder=row.folder,
    )
