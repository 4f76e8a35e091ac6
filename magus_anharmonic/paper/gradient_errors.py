"""Errors of gradients in an ensemble, and the correction of G.

From the free energy of a model to that of the reference, by the labels of one ensemble of the
model's SSCHA state.

First order (Gibbs-Bogoliubov): the state that minimises F with the model's energies is a trial
state for the reference, so that F_ref <= F_model + <E_ref - E_model>_rho, without any force. Second
order: the state would relax in the field of the gradient errors, -1/2 dg . H^-1 . dg by centroids,
by force constants and, where its stiffness is known, by the cell. Both together are G of the
reference at its own minimum, up to third order.

Errors of a model in an SSCHA ensemble: forces, gradients of the free energy, and what averaging
does to them (Eqs. 11 to 15).

Gao, Fang, Errea, arXiv:2512.20424. Every average is over +u/-u pairs, whose means are independent
of one another. For a vector with K components whose mean over n pairs has the root mean square R,
R^2 = systematic^2 + statistical^2: the systematic part is what an infinite ensemble would leave
(estimated without bias, as the mean product of different pairs), the statistical part goes with
1/sqrt(n). The paper's numbers are R.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from magus_anharmonic.paper.ensemble_labels import Labelled
from magus_anharmonic.paper.tables import GRADIENT_UNITS, GibbsCorrection, GradientError
from magus_anharmonic.sscha.cell import CellStiffness
from magus_anharmonic.sscha.ensemble import (
    matrix_decrease,
    pair_means,
    quadratic_decrease,
    standard_error,
)
from magus_anharmonic.sscha.start import SYMMETRY_OF_A_STATE
from magus_anharmonic.sscha.state import fold
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import GPa

HIGHER = 1.0 / 3.0
"""Part of the second order that higher ones may change: for two crystals whose volume the reference
changes by 3 % it was 37 and 15 % too large."""


@dataclass(frozen=True)
class Correction:
    """What to add to a model's G, eV/atom; ``error`` : of both orders together, what is not known
    of the second one included; ``electronic``, with its standard error: the free energy of the
    electrons at the temperature of the state minus their energy, None where it was not asked for.
    """

    n_labels: int
    first_order: float
    first_order_error: float
    second_order: float
    error: float
    electronic: float | None = None
    electronic_error: float | None = None

    @property
    def total(self) -> float:
        """Both orders."""
        return self.first_order + self.second_order


def gibbs_correction(
    labelled: Labelled, cell: CellStiffness | None = None, left: float = 0.0
) -> Correction:
    """<E_ref - E_model>_rho / N with the standard error of pair means, and the second-order
    remainder, eV/atom.

    The remainder is a mean over products of different pairs, so that noise does not add up to a
    decrease. ``cell`` : how stiff the cell is, where it may change. ``left`` (eV/atom) : what the
    model itself predicts its state to fall by; it is in G of the model, but its gradient may add to
    that of the reference, by 2 sqrt(left * remainder) at most, which is part of the error. So are
    `HIGHER` of the remainder and the error of the stiffness of the cell.
    """
    state = labelled.state
    n_supercell, n = len(state.supercell), len(state.atoms)
    pairs = pair_means(energy_differences(labelled)) / n_supercell
    symmetry = Symmetry(state.atoms, state.supercell_matrix, SYMMETRY_OF_A_STATE)
    difference = -force_differences(labelled)
    n_configs = len(difference)
    cells = difference.reshape(n_configs, state.n_cells, -1, 3).mean(axis=1)
    compliance = np.linalg.pinv(state.gamma, rcond=1e-9)
    forces = symmetry.vectors(pair_means(cells)).reshape(n_configs // 2, -1)
    by_centroids, influence = quadratic_decrease(forces, compliance)
    displacements = labelled.reference.displacements.reshape(n_configs, -1)
    by_matrix, of_matrix = matrix_decrease(
        state, displacements, difference.reshape(n_configs, -1), symmetry
    )
    by_cell, of_cell, misfit = _cell_decrease(labelled, cell, symmetry, forces @ compliance)
    decrease, influence = by_centroids + by_matrix + by_cell, influence + of_matrix + of_cell
    parts = (
        float(standard_error(pairs * n - influence)),
        HIGHER * decrease,
        misfit,
        2.0 * n * float(np.sqrt(max(left, 0.0) * max(decrease, 0.0) / n)),
    )
    found = Correction(
        n_configs,
        float(pairs.mean()),
        float(standard_error(pairs)),
        -decrease / n,
        float(np.linalg.norm(parts)) / n,
    )
    if labelled.electronic is None:
        return found
    electrons = pair_means(labelled.electronic) / n_supercell
    error = float(standard_error(electrons))
    return replace(found, electronic=float(electrons.mean()), electronic_error=error)


def _cell_decrease(
    labelled: Labelled, cell: CellStiffness | None, symmetry: Symmetry, shift: np.ndarray
) -> tuple[float, np.ndarray, float]:
    """What the cell gains by following the reference, eV per primitive cell, how each pair moves
    it, and what is not known of it by the stiffness; ``shift`` (n_pairs, 3n) A of the centroids."""
    if cell is None:
        return 0.0, np.zeros(len(shift)), 0.0
    excess = replace(cell, pressure=0.0).relaxed_excess(
        symmetry.tensor(pair_means(stress_differences(labelled))),
        shift,
        size := labelled.state.atoms.get_volume(),
    )
    decrease, influence = quadratic_decrease(excess, size * cell.compliance)
    strain = -cell.compliance @ excess.mean(axis=0)
    return decrease, influence, size * cell.misfit(strain)


def stress_differences(labelled: Labelled) -> np.ndarray:
    """Stress of the reference minus that of the model, (n, 3, 3) eV/A^3, virial of the
    displacements included."""
    u, volume = labelled.reference.displacements, labelled.state.supercell.get_volume()
    virial = np.einsum("cai,caj->cij", -force_differences(labelled), u) / volume
    static = labelled.reference.stresses - labelled.model.stresses
    return static + 0.5 * (virial + virial.transpose(0, 2, 1))


def energy_differences(labelled: Labelled) -> np.ndarray:
    """Energy of the reference minus that of the model, (n,) eV per supercell."""
    return labelled.reference.energies - labelled.model.energies


def row(correction: Correction, phase: str, pressure: GPa, temperature: float) -> GibbsCorrection:
    """The line of ``gibbs_correction.csv``; ``pressure`` in GPa, ``temperature`` in K."""
    return GibbsCorrection(
        phase,
        pressure,
        correction.n_labels,
        correction.first_order,
        correction.first_order_error,
        correction.second_order,
        correction.electronic,
        correction.electronic_error,
        None if correction.electronic is None else temperature,
    )


@dataclass(frozen=True)
class Parts:
    """Root mean squares over the components of an averaged error, in the unit of its quantity.

    single : of one configuration; mean : of the average over the ensemble; systematic, statistical
    : its two parts; systematic_error : standard error of the systematic part by the jackknife over
    pairs (where that part is not told from zero: the value that it may have); floor : ``single``
    over the root of the number of configurations, what independent errors without a systematic part
    would leave.
    """

    single: float
    mean: float
    systematic: float
    statistical: float
    systematic_error: float
    floor: float


@dataclass(frozen=True)
class GradientErrors:
    """Errors of a model against its reference in one ensemble of ``n_configs``.

    force : eV/A, RMSE of all components of all configurations (Eq. 12). centroid : eV/A, of the
    gradient by the centroids of the supercell (Eq. 13; no symmetry and no translation averaged, as
    in the paper), symmetric_centroid : the same averaged over translations and space group, as the
    SSCHA uses it. force_constants, symmetric_force_constants : eV/A^2, the same for Eq. 15.
    bo_centroid : eV/A, forces at the centroids (Eq. 14), None without a label of them.
    """

    n_configs: int
    force: float
    centroid: Parts
    symmetric_centroid: Parts
    force_constants: Parts
    symmetric_force_constants: Parts
    bo_centroid: float | None


def gradient_errors(labelled: Labelled) -> GradientErrors:
    """All errors of ``labelled``; model minus reference."""
    state = labelled.state
    difference = force_differences(labelled)
    n_configs = len(difference)
    flat = difference.reshape(n_configs, -1)
    force = float(np.sqrt(np.mean(flat**2)))
    symmetry = Symmetry(state.atoms, state.supercell_matrix, SYMMETRY_OF_A_STATE)
    cells = difference.reshape(n_configs, state.n_cells, -1, 3).mean(axis=1)
    symmetric = symmetry.vectors(cells).reshape(n_configs, -1)
    return GradientErrors(
        n_configs=n_configs,
        force=force,
        centroid=parts(gram(pair_means(flat)), force, n_configs),
        symmetric_centroid=parts(
            gram(pair_means(symmetric)), float(np.sqrt(np.mean(symmetric**2))), n_configs
        ),
        force_constants=force_constant_parts(labelled, flat),
        symmetric_force_constants=symmetric_force_constant_parts(labelled, flat, symmetry),
        bo_centroid=None
        if labelled.centroid is None
        else _rms(labelled.centroid[1] - labelled.centroid[0]),
    )


def force_differences(labelled: Labelled) -> np.ndarray:
    """Forces of the model minus those of the reference, (n, n_supercell, 3) eV/A (Eq. 11)."""
    return labelled.model.forces - labelled.reference.forces


def force_constant_parts(labelled: Labelled, difference: np.ndarray) -> Parts:
    """Error of the gradient by the force constants (Eqs. 10 and 15), eV/A^2; ``difference`` (n, 3N)
    of the forces.

    The harmonic forces drop out of the difference, so that G_i,ab = w_a d_b with w = Psi^-1 u. A
    pair has w and -w: only the odd part of the error stays. Products of pairs factorise, so that no
    (n, 3N, 3N) array is needed.
    """
    n_configs, size = difference.shape
    weights = labelled.reference.displacements.reshape(n_configs, -1) @ labelled.state.precision
    single = float(
        np.sqrt(np.sum((weights**2).sum(axis=1) * (difference**2).sum(axis=1)) / n_configs) / size
    )
    odd = 0.5 * (difference[0::2] - difference[1::2])
    first = weights[0::2]
    return parts((first @ first.T) * (odd @ odd.T) / size**2, single, n_configs)


def symmetric_force_constant_parts(
    labelled: Labelled, difference: np.ndarray, symmetry: Symmetry
) -> Parts:
    """`force_constant_parts` after averaging over translations, space group and the two indices:
    components of compact force constants."""
    state, n_configs = labelled.state, len(difference)
    weights = labelled.reference.displacements.reshape(n_configs, -1) @ state.precision
    compact = []
    for w, d in zip(weights, difference, strict=True):
        product = np.outer(w, d)
        compact.append(
            symmetry.force_constants(
                fold(0.5 * (product + product.T), state.supercell_matrix)
            ).ravel()
        )
    vectors = np.array(compact)
    return parts(gram(pair_means(vectors)), float(np.sqrt(np.mean(vectors**2))), n_configs)


def mean_force_constant_gradient(labelled: Labelled, forces: np.ndarray) -> np.ndarray:
    """Eqs. 9 and 10 with ``forces`` (n, N, 3): the gradient of the free energy by the force
    constants, (3N, 3N) eV/A^2."""
    n_configs = len(forces)
    u = labelled.reference.displacements.reshape(n_configs, -1)
    residual = forces.reshape(n_configs, -1) + u @ labelled.state.full
    return (u @ labelled.state.precision).T @ residual / n_configs


def gram(vectors: np.ndarray) -> np.ndarray:
    """Mean products of the components of all pairs of ``vectors`` (n, K): (n, n)."""
    return vectors @ vectors.T / vectors.shape[1]


def parts(products: np.ndarray, single: float, n_configs: int) -> Parts:
    """The parts of an averaged error from the mean products (n_pairs, n_pairs) of its pair
    means."""
    n = len(products)
    diagonal, rows = np.diag(products), products.sum(axis=1)
    total, trace = rows.sum(), diagonal.sum()
    mean = total / n**2
    systematic = (total - trace) / (n * (n - 1))
    error = np.inf
    if n > 2:
        left_out = (total - 2.0 * rows + diagonal - (trace - diagonal)) / ((n - 1) * (n - 2))
        error = float(np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2)))
    return Parts(
        single=single,
        mean=float(np.sqrt(max(mean, 0.0))),
        systematic=float(np.sqrt(max(systematic, 0.0))),
        statistical=float(np.sqrt(max(mean - systematic, 0.0))),
        systematic_error=_error_of_root(float(systematic), error),
        floor=single / np.sqrt(n_configs),
    )


def _error_of_root(square: float, error: float) -> float:
    """Standard error of a root from that of its square; where the square is within its error, the
    root of that error."""
    return error / (2.0 * np.sqrt(square)) if square > error else float(np.sqrt(error))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def rows(errors: GradientErrors, phase: str, pressure: GPa) -> list[GradientError]:
    """The lines of ``gradient_errors.csv``; ``pressure`` in GPa."""

    def line(quantity: str, rmse: float, found: Parts | None) -> GradientError:
        numbers = (
            (None, None, None)
            if found is None
            else (found.systematic, found.statistical, found.floor)
        )
        unit = GRADIENT_UNITS[quantity]
        error = None if found is None else found.systematic_error
        single = None if found is None else found.single
        return GradientError(
            phase, pressure, errors.n_configs, quantity, unit, rmse, *numbers, error, single
        )  # type: ignore[arg-type]

    lines = [
        line("force", errors.force, None),
        line("gradient_centroid", errors.centroid.mean, errors.centroid),
        line("gradient_force_constants", errors.force_constants.mean, errors.force_constants),
    ]
    if errors.bo_centroid is not None:
        lines.append(line("bo_force_centroid", errors.bo_centroid, None))
    return lines
