"""A family of anharmonic crystals with cells that may change, one evaluator for all of them: for
rankings and isotopes.

Each crystal has two atoms per cell (CsCl's arrangement, edges of its own). Energy per cell: depth +
sum over links of sum_i (k2 x_i^2 / 2 + k3 x_i^3 + k4 x_i^4), where x are the components, in the
link's own axes, of its vector minus the one of the reference. Links are the eight bonds of H to its
neighbours, and the vector from their mean to H (reference zero), which may have a double well. A
structure belongs to the crystal whose volume per atom is nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms

from magus_anharmonic.evaluator import Evaluation

CORNERS = np.array(list(np.ndindex(2, 2, 2))) - 0.5
"""Bond vectors in fractions of the cell edges, from the centre of the cell."""


@dataclass(frozen=True)
class Crystal:
    """edges : A; bonds : (8, 3, 3) coefficients k2, k3, k4 (first axis of a link's terms) along its
    three axes (the first is the bond); cage : (3, 3) the same for the vector from the neighbours'
    mean to H; depth : eV per cell; offset : A, of H from the centre of the cell in the reference;
    shift : A, of H from there in the structure that is handed out.
    """

    edges: tuple[float, float, float]
    bonds: np.ndarray
    cage: np.ndarray
    depth: float = 0.0
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def atoms(self):
        hydrogen = np.array(self.edges) / 2.0 + self.offset + self.shift
        return Atoms("LiH", positions=[np.zeros(3), hydrogen], cell=self.edges, pbc=True)

    @property
    def vectors(self):
        """(9, 3) link vectors of the reference, A."""
        return np.concatenate([CORNERS * self.edges - self.offset, np.zeros((1, 3))])

    @property
    def axes(self):
        """(9, 3, 3) orthonormal axes of the links as rows: along the bond, two across; Cartesian
        for the cage."""
        frames = []
        for along in self.vectors[:8]:
            first = along / np.linalg.norm(along)
            second = np.cross([0.0, 0.0, 1.0], first)
            second /= np.linalg.norm(second)
            frames.append([first, second, np.cross(first, second)])
        return np.array([*frames, np.eye(3)])


def crystal(
    edges,
    along,
    across,
    cubic,
    quartic,
    *,
    well=0.0,
    wall=0.0,
    depth=0.0,
    offset=(0.0, 0.0, 0.0),
    shift=(0.0, 0.0, 0.0),
):
    """Equal bonds: k2 ``along`` and ``across``, k3 ``cubic`` and k4 ``quartic``; eV/A^n.

    ``well`` : taken off the curvature of the cage along z, ``wall`` : its k4.
    """
    one = np.array([[along, across, across], [cubic, 0.0, 0.0], [quartic, quartic, quartic]])
    bonds = np.tile(one, (8, 1, 1))
    cage = np.array([[0.0, 0.0, -well], [0.0] * 3, [0.0, 0.0, wall]])
    return Crystal(edges, bonds, cage, depth, offset, shift)


class Crystals:
    """Evaluator of a family of `Crystal`; all structures of one cell in one operation."""

    def __init__(self, crystals, model_id="crystals"):
        self.crystals, self.model_id = list(crystals), model_id
        self.volumes = np.array([np.prod(one.edges) / 2.0 for one in crystals])
        self.n_structures = 0

    def evaluate(self, structures):
        """Energies, forces, stresses; structures next to each other with the same cell share their
        list of links."""
        self.n_structures += len(structures)
        cells = np.array([atoms.cell.array for atoms in structures])
        sizes = np.array([len(atoms) for atoms in structures])
        new = np.any(cells[1:] != cells[:-1], axis=(1, 2)) | (sizes[1:] != sizes[:-1])
        edges = [0, *(np.flatnonzero(new) + 1), len(structures)]
        energies, forces, stresses = [], [], []
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            part = structures[begin:end]
            found = self._one_cell(part[0], np.array([atoms.positions for atoms in part]))
            energies.append(found[0])
            forces.extend(found[1])
            stresses.append(found[2])
        return Evaluation(np.concatenate(energies), forces, np.concatenate(stresses))

    def _one_cell(self, like, positions):
        one = self.crystals[
            int(np.argmin(np.abs(np.log(self.volumes * len(like) / like.get_volume()))))
        ]
        links, constant = _links(one, like, positions.mean(axis=0))
        axes, terms = (
            np.tile(one.axes, (len(like) // 2, 1, 1)),
            np.tile(np.array([*one.bonds, one.cage]), (len(like) // 2, 1, 1)),
        )
        reference = np.tile(one.vectors, (len(like) // 2, 1))
        vectors = np.tensordot(positions, links, axes=([1], [1])).transpose(0, 2, 1) + constant
        x = ((vectors - reference)[:, :, None, :] * axes).sum(axis=3)
        k2, k3, k4 = terms[:, 0], terms[:, 1], terms[:, 2]
        energy = one.depth * len(like) / 2.0 + (x**2 * (0.5 * k2 + k3 * x + k4 * x**2)).sum(
            axis=(1, 2)
        )
        pull = ((x * (k2 + 3.0 * k3 * x + 4.0 * k4 * x**2))[..., None] * axes).sum(axis=2)
        forces = -np.tensordot(pull, links, axes=([1], [0])).transpose(0, 2, 1)
        stress = np.matmul(pull.transpose(0, 2, 1), vectors) / like.get_volume()
        return energy, forces, 0.5 * (stress + stress.transpose(0, 2, 1))


def _links(one, like, mean):
    """Matrix (9 n_H, n) that makes link vectors of positions, and what the lattice adds (9 n_H, 3),
    A.

    Neighbours are found in ``mean`` positions, so that no single configuration can change the
    bonds.
    """
    numbers, cell = like.numbers, like.cell.array
    hydrogen, lithium = np.flatnonzero(numbers == 1), np.flatnonzero(numbers == 3)
    scale = (like.get_volume() / len(like) / (np.prod(one.edges) / 2.0)) ** (1 / 3)
    rows, constants = [], []
    for h in hydrogen:
        apart = mean[lithium] - mean[h]
        bonds, lattices = [], []
        for target in scale * one.vectors[:8]:
            image = np.round((target - apart) @ np.linalg.inv(cell))
            nearest = int(np.argmin(np.linalg.norm(apart + image @ cell - target, axis=1)))
            bond = np.zeros(len(like))
            bond[lithium[nearest]], bond[h] = 1.0, -1.0
            bonds.append(bond)
            lattices.append(image[nearest] @ cell)
        rows += [*bonds, -np.mean(bonds, axis=0)]
        constants += [*lattices, -np.mean(lattices, axis=0)]
    return np.array(rows), np.array(constants)


def family(n=20, seed=5):
    """Crystals whose stiffness, anharmonicity, symmetry and depth are drawn at random; every fourth
    has a double well."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(n):
        edge = 3.0 * 1.02**k
        stretch = (
            np.array([1.0, rng.uniform(0.97, 1.03), rng.uniform(0.97, 1.03)])
            if k % 3
            else np.ones(3)
        )
        a, b, c = (float(value) for value in edge * stretch / stretch.prod() ** (1 / 3))
        along, across, quartic = (
            rng.uniform(0.7, 1.3),
            rng.uniform(0.15, 0.3),
            rng.uniform(0.5, 2.0),
        )
        well = 0.0 if k % 4 or k % 5 == 1 else float(rng.uniform(3.0, 6.0))
        offset = (0.2, 0.12, -0.15) if k % 5 == 1 else (0.0, 0.0, 0.0)
        shift = (0.0, 0.0, 0.15) if k % 8 == 0 else (0.0, 0.0, 0.0)
        found.append(
            crystal(
                (a, b, c), along, across, -0.6 * rng.random(), quartic, well=well, wall=0.5 * well,
                depth=2.0 * rng.uniform(0.0, 0.06), offset=offset, shift=shift,
            )
        )  # fmt: skip
    return found
