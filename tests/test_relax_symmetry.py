"""``fix_symmetry``: the projection is exact, supercells are no burden, and what cannot be kept is
said."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import spglib
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.spacegroup import crystal

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import CalculatorEvaluator
from magus_anharmonic.potential import guards as symmetrise
from magus_anharmonic.potential.guards import SymmetryProjector
from magus_anharmonic.potential.relax import relax
from magus_anharmonic.structures import spglib_cell

QUARTZ = crystal(
    ["Si", "O"],
    [(0.4697, 0, 0), (0.4135, 0.2669, 0.1191)],
    spacegroup=152,
    cellpar=[4.91, 4.91, 5.4, 90, 90, 120],
)
SLANTED = bulk("NaCl", "rocksalt", a=5.6).repeat((2, 1, 1))
SLANTED.set_cell(np.array([[1, 0, 0], [7, 1, 0], [-9, 5, 1]]) @ SLANTED.cell.array)


def over_all_operations(atoms, forces):
    """The average over every operation that spglib lists, each image found among all atoms and
    neighbouring cells."""
    found = spglib.get_symmetry(spglib_cell(atoms), symprec=0.01)
    lattice = atoms.cell.array.T
    result = np.zeros_like(forces)
    shifts = np.stack(np.meshgrid(*3 * [[-1, 0, 1]]), -1).reshape(-1, 3)
    for rotation, translation in zip(found["rotations"], found["translations"], strict=True):
        difference = (atoms.get_scaled_positions(wrap=False) @ rotation.T + translation)[
            :, None
        ] - atoms.get_scaled_positions(wrap=False)
        difference = (difference - np.round(difference))[:, :, None] + shifts
        image = np.linalg.norm(difference @ lattice.T, axis=-1).min(axis=2).argmin(axis=1)
        result[image] += forces @ (lattice @ rotation @ np.linalg.inv(lattice)).T
    return result / len(found["rotations"])


def n_operations(atoms, symprec):
    return len(spglib.get_symmetry(spglib_cell(atoms), symprec=symprec)["rotations"])


@pytest.mark.parametrize(
    "atoms",
    [bulk("Cu").repeat((2, 2, 1)), QUARTZ, QUARTZ.repeat((2, 1, 1)), SLANTED],
    ids=["metal", "quartz", "doubled", "slanted"],
)
def test_translations_and_one_operation_for_each_rotation_are_the_average_over_all_operations(
    atoms,
):
    rng = np.random.default_rng(0)
    atoms = atoms.copy()
    atoms.rattle(2e-4, rng=rng)
    projector = SymmetryProjector(atoms)
    forces = rng.normal(size=(len(atoms), 3))
    projected = projector.forces(atoms.cell.array, forces)
    np.testing.assert_allclose(projected, over_all_operations(atoms, forces), atol=1e-12)
    np.testing.assert_allclose(projector.forces(atoms.cell.array, projected), projected, atol=1e-12)
    healed = projector.structure(atoms)
    assert n_operations(healed, 1e-6) == n_operations(atoms, 0.01) > n_operations(atoms, 1e-6)


def test_a_supercell_of_125_atoms_keeps_its_group_within_300_megabytes():
    program = """
import resource, numpy as np
from ase.build import bulk
from magus_anharmonic.potential.guards import SymmetryProjector
from magus_anharmonic.structures import space_group
atoms = bulk("Cu").repeat(5)
atoms.rattle(1e-3, seed=1)
SymmetryProjector(bulk("Cu"))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
projector = SymmetryProjector(atoms)
print([len(step.rotations) for step in projector.steps], space_group(projector.structure(atoms), 1e-5))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "[125, 48] Fm-3m (225)", done.stderr


def test_a_structure_whose_symmetry_cannot_be_set_up_fails_alone(monkeypatch):
    class Costly(SymmetryProjector):
        def __init__(self, atoms, symprec):
            if len(atoms) > 1:
                raise ValueError("no operation closes the group")
            super().__init__(atoms, symprec)

    monkeypatch.setattr("magus_anharmonic.potential.relaxation.SymmetryProjector", Costly)
    results = relax(
        CalculatorEvaluator(EMT()),
        [bulk("Cu"), bulk("Cu").repeat(2), bulk("Al")],
        fix_symmetry=True,
    )
    assert (
        [result.failed for result in results] == [False, True, False]
        and results[0].converged
        and results[2].converged
    )
    assert results[1].reason == "no operation closes the group" and np.isnan(results[1].enthalpy)


@pytest.mark.parametrize("symprec", [0, -1, np.nan, np.inf, None])
def test_a_symprec_that_would_crash_spglib_or_lose_the_symmetry_is_refused(symprec):
    with pytest.raises(InputError, match="symprec"):
        relax(CalculatorEvaluator(EMT()), [bulk("Cu")], fix_symmetry=True, symprec=symprec)


def test_operations_that_put_two_atoms_on_one_are_refused():
    atoms = Atoms("H2", scaled_positions=[[0, 0, 0], [0.4, 0, 0]], cell=3 * [3.0], pbc=True)
    images = symmetrise._Images(atoms, 5.0)
    with pytest.raises(InputError, match="two atoms on one; take a smaller symprec"):
        images(np.eye(3), np.array([0.2, 0, 0]))


def test_where_no_space_group_is_found_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(symmetrise, "spglib_or_none", lambda *arguments, **options: None)
    projector = SymmetryProjector(bulk("Cu"))
    assert "finds no space group of Cu at 0.01 A" in caplog.text and len(projector.rotations) == 1


def test_structures_without_three_periods_relax_without_symmetry_and_one_line_says_so(caplog):
    slab = fcc111("Cu", (1, 1, 3), vacuum=5.0)
    with caplog.at_level(logging.WARNING):
        relax(CalculatorEvaluator(EMT()), [slab, bulk("Cu"), slab], fix_symmetry=True, max_steps=2)
    assert [line for line in caplog.messages if "fix_symmetry" in line] == [
        "fix_symmetry: 2 of 3 structures are not periodic in three directions and relax without it"
    ]
