"""The Hessian of the SSCHA free energy: is the structure a minimum, and what are its physical
phonons.

H = Phi + D L D [+ fourth order], Bianco et al., PRB 96, 014111 (2017), Eqs. 20-22,
doi:10.1103/PhysRevB.96.014111: Phi the auxiliary force constants, D the third-order tensor of
`third_order`, L = -1/2 of the response of the variances. The noise of D enters squared and always
softens; by default it is removed by taking the two D from the two halves of the ensemble.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.special import ndtr

from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.notebook import Described
from magus_anharmonic.sscha.anharmonic import (
    CHUNK,
    FourthOrder,
    ThirdOrder,
    dressed_rows,
    third_order,
    transformed,
)
from magus_anharmonic.sscha.ensemble import Ensemble, standard_error
from magus_anharmonic.sscha.reciprocal import Representation, Samples, samples, wavevectors
from magus_anharmonic.sscha.start import harmonic_force_constants
from magus_anharmonic.sscha.state import SschaState, fourier, inverse_fourier
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import HBAR, ev_to_mev

SIGMAS = 2.0
"""Standard errors that a squared frequency must lie below or above zero to count."""

DEGENERATE = 1e-6
"""Relative difference of squared frequencies that symmetry makes equal."""


@dataclass(frozen=True, repr=False)
class Hessian(Described):
    """Free-energy Hessian on the q points of the supercell.

    force_constants : compact, eV/A^2. points : (n_q, 3) fractional q. squares, errors : (n_q, 3n)
    squared frequencies in eV^2 (hbar omega)^2, ascending at each q, and their standard errors (None
    when not asked for); the three translations are zero. vectors : (n_q, 3n, 3n) columns, mass
    weighted. star : (n_q,) number of the star of each q, -q included. fourth_order : whether <d4V>
    is in it. unbiased : whether the squared noise of D was removed.
    """

    state: SschaState
    force_constants: np.ndarray
    points: np.ndarray
    squares: np.ndarray
    errors: np.ndarray | None
    vectors: np.ndarray
    star: np.ndarray
    n_configs: int
    fourth_order: bool
    unbiased: bool

    @property
    def hbar_omega(self) -> np.ndarray:
        """(n_q, 3n) hbar omega in eV, negative for imaginary modes."""
        return np.sign(self.squares) * np.sqrt(np.abs(self.squares))

    @property
    def hbar_omega_error(self) -> np.ndarray:
        """Standard errors in eV, NaN where they were not asked for; for a mode within its error of
        zero, the frequency whose square is the error."""
        if self.errors is None:
            return np.full_like(self.squares, np.nan)
        return self.errors / np.maximum(
            2.0 * np.abs(self.hbar_omega), np.sqrt(np.maximum(self.errors, 1e-30))
        )

    @cached_property
    def deciding(self) -> tuple[int, int]:
        """q and mode that are most surely negative, or else least surely positive."""
        score = self._score
        q, mode = np.unravel_index(int(np.argmin(score)), score.shape)
        return int(q), int(mode)

    @property
    def status(self) -> str:
        """``saddle`` (a mode negative beyond two standard errors), ``stable`` (all positive beyond
        two), or ``undecided``."""
        errors = 0.0 if self.errors is None else self.errors
        if np.any(self._moving(self.squares + SIGMAS * errors) < 0):
            return "saddle"
        return "stable" if np.all(self._moving(self.squares - SIGMAS * errors) > 0) else "undecided"

    def described(self) -> dict[str, str]:
        """Structure, verdict and the mode that decides it."""
        q, mode = self.deciding
        error = float(np.nan_to_num(self.hbar_omega_error[q, mode]))
        return {
            "structure": self.state.atoms.get_chemical_formula(),
            "status": self.status,
            "probability stable": f"{self.probability_stable:.3f}",
            "deciding mode": f"{ev_to_mev(self.hbar_omega[q, mode]):.2f} +- {ev_to_mev(error):.2f}"
            f" meV at q = {self.points[q].round(4).tolist()}",
        }

    @property
    def probability_stable(self) -> float:
        """Probability that no mode is negative, the sets of equivalent modes taken as independent;
        sampling errors alone."""
        if self.errors is None:
            return float(np.all(self._moving(self.squares) > 0))
        score = self._score
        first = [int(np.argmax(self.star == star)) for star in np.unique(self.star)]
        return float(
            np.prod(
                [ndtr(score[q][level].min()) for q in first for level in levels(self.squares[q])]
            )
        )

    @cached_property
    def _score(self) -> np.ndarray:
        """Squared frequencies in standard errors where these are known."""
        errors = 1.0 if self.errors is None else np.maximum(self.errors, 1e-30)
        return self._moving(self.squares / errors)

    def _moving(self, values: np.ndarray) -> np.ndarray:
        """``values`` with the translations at q = 0 replaced by plus infinity."""
        still = np.zeros(values.shape, dtype=bool)
        still[0, np.argsort(np.abs(self.squares[0]))[:3]] = True
        return np.where(still, np.inf, values)


def free_energy_hessian(
    state: SschaState,
    ensemble: Ensemble,
    symmetry: Symmetry,
    *,
    include_v4: bool = False,
    unbiased: bool = True,
    errors: bool = True,
) -> Hessian:
    """The Hessian of ``state`` from an ensemble drawn from it.

    ``unbiased=False`` is the estimate of python-sscha. Error bars (first order in the noise, pairs
    as units) hold the sampling of D and of Phi; not the error of the energy surface or of the
    supercell. Raises ``SschaError`` for imaginary auxiliary modes, and with ``include_v4`` when the
    equation of fourth order does not converge.
    """
    modes = wavevectors(state)
    data = samples(state, ensemble, modes)
    representation = Representation(modes, symmetry)
    tensor, noise = tensors(data, representation, unbiased and len(data) > 1)
    rows = Rows(data, representation, include_v4)
    corrections = np.zeros_like(modes.vectors)
    for star in representation.stars:
        first = next(iter(star))
        corrections[first] = contracted(tensor, rows.of(tensor, first), first)
        if noise is not None:
            corrections[first] -= contracted(noise, rows.of(noise, first), first)
        for q, operation in star.items():
            turn = representation.matrix(operation, first)
            corrections[q] = turn @ corrections[first] @ turn.conj().T
    weights = modes.vectors * modes.root_mass[:, None]
    q = modes.q
    matrices = fourier(
        state.force_constants, state.supercell_matrix, q
    ) + weights @ corrections @ weights.conj().transpose(0, 2, 1)
    compact = symmetry.force_constants(inverse_fourier(matrices, state.supercell_matrix, q))
    n_configs = len(ensemble.energies)
    found = _diagonalised(state, representation, compact, n_configs, include_v4, noise is not None)
    if not errors or len(data) < 2:
        return found
    return replace(found, errors=square_errors(found, rows, tensor))


def harmonic_hessian(state: SschaState, evaluator: Evaluator) -> Hessian:
    """Of the static energy at the centroids of ``state``, as if nothing moved; evaluates the
    displacements that symmetry does not tell."""
    symmetry = Symmetry(state.atoms, state.supercell_matrix)
    compact = harmonic_force_constants(state.atoms, state.supercell_matrix, symmetry, evaluator)
    return _diagonalised(state, Representation(wavevectors(state), symmetry), compact)


def tensors(
    data: Samples, representation: Representation, halves: bool
) -> tuple[ThirdOrder, ThirdOrder | None]:
    """The symmetrised tensor, and half the difference between those of the two halves of the
    ensemble (or None)."""
    if not halves:
        return third_order(data).symmetrised(representation), None
    first, second = data.part(slice(0, None, 2)), data.part(slice(1, None, 2))
    share = len(first) / len(data)
    one, other = third_order(first), third_order(second)
    mean = one.mixed(other, share, 1.0 - share)
    return mean.symmetrised(representation), one.mixed(other, 0.5, -0.5).symmetrised(representation)


@dataclass(frozen=True)
class Rows:
    """R of H = Phi + D R at any q: L D, or with the fourth order L (1 - D4 L)^-1 D."""

    data: Samples
    representation: Representation
    include_v4: bool
    _solved: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def of(self, tensor: ThirdOrder, q: int) -> np.ndarray:
        """(3n, n_q, 3n, 3n): row, second q, modes there, modes at the third q."""
        modes, key = tensor.modes, (id(tensor), q)
        if not self.include_v4:
            rows = [
                tensor.block(q, second) * modes.response[second, modes.third(q, second)]
                for second in range(len(modes.points))
            ]
            return np.stack(rows, axis=1)
        if key not in self._solved:
            fourth = FourthOrder(self.data, self.representation)
            self._solved[key] = dressed_rows(fourth, tensor, q)
        return self._solved[key]

    def everywhere(self, tensor: ThirdOrder, q: int) -> np.ndarray:
        """The same, from the representative of the star where that is dear."""
        star = next(star for star in self.representation.stars if q in star)
        first = next(iter(star))
        if not self.include_v4 or first == q:
            return self.of(tensor, q)
        known, operation = self.of(tensor, first), star[q]
        image = self.representation.images[operation]
        rows = np.empty_like(known)
        for second in range(len(image)):
            triple = (first, second, tensor.modes.third(first, second))
            turns = [self.representation.matrix(operation, index) for index in triple]
            rows[:, image[second]] = transformed(known[:, second], turns)
        return rows


def contracted(tensor: ThirdOrder, rows: np.ndarray, q: int) -> np.ndarray:
    """D R at one q in modes, (3n, 3n), eV/A^2/amu."""
    total = np.zeros(tensor.modes.vectors.shape[1:], dtype=tensor.modes.vectors.dtype)
    for second in range(len(tensor.modes.points)):
        block, right = tensor.block(q, second), rows[:, second]
        total += block.reshape(len(block), -1) @ right.reshape(len(block), -1).conj().T
    return 0.5 * (total + total.conj().T)


def _diagonalised(
    state: SschaState,
    representation: Representation,
    compact: np.ndarray,
    n_configs: int = 0,
    fourth: bool = False,
    unbiased: bool = False,
) -> Hessian:
    modes = representation.modes
    q, mass = modes.q, np.outer(modes.root_mass, modes.root_mass)
    matrices = fourier(compact, state.supercell_matrix, q) / mass
    matrices = matrices if np.iscomplexobj(modes.vectors) else matrices.real
    squares, vectors = np.linalg.eigh(0.5 * (matrices + matrices.conj().transpose(0, 2, 1)))
    star = np.zeros(len(q), dtype=int)
    for number, members in enumerate(representation.stars):
        star[list(members)] = number
    # where no operation turns q around, -q is a star of its own with the same modes
    star = np.unique(np.minimum(star, star[modes.minus]), return_inverse=True)[1]
    return Hessian(
        state, compact, q, squares * HBAR**2, None, vectors, star, n_configs, fourth, unbiased
    )


def square_errors(found: Hessian, rows: Rows, tensor: ThirdOrder) -> np.ndarray:
    """(n_q, 3n) standard errors in eV^2 of ``found.squares``, to first order in the noise of the
    averages.

    A squared frequency is l = e+ (Phi + D R) e; a configuration c moves it by 2 Re(D_c R) (+ R D4_c
    R), averaged over the q points and modes that symmetry makes equal. The auxiliary Phi is as
    uncertain as the curvature of an ensemble of this size.
    """
    data, errors = rows.data, np.zeros_like(found.squares)
    for star in np.unique(found.star):
        members = np.flatnonzero(found.star == star)
        computed = [int(q) for q in members if data.modes.minus[q] >= q]
        parts = [contributions(found, data, q, rows.everywhere(tensor, q)) for q in computed]
        cubic, auxiliary = (sum(part) / len(computed) for part in zip(*parts, strict=True))
        for level in levels(found.squares[members[0]]):
            both = [
                standard_error(data.scatter(values[:, level].mean(axis=1)))
                for values in (cubic, auxiliary)
            ]
            errors[np.ix_(members, level)] = np.hypot(*both) * HBAR**2
    return errors


def levels(squares: np.ndarray) -> list[np.ndarray]:
    """Indices of the modes of each degenerate level; ``squares`` ascending."""
    steps = np.diff(squares) > DEGENERATE * np.abs(squares).max()
    return np.split(np.arange(len(squares)), np.flatnonzero(steps) + 1)


def contributions(
    found: Hessian, data: Samples, q: int, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What every configuration says about every squared frequency at q: through D (and D4), and
    through Phi; (n, 3n) each. ``rows`` : R (3n, n_q, 3n, 3n) in auxiliary modes."""
    into = data.modes.vectors[q].conj().T @ found.vectors[q]
    v, even, odd = (values[q] @ into.conj() for values in (data.scaled, data.even, data.odd))
    turned = np.tensordot(into.conj(), rows, axes=(0, 0))
    step = max(1, CHUNK // (len(data) * len(turned)))
    parts = (slice(offset, offset + step) for offset in range(0, len(turned), step))
    cubic = [
        _cubic(data, q, turned[p], v[:, p], even[:, p], into[:, p], found.fourth_order)
        for p in parts
    ]
    return np.concatenate(cubic, axis=1), -(v * odd.conj()).real


def _cubic(
    data: Samples,
    q: int,
    rows: np.ndarray,
    v: np.ndarray,
    even: np.ndarray,
    into: np.ndarray,
    fourth: bool,
) -> np.ndarray:
    """-2/3 Re[f (vRv - YR)* + 2 v (fRv)* - 2 (Y f R)*], and -Re[(vRv - YR)* fRv - 2 (Rv)* Y (Rf)]
    for the fourth order."""
    modes, stiffness = data.modes, data.modes.precision
    shape = (len(data), len(rows))
    vv, fv, odd_v, fourth_part = (np.zeros(shape, dtype=data.scaled.dtype) for _ in range(4))
    for first in range(len(modes.points)):
        second = modes.third(q, first)
        block = rows[:, first].reshape(-1, rows.shape[-1]).T
        with_v = (data.scaled[second].conj() @ block).reshape(*shape, -1)
        vv += np.einsum("cm,clm->cl", data.scaled[first].conj(), with_v)
        fv += np.einsum("cm,clm->cl", data.even[first].conj(), with_v)
        if fourth:
            with_f = (data.odd[second].conj() @ block).reshape(*shape, -1)
            odd_v += np.einsum("cm,clm->cl", data.odd[first].conj(), with_v)
            fourth_part += np.einsum(
                "clm,clm,m->cl", with_v.conj(), with_f, stiffness[first], optimize=True
            )
    if q == 0:
        vv = vv - np.einsum("lqii,qi->l", rows, stiffness)
    mean = data.even[0] @ np.einsum(
        "lmn,nl,n->ml", rows[:, 0].conj(), into.conj(), stiffness[q], optimize=True
    )
    result = (even * vv.conj() + 2.0 * v * fv.conj() - 2.0 * mean).real * (-2.0 / 3.0)
    if fourth:
        result -= (vv.conj() * odd_v - 2.0 * fourth_part).real
    return result
