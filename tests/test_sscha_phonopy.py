"""phonopy's own SSCHA as an oracle: another code, another fit of the force constants (symfc), no
reweighting, no common line."""

import numpy as np
import pytest
from ase import Atoms
from crystal_models import Crystals, crystal
from sscha_models import harmonic_state, phonopy_of

from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.state import fourier

SUPERCELL_MATRIX = (2, 2, 2)
CRYSTAL = crystal((3.0,) * 3, 0.6, 0.1, -0.3, 1.5)
MODEL = Crystals([CRYSTAL])
POINTS = np.array([[0, 0, 0], [0.5, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0.5]])
"""Those of the supercell, so that nothing is interpolated."""
TEMPERATURE = 300.0


class AsMlp:
    """The model where phonopy has its machine-learned potential."""

    def evaluate(self, cells):
        structures = [Atoms(c.symbols, positions=c.positions, cell=c.cell, pbc=True) for c in cells]
        found = MODEL.evaluate(structures)
        return np.array(found.energy), np.array(found.forces), np.zeros((len(cells), 6))


def phonopys(n_snapshots, n_iterations):
    """Its SSCHA after all iterations, which are kept."""
    from phonopy.sscha.core import MLPSSCHA

    return MLPSSCHA(
        phonopy_of(CRYSTAL.atoms, SUPERCELL_MATRIX),
        AsMlp(),
        temperature=TEMPERATURE,
        number_of_snapshots=n_snapshots,
        max_iterations=n_iterations,
        random_seed=1,
    ).run()


def their_squares(sscha):
    """(iterations, points, modes) squared frequencies in phonopy's unit of the force constants that
    each iteration sampled."""
    from phonopy.harmonic.force_constants import compact_fc_to_full_fc

    found = []
    for compact in sscha.to_trace(all_force_constants=True).force_constants_history:
        sscha.phonopy.force_constants = compact_fc_to_full_fc(sscha.phonopy.primitive, compact)
        found.append(
            [np.linalg.eigvalsh(sscha.phonopy.get_dynamical_matrix_at_q(q)) for q in POINTS]
        )
    return np.array(found)


def our_squares(force_constants):
    """(points, modes) the same of compact force constants: eV/A^2/amu in both codes."""
    root = np.sqrt(np.repeat(CRYSTAL.atoms.get_masses(), 3))
    return np.array(
        [
            np.linalg.eigvalsh(matrix / np.outer(root, root))
            for matrix in fourier(force_constants, SUPERCELL_MATRIX, POINTS)
        ]
    )


def ours(seed, n_configs=400):
    return free_energy(
        CRYSTAL.atoms,
        MODEL,
        0.0,
        TEMPERATURE,
        supercell=SUPERCELL_MATRIX,
        cell="fixed",
        n_configs=n_configs,
        seed=seed,
        free_energy_tolerance=1e-4,
    )


@pytest.mark.slow
def test_self_consistent_force_constants_and_free_energy_equal_phonopys():
    """Centroids stay where symmetry holds them, the cell is fixed: then phonopy's fixed point is
    the minimum of SSCHA."""
    sscha = phonopys(400, 12)
    # the first iterations lead from the harmonic force constants
    theirs, results = their_squares(sscha)[4:], [ours(seed) for seed in range(4)]
    assert all(result.converged for result in results)
    mine = np.array([our_squares(result.force_constants) for result in results])
    error = np.sqrt(mine.var(axis=0, ddof=1) / len(mine) + theirs.var(axis=0, ddof=1) / len(theirs))
    difference, scale = mine.mean(axis=0) - theirs.mean(axis=0), theirs.mean(axis=0).max()
    assert error.max() < 0.01 * scale
    assert np.abs(difference[0, :3]).max() < 1e-6 * scale, "acoustic modes at Gamma"
    assert np.all(np.abs(difference) <= 4.5 * error + 1e-6 * scale)
    harmonic = our_squares(harmonic_state(CRYSTAL.atoms, SUPERCELL_MATRIX, MODEL).force_constants)
    assert np.abs(mine.mean(axis=0) - harmonic).max() > 20.0 * error.max(), (
        "anharmonicity is what is compared"
    )

    energies = np.array([step.free_energy for step in sscha.history[4:]]) / len(CRYSTAL.atoms)
    found = np.array([result.gibbs for result in results])
    reference = float(MODEL.evaluate([CRYSTAL.atoms]).energy[0]) / len(CRYSTAL.atoms)
    noise = np.sqrt(found.var(ddof=1) / len(found) + energies.var(ddof=1) / len(energies))
    assert found.mean() - reference == pytest.approx(energies.mean(), abs=4.0 * noise + 1e-4)
    assert noise < 5e-4
