"""Rotating molecules are told apart from stiff ones, because a Cartesian Gaussian overestimates
their free energy."""

import numpy as np
import pytest
from ase import Atoms

from magus_anharmonic.sscha.state import (
    LARGE_LIBRATION,
    SschaState,
    librations,
    rotation_warning,
    sample,
)
from magus_anharmonic.units import HBAR


def hydrogen_molecule(stretch, tilt, bond=0.74, symbols="H2"):
    """One molecule along x per cubic cell; springs (eV/A^2) along and across the bond, and to fixed
    sites (weak, both atoms)."""
    atoms = Atoms(
        symbols, positions=[[1.0, 1.0, 1.0], [1.0 + bond, 1.0, 1.0]], cell=[4.0, 4.0, 4.0], pbc=True
    )
    spring = np.diag([stretch, tilt, tilt])
    block = np.stack([np.stack([spring, -spring]), np.stack([-spring, spring])])
    return SschaState(atoms, (1, 1, 1), block[None], 0.0)


def test_the_angle_is_that_of_a_two_dimensional_oscillator():
    """<u_perp^2> per direction of the relative motion: hbar / (2 mu omega), mu = m / 2, omega^2 = k
    / mu."""
    state = hydrogen_molecule(stretch=30.0, tilt=1.0)
    reduced = state.atoms.get_masses()[0] / 2.0
    expected = np.sqrt(HBAR / (2.0 * np.sqrt(1.0 * reduced))) / 0.74
    ((unit, bond, angle),) = librations(state)
    assert (unit, bond) == ("H2", pytest.approx(0.74)) and angle == pytest.approx(
        expected, rel=1e-10
    )


def test_the_angle_is_that_of_the_sampled_molecules():
    state = hydrogen_molecule(stretch=30.0, tilt=2.0)
    u = sample(state, 20000, np.random.default_rng(1))
    across = (u[:, 1] - u[:, 0])[:, 1:]
    assert librations(state)[0][2] == pytest.approx(np.sqrt((across**2).mean()) / 0.74, rel=0.02)


def test_soft_librations_are_flagged_and_stiff_or_long_bonds_are_not():
    soft, stiff = hydrogen_molecule(30.0, 0.2), hydrogen_molecule(30.0, 20.0)
    assert librations(soft)[0][2] > LARGE_LIBRATION > librations(stiff)[0][2]
    assert rotation_warning(soft).startswith("rotating H2 units (1 bonds of 0.74 A, libration ")
    assert rotation_warning(stiff) == ""
    assert librations(hydrogen_molecule(30.0, 0.2, bond=1.0)) == [], (
        "metallic hydrogen has no molecules"
    )


def test_a_molecule_across_the_cell_boundary_is_one_molecule():
    state = hydrogen_molecule(30.0, 0.2)
    moved = state.atoms.copy()
    moved.positions[:, 0] -= 1.0 + 0.37
    moved.wrap()
    across = SschaState(moved, (1, 1, 1), state.force_constants, 0.0)
    assert np.allclose(
        [entry[1:] for entry in librations(across)], [entry[1:] for entry in librations(state)]
    )


def test_carbon_with_hydrogen_counts_too():
    state = hydrogen_molecule(30.0, 0.02, bond=1.09, symbols="CH")
    assert rotation_warning(state).startswith("rotating C-H units")
