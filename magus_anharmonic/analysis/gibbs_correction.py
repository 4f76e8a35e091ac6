"""From the free energy of a model to that of the reference, by the labels of one ensemble of the model's SSCHA state.

First order (Gibbs-Bogoliubov): the state that minimises F with the model's energies is a trial state for the reference, so that
F_ref <= F_model + <E_ref - E_model>_rho, without any force. Second order: the state would relax in the field of the gradient errors,
-1/2 dg . Phi^-1 . dg by centroids and by force constants. Both hold at the model's cell; relaxing that costs another second-order
term, -V (dP)^2 / 2B, which is left out and small (1 GPa against a bulk modulus of 500 GPa at 4 A^3/atom: 0.03 meV/atom).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from magus_anharmonic.analysis.gradient_errors import force_differences
from magus_anharmonic.analysis.labelled_ensemble import Labelled
from magus_anharmonic.analysis.tables import GibbsCorrection
from magus_anharmonic.sscha.averages import gamma_matrix, matrix_decrease, pair_means, quadratic_decrease, standard_error
from magus_anharmonic.sscha.begin import SYMMETRY_OF_A_STATE
from magus_anharmonic.sscha.symmetry import Symmetry


@dataclass(frozen=True)
class Correction:
    """What to add to a model's G, eV/atom; ``second_order`` is None with fewer than two pairs."""

    n_labels: int
    first_order: float
    first_order_error: float
    second_order: float


def gibbs_correction(labelled: Labelled) -> Correction:
    """<E_ref - E_model>_rho / N with the standard error of pair means, and the second-order remainder, eV/atom.

    The remainder is a mean over products of different pairs, so that noise does not add up to a decrease.
    """
    state = labelled.state
    n_supercell = len(state.supercell)
    pairs = pair_means(energy_differences(labelled)) / n_supercell
    symmetry = Symmetry(state.atoms, state.repeats, SYMMETRY_OF_A_STATE)
    difference = -force_differences(labelled)
    n_configs = len(difference)
    cells = difference.reshape(n_configs, state.n_cells, -1, 3).mean(axis=1)
    compliance = np.linalg.pinv(gamma_matrix(state), rcond=1e-9)
    decrease, _ = quadratic_decrease(symmetry.vectors(pair_means(cells)).reshape(n_configs // 2, -1), compliance)
    displacements = labelled.reference.displacements.reshape(n_configs, -1)
    decrease += matrix_decrease(state, displacements, difference.reshape(n_configs, -1), symmetry)[0]
    return Correction(n_configs, float(pairs.mean()), float(standard_error(pairs)), -decrease / len(state.atoms))


def energy_differences(labelled: Labelled) -> np.ndarray:
    """Energy of the reference minus that of the model, (n,) eV per supercell."""
    return labelled.reference.energies - labelled.model.energies


def row(correction: Correction, phase: str, pressure: float) -> GibbsCorrection:
    """The line of ``gibbs_correction.csv``; ``pressure`` in GPa."""
    return GibbsCorrection(
        phase, pressure, correction.n_labels, correction.first_order, correction.first_order_error, correction.second_order
    )
