"""Very skewed cells are the crystals that they describe, and cells that are none are no cells."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111, molecule

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.graph import find_neighbours
from magus_anharmonic.potential.guards import is_skewed, isolated, overlap, search_cell, why_invalid

TURNS = {
    "modest": [[1, 0, 0], [2, 1, 0], [-1, 1, 1]],
    "strong": [[1, 0, 0], [300, 1, 0], [1000, 700, 1]],
    "extreme": [[1, 0, 0], [-40000, 1, 0], [70000, 90000, 1]],
    "left": [[0, 1, 0], [1, 300, 0], [90, -50, 1]],
}


def described(atoms, turn):
    """The same crystal with other lattice vectors."""
    other = atoms.copy()
    other.set_cell(np.array(turn) @ atoms.cell.array)
    return other


@pytest.mark.parametrize("turn", list(TURNS.values()), ids=list(TURNS))
def test_a_skewed_description_of_a_crystal_has_its_energy_forces_and_stress(turn, potential, h3s):
    double = potential.double()
    crystal = h3s(3.1, 0.1)
    crystal.rattle(0.05, seed=1)
    reference = double.evaluate([crystal])
    for copies in (1, 4):
        found = double.evaluate([described(crystal, turn)] * copies)
        np.testing.assert_allclose(found.energy, reference.energy[0], rtol=0, atol=1e-7)
        np.testing.assert_allclose(found.forces, [reference.forces[0]] * copies, atol=1e-6)
        np.testing.assert_allclose(
            found.stress, np.repeat(reference.stress, copies, axis=0), atol=1e-7
        )


def test_a_skewed_slab_has_its_energy_and_forces_whatever_its_third_vector(potential):
    double = potential.double()
    slab = fcc111("Cu", (1, 1, 3), vacuum=5.0)
    slab.rattle(0.05, seed=1)
    reference = double.evaluate([slab])
    for turn in ([[1, 0, 0], [900, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [500, -800, 1]]):
        skewed = described(slab, turn)
        assert is_skewed(skewed.cell.array)
        found = double.evaluate([skewed])
        assert found.energy[0] == pytest.approx(reference.energy[0], abs=1e-8)
        np.testing.assert_allclose(found.forces[0], reference.forces[0], atol=1e-7)


def test_a_skewed_crystal_relaxes_and_keeps_its_cell_vectors(potential, h3s):
    skewed = described(h3s(3.1, 0.1), TURNS["strong"])
    assert why_invalid(skewed) == overlap(skewed) == "" and not isolated(skewed)
    straight, (result,) = (
        potential.relax([h3s(3.1, 0.1)], 100.0, max_steps=3)[0],
        potential.relax([skewed], 100.0, max_steps=3),
    )
    assert not result.failed and result.enthalpy == pytest.approx(straight.enthalpy, abs=1e-4)
    assert (
        np.abs(result.atoms.cell.array - skewed.cell.array).max()
        < 0.2 * np.abs(skewed.cell.array).max()
    )


def test_ordinary_cells_are_searched_as_they_are(h3s):
    for atoms in (
        h3s(),
        described(h3s(), TURNS["modest"]),
        Atoms("H", cell=[1.0, 40.0, 40.0], pbc=True),
        molecule("H2O"),
    ):
        np.testing.assert_array_equal(
            search_cell(atoms), atoms.cell.array if atoms.pbc.any() else np.eye(3)
        )


def test_a_cell_whose_volume_is_lost_in_rounding_is_refused():
    lost = Atoms("H", cell=[[3, 0, 0], [1e17 / 3, 3, 0], [0, 1e17 / 7, 3]], pbc=True)
    with pytest.raises(
        InputError, match=r"structure 5: the cell is too skewed .* give a reduced one"
    ):
        find_neighbours(lost, 5.0, "structure 5")


DEPENDENT = [[1, 0, 0], [2, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    "cell", [DEPENDENT, [[1, 0, 0], [2, 1e-9, 0], [0, 0, 1]], [[1, 0, 0], [2, 0, 0], [0, 0, 0]]]
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_dependent_vectors_without_periodicity_are_no_cell_alone_and_in_a_group(cell, potential):
    free = potential.evaluate([molecule("H2")])
    for copies in (1, 5):
        found = potential.evaluate(
            [Atoms("H2", positions=molecule("H2").positions, cell=cell)] * copies
        )
        np.testing.assert_allclose(found.energy, free.energy[0], atol=1e-5)
        np.testing.assert_allclose(found.forces, [free.forces[0]] * copies, atol=1e-5)
        assert (found.stress == 0.0).all()


def test_a_third_vector_in_the_plane_of_a_slab_is_no_vector(potential):
    slab = fcc111("Cu", (1, 1, 2), vacuum=5.0)
    plane = slab.cell.array.copy()
    plane[2] = plane[0] + plane[1]
    flat = Atoms(slab.numbers, positions=slab.positions, cell=plane, pbc=slab.pbc)
    for copies in (1, 4):
        found = potential.evaluate([flat] * copies)
        np.testing.assert_allclose(found.energy, potential.evaluate([slab]).energy[0], atol=1e-5)
        assert (found.stress == 0.0).all()
    (result,) = potential.relax([flat], max_steps=2)
    assert not result.failed


@pytest.mark.parametrize("pbc", [True, [True, True, False]])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_dependent_vectors_along_periodic_directions_are_flat(pbc, potential):
    with pytest.raises(InputError, match="structure 0: the cell is flat"):
        potential.evaluate(
            [Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]], cell=DEPENDENT, pbc=pbc)]
        )
