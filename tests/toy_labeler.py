"""A labeler that costs nothing: soft spheres, smooth and periodic, which refuses one structure of
each family."""

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress

REACH = 3.0
"""Angstrom."""


class SoftSpheres(Calculator):
    """E = sum over pairs of (1 - r / 3 A)^3 eV, exact forces and stress; ValueError for every
    structure whose volume asks for it.

    ``refuse``: of the structures, by the third decimal of their volume in A^3, so many tenths fail.
    """

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, refuse=3):
        super().__init__()
        self.refuse = refuse

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        if int(1000 * self.atoms.get_volume()) % 10 < self.refuse:
            raise ValueError("these spheres do not like this cell")
        i, d, vectors = neighbor_list("idD", self.atoms, REACH)
        x = 1 - d / REACH
        pull = (3 * x**2 / REACH / d)[:, None] * vectors
        forces = np.zeros((len(self.atoms), 3))
        np.add.at(forces, i, -pull)
        stress = -0.5 * np.einsum("pa,pb->ab", pull, vectors) / self.atoms.get_volume()
        self.results = {
            "energy": 0.5 * float((x**3).sum()),
            "forces": forces,
            "stress": full_3x3_to_voigt_6_stress(stress),
        }
