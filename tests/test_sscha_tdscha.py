"""What a native run leaves loads in tdscha (time-dependent SSCHA), and its static limit is our
Hessian.

tdscha is not among the dependencies: it is built from source with a Fortran compiler (`pip install
--no-deps tdscha`).
"""

from dataclasses import replace

import numpy as np
import pytest
from crystal_models import Crystals, crystal

from magus_anharmonic.sscha import free_energy, python_sscha
from magus_anharmonic.sscha.hessian import free_energy_hessian
from magus_anharmonic.sscha.qe_files import write_ensemble
from magus_anharmonic.sscha.result import final_ensemble
from magus_anharmonic.sscha.state import expand
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import HBAR, RYDBERG

pytest.importorskip(
    "tdscha", reason="tdscha is not installed (built from source: pip install --no-deps tdscha)"
)

POLAR = crystal((3.0, 3.1, 3.3), 1.0, 0.2, -0.6, 1.0, offset=(0.0, 0.0, 0.25))
"""H off the centre along z: third-order terms that symmetry does not forbid."""


def loaded(run, ensemble, n_populations):
    """python-sscha's ensemble of the run's last matrices and the folder that `write_ensemble`
    made."""
    import cellconstructor as CC
    import cellconstructor.Phonons
    import sscha.Ensemble

    count = len(list(run.glob(f"dyn_pop{n_populations}_*")))
    found = sscha.Ensemble.Ensemble(
        CC.Phonons.Phonons(str(run / f"dyn_pop{n_populations}_"), count), T0=0.0
    )
    found.load_bin(str(ensemble), 1)
    return found


def without_mean_force(state, ensemble):
    """What is left of the force on the centroids enters the two estimates of the third order in
    different ways."""
    count = len(ensemble.energies)
    residual = (
        ensemble.forces.reshape(count, -1) + ensemble.displacements.reshape(count, -1) @ state.full
    )
    return replace(
        ensemble, forces=ensemble.forces - residual.mean(axis=0).reshape(ensemble.forces.shape[1:])
    )


@pytest.mark.slow
def test_a_native_run_loads_in_tdscha_whose_static_limit_is_our_hessian(tmp_path):
    """At zero frequency, without the fourth order, the response of the modes is the inverse of the
    Hessian between them."""
    import tdscha.DynamicalLanczos as lanczos

    result = free_energy(
        POLAR.atoms,
        Crystals([POLAR]),
        supercell=(2, 1, 1),
        cell="fixed",
        n_configs=60,
        directory=tmp_path / "run",
    )
    state, ensemble = result.state, final_ensemble(tmp_path / "run", result)
    ensemble = without_mean_force(state, ensemble)
    write_ensemble(state, ensemble, tmp_path / "ensemble", 1)
    with python_sscha.quiet(tmp_path / "log"):
        response = lanczos.Lanczos(
            loaded(tmp_path / "run", tmp_path / "ensemble", result.n_populations), mode=1
        )
        response.ignore_v3, response.ignore_v4 = False, True
        response.init(use_symmetries=True)
        quanta = np.array(response.w) * RYDBERG
        static = np.zeros(len(quanta))
        for mode in range(len(quanta)):
            response.prepare_mode(mode)
            response.run_FT(3 * len(quanta))
            green = response.get_green_function_continued_fraction(
                np.array([0.0]), use_terminator=False, smearing=0.0
            )
            static[mode] = RYDBERG / np.sqrt(green[0].real)
    own, order = state.modes, np.argsort(quanta)
    assert quanta[order] == pytest.approx(own.hbar_omega, abs=1e-7), (
        "the matrices are those of the state"
    )
    hessian = free_energy_hessian(
        state, ensemble, Symmetry(state.atoms, state.supercell_matrix), unbiased=False, errors=False
    )
    root = np.sqrt(np.repeat(state.supercell.get_masses(), 3))
    inside = (
        own.vectors.T
        @ (expand(hessian.force_constants, state.supercell_matrix) / np.outer(root, root))
        @ own.vectors
    )
    ours = HBAR / np.sqrt(np.diag(np.linalg.inv(inside)))
    shift = np.abs(ours - own.hbar_omega).max()
    assert shift > 1e-4, "there is a third order to compare"
    assert static[order] == pytest.approx(ours, abs=1e-6 * shift)
