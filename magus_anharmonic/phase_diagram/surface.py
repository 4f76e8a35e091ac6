"""One smooth G(P, T) per phase from its G, V and S together, so that V = dG/dP and S = -dG/dT hold
by construction.

G(P, T) = sum_k a_k C_k(u) + sum_jk b_jk t_j(T) C_k(u), C_k Chebyshev polynomials of the pressure u
scaled to [-1, 1], t_j free energies of Einstein oscillators without their zero-point energy, k T
ln(1 - exp(-theta_j / T)): any quasi-harmonic spectrum is a sum of such terms, and the third law
holds. With one temperature above zero there is one term, linear in T. Least squares with the errors
of the data as weights; how many terms the data support is decided by Akaike's criterion for known
errors, chi^2 + 2 k (Mallows' C_p), and the terms that compete are averaged with Akaike weights,
exp(-delta/2) (Burnham, Anderson, Model Selection and Multimodel Inference, 2nd ed., 2002,
doi:10.1007/b97636), so that the choice is part of the error. If the best fit leaves more than the
errors explain, its covariance grows by chi^2 / degrees of freedom. Outside of the points there is
no value: `GibbsSurface.inside`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.polynomial import chebyshev

from magus_anharmonic.errors import InputError
from magus_anharmonic.phase_diagram.points import Basis, GibbsPoint

MAX_COLD = 5
"""Highest power of P of the cold part."""
MAX_THERMAL = 2
"""Highest power of P of a thermal term."""
MAX_OSCILLATORS = 3
N_TRIAL_TEMPERATURES = 9
"""Einstein temperatures to choose from, from half the lowest temperature to six times the highest;
no two neighbours at once."""
WANDER = 1.5
"""How far a fitted Einstein temperature may go from the trial temperatures, natural logarithm."""
KNOWN = 0.3
"""Largest error of a fitted Einstein temperature, natural logarithm: beyond it the fit is no longer
linear in it."""
GAUSS_NEWTON = 8
SETTLED = 0.02
"""Largest step of an Einstein temperature (natural logarithm) that a fit may still want."""
MAX_MODELS = 12
LEAST_WEIGHT = 0.02
CONDITION = 1e9


@dataclass(frozen=True)
class Model:
    """One fit: coefficients (size,), root (size, n) of their covariance, Akaike weight."""

    basis: Basis
    coefficients: np.ndarray
    root: np.ndarray
    weight: float = 1.0

    def variance(self, rows: np.ndarray) -> np.ndarray:
        """Of ``rows`` (n, size) times the coefficients, (n,)."""
        return ((rows @ self.root) ** 2).sum(axis=1)

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n, size) coefficients."""
        return self.coefficients + rng.standard_normal((n, self.root.shape[1])) @ self.root.T


@dataclass(frozen=True)
class Quality:
    """chi2, dof of the best model; n : how many data of each kind; rms : of their residuals over
    their errors, by kind (G, V, S)."""

    chi2: float
    dof: int
    inflation: float
    n: dict[str, int]
    rms: dict[str, float]


@dataclass(frozen=True)
class GibbsSurface:
    """G(P, T) of one phase; ``domain`` (n, 2): the points (GPa, K) that it rests on."""

    models: tuple[Model, ...]
    finite_size: Model | None
    domain: np.ndarray
    quality: Quality

    def gibbs(self, pressure: np.ndarray, temperature: np.ndarray) -> np.ndarray:
        """eV/atom, finite-size term included; GPa and K, arrays of one shape or numbers."""
        return self._mean(pressure, temperature, "")

    def volume(self, pressure: np.ndarray, temperature: np.ndarray) -> np.ndarray:
        """dG/dP, A^3/atom."""
        return self._mean(pressure, temperature, "P")

    def entropy(self, pressure: np.ndarray, temperature: np.ndarray) -> np.ndarray:
        """-dG/dT, eV/K per atom."""
        return -self._mean(pressure, temperature, "T")

    def error(self, pressure: np.ndarray, temperature: np.ndarray) -> np.ndarray:
        """Standard error of G by the fit, eV/atom, the choice among the models included."""
        p, t = _flat(pressure, temperature)
        mean = self.gibbs(p, t)
        total = np.zeros_like(mean)
        for model in self.models:
            rows = model.basis.values(p, t)
            off = rows @ model.coefficients + self._extra(p, t, "") - mean
            total += model.weight * (model.variance(rows) + off**2)
        if self.finite_size is not None:
            total += self.finite_size.variance(self.finite_size.basis.values(p, t))
        return np.sqrt(np.maximum(total, 0.0)).reshape(np.broadcast(pressure, temperature).shape)

    def _mean(self, pressure: np.ndarray, temperature: np.ndarray, derivative: str) -> np.ndarray:
        p, t = _flat(pressure, temperature)
        total = self._extra(p, t, derivative)
        for model in self.models:
            total = total + model.weight * (
                model.basis.values(p, t, derivative) @ model.coefficients
            )
        return total.reshape(np.broadcast(pressure, temperature).shape)

    def _extra(self, p: np.ndarray, t: np.ndarray, derivative: str) -> np.ndarray:
        if self.finite_size is None:
            return np.zeros(len(p))
        return self.finite_size.basis.values(p, t, derivative) @ self.finite_size.coefficients

    def inside(self, pressure: np.ndarray, temperature: np.ndarray) -> np.ndarray:
        """Whether (GPa, K) lie in the convex hull of the points: elsewhere the fit says nothing."""
        p, t = _flat(pressure, temperature)
        return _inside(self.domain, np.stack([p, t], axis=1)).reshape(
            np.broadcast(pressure, temperature).shape
        )

    def sample(self, n: int, rng: np.random.Generator, offset_error: float = 0.0) -> SurfaceSamples:
        """``n`` surfaces from the distribution of the fit; ``offset_error`` (eV/atom): of G as a
        whole, e.g. the model's."""
        weights = np.array([model.weight for model in self.models])
        counts = rng.multinomial(n, weights / weights.sum())
        parts = tuple(
            (model.basis, model.sample(count, rng))
            for model, count in zip(self.models, counts, strict=True)
            if count
        )
        term = self.finite_size
        extra = None if term is None else (term.basis, term.sample(n, rng))
        offsets = offset_error * rng.standard_normal(n)
        return SurfaceSamples(parts, extra, offsets, rng.permutation(n))


@dataclass(frozen=True)
class SurfaceSamples:
    """Sampled surfaces; all methods return (n_samples, n_points). ``order`` shuffles the models, so
    that samples of phases are independent."""

    parts: tuple[tuple[Basis, np.ndarray], ...]
    extra: tuple[Basis, np.ndarray] | None
    offsets: np.ndarray
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))

    def values(
        self, pressure: np.ndarray, temperature: np.ndarray, derivative: str = ""
    ) -> np.ndarray:
        """G in eV/atom, or dG/dP in A^3 ("P"), dG/dT in eV/K ("T"), at points (GPa, K)."""
        p, t = _flat(pressure, temperature)
        found = np.concatenate(
            [sampled @ basis.values(p, t, derivative).T for basis, sampled in self.parts]
        )[self.order]
        if self.extra is not None:
            basis, sampled = self.extra
            found = found + sampled @ basis.values(p, t, derivative).T
        return found if derivative else found + self.offsets[:, None]


def _flat(pressure: np.ndarray, temperature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, t = np.broadcast_arrays(
        np.asarray(pressure, dtype=float), np.asarray(temperature, dtype=float)
    )
    return p.ravel(), t.ravel()


def _inside(points: np.ndarray, asked: np.ndarray) -> np.ndarray:
    from scipy.spatial import ConvexHull

    lower, span = points.min(axis=0), np.ptp(points, axis=0)
    box = np.all(
        (asked >= lower - 1e-9 * (1 + span)) & (asked <= lower + span + 1e-9 * (1 + span)), axis=1
    )
    scaled = (points - lower) / np.where(span > 0, span, 1.0)
    if np.linalg.matrix_rank(scaled - scaled.mean(axis=0), tol=1e-9) < 2:
        if np.all(span > 0):  # points on a slanted line, which rises or falls
            along = (asked - lower) / span
            rises = (scaled[np.argmax(scaled[:, 0]), 1]) > 0.5
            return box & (
                np.abs(along[:, 1] - (along[:, 0] if rises else 1.0 - along[:, 0])) < 1e-9
            )
        return box
    equations = ConvexHull(scaled).equations
    return box & np.all(
        ((asked - lower) / span) @ equations[:, :2].T + equations[:, 2] <= 1e-9, axis=1
    )


@dataclass(frozen=True)
class _Data:
    """What is fitted: pressure (GPa), temperature (K), value, error and kind ("G", "V", "S") of
    every datum."""

    pressure: np.ndarray
    temperature: np.ndarray
    value: np.ndarray
    error: np.ndarray
    kind: np.ndarray

    def rows(self, basis: Basis) -> np.ndarray:
        rows = np.empty((len(self.value), basis.size))
        for kind, derivative, sign in (("G", "", 1.0), ("V", "P", 1.0), ("S", "T", -1.0)):
            mine = self.kind == kind
            at = (self.pressure[mine], self.temperature[mine])
            rows[mine] = sign * basis.values(*at, derivative)
        return rows / self.error[:, None]


def fit_surface(
    points: Sequence[GibbsPoint], kinds: Sequence[str] = ("G", "V", "S")
) -> GibbsSurface:
    """Fit the usable ``points`` of one phase; ``kinds`` leaves out data for a test of the
    identities ("V", "S": no constant).

    Raises ``InputError`` when there is no usable point.
    """
    chosen = [point for point in points if point.usable]
    if not chosen:
        raise InputError(f"{points[0].phase if points else 'phase'}: no point with a free energy")
    data = _data(chosen, kinds)
    domain = np.array([(point.pressure_GPa, point.temperature_K) for point in chosen])
    bases = _candidates(chosen, data)
    fits = _fit_all(bases, data)
    fits += _refined(fits, data)
    if not fits:
        raise InputError(
            f"{chosen[0].phase}: {len(data.value)} numbers do not determine a surface; add"
            " pressures, volumes or entropies"
        )
    best = min(fits, key=_akaike)
    dof = len(data.value) - best[1].basis.size
    inflation = max(1.0, best[0] / dof) if dof > 0 else 1.0
    models = _weighted(fits, inflation, Counter(len(basis.thetas) for basis in bases))
    quality = _quality(models, data, best[0], dof, inflation)
    return GibbsSurface(models, _finite_size(chosen), domain, quality)


def _akaike(fit: tuple[float, Model]) -> float:
    return fit[0] + 2 * fit[1].basis.size


def _fit_all(bases: Sequence[Basis], data: _Data) -> list[tuple[float, Model]]:
    """chi^2 and fit for every basis that the data determine, those with a negative number of
    oscillators left out."""
    every = tuple(sorted({theta for basis in bases for theta in basis.thetas}))
    rows = data.rows(replace(bases[0], cold=MAX_COLD, thermal=MAX_THERMAL, thetas=every))
    chosen: dict[int, list[tuple[Basis, list[int]]]] = {}
    for basis in bases:
        thermal = [
            MAX_COLD + 1 + every.index(theta) * (MAX_THERMAL + 1) + k
            for theta in basis.thetas
            for k in range(basis.thermal + 1)
        ]
        chosen.setdefault(basis.size, []).append((basis, [*range(basis.cold + 1), *thermal]))
    fits: list[tuple[float, Model]] = []
    for group in chosen.values():
        stacked = np.stack([rows[:, columns] for _, columns in group])
        fits += _least_squares([basis for basis, _ in group], stacked, data)
    return [
        fit
        for fit in fits
        if fit[1].basis.thetas in ((), (0.0,)) or _oscillators(fit[1]).min() >= 0
    ]


def _refined(fits: Sequence[tuple[float, Model]], data: _Data) -> list[tuple[float, Model]]:
    """For every number of oscillators the best fit again with its Einstein temperatures fitted too,
    where the data determine them."""
    found = []
    for n_terms in sorted({len(model.basis.thetas) for _, model in fits}):
        chi2, model = min((fit for fit in fits if len(fit[1].basis.thetas) == n_terms), key=_akaike)
        if (
            n_terms
            and model.basis.thetas != (0.0,)
            and model.basis.size + n_terms < len(data.value)
        ):
            found += _with_bends(chi2, model, data)
    return found


def _with_bends(chi2: float, model: Model, data: _Data) -> list[tuple[float, Model]]:
    """Gauss-Newton steps of the Einstein temperatures, then the fit with them as linear parameters.

    None where a temperature leaves the neighbourhood of where it started, is known worse than that,
    or does not settle.
    """
    start, n = np.log(model.basis.thetas), model.basis.size
    for _ in range(GAUSS_NEWTON):
        wider = replace(model.basis, bends=tuple(tuple(row) for row in _terms(model).tolist()))
        fits = _fit(wider, data)
        if not fits:
            return []
        step = fits[0][1].coefficients[n:]
        if np.abs(step).max() < SETTLED:
            return fits if np.linalg.norm(fits[0][1].root[n:], axis=1).max() < KNOWN else []
        logs = np.log(model.basis.thetas) + np.clip(step, -0.3, 0.3)
        moved = replace(model.basis, thetas=tuple(np.exp(logs).tolist()))
        again = _fit(moved, data)
        if (
            not again
            or np.abs(logs - start).max() > WANDER
            or _oscillators(again[0][1]).min() < 0
            or again[0][0] > chi2 + 1.0
        ):
            return []
        chi2, model = again[0]
    return []


def _terms(model: Model) -> np.ndarray:
    """(n_thetas, thermal + 1) coefficients of the thermal terms."""
    basis = model.basis
    first = basis.cold + 1
    return model.coefficients[first : first + len(basis.thetas) * (basis.thermal + 1)].reshape(
        len(basis.thetas), -1
    )


def _oscillators(model: Model) -> np.ndarray:
    """How many Einstein oscillators of each kind there are in the middle of the pressures."""
    return chebyshev.chebval(0.0, _terms(model).T)


def _data(points: Sequence[GibbsPoint], kinds: Sequence[str]) -> _Data:
    rows: list[tuple[float, float, float, float, str]] = []
    for p in points:
        given = {
            "G": (p.raw, max(p.error, 1e-7)),
            "V": (p.volume, p.volume_error),
            "S": (p.entropy, p.entropy_error),
        }
        rows += [
            (p.pressure_GPa, p.temperature_K, *given[kind], kind)
            for kind in kinds
            if given[kind][1] > 0 and (kind != "S" or p.temperature_K > 0)
        ]
    *numbers, kind = zip(*rows, strict=True) if rows else ((),) * 5
    return _Data(*(np.array(column, dtype=float) for column in numbers), np.array(kind, dtype=str))


def _grid(points: Sequence[GibbsPoint]) -> tuple[list[float], list[float], float, float]:
    """Distinct pressures and temperatures, rising; centre and half the range of the pressures."""
    pressures = sorted({point.pressure_GPa for point in points})
    temperatures = sorted({point.temperature_K for point in points})
    low, high = pressures[0], pressures[-1]
    return pressures, temperatures, 0.5 * (low + high), max(0.5 * (high - low), 1.0)


def _trial_temperatures(lowest: float, highest: float) -> np.ndarray:
    return np.geomspace(0.5 * lowest, 6.0 * highest, N_TRIAL_TEMPERATURES)


def _candidates(points: Sequence[GibbsPoint], data: _Data) -> list[Basis]:
    """Every basis that the number of pressures and temperatures can determine."""
    pressures, temperatures, centre, half = _grid(points)
    gibbs, volumes, entropies = (bool((data.kind == kind).any()) for kind in ("G", "V", "S"))
    per_row = len(pressures) * (gibbs + volumes)
    cold = range(min(2, per_row - 1), min(MAX_COLD, per_row - 1) + 1)
    thermal = range(min(MAX_THERMAL, len(pressures) - 1 + volumes) + 1)
    found = []
    for thetas, zero in _thermal_terms(temperatures, entropies, gibbs or volumes):
        for n, m in itertools.product(cold, thermal if thetas else (0,)):
            basis = Basis(centre, half, n, min(n, m), thetas, zero)
            if basis.size <= len(data.value) + (not gibbs) and basis not in found:
                found.append(basis)
    return found


def _thermal_terms(
    temperatures: Sequence[float], entropies: bool, along: bool
) -> list[tuple[tuple[float, ...], float]]:
    """Sets of Einstein temperatures; with one temperature a linear term (if there are entropies),
    else none."""
    warm = [t for t in temperatures if t > 0]
    if not warm:
        return [((), 0.0)]
    if len(temperatures) == 1:
        return [((0.0,), warm[0])] if entropies else [((), 0.0)]
    trial_temperatures = _trial_temperatures(warm[0], warm[-1])
    n_terms = min(MAX_OSCILLATORS, (len(temperatures) - 1) * along + len(warm) * entropies)
    choices = [
        c
        for m in range(1, n_terms + 1)
        for c in itertools.combinations(range(N_TRIAL_TEMPERATURES), m)
        if np.diff(c).min(initial=2) > 1
    ]
    return [(tuple(trial_temperatures[list(c)].tolist()), 0.0) for c in choices]


def _fit(basis: Basis, data: _Data) -> list[tuple[float, Model]]:
    return _least_squares([basis], data.rows(basis)[None], data)


def _least_squares(
    bases: Sequence[Basis], rows: np.ndarray, data: _Data
) -> list[tuple[float, Model]]:
    """chi^2 and fit of bases of one size at once, ``rows`` (n_bases, n_data, size); those that the
    data do not determine are left out.

    A constant that no datum sees (there are only derivatives) is set to zero.
    """
    norms = np.linalg.norm(rows, axis=1)
    seen = norms > 0
    scales = np.where(seen, norms, 1.0)
    if rows.shape[1] < seen.sum(axis=1).max():
        return []
    u, s, vt = np.linalg.svd(rows / scales[:, None, :], full_matrices=False)
    target = data.value / data.error
    found = []
    for k, basis in enumerate(bases):
        n = int(seen[k].sum())
        if s[k, n - 1] * CONDITION < s[k, 0]:
            continue
        inverse = vt[k, :n].T / s[k, :n] / scales[k][:, None]
        coefficients = np.where(seen[k], inverse @ (u[k, :, :n].T @ target), 0.0)
        residual = target - rows[k] @ coefficients
        found.append((float(residual @ residual), Model(basis, coefficients, inverse)))
    return found


def _weighted(
    fits: Sequence[tuple[float, Model]], inflation: float, rivals: Counter[int]
) -> tuple[Model, ...]:
    """The models that compete, with Akaike weights; those with the same number of oscillators
    (``rivals``) share one vote."""
    votes = np.array(
        [1 if model.basis.bends else rivals[len(model.basis.thetas)] for _, model in fits]
    )
    scores = np.array(
        [chi2 / inflation + 2.0 * model.basis.size for chi2, model in fits]
    ) + 2.0 * np.log(votes)
    weights = np.exp(-0.5 * (scores - scores.min()))
    order = [
        int(i)
        for i in np.argsort(-weights, kind="stable")[:MAX_MODELS]
        if weights[i] >= LEAST_WEIGHT * weights.max()
    ]
    total = weights[order].sum()
    return tuple(
        replace(
            fits[i][1], root=fits[i][1].root * np.sqrt(inflation), weight=float(weights[i] / total)
        )
        for i in order
    )


def _quality(
    models: Sequence[Model], data: _Data, chi2: float, dof: int, inflation: float
) -> Quality:
    predicted = sum(
        model.weight * (data.rows(model.basis) @ model.coefficients) for model in models
    )
    residual = data.value / data.error - predicted
    kinds = [kind for kind in ("G", "V", "S") if (data.kind == kind).any()]
    n = {kind: int((data.kind == kind).sum()) for kind in kinds}
    rms = {kind: float(np.sqrt(np.mean(residual[data.kind == kind] ** 2))) for kind in kinds}
    return Quality(chi2, dof, inflation, n, rms)


def _finite_size(points: Sequence[GibbsPoint]) -> Model | None:
    """The finite-size term as a smooth function of its own: a parabola in P, one Einstein term in
    T; errors from what is left over."""
    values = np.array([point.finite_size for point in points])
    if not np.isfinite(values).all() or not values.any():
        return None
    n = len(points)
    domain = np.array([(point.pressure_GPa, point.temperature_K) for point in points])
    data = _Data(*domain.T, values, np.full(n, 1e-4), np.full(n, "G"))
    pressures, temperatures, centre, half = _grid(points)
    cold = min(2, len(pressures) - 1)
    terms: list[tuple[float, ...]] = [()]
    if len(temperatures) > 1:
        terms = [(theta,) for theta in _trial_temperatures(temperatures[1], temperatures[-1])]
    bases = [
        Basis(centre, half, cold, power, term)
        for term in terms
        for power in range(min(1, cold) + 1)
    ]
    fits = [fit for basis in bases for fit in _fit(basis, data)]
    if not fits:
        return None
    chi2, model = min(fits, key=_akaike)
    dof = n - model.basis.size
    scale = chi2 / dof if dof > 0 else 0.0
    return replace(model, root=model.root * np.sqrt(scale))
