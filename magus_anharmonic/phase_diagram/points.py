"""G, V and S with their errors at (P, T), and the functions that they are fitted by.

The functions of pressure and temperature that a `GibbsSurface` is made of, with their derivatives.

G, V and S of one phase at one pressure and temperature: the data of a phase diagram, and its table
``gibbs.csv``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.tables import column, columns_of, read, table_rows, write
from magus_anharmonic.settings import check_pressure, nearest
from magus_anharmonic.units import KELVIN, ev_per_a3_to_gpa


def einstein(theta: float, temperature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k T ln(1 - exp(-theta/T)) in eV and its derivative with respect to T in eV/K; both zero at 0
    K."""
    t = np.asarray(temperature, dtype=float)
    x = theta / np.where(t > 0, t, 1.0)
    value = np.where(t > 0, KELVIN * t * np.log1p(-np.exp(-x)), 0.0)
    slope = np.where(t > 0, KELVIN * (np.log1p(-np.exp(-x)) - x * np.exp(-x) / -np.expm1(-x)), 0.0)
    return value, slope


def einstein_shift(theta: float, temperature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of `einstein` with respect to ln(theta): k theta / (exp(x) - 1), and k x^2 exp(x)
    / (exp(x) - 1)^2, x = theta / T."""
    t = np.asarray(temperature, dtype=float)
    x = theta / np.where(t > 0, t, 1.0)
    number = np.exp(-x) / -np.expm1(-x)
    return np.where(t > 0, KELVIN * theta * number, 0.0), np.where(
        t > 0, KELVIN * x**2 * number * (1.0 + number), 0.0
    )


@dataclass(frozen=True)
class Basis:
    """Functions of (P, T). centre, half : GPa; thetas : K, or a single 0 for a term linear in T
    about ``zero`` (K).

    bends : for each theta that was fitted too the coefficients of its term; adds the derivative of
    that term with respect to ln(theta).
    """

    centre: float
    half: float
    cold: int
    thermal: int
    thetas: tuple[float, ...]
    zero: float = 0.0
    bends: tuple[tuple[float, ...], ...] = ()

    @property
    def size(self) -> int:
        return self.cold + 1 + len(self.thetas) * (self.thermal + 1) + len(self.bends)

    def values(
        self, pressure: np.ndarray, temperature: np.ndarray, derivative: str = ""
    ) -> np.ndarray:
        """(n, size) values in eV; their derivatives with respect to ``"P"`` in A^3 or ``"T"`` in
        eV/K. Pressures in GPa."""
        u = (np.asarray(pressure, dtype=float) - self.centre) / self.half
        degree = max(self.cold, self.thermal)
        powers = chebyshev.chebvander(u, degree)
        if derivative == "P":
            unit = np.eye(degree + 1)
            powers = np.stack(
                [chebyshev.chebval(u, chebyshev.chebder(unit[k])) for k in range(degree + 1)],
                axis=-1,
            )
            powers = powers * (ev_per_a3_to_gpa(1.0) / self.half)
        cold = powers[:, : self.cold + 1]
        parts = [np.zeros_like(cold) if derivative == "T" else cold]
        for theta in self.thetas:
            value, slope = self._thermal(theta, np.asarray(temperature, dtype=float))
            parts.append(
                powers[:, : self.thermal + 1] * (slope if derivative == "T" else value)[:, None]
            )
        for theta, bend in zip(self.thetas, self.bends, strict=False):
            value, slope = einstein_shift(theta, np.asarray(temperature, dtype=float))
            parts.append(
                (
                    powers[:, : self.thermal + 1]
                    @ np.array(bend)
                    * (slope if derivative == "T" else value)
                )[:, None]
            )
        return np.concatenate(parts, axis=1)

    def _thermal(self, theta: float, temperature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if theta == 0:
            return KELVIN * (temperature - self.zero), np.full_like(temperature, KELVIN)
        return einstein(theta, temperature)


NAN = float("nan")
NATURAL = "natural"
"""Name of the isotopes of the natural elements."""
STATES = ("converged", "unconverged", "failed", "transformed")
OLD_STATES = {"became": "transformed"}
"""Of files of earlier versions."""
LARGEST_ERROR = 0.1
"""eV/atom; a free energy known worse than that decides nothing, and its volume and entropy are
those of a diverged run."""


def _number(
    meaning: str,
    unit: str,
    equation: str = "",
    origin: str = "sscha.task.finished_result",
    default: float = NAN,
) -> Any:
    return column(
        meaning,
        unit,
        equation=equation,
        origin=origin,
        default=default,
        digits=".10g",
        needed=unit in ("GPa", "K", "eV/atom") and math.isnan(default),
    )


@dataclass(frozen=True)
class GibbsPoint:
    """One SSCHA free energy (or one of another method) with its errors; NaN where there is no
    number.

    gibbs : finite-size term included, gibbs_error : sampling alone; predicted_decrease : what the
    minimisation may still gain; finite_size : part of gibbs that the identities below do not hold
    for (it is not stationary). eV/atom. volume : A^3/atom at ``pressure_GPa``, entropy : eV/K per
    atom; without finite-size term V = dG/dP and S = -dG/dT. status : "converged"; "unconverged",
    with a G that is an upper bound and counts for nothing, because no error bar says how far it is
    off; "failed"; or "transformed": the structure is another phase now, ``space_group`` says which,
    ``same_as`` is the phase of the diagram that it is.
    """

    phase: str = column("name of the phase", default="", needed=True)
    isotopes: str = column("masses: `natural`, or as in the settings", default=NATURAL)
    formula: str = column("formula, metals first", default="")
    pressure_GPa: float = _number("pressure", "GPa", origin="")  # noqa: N815
    temperature_K: float = _number("temperature", "K", origin="")  # noqa: N815
    gibbs_eV_per_atom: float = _number(  # noqa: N815
        "Gibbs free energy, finite-size term included", "eV/atom", "(F + P V) / N + finite_size"
    )
    gibbs_error_eV_per_atom: float = _number(  # noqa: N815
        "standard error of G by sampling alone", "eV/atom"
    )
    volume_A3_per_atom: float = _number(  # noqa: N815
        "volume at the pressure",
        "A^3/atom",
        "V (1 + (P_run - P) / B)",
        "phase_diagram.grid.point_of",
    )
    volume_error_A3_per_atom: float = _number("its standard error", "A^3/atom")  # noqa: N815
    entropy_eV_per_K_per_atom: float = _number(  # noqa: N815
        "entropy", "eV/K/atom", "-dG/dT without finite-size term", "phase_diagram.grid.point_of"
    )
    entropy_error_eV_per_K_per_atom: float = _number(  # noqa: N815
        "its standard error", "eV/K/atom"
    )
    finite_size_eV_per_atom: float = _number(  # noqa: N815
        "finite-size term, part of G", "eV/atom", default=0.0
    )
    predicted_decrease_eV_per_atom: float = _number(  # noqa: N815
        "by how much the relaxation may still lower G", "eV/atom", default=0.0
    )
    status: str = column(
        "`converged`, `unconverged` (G is an upper bound), `failed`, `transformed` (another phase"
        " now)",
        default="converged",
        old=OLD_STATES,
    )
    space_group: str = column("space group of the SSCHA centroids", default="")
    same_as: str = column("phase of the diagram that a transformed one is", default="")
    n_evaluations: int = column("energies and forces that were evaluated", default=0)
    natoms_supercell: int = column("atoms of the supercell", default=0)
    model: str = column("identity of the model", default="")
    reason: str = column("why there is no free energy that counts", default="")

    @property
    def usable(self) -> bool:
        """True with a free energy of the phase itself that is known at all."""
        return (
            self.status == "converged"
            and math.isfinite(self.gibbs_eV_per_atom)
            and self.error <= LARGEST_ERROR
        )

    @property
    def useless(self) -> bool:
        """True where there should be a free energy and is none, or one so uncertain that it says
        nothing."""
        return self.status == "failed" or (self.status == "converged" and not self.usable)

    @property
    def bound(self) -> bool:
        """True where the free energy is an upper bound alone, of a run that did not converge."""
        return self.status == "unconverged" and math.isfinite(self.gibbs_eV_per_atom)

    @property
    def raw(self) -> float:
        """G without finite-size term, eV/atom: what V and S belong to."""
        return self.gibbs_eV_per_atom - self.finite_size_eV_per_atom

    @property
    def error(self) -> float:
        """Sampling error and what the minimisation may still gain, eV/atom."""
        return math.hypot(self.gibbs_error_eV_per_atom, self.predicted_decrease_eV_per_atom)


WITH_ERRORS = (
    ("volume_A3_per_atom", "volume_error_A3_per_atom"),
    ("entropy_eV_per_K_per_atom", "entropy_error_eV_per_K_per_atom"),
)


def write_points(path: str | Path, points: Sequence[GibbsPoint]) -> None:
    """Write ``gibbs.csv`` atomically; NaN as an empty cell."""
    write(GibbsPoint, path, points)


def read_points(path: str | Path) -> list[GibbsPoint]:
    """Read ``gibbs.csv``; only the columns that are needed must be there.

    Raises ``InputError`` that names file, line and column: a column without its unit or with
    another one, a cell that is no number, a free energy without an error, a pressure that is no
    pressure, the same point twice.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    with table_rows(file) as reader:
        _check_columns(file, [name.strip() for name in reader.fieldnames or () if name])
    points = read(GibbsPoint, file)
    for line, point in enumerate(points, start=2):
        _check_point(f"{file}: line {line}", point)
    if not points:
        raise InputError(f"{file}: holds no points")
    seen: dict[tuple[str, str, float, float], int] = {}
    for row, point in enumerate(points, start=2):
        key = (point.phase, point.isotopes, point.pressure_GPa, point.temperature_K)
        if key in seen:
            raise InputError(
                f"{file}: {point.phase} ({point.isotopes}) at {point.pressure_GPa:g} GPa,"
                f" {point.temperature_K:g} K is given twice (rows {seen[key]} and {row})"
            )
        seen[key] = row
    return points


def _check_columns(file: Path, found: Sequence[str]) -> None:
    known = columns_of(GibbsPoint)
    names = [one.name for one in known]
    missing = [one.name for one in known if one.needed and one.name not in found]
    problems = [f"{file}: column {name} is missing" for name in missing]
    problems += [
        f"{file}: unknown column {name}{nearest(name, names)} (units are part of the names:"
        " convert first)"
        for name in found
        if name not in names
    ]
    if problems:
        raise InputError(*problems)


def _check_point(where: str, point: GibbsPoint) -> None:
    if not point.phase:
        raise InputError(f"{where}: phase: is empty")
    try:
        check_pressure(point.pressure_GPa)
    except ValueError as error:
        raise InputError(f"{where}: pressure_GPa: {point.pressure_GPa:g}: {error}") from None
    if not 0 <= point.temperature_K < math.inf:
        raise InputError(
            f"{where}: temperature_K: {point.temperature_K:g}: must be in K, not below 0"
        )
    if point.status not in STATES:
        raise InputError(
            f"{where}: status: {point.status!r}: must be {', '.join(STATES[:-1])} or {STATES[-1]}"
        )
    given = point.status in ("converged", "unconverged") and math.isfinite(point.gibbs_eV_per_atom)
    if given and not point.gibbs_error_eV_per_atom > 0:
        raise InputError(
            f"{where}: gibbs_error_eV_per_atom: must be above 0 (its standard error in eV/atom)"
        )
    for value, error in WITH_ERRORS:
        at_rest = value.startswith("entropy") and point.temperature_K == 0
        if math.isfinite(getattr(point, value)) and not at_rest and not getattr(point, error) > 0:
            raise InputError(f"{where}: {error}: must be above 0, because {value} is given")


def with_same_phase(points: Sequence[GibbsPoint]) -> list[GibbsPoint]:
    """Fill in ``same_as`` of the points that transformed into another phase: the phase of this
    diagram with that space group, there and then."""
    found = []
    for point in points:
        duplicates = [
            other.phase
            for other in points
            if other.usable
            and other.phase != point.phase
            and other.space_group == point.space_group
            and other.formula == point.formula
            and (other.isotopes, other.pressure_GPa, other.temperature_K)
            == (point.isotopes, point.pressure_GPa, point.temperature_K)
        ]
        same = (
            duplicates[0]
            if point.status == "transformed" and not point.same_as and duplicates
            else point.same_as
        )
        found.append(replace(point, same_as=same))
    return found
