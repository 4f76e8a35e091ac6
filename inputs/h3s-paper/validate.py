"""``magus-anharmonic validate``: a campaign's numbers beside expected ones.

Lies beside the inputs of the paper; loaded by ``magus_anharmonic.paper.script``.
The numbers are those of ``magus_anharmonic.paper.quantities`` and ``enthalpies``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.files import write_json
from magus_anharmonic.io.tables import TableFolder, write
from magus_anharmonic.paper.enthalpies import ranks, stability_sequence, transition
from magus_anharmonic.paper.quantities import (
    Reordering,
    computed,
    critical_pressure,
    gradient_error,
    kept_by_dft,
    reordering,
    series,
    standard_error,
    table_one,
)
from magus_anharmonic.paper.tables import (
    Enthalpy,
    GradientError,
    Mode,
    ModelError,
    SpaceGroups,
    ranking_files,
)
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.runs.folder import CampaignFolder

from .expected import NAMES, ExpectedValue, ExpectedValues, load_expected
from .explain import Context, Found, explanations, near, read_context, sources_of, why_absent

# --- finding: expected value -> function of `quantities` or `enthalpies` ---


def _enthalpies(wanted: ExpectedValue, tables: TableFolder) -> list[Enthalpy]:
    return [row for row in tables.rows(Enthalpy) if row.source in sources_of(wanted)]


def _models(rows: Iterable[Any], column: str = "model_id") -> tuple[str, ...]:
    return tuple(sorted({getattr(row, column) for row in rows} - {""}))


def _rmse(column: str, factor: float) -> Finder:
    def find(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
        for line in table_one(tables.rows(ModelError)):
            value = getattr(line, column)
            if (line.model, line.set) == (wanted.model, wanted.set) and value is not None:
                value *= factor
                error = None if line.relative_error is None else value * line.relative_error
                return Found(value, error, n=line.n, models=(line.model_id,))
        return None

    return find


def _sequence(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    rows = _enthalpies(wanted, tables)
    words = stability_sequence(rows, sources_of(wanted))
    return Found(words=words, models=_models(rows)) if words else None


def _transition(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    rows, (below, above) = _enthalpies(wanted, tables), wanted.phases or ("", "")
    one = transition(rows, below, above, sources_of(wanted))
    if one is None:
        return None
    error, bound = one.error_GPa, {"below": "<", "above": ">"}.get(one.how, "")
    between = None
    if one.how == "continuous":
        between = one.between_low_GPa, one.between_high_GPa
        error = 0.5 * (between[1] - between[0])
    models = _models(rows)
    return Found(one.pressure_GPa, error, bound, between=between, slope=one.slope, models=models)


def _rank(value: Callable[[Any], float]) -> Finder:
    def find(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
        rows = [row for row in _enthalpies(wanted, tables) if near(row.pressure_GPa, wanted)]
        return next(
            (
                Found(value(one), n=one.n_distinct, models=_models(rows))
                for one in ranks(rows, wanted.phase or "")
            ),
            None,
        )

    return find


def _critical(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    key = (wanted.phase or "", wanted.irrep or "", wanted.method or "", wanted.energies_by or "")
    points = series(tables.rows(Mode)).get(key, [])
    if len(points) < 2:
        return None
    found, known = critical_pressure(points), {"n": len(points), "models": _models(points)}
    if found.critical_pressure_GPa is not None:
        return Found(found.critical_pressure_GPa, found.error_GPa, **known)  # type: ignore[arg-type]
    limit, bound = (found.lowest_GPa, "<") if found.stable else (found.highest_GPa, ">")
    return Found(limit, None, bound, **known)  # type: ignore[arg-type]


def _critical_difference(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    model, dft = (
        _critical(wanted.model_copy(update={"energies_by": by}), tables) for by in ("model", "dft")
    )
    if model is None or dft is None or model.bound or dft.bound:
        return None
    error = math.hypot(model.error or 0.0, dft.error or 0.0)
    return Found(abs(model.value - dft.value), error, models=model.models)


def _ranking(value: Callable[[Reordering], Found | None]) -> Finder:
    def find(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
        for path in ranking_files(tables.folder):
            every = tables.rows(Candidate, path.name)
            if any(near(row.pressure, wanted) for row in every):
                rows = computed(every)
                if not rows:
                    return Found(0.0, 0.0, n=0) if wanted.name == "n_with_free_energy" else None
                found = value(reordering(rows, phase=wanted.space_group)[0])
                models = _models(rows, "model")
                return found and replace(found, n=len(rows), models=models)
        return None

    return find


def _n_transformed(found: Reordering) -> Found:
    """With the binomial error."""
    k, n = found.n_transformed_best, found.n
    error = math.sqrt(max(k, 1) * (1.0 - min(k, n - 1) / n)) if n > 1 else 1.0
    return Found(float(k), error)


def _window(found: Reordering) -> Found | None:
    if found.window is None:
        return None
    error = None if found.window_error is None else 1e-3 * found.window_error
    return Found(1e-3 * found.window, error)


def _shift(found: Reordering) -> Found:
    error = None if found.shift_error is None else 1e-3 * found.shift_error
    return Found(1e-3 * found.shift, error)


def _share(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    """With the binomial error."""
    k, n = kept_by_dft(tables.rows(SpaceGroups), wanted.space_group)
    if not n:
        return None
    inner = min(max(k / n, 0.5 / n), 1.0 - 0.5 / n)
    return Found(k / n, math.sqrt(inner * (1.0 - inner) / n), n=n)


def _gradient(wanted: ExpectedValue, tables: TableFolder) -> Found | None:
    rows = tables.rows(GradientError)
    pressure = wanted.pressure_GPa or 0.0
    one = gradient_error(rows, wanted.phase or "", pressure, wanted.quantity or "")
    return one and Found(one.rmse, standard_error(one), n=one.n_configs, floor=one.floor)


Finder = Callable[[ExpectedValue, TableFolder], Found | None]

FINDERS: dict[str, Finder] = {
    "energy_rmse": _rmse("energy_meV_per_atom", 1e-3),
    "force_rmse": _rmse("force_meV_per_A", 1e-3),
    "stress_rmse": _rmse("stress_GPa", 1.0),
    "stability_sequence": _sequence,
    "transition_pressure": _transition,
    "enthalpy_above_lowest": _rank(lambda one: 1e-3 * one.above_lowest_meV_per_atom),
    "enthalpy_rank": _rank(lambda one: float(one.rank)),
    "critical_pressure": _critical,
    "critical_pressure_difference": _critical_difference,
    "n_transformed": _ranking(_n_transformed),
    "n_with_free_energy": _ranking(lambda one: Found(float(one.n), 0.0)),
    "lowest_space_group": _ranking(lambda one: Found(words=(one.best,)) if one.best else None),
    "share_kept_by_dft": _share,
    "gibbs_minus_enthalpy": _ranking(_shift),
    "reordering_window": _ranking(_window),
    "gradient_error": _gradient,
}
"""Name of a value -> who finds it; None: the tables do not hold it."""


# --- comparing ---

Verdict = Literal["agrees", "disagrees", "not in this run"]
STANDARD_ERRORS = 2.0
"""A difference of so many standard errors still agrees."""


@dataclass(frozen=True)
class Validated:
    """One value: found and expected in the unit of the expected one.

    difference : found minus the nearest expected number. could_explain : what of the run, separated
    by "; ". remark : what one must know to read the numbers, or why it is not in this run.
    """

    name: str
    unit: str
    found: str
    error: str
    expected: str
    expected_error: str
    difference: str
    verdict: Verdict
    source: str
    could_explain: str = ""
    remark: str = ""

    @property
    def line(self) -> str:
        """One line for the terminal."""
        unit = "" if self.unit in ("-", "1") else f" {self.unit}"
        mark = "DISAGREES" if self.verdict == "disagrees" else self.verdict
        bound = {"<": "below ", ">": "above "}.get(self.found[:1], "")
        found = bound + self.found.removeprefix("<").removeprefix(">")
        if self.verdict != "not in this run":
            expected_error = f" +- {self.expected_error}" if self.expected_error else ""
            parts = [
                f"found {found}" + (f" +- {self.error}" if self.error else ""),
                f"expected {self.expected}{expected_error}{unit}",
                *([f"difference {self.difference}"] if self.difference else []),
            ]
        else:
            parts = [f"expected {self.expected}{unit}"]
        remark = f"; {self.remark}" if self.remark else ""
        return f"{mark:16s} {self.name}: {', '.join(parts)}{remark}  [{self.source}]"


def tables_folder(campaign: str | Path) -> Path:
    """Where the tables of a campaign are: below its folder, below ``campaign/`` in it, or the
    folder itself. Raises ``InputError``."""
    root, found = Path(campaign), CampaignFolder.find(campaign)
    if found is not None:
        return found.tables
    if any(root.glob("*.csv")):
        return root
    raise InputError(f"{root}: no campaign (no tables/*.csv in it or in its campaign/)")


def validate(campaign: str | Path, expected: str | Path) -> list[Validated]:
    """Compare every expected value with what the campaign holds; pure. Raises ``InputError``."""
    folder = tables_folder(campaign)
    return compare_all(load_expected(expected), TableFolder(folder), read_context(folder))


def compare_all(expected: ExpectedValues, tables: TableFolder, context: Context) -> list[Validated]:
    """All values, in the order of the file."""
    rows = []
    for wanted in expected.values:
        found = FINDERS[wanted.name](wanted, tables)
        if found is not None:
            rows.append(compare(wanted, found, context))
            continue
        undone = context.undone_steps(wanted)
        why = why_absent(wanted, tables) + (f"; not done: {undone}" if undone else "")
        rows.append(_row(wanted, Found(), "not in this run", remark=why))
    return rows


def compare(wanted: ExpectedValue, found: Found, context: Context) -> Validated:
    """One value; agreement is a difference of at most two standard errors, or within the tolerance,
    on the open side of a limit, or, for an error, below what is expected."""
    difference = None
    if found.words:
        agrees = _same_words(wanted, found.words)
    else:
        low, high, spread = _expected_range(wanted, found)
        least, most = found.between or (found.value, found.value)
        difference = least - high if least > high else most - low if most < low else 0.0
        agrees = _agrees(wanted, found, low, high, spread, difference)
    reasons = "" if agrees else "; ".join(explanations(wanted, found, context, difference))
    remarks = []
    if agrees and NAMES[wanted.name].smaller_is_better and (difference or 0.0) < 0:
        remarks.append("less than expected counts as agreement")
    if found.bound:
        remarks.append("it does not change sign between the pressures of the run")
    if found.between:
        remarks.append("the first relaxes into the second there, which is all that is known")
    if NAMES[wanted.name].table == ModelError.FILE:
        remarks.append(f"{found.n} labels")
    verdict: Verdict = "agrees" if agrees else "disagrees"
    return _row(wanted, found, verdict, difference, reasons, "; ".join(remarks))


def _expected_range(wanted: ExpectedValue, found: Found) -> tuple[float, float, float]:
    """Lowest and highest expected number and their error; a count among ``out_of`` structures is
    scaled to those of the run."""
    low, high = wanted.range
    spread = (wanted.error or 0.0) * wanted.factor
    if wanted.out_of is not None and found.n is not None and found.n != wanted.out_of:
        scale = found.n / wanted.out_of
        low, high, spread = low * scale, high * scale, spread * math.sqrt(scale)
    return low, high, spread


def _agrees(
    wanted: ExpectedValue, found: Found, low: float, high: float, spread: float, difference: float
) -> bool:
    if found.bound:
        return low <= found.value if found.bound == "<" else high >= found.value
    if difference < 0 and NAMES[wanted.name].smaller_is_better:
        return True
    own = 0.0 if found.between else found.error or 0.0
    tolerance = (wanted.tolerance or 0.0) * wanted.factor
    return abs(difference) <= max(STANDARD_ERRORS * math.hypot(own, spread), tolerance) + 1e-12


def _same_words(wanted: ExpectedValue, words: Sequence[str]) -> bool:
    """A name is one of the allowed ones; a sequence is a stretch of the expected one (a run has its
    own pressures)."""
    if isinstance(wanted.value, str):
        return tuple(words) == (wanted.value,)
    allowed = [str(item) for item in wanted.value] if isinstance(wanted.value, list) else []
    stretches = [allowed[i : i + len(words)] for i in range(len(allowed) - len(words) + 1)]
    return list(words) in stretches


def _row(
    wanted: ExpectedValue,
    found: Found,
    verdict: Verdict,
    difference: float | None = None,
    reasons: str = "",
    remark: str = "",
) -> Validated:
    factor = wanted.factor
    low, _, spread = _expected_range(wanted, found)
    expected = wanted.words
    if wanted.out_of is not None and found.n not in (None, wanted.out_of):
        expected = f"{low / factor:.4g} ({expected} of {wanted.out_of})"
    value = "" if math.isnan(found.value) else f"{found.bound}{found.value / factor:.4g}"
    if found.words:
        value = " -> ".join(found.words)
    elif found.between:
        value = " to ".join(f"{end / factor:.4g}" for end in found.between)
    elif found.n is not None and wanted.out_of is not None:
        value += f" of {found.n}"
    exact = found.error is None or found.bound or found.between
    tolerance = f"{wanted.tolerance:g} (tolerance)" if wanted.tolerance else ""
    return Validated(
        wanted.title,
        wanted.unit,
        value,
        "" if exact else _two_digits((found.error or 0.0) / factor),
        expected,
        _two_digits(spread / factor) if spread > 0 else tolerance,
        "" if difference is None or found.bound else f"{difference / factor:+.3g}",
        verdict,
        wanted.source,
        reasons,
        remark,
    )


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def write_validation(rows: Sequence[Validated], folder: str | Path) -> None:
    """``validation.csv`` and ``validation.json``."""
    write(Validated, Path(folder) / "validation.csv", rows)
    counts = {"agrees": 0, "disagrees": 0, "not in this run": 0} | Counter(r.verdict for r in rows)
    values = [asdict(row) for row in rows]
    write_json(Path(folder) / "validation.json", {"counts": counts, "values": values})
