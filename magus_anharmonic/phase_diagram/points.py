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

import numpy as np
from numpy.polynomial import chebyshev

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.tables import column, columns_of, held, read, table_rows, write
from magus_anharmonic.settings import check_pressure, nearest
from magus_anharmonic.sscha.record import FreeEnergy, WithFreeEnergy
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


NATURAL = "natural"
"""Name of the isotopes of the natural elements."""
LARGEST_ERROR = 0.1
"""eV/atom; a free energy known worse than that decides nothing, and its volume and entropy are
those of a diverged run."""
_OF_THE_RUN = "phase_diagram.grid.point_of"
_OPTIONAL = {"default": "", "needed": False}


@dataclass(frozen=True)
class GibbsPoint(WithFreeEnergy):
    """One free energy (of an SSCHA run, or of another method) with its errors; NaN where there is
    no number.

    ``free_energy`` as the run made it, its volume brought to ``pressure_GPa``; without finite-size
    term V = dG/dP and S = -dG/dT. Its status is "converged"; "unconverged", with a G that is an
    upper bound and counts for nothing, because no error bar says how far it is off; "failed"; or
    "transformed": the structure is another phase now, ``space_group`` says which, ``same_as`` is
    the phase of the diagram that it is.
    """

    phase: str = column("name of the phase", default="", needed=True)
    isotopes: str = column("masses: `natural`, or as in the settings", default=NATURAL)
    formula: str = column("formula, metals first", default="")
    pressure_GPa: float = column(  # noqa: N815
        "pressure", "GPa", default=math.nan, digits=".10g", needed=True
    )
    temperature_K: float = column(  # noqa: N815
        "temperature", "K", default=math.nan, digits=".10g", needed=True
    )
    free_energy: FreeEnergy = held(
        FreeEnergy(status="converged"),
        ".10g",
        status={"default": "converged", "needed": False},
        reason=_OPTIONAL,
        space_group={"name": "space_group", **_OPTIONAL},
    )
    volume_error: float = column(
        "standard error of the volume", "A^3/atom", origin=_OF_THE_RUN, default=math.nan
    )
    entropy: float = column(
        "entropy",
        "eV/K/atom",
        equation="-dG/dT without finite-size term",
        origin=_OF_THE_RUN,
        default=math.nan,
        digits=".10g",
    )
    entropy_error: float = column(
        "its standard error", "eV/K/atom", origin=_OF_THE_RUN, default=math.nan, digits=".10g"
    )
    same_as: str = column("phase of the diagram that a transformed one is", default="")
    model: str = column("identity of the model", default="")

    @property
    def gibbs(self) -> float:
        """eV/atom, finite-size term included."""
        return _number(self.free_energy.gibbs)

    @property
    def gibbs_error(self) -> float:
        """eV/atom, by sampling alone."""
        return _number(self.free_energy.gibbs_error)

    @property
    def volume(self) -> float:
        """A^3/atom at the pressure of the point."""
        return _number(self.free_energy.volume)

    @property
    def space_group(self) -> str:
        """Of the SSCHA centroids."""
        return self.free_energy.space_group

    @property
    def usable(self) -> bool:
        """True with a free energy of the phase itself that is known at all."""
        known = self.status == "converged" and math.isfinite(self.gibbs)
        return known and self.error <= LARGEST_ERROR

    @property
    def useless(self) -> bool:
        """True where there should be a free energy and is none, or one so uncertain that it says
        nothing."""
        return self.status == "failed" or (self.status == "converged" and not self.usable)

    @property
    def bound(self) -> bool:
        """True where the free energy is an upper bound alone, of a run that did not converge."""
        return self.status == "unconverged" and math.isfinite(self.gibbs)

    @property
    def finite_size(self) -> float:
        """The part of ``gibbs`` that V and S do not belong to (it is not stationary), eV/atom."""
        return self.free_energy.finite_size or 0.0

    @property
    def raw(self) -> float:
        """G without finite-size term, eV/atom: what V and S belong to."""
        return self.gibbs - self.finite_size

    @property
    def error(self) -> float:
        """Sampling error and what the minimisation may still gain, eV/atom."""
        return math.hypot(self.gibbs_error, self.free_energy.predicted_decrease or 0.0)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


WITH_ERRORS = {"volume": "volume_error_A3_per_atom", "entropy": "entropy_error_eV_per_K_per_atom"}
"""Numbers that need an error, and its column."""


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
    given = point.status in ("converged", "unconverged") and math.isfinite(point.gibbs)
    if given and not point.gibbs_error > 0:
        raise InputError(
            f"{where}: gibbs_error_eV_per_atom: must be above 0 (its standard error in eV/atom)"
        )
    if point.volume <= 0:
        raise InputError(
            f"{where}: volume_A3_per_atom: {point.volume:g}: must be above 0 (A^3 per atom)"
        )
    for value, column_ in WITH_ERRORS.items():
        at_rest = value == "entropy" and point.temperature_K == 0
        known = math.isfinite(getattr(point, value)) and not at_rest
        if known and not getattr(point, f"{value}_error") > 0:
            raise InputError(f"{where}: {column_}: must be above 0, because {value} is given")


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
