"""Values that `validate` compares, each found in the tables of a campaign: one function per name,
numbers in the tables' units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from magus_anharmonic.paper.enthalpies import distinct, lowest_of_phases, transformed_into
from magus_anharmonic.paper.expected import PRESSURE_TOLERANCE, ExpectedValue
from magus_anharmonic.paper.reordering import (
    computed,
    critical_pressures,
    lowest,
    new_space_group,
    reordering,
    series,
)
from magus_anharmonic.paper.tables import (
    Enthalpy,
    GradientError,
    Mode,
    ModelError,
    SpaceGroups,
    TableFolder,
    ranking_files,
)
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.structures import symbol_of


@dataclass(frozen=True)
class Found:
    """value, error : in the unit of the table (error None: not known). bound : "<" or ">" when
    ``value`` is only a limit.

    words : instead of a number. n : how many structures or labels stand behind it. slope : of a
    difference of enthalpies, eV/atom per GPa. models : ids of the models behind it. between : where
    all that is known are two numbers that it lies between.
    """

    value: float = math.nan
    error: float | None = None
    bound: str = ""
    words: tuple[str, ...] = ()
    n: int | None = None
    slope: float | None = None
    models: tuple[str, ...] = ()
    between: tuple[float, float] | None = None
    extra: dict[str, float] = field(default_factory=dict)


def near(pressure: float, wanted: ExpectedValue) -> bool:
    """Whether a pressure (GPa) is the one that is asked for."""
    return abs(pressure - (wanted.pressure_GPa or 0.0)) < PRESSURE_TOLERANCE


def _rmse(column: str) -> Callable[[ExpectedValue, TableFolder], Found | None]:
    def find(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
        for row in tables.rows(ModelError):
            value = getattr(row, column)
            if (row.model, row.set) == (wanted.model, wanted.set) and value is not None:
                error = value / math.sqrt(2.0 * row.n) if row.n > 0 else None
                return Found(value, error, n=row.n, models=(row.model_id,))
        return None

    return find


def sources_of(wanted: ExpectedValue) -> tuple[str, ...]:
    """Of the rows of ``enthalpies.csv`` that count: the one wanted, else relax and produce
    together."""
    return (wanted.table_source,) if wanted.table_source else ("relax", "produce")


def _enthalpies(wanted: ExpectedValue, tables: TableFolder) -> list[Enthalpy]:
    sources = sources_of(wanted)
    return [row for row in tables.rows(Enthalpy) if row.source in sources]


def _models(rows: Sequence[Enthalpy] | Sequence[Mode]) -> tuple[str, ...]:
    return tuple(sorted({row.model_id for row in rows} - {""}))


def stability_sequence(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """Named phases of lowest enthalpy with rising pressure, at pressures where two of them or more
    have one."""
    every = lowest_of_phases(_enthalpies(wanted, tables))
    gone = transformed_into(every)
    pressures = sorted({p for row in every.values() for p in row})
    sequence: list[str] = []
    for pressure in pressures:
        there = {
            name: row[pressure].enthalpy_eV_per_atom
            for name, row in every.items()
            if pressure in row
        }
        if len(there) > 1:
            lowest = min(
                (name for name in there if (name, pressure) not in gone),
                key=lambda name: there[name],
            )
            if not sequence or sequence[-1] != lowest:
                sequence.append(lowest)
    if not sequence:
        return None
    return Found(words=tuple(sequence), models=_models(_enthalpies(wanted, tables)))


def transition_pressure(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """Highest pressure (GPa) where the second phase falls below the first in enthalpy, or where the
    first relaxes into it."""
    below, above = wanted.phases or ("", "")
    every = lowest_of_phases(_enthalpies(wanted, tables))
    gone, models = transformed_into(every), _models(_enthalpies(wanted, tables))
    common = sorted(set(every.get(below, {})) & set(every.get(above, {})))
    apart = [p for p in common if gone.get((below, p)) != above and gone.get((above, p)) != below]
    difference = np.array(
        [every[above][p].enthalpy_eV_per_atom - every[below][p].enthalpy_eV_per_atom for p in apart]
    )
    found = zero_crossing(np.array(apart), -difference) if len(apart) > 1 else None
    merged = [p for p in common if gone.get((below, p)) == above and apart and p > apart[-1]]
    if merged and difference[-1] > 0:
        low, high = apart[-1], merged[0]
        return Found(0.5 * (low + high), 0.5 * (high - low), models=models, between=(low, high))
    return None if found is None else replace(found, models=models)


def zero_crossing(x: np.ndarray, y: np.ndarray) -> Found:
    """Where ``y`` rises through zero for the last time, linearly between its neighbours; a bound
    when it never does.

    Error: what a parabola through a third point would change (a tenth of the spacing without one).
    """
    indices = np.flatnonzero((y[:-1] < 0) & (y[1:] >= 0))
    if not len(indices):
        return Found(float(x[0]), None, "<") if y[-1] >= 0 else Found(float(x[-1]), None, ">")
    i = int(indices[-1])
    slope = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
    crossing = float(x[i] - y[i] / slope)
    others = [k for k in (i - 1, i + 2) if 0 <= k < len(x)]
    curved = [_bend(x, y, i, k, crossing) / abs(slope) for k in others] or [0.1 * (x[i + 1] - x[i])]
    return Found(crossing, float(max(curved)), slope=float(abs(slope)))


def _bend(x: np.ndarray, y: np.ndarray, i: int, k: int, at: float) -> float:
    """How far the parabola through points i, i + 1, k is off the straight line at ``at``."""
    line = y[i] + (y[i + 1] - y[i]) / (x[i + 1] - x[i]) * (x[k] - x[i])
    return abs((y[k] - line) * (at - x[i]) * (at - x[i + 1]) / ((x[k] - x[i]) * (x[k] - x[i + 1])))


def _at_pressure(wanted: ExpectedValue, tables: TableFolder) -> tuple[list[Enthalpy], int] | None:
    """The distinct structures at the pressure by enthalpy, and the place of the phase among them,
    from 0."""
    order = distinct([row for row in _enthalpies(wanted, tables) if near(row.pressure_GPa, wanted)])
    indices = [
        index
        for index, row in enumerate(order)
        if wanted.phase in (row.phase, symbol_of(row.space_group))
    ]
    return (order, indices[0]) if indices else None


def enthalpy_above_lowest(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """eV/atom."""
    found = _at_pressure(wanted, tables)
    if found is None:
        return None
    order, index = found
    return Found(
        order[index].enthalpy_eV_per_atom - order[0].enthalpy_eV_per_atom,
        n=len(order),
        models=_models(order),
    )


def enthalpy_rank(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """1 is lowest; structures found several times count once."""
    found = _at_pressure(wanted, tables)
    return (
        None if found is None else Found(1.0 + found[1], n=len(found[0]), models=_models(found[0]))
    )


def critical_pressure(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """Pressure (GPa) where the squared frequency of a mode rises through zero: that of figure 4a; a
    bound where it does not."""
    mine = series(tables.rows(Mode)).get(
        (wanted.phase or "", wanted.irrep or "", wanted.method or "", wanted.energies_by or ""), []
    )
    if len(mine) < 2:
        return None
    (found,) = critical_pressures(mine)
    known = {"n": len(mine), "models": _models(mine)}
    if found.critical_pressure_GPa is not None:
        return Found(found.critical_pressure_GPa, found.error_GPa, **known)
    below = mine[-1].frequency_squared_cm2 >= 0
    return Found(mine[0 if below else -1].pressure_GPa, None, "<" if below else ">", **known)


def critical_pressure_difference(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """|model - DFT|, GPa; None unless both cross."""
    both = [
        critical_pressure(wanted.model_copy(update={"energies_by": by}), tables)
        for by in ("model", "dft")
    ]
    if any(one is None or one.bound for one in both):
        return None
    model, dft = both
    assert model is not None and dft is not None
    return Found(
        abs(model.value - dft.value),
        math.hypot(model.error or 0.0, dft.error or 0.0),
        models=model.models,
    )


def _ranking(wanted: ExpectedValue, tables: TableFolder) -> list[Candidate] | None:
    """Rows with a computed G of the ranking at the pressure; None without such a ranking."""
    for path in ranking_files(tables.folder):
        rows = tables.rows(Candidate, path.name)
        if any(near(row.pressure, wanted) for row in rows):
            return [row for row in rows if row.free_energy.computed]
    return None


def _ranked_by(rows: Sequence[Candidate]) -> tuple[str, ...]:
    return tuple(sorted({row.model for row in rows} - {""}))


def n_with_free_energy(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """How many structures SSCHA relaxed."""
    rows = _ranking(wanted, tables)
    return (
        None if rows is None else Found(float(len(rows)), 0.0, n=len(rows), models=_ranked_by(rows))
    )


def n_transformed(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """Structures of another space group that ended in the wanted one, with the binomial error."""
    rows = _ranking(wanted, tables)
    if not rows:
        return None
    n_there = sum(new_space_group(row) == wanted.space_group for row in rows)
    n = len(rows)
    error = math.sqrt(max(n_there, 1) * (1.0 - min(n_there, n - 1) / n)) if n > 1 else 1.0
    return Found(float(n_there), error, n=n, models=_ranked_by(rows))


def lowest_space_group(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """Of the lowest free energy that is no saddle point."""
    rows = computed(_ranking(wanted, tables) or [])
    best = lowest(rows)
    return (
        None
        if best is None
        else Found(words=(symbol_of(best.spg_quantum),), n=len(rows), models=_ranked_by(rows))
    )


def gibbs_minus_enthalpy(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """Mean over the structures, eV/atom; error: of the mean, from the scatter."""
    pairs = _pairs(wanted, tables)
    if not len(pairs):
        return None
    shifts = pairs[:, 1] - pairs[:, 0]
    error = (
        float(shifts.std(ddof=1) / math.sqrt(len(shifts)))
        if len(shifts) > 1
        else float(pairs[0, 2])
    )
    return Found(float(shifts.mean()), error, n=len(shifts))


def _pairs(wanted: ExpectedValue, tables: TableFolder) -> np.ndarray:
    """(n, 3): H, G, error of G of every structure with both, eV/atom."""
    found = [(r.enthalpy, r.gibbs, r.gibbs_error or 0.0) for r in _ranking(wanted, tables) or []]
    return np.array([row for row in found if row[0] is not None and row[1] is not None]).reshape(
        -1, 3
    )


def reordering_window(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """H above the lowest (eV/atom) of the highest structure that leaves the line G(H): that of
    figure 6 (`reordering`).

    Error: the distance to the next structure above. Zero when nobody leaves the line.
    """
    rows = computed(_ranking(wanted, tables) or [])
    if not rows:
        return None
    numbers, moved = reordering(rows)
    if numbers.window is None or numbers.scatter is None:
        return None
    above = [
        m.enthalpy_meV_per_atom for m in moved if m.enthalpy_meV_per_atom > numbers.window + 1e-6
    ]
    error = 1e-3 * (min(above) - numbers.window) if above else None
    return Found(
        1e-3 * numbers.window, error, n=len(rows), extra={"scatter": 1e-3 * numbers.scatter}
    )


def share_kept_by_dft(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """Of the structures that became the space group: the share that DFT leaves as it was found,
    with the binomial error."""
    rows = tables.rows(SpaceGroups)
    mine = [
        row
        for row in rows
        if symbol_of(row.spg_quantum) == wanted.space_group != symbol_of(row.spg_static)
        and row.spg_dft
    ]
    if not mine:
        return None
    n = len(mine)
    share = sum(symbol_of(row.spg_dft) == symbol_of(row.spg_static) for row in mine) / n
    inner = min(max(share, 0.5 / n), 1.0 - 0.5 / n)
    return Found(share, math.sqrt(inner * (1.0 - inner) / n), n=n)


def gradient_error(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """RMSE (eV/A; of force constants eV/A^2) of forces or gradients over one ensemble."""
    for row in tables.rows(GradientError):
        if (row.phase, row.quantity) == (wanted.phase, wanted.quantity) and near(
            row.pressure_GPa, wanted
        ):
            single = (
                row.rmse / math.sqrt(2.0 * row.n_configs)
                if row.n_configs and wanted.quantity == "force"
                else None
            )
            error = single if row.statistical is None else row.statistical
            return Found(
                row.rmse,
                error,
                n=row.n_configs,
                extra={} if row.floor is None else {"floor": row.floor},
            )
    return None


FINDERS: dict[str, Callable[[ExpectedValue, TableFolder], Found | None]] = {
    "energy_rmse": _rmse("energy_rmse_eV_per_atom"),
    "force_rmse": _rmse("force_rmse_eV_per_A"),
    "stress_rmse": _rmse("stress_rmse_GPa"),
    "stability_sequence": stability_sequence,
    "transition_pressure": transition_pressure,
    "enthalpy_above_lowest": enthalpy_above_lowest,
    "enthalpy_rank": enthalpy_rank,
    "critical_pressure": critical_pressure,
    "critical_pressure_difference": critical_pressure_difference,
    "n_transformed": n_transformed,
    "n_with_free_energy": n_with_free_energy,
    "lowest_space_group": lowest_space_group,
    "share_kept_by_dft": share_kept_by_dft,
    "gibbs_minus_enthalpy": gibbs_minus_enthalpy,
    "reordering_window": reordering_window,
    "gradient_error": gradient_error,
}
"""Name of a value -> who finds it; None: the tables do not hold it."""
