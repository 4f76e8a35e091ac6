"""Rock salt of rigid ions: point charges by Ewald's sum and a repulsion of neighbours. Its Born
charges are the charges, its dielectric tensor is 1, and its forces reach as far as dipoles do."""

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from scipy.special import erfc

from magus_anharmonic.evaluator import Evaluation

COULOMB = 14.399645
"""e^2 / (4 pi epsilon_0), eV A."""


class RigidIons:
    """An `Evaluator`; energy sum Z Z / r + strength exp(-(r - distance) / range) of unlike ions."""

    def __init__(self, charge=1.2, distance=2.1, length=0.3, model_id="rigid-ions"):
        self.charge, self.distance, self.length, self.model_id = charge, distance, length, model_id
        madelung = 1.747564594633 * COULOMB * charge**2
        # at rest at this distance: 6 strength / range = madelung / distance^2
        self.strength = madelung * length / (6.0 * distance**2)

    def crystal(self, symbols="MgO"):
        return bulk(symbols, "rocksalt", a=2.0 * self.distance)

    def charges(self, atoms):
        return np.where(np.array(atoms.get_chemical_symbols()) == "O", -self.charge, self.charge)

    def evaluate(self, structures):
        found = [self._one(atoms) for atoms in structures]
        forces = [force for _, force in found]
        stress = np.zeros((len(found), 3, 3))  # for cells that are kept
        return Evaluation(np.array([energy for energy, _ in found]), forces, stress)

    def _one(self, atoms: Atoms):
        z, volume, eta = self.charges(atoms), atoms.get_volume(), 1.1
        i, j, d, vectors = neighbor_list("ijdD", atoms, 5.6 / eta)
        pair = 0.5 * COULOMB * z[i] * z[j]
        energy = np.sum(pair * erfc(eta * d) / d)
        slope = (
            -pair * (erfc(eta * d) / d + 2 * eta / np.sqrt(np.pi) * np.exp(-((eta * d) ** 2))) / d
        )
        near = (z[i] * z[j] < 0) & (d < 1.5 * self.distance)
        bump = 0.5 * self.strength * np.exp(-(d[near] - self.distance) / self.length)
        energy += bump.sum()
        slope[near] -= bump / self.length
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, 2.0 * slope[:, None] * vectors / d[:, None])
        reciprocal = 2 * np.pi * np.linalg.inv(atoms.cell.array).T
        reach = np.ceil(2 * eta * 5.6 * atoms.cell.lengths() / (2 * np.pi)).astype(int)
        g = np.array(list(np.ndindex(*(2 * reach + 1)))) - reach
        g = g[np.any(g != 0, axis=1)] @ reciprocal
        square = (g**2).sum(axis=1)
        g, square = g[square < (2 * eta * 5.6) ** 2], square[square < (2 * eta * 5.6) ** 2]
        weight = 2 * np.pi * COULOMB / volume * np.exp(-square / (4 * eta**2)) / square
        phase = np.exp(1j * atoms.positions @ g.T)
        structure = z @ phase
        energy += np.sum(weight * np.abs(structure) ** 2)
        forces += 2.0 * z[:, None] * ((phase.conj() * structure).imag * weight) @ g * -1.0
        return energy - COULOMB * eta / np.sqrt(np.pi) * np.sum(z**2), forces
