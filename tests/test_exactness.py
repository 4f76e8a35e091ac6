"""The factorised form is MatterSim's model: same numbers as stock for sixty and more structures,
and smooth at both cutoffs."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bcc110, bulk, fcc100, fcc111, hcp0001, molecule
from ase.io import read
from ase.stress import voigt_6_to_full_3x3_stress
from mattersim.datasets.utils.build import build_dataloader
from mattersim.forcefield import MatterSimCalculator
from mattersim.forcefield.potential import Potential as StockPotential
from mattersim.forcefield.potential import batch_to_dict

from magus_anharmonic.potential import load
from magus_anharmonic.units import EV_PER_A3_IN_GPA

LABELS = Path(__file__).parents[1] / "inputs" / "h3s-checkpoint" / "labels.xyz"


def crystals():
    """Elements and compounds at their usual density; many cells of one atom, all smaller than the
    cutoff."""
    elements = [
        "Al",
        "Cu",
        "Fe",
        "W",
        "Ti",
        "Mg",
        "Na",
        "Pb",
        "Au",
        "Pt",
        "Ni",
        "Ca",
        "Zr",
        "V",
        "Si",
        "Ge",
    ]
    compounds = [
        bulk("NaCl", "rocksalt", a=5.64),
        bulk("MgO", "rocksalt", a=4.21),
        bulk("CsCl", "cesiumchloride", a=4.12),
    ]
    return [
        *(bulk(name) for name in elements),
        *compounds,
        bulk("ZnS", "zincblende", a=5.41),
        bulk("GaAs", "zincblende", a=5.65),
    ]


def slabs():
    """Surfaces in vacuum."""
    common = {"vacuum": 8.0, "periodic": True}
    return [
        fcc111("Al", (2, 1, 2), **common),
        fcc100("Cu", (1, 1, 3), **common),
        bcc110("Fe", (1, 1, 3), **common),
        hcp0001("Ti", (1, 1, 3), **common),
        fcc111("Au", (1, 1, 4), **common),
    ]


def molecules():
    """In boxes wider than twice the cutoff."""
    boxed = [
        molecule(name, cell=[14, 14, 14], pbc=True)
        for name in ("H2O", "CO2", "CH4", "NH3", "C6H6", "SO2", "N2", "HCl", "LiF")
    ]
    for atoms in boxed:
        atoms.center()
    return boxed


def unusual(h3s):
    """Atoms without neighbours, very dense, very dilute, and H-S-H on a line as in Im-3m."""
    lone = [Atoms(name, cell=[12, 12, 12], pbc=True) for name in ("He", "Xe", "U")]
    apart = Atoms(
        "NaCl2", positions=[[0, 0, 0], [0, 0, 2.4], [8, 8, 8]], cell=[16, 16, 16], pbc=True
    )
    dense = [
        bulk("H", "fcc", a=1.9),
        bulk("Fe", "bcc", a=1.9),
        bulk("Si", "diamond", a=4.0),
        bulk("S", "sc", a=1.8),
    ]
    dilute = [bulk("NaCl", "rocksalt", a=9.0), bulk("Cs", "bcc", a=8.0), bulk("Ar", "fcc", a=8.0)]
    return [
        *lone,
        apart,
        *dense,
        *dilute,
        *(h3s(a) for a in (2.7, 2.9, 3.1, 3.4)),
        *(h3s(a, 0.1) for a in (2.8, 3.0, 3.2)),
    ]


def random_cells():
    """Skewed cells of 2 to 6 atoms of any three elements, some of them at high pressure."""
    rng = np.random.default_rng(11)
    found = []
    while len(found) < 14:
        count = int(rng.integers(2, 7))
        edge = (count * rng.uniform(7, 25)) ** (1 / 3)
        cell = edge * (np.eye(3) + rng.uniform(-0.25, 0.25, (3, 3)))
        atoms = Atoms(
            rng.choice(rng.integers(1, 90, 3), count),
            scaled_positions=rng.random((count, 3)),
            cell=cell,
            pbc=True,
        )
        distances = atoms.repeat((2, 2, 2)).get_all_distances(mic=True)
        if distances[distances > 0].min() > 1.0:
            found.append(atoms)
    return found


def all_structures(h3s):
    return [*crystals(), *slabs(), *molecules(), *unusual(h3s), *random_cells()]


def stock_single(path, structures):
    """Energy, forces and stress (GPa) of stock MatterSim, one structure at a time."""
    stock = StockPotential.from_checkpoint(str(path), device="cpu", load_training_state=False)
    results = []
    for atoms in structures:
        loader = build_dataloader([atoms.copy()], batch_size=1, only_inference=True)
        energy, forces, stress = stock.predict_properties(
            loader, include_forces=True, include_stresses=True
        )
        results.append((float(energy[0]), forces[0], stress[0]))
    return results


def stock_double(module, atoms, monkeypatch, clamp):
    """Stock MatterSim's forward pass in float64, with or without its clamp of cos theta; stress in
    eV/A^3."""
    batch = batch_to_dict(
        next(iter(build_dataloader([atoms.copy()], batch_size=1, only_inference=True))),
        device="cpu",
    )
    # It moves atoms into the cell, in float32: the same images, but in double precision.
    images = np.rint(
        (batch["atom_pos"].numpy() - atoms.positions) @ np.linalg.inv(atoms.cell.array)
    )
    positions = torch.tensor(atoms.positions + images @ atoms.cell.array, requires_grad=True)
    np.testing.assert_allclose(batch["atom_pos"], positions.detach(), atol=1e-5)
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    deformation = torch.eye(3, dtype=torch.float64) + strain
    inputs = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    inputs |= {
        "atom_pos": positions @ deformation,
        "cell": (torch.tensor(atoms.cell.array) @ deformation)[None],
    }
    with monkeypatch.context() as patch:
        # Its forward pass rounds the images of the cell to float32, which here would be a wrong
        # type only.
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        if not clamp:
            patch.setattr(
                torch,
                "clamp",
                lambda values, min=None, max=None: (
                    values if max is not None else values.clamp(min=min)
                ),
            )
        energy = module(inputs).sum()
    by_position, by_strain = torch.autograd.grad(energy, (positions, strain))
    return float(energy), -by_position.numpy(), by_strain.numpy() / atoms.cell.volume


@pytest.mark.slow
def test_more_than_sixty_structures_of_more_than_ten_elements_equal_stock_mattersim(
    tiny_checkpoint, potential, h3s
):
    structures = all_structures(h3s)
    assert (
        len(structures) >= 60
        and len({number for atoms in structures for number in atoms.numbers}) >= 30
    )
    found = potential.evaluate(structures)
    for index, (energy, forces, stress) in enumerate(stock_single(tiny_checkpoint, structures)):
        name = f"{index}: {structures[index]}"
        assert abs(found.energy[index] - energy) < 1e-5 * len(structures[index]), name
        assert np.abs(found.forces[index] - forces).max() < 1e-4, name
        assert np.abs(found.stress[index] * EV_PER_A3_IN_GPA - stress).max() < 1e-3, name


def cells_of_the_shipped_checkpoint(h3s):
    """Of its labels some of every kind, Im-3m, where H-S-H is on a line, and cells with fewer atoms
    than neighbours."""
    labelled = read(LABELS, ":")
    kinds = {}
    for atoms in labelled:
        kinds.setdefault(atoms.info["kind"], []).append(atoms)
    chosen = [members[index] for members in kinds.values() for index in (0, len(members) // 2, -1)]
    small = [
        bulk("H", "fcc", a=2.2),
        bulk("S", "sc", a=2.5),
        bulk("S", "bcc", a=2.8),
        Atoms("SH", [[0] * 3, [1.3] * 3], cell=[2.6] * 3, pbc=True),
    ]
    return [*chosen, *(h3s(a) for a in (2.8, 3.0, 3.2)), *small]


def test_the_shipped_checkpoint_equals_stock_mattersims_calculator_on_cells_of_every_kind(h3s):
    ours = load("h3s-gpaw-small", device="cpu")
    structures = cells_of_the_shipped_checkpoint(h3s)
    assert (
        len(structures) >= 28
        and sum(atoms.cell.lengths().min() < ours.cutoff for atoms in structures) >= 20
    )
    stock = MatterSimCalculator(
        load_path=str(ours.path), device="cpu"
    )  # stress in eV/A^3, as its default stress_weight makes it
    found = ours.evaluate(structures)
    for index, atoms in enumerate(structures):
        name = f"{index}: {atoms}"
        assert abs(found.energy[index] - stock.get_potential_energy(atoms)) < 1e-5 * len(atoms), (
            name
        )
        assert np.abs(found.forces[index] - stock.get_forces(atoms)).max() < 1e-4, name
        difference = found.stress[index] - voigt_6_to_full_3x3_stress(stock.get_stress(atoms))
        assert np.abs(difference * EV_PER_A3_IN_GPA).max() < 1e-3, name


@pytest.mark.slow
def test_in_double_precision_rattled_cells_equal_stock_without_its_clamp(
    tiny_checkpoint, h3s, monkeypatch
):
    double = load(tiny_checkpoint, device="cpu", dtype="float64")
    module = copy.deepcopy(double.module)
    structures = [
        crystals()[0],
        crystals()[9],
        slabs()[0],
        *molecules()[:3],
        h3s(2.9, 0.1),
        *random_cells()[:3],
    ]
    for seed, atoms in enumerate(structures):
        # An atom between two of its own images would be on a line with them, however it is rattled.
        heights = 1 / np.linalg.norm(atoms.cell.reciprocal(), axis=1)
        atoms = atoms.repeat(np.ceil(4.01 / heights).astype(int))
        atoms.rattle(0.05, seed=seed)
        found = double.evaluate([atoms])
        energy, forces, stress = stock_double(module, atoms, monkeypatch, clamp=False)
        assert found.energy[0] == pytest.approx(energy, rel=1e-9), atoms
        np.testing.assert_allclose(
            found.forces[0], forces, atol=1e-9 * max(1.0, np.abs(forces).max()), err_msg=str(atoms)
        )
        np.testing.assert_allclose(
            found.stress[0], stress, atol=1e-9 * max(1.0, np.abs(stress).max()), err_msg=str(atoms)
        )


def test_in_double_precision_collinear_triplets_equal_stock_with_its_clamp(
    tiny_checkpoint, h3s, monkeypatch
):
    double = load(tiny_checkpoint, device="cpu", dtype="float64")
    for atoms in (h3s(3.0), bulk("Cu"), bulk("MgO", "rocksalt", a=4.21)):
        found = double.evaluate([atoms])
        energy, forces, stress = stock_double(
            copy.deepcopy(double.module), atoms, monkeypatch, clamp=True
        )
        assert found.energy[0] == pytest.approx(energy, rel=1e-6)
        np.testing.assert_allclose(found.forces[0], forces, atol=1e-6)
        np.testing.assert_allclose(
            found.stress[0], stress, atol=1e-6 * max(1.0, np.abs(stress).max())
        )


@pytest.mark.parametrize("cutoff", [4.0, 5.0])
def test_energy_and_forces_are_smooth_through_both_cutoffs(tiny_checkpoint, cutoff):
    """Of the bonds of the third atom, with a pair close by, so that three-body terms end at 4
    Angstrom."""
    double = load(tiny_checkpoint, device="cpu", dtype="float64")
    step = 1e-3
    distances = cutoff + step * np.arange(-6, 7)
    structures = [
        Atoms("HSH", positions=[[0, 0, 0], [1.3, 0.2, 0], [0, 0, d]], cell=[30, 30, 30], pbc=True)
        for d in distances
    ]
    found = double.evaluate(structures)
    energy, force = found.energy, np.array([forces[2, 2] for forces in found.forces])
    np.testing.assert_allclose(-(energy[2:] - energy[:-2]) / (2 * step), force[1:-1], atol=1e-6)
    assert np.abs(np.diff(force, 2)).max() < 1e-4, "the force has a step or a kink there"
