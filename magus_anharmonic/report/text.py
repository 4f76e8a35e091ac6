"""What a ranking says: one line per finding, each from the numbers of one composition alone; and
the ranking as the page shows it, energies in meV/atom above the lowest."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from magus_anharmonic.io.tables import Column, columns_of
from magus_anharmonic.paper.quantities import computed, new_space_group
from magus_anharmonic.ranking.candidate import Candidate, by_composition, numbered
from magus_anharmonic.sscha.record import WITH_ERROR
from magus_anharmonic.structures import UNDECIDED
from magus_anharmonic.units import GPa, ev_to_mev, span

SHOWN = 200
"""Most lines of one ranking on the page; the file holds all."""
SPELLED_OUT = 12
"""Most structures that a finding names one by one."""


@dataclass(frozen=True)
class RankingView:
    """The first `SHOWN` lines of one ranking of one composition at one pressure (GPa) and
    temperature (K), the lowest first."""

    file: str
    pressure: GPa
    temperature: float
    rows: Sequence[Candidate] = field(repr=False)
    composition: str

    @property
    def lines(self) -> Sequence[Candidate]:
        """Those that are shown."""
        return self.rows[:SHOWN]

    @functools.cached_property
    def columns(self) -> list[Column]:
        """Those of the file in which a line has something."""
        return [c for c in columns_of(Candidate) if any(c.text(row) for row in self.lines)]

    @functools.cached_property
    def _lowest(self) -> tuple[float, float | None]:
        """Enthalpy, and G of the phases: None where nothing is ranked."""
        static = (row.enthalpy for row in self.rows if row.enthalpy is not None)
        ranked = (row.gibbs for row in self.rows if row.phase_ranked)
        return min(static, default=0.0), min(ranked, default=None)

    def enthalpy(self, row: Candidate) -> float | None:
        """Above the lowest, meV/atom."""
        return None if row.enthalpy is None else ev_to_mev(row.enthalpy - self._lowest[0])

    def gibbs(self, row: Candidate) -> float | None:
        """Above the lowest phase, meV/atom; None for what failed."""
        lowest = self._lowest[1]
        none = row.gibbs is None or lowest is None or row.status == "failed"
        return None if none else ev_to_mev(row.gibbs - lowest)

    def error(self, row: Candidate) -> float | None:
        """Of a G of its own, meV/atom."""
        known = row.gibbs_error is not None and row.status in WITH_ERROR
        return ev_to_mev(row.gibbs_error) if known else None

    def model_error(self, row: Candidate) -> float | None:
        """Expected of the model, in the difference to the lowest where that is known, meV/atom."""
        errors = row.difference_model_error, row.model_error
        known = next((error for error in errors if error), None)
        return None if known is None else ev_to_mev(known)

    def probability(self, row: Candidate) -> float | None:
        """To be the lowest, with all errors, or by sampling where that of the model is unknown."""
        total = row.p_lowest_total
        return row.p_lowest_sampling if total is None else total

    def status(self, row: Candidate) -> str:
        """In words."""
        if row.same_as:
            return f"same as {label_of(row.same_as, self.rows)}"
        return row.status

    @property
    def where(self) -> str:
        """Pressure and temperature in words."""
        return f"{self.pressure:g} GPa, {self.temperature:g} K"

    @property
    def title(self) -> str:
        """Composition, pressure and temperature in words."""
        return f"{self.composition}, {self.where}"

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
    return [
        RankingView(file, *condition, numbered(block), block[0].composition)
        for condition, group in sorted(_conditions(rows).items())
        for block in by_composition(group)
    ]


def _conditions(rows: Iterable[Candidate]) -> dict[tuple[float, float], list[Candidate]]:
    found: dict[tuple[float, float], list[Candidate]] = {}
    for row in rows:
        found.setdefault((row.pressure, row.temperature), []).append(row)
    return found


def conditions(views: Sequence[RankingView]) -> str:
    """Compounds, pressures and temperatures in words: ``"H3S, 50 to 150 GPa, 0 K"``."""
    if not views:
        return ""
    compounds = list(dict.fromkeys(view.composition for view in views))
    shown = ", ".join(compounds[:4]) + (" ..." if len(compounds) > 4 else "")
    pressures = span((view.pressure for view in views), "GPa")
    return f"{shown}, {pressures}, {span((view.temperature for view in views), 'K')}"


def label_of(identity: str, rows: Sequence[Candidate]) -> str:
    """What the candidate with this id is called."""
    return next((row.label for row in rows if row.id == identity), identity[:8])


def sentences(rows: Sequence[Candidate]) -> list[str]:
    """What SSCHA changed, from the numbers in ``rows`` alone."""
    done = sorted((row for row in rows if row.ranked), key=lambda row: row.gibbs)
    phases = [row for row in done if row.phase_ranked]
    if not phases:
        open_ = any(row.status == "unconverged" for row in rows)
        nothing = "No free energy has converged" if open_ else "No structure has a free energy"
        first = [f"{nothing}; the order is that of the static enthalpy."]
    else:
        first = [_lowest(phases[0], rows), *_static(phases[0], done), *_second(phases)]
    return [
        *first,
        *_changes(computed(rows)),
        *_merged(done),
        *_saddles(rows),
        *_open(rows),
        *_contents(done),
        *_cost(rows),
    ]


def _group(row: Candidate) -> str:
    return row.spg_quantum or row.spg_static


def _lowest(best: Candidate, rows: Sequence[Candidate]) -> str:
    below = f", found below the saddle point {label_of(best.parent, rows)}" if best.parent else ""
    return f"Lowest free energy: {best.label} ({_group(best)}){_probability(best)}{below}."


def _probability(row: Candidate) -> str:
    """``", probability 97 % by sampling, 88 % with all errors"``, as far as it is known."""
    known = (row.p_lowest_sampling, "by sampling"), (row.p_lowest_total, "with all errors")
    told = [f"{value:.0%} {word}".replace("%", " %") for value, word in known if value is not None]
    return f", probability {', '.join(told)}" if told else ""


def _static(best: Candidate, done: Sequence[Candidate]) -> list[str]:
    static = [row for row in done if row.enthalpy is not None]
    if not static:
        return []
    lowest = min(static, key=lambda row: row.enthalpy)
    told = f"{lowest.label} ({lowest.spg_static}), "
    if lowest is best:
        told = f"the same structure, {best.spg_static}"
    elif lowest.same_as == best.id:
        told += "which becomes the phase of the lowest G"
    else:
        told += f"in free energy {_difference(lowest, best)} higher"
    return [f"Lowest static enthalpy: {told}."]


def _difference(row: Candidate, best: Candidate) -> str:
    """``"10.0 ± 3.4 meV/atom (sampling 1.4, finite size 0.3, model 3.1)"``."""
    total, parts = _error(row, best)
    shown = f"{ev_to_mev(row.gibbs - best.gibbs):.1f} ± {ev_to_mev(total):.1f} meV/atom"
    return f"{shown} ({parts})"


def _error(row: Candidate, best: Candidate) -> tuple[float, str]:
    """Total error of the difference of G to the lowest phase, eV/atom, and its parts in words."""
    if row.difference_sampling_error is None:  # another stands for it, or a table of earlier
        return math.hypot(row.gibbs_error or 0.0, best.gibbs_error or 0.0), "sampling alone"
    parts = {
        "sampling": row.difference_sampling_error,
        "finite size": row.difference_finite_size_error,
        "model": row.difference_model_error,
    }
    told = (
        f"{name} {'unknown' if part is None else f'{ev_to_mev(part):.1f}'}"
        for name, part in parts.items()
    )
    return math.hypot(*(part or 0.0 for part in parts.values())), ", ".join(told)


def _second(phases: Sequence[Candidate]) -> list[str]:
    if len(phases) < 2:
        return []
    best, second = phases[:2]
    unsure = second.gibbs - best.gibbs < 2 * _error(second, best)[0]
    return [
        f"Next phase: {second.label} ({_group(second)}), {_difference(second, best)} higher"
        f"{': the two are not told apart' if unsure else ''}."
    ]


def _changes(done: Sequence[Candidate]) -> list[str]:
    """Space groups that SSCHA changed, and the shift of the energies."""
    changed = [row for row in done if new_space_group(row)]
    if not done:
        return []
    if not changed:
        surely = " for certain" if any(UNDECIDED in row.spg_quantum for row in done) else ""
        lines = [f"No structure changed its space group{surely} with SSCHA."]
    elif len(done) > SPELLED_OUT:
        group, count = Counter(map(new_space_group, changed)).most_common(1)[0]
        lines = [
            f"{len(changed)} of {len(done)} structures changed their space group with SSCHA,"
            f" {count} of them to {group}."
        ]
    else:
        lines = [f"{r.label}: {r.spg_static} static, {r.spg_quantum} with SSCHA." for r in changed]
    shifts = sorted(ev_to_mev(row.gibbs - row.enthalpy) for row in done if row.enthalpy is not None)
    if shifts:
        ends = f"{shifts[0]:.0f} to {shifts[-1]:.0f}" if len(shifts) > 1 else f"{shifts[0]:.0f}"
        lines.append(f"G - H: {ends} meV/atom (median {shifts[len(shifts) // 2]:.0f}).")
    return lines


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - SPELLED_OUT} more" if len(names) > SPELLED_OUT else ""
    return ", ".join(names[:SPELLED_OUT]) + more


def _merged(done: Sequence[Candidate]) -> list[str]:
    """Which structures ended in one phase."""
    lines = []
    for row in done:
        members = [row, *(other for other in done if other.same_as == row.id)]
        if len(members) > 1:
            names = _named([f"{one.label} ({one.spg_static})" for one in members])
            lines.append(f"One phase with SSCHA, {row.spg_quantum}: {names}.")
    return lines


def _saddles(rows: Sequence[Candidate]) -> list[str]:
    """What the Hessian took out of the ranking, and what was found below."""
    lines = []
    for row in (row for row in rows if row.status == "saddle"):
        below = next((other for other in rows if other.parent == row.id), None)
        lowest, error = row.free_energy.hessian_deciding, row.free_energy.hessian_error or 0.0
        mode = "" if lowest is None else f", mode at {lowest:.0f} ± {error:.0f} cm⁻¹"
        found = "nothing was found" if below is None else f"{below.label} ({below.spg_quantum})"
        if below is not None and below.status == "unconverged":
            found = f"{below.label}, not converged"
        lines.append(
            f"Saddle point, not ranked: {row.label} ({row.spg_quantum}){mode}; below it: {found}."
        )
    return lines


def _open(rows: Sequence[Candidate]) -> list[str]:
    """Who is missing from the ranking for lack of populations."""
    names = [row.label for row in rows if row.status == "unconverged"]
    return [
        f"Not converged within the budget: {_named(names)}. Their G are upper bounds (raise"
        " max_populations, n_configs or the budget)."
    ] * bool(names)


def _contents(done: Sequence[Candidate]) -> list[str]:
    """Whether G holds what polar and metallic compounds need in it, where that was asked for."""
    own = [row for row in done if not row.same_as]
    electrons = any(row.free_energy.electronic is not None for row in own)
    lines = ["The free energy of the electrons is in G of all phases."] * electrons
    without = [row.label for row in own if row.free_energy.nonanalytic is None]
    if len(without) == len(own):
        return lines
    named = f", not in that of {_named(without)}: do not compare" if without else ""
    count = len(own) - len(without)
    several = "s" * (count > 1)
    return [*lines, f"Long-range dipoles (LO-TO) are in G of {count} phase{several}{named}."]


def _cost(rows: Sequence[Candidate]) -> list[str]:
    runs = [row.free_energy.n_evaluations for row in rows if row.free_energy.n_evaluations]
    if not runs:
        return []
    several = "s" * (len(runs) > 1)
    return [
        f"Cost: {sum(runs):,} evaluations of energy and forces in {len(runs)} SSCHA run{several}."
    ]


def hull_sentences(rows: Sequence[Candidate]) -> list[str]:
    """Who is on the hull of free energies, and how far above it the lowest of the other
    compositions are; empty for one composition."""
    blocks = by_composition(rows)
    phases = [[row for row in block if row.phase_ranked] for block in blocks]
    lowest = [min(block, key=lambda row: row.gibbs, default=None) for block in phases]
    known = [row for row in lowest if row is not None and row.gibbs_above_hull is not None]
    if len(blocks) < 2 or not known:
        return []
    on, above = [], []
    for row in known:
        p = "" if row.p_on_hull_sampling is None else f" ({100 * row.p_on_hull_sampling:.0f} %)"
        if row.gibbs_above_hull:
            height, error = row.gibbs_above_hull, row.gibbs_above_hull_error or 0.0
            above.append(f"{row.composition} {ev_to_mev(height):.1f} ± {ev_to_mev(error):.1f}")
        else:
            on.append(f"{row.composition} {row.label}{p}")
    without = [
        block[0].composition for block, row in zip(blocks, lowest, strict=True) if row is None
    ]
    lines = {
        "On the hull of the free energies of these structures (probability by sampling)": on,
        "Above it (meV/atom), the lowest of each composition": above,
        "Without a computed free energy, and no part of the hull": without,
    }
    return [f"{head}: {', '.join(names)}." for head, names in lines.items() if names]


def hull_parts(views: Sequence[RankingView]) -> list[tuple[str, list[str]]]:
    """Titled sentences on the hull of each pressure and temperature at which there are several
    compositions."""
    rows: dict[tuple[str, str], list[Candidate]] = {}
    for view in views:
        rows.setdefault((view.file, view.where), []).extend(view.rows)
    parts = [(f"Hull at {where}", hull_sentences(found)) for (_, where), found in rows.items()]
    return [(title, lines) for title, lines in parts if lines]
