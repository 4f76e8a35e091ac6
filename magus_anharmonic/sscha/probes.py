"""The fewest displacements whose forces give all force constants of an atom: what its site symmetry can tell is not evaluated.

An operation g that leaves the atom where it is takes the force constants to themselves, so that the forces of a displacement d give
those of its image R d. Of a cubic site one direction is enough, of a site without symmetry three are needed. Central differences need
-d too, unless it is an image of d.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from magus_anharmonic.sscha.symmetry import Symmetry

EVENNESS = 0.15
"""Of the three directions of space, the least that one may have of what each has of evenly spread displacements."""
DIRECTIONS = np.array(
    sorted((d for d in itertools.product((0, 1, -1), repeat=3) if next(filter(None, d), 0) > 0), key=np.count_nonzero, reverse=True),
    dtype=float,
)
"""(13, 3) space and face diagonals and edges of a cube, each in one sense. The diagonals first: they ask for all components at once, so
that an evaluator which does not quite have the symmetry of the crystal is averaged over."""


@dataclass(frozen=True)
class Probe:
    """A displacement of ``atom`` along the unit vector ``direction``; ``both``: the opposite one has to be evaluated too.

    inverse : an operation of the site that turns the direction round, where there is one.
    """

    atom: int
    direction: np.ndarray
    inverse: int | None

    @property
    def both(self) -> bool:
        return self.inverse is None


def probes_of(symmetry: Symmetry, atom: int) -> list[Probe]:
    """The cheapest displacements of an atom from which its force constants follow, among those the most evenly spread."""
    site = np.flatnonzero(symmetry.permutations[:, atom] == atom)
    units = DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=1)[:, None]
    images = np.einsum("gij,dj->dgi", symmetry.rotations[site], units)
    spread = np.einsum("dgi,dgj->dij", images, images) / len(site)
    turned = np.linalg.norm(images + units[:, None], axis=2) < 1e-4
    probes = [Probe(atom, unit, int(site[row.argmax()]) if row.any() else None) for unit, row in zip(units, turned, strict=True)]
    found: tuple[int, float, tuple[int, ...]] | None = None
    for count in (1, 2, 3):
        for chosen in itertools.combinations(range(len(units)), count):
            least = 3.0 * float(np.linalg.eigvalsh(spread[list(chosen)].mean(axis=0))[0])
            cost = sum(2 if probes[k].both else 1 for k in chosen)
            if least >= EVENNESS and (found is None or (cost, -round(least, 6)) < found[:2]):
                found = cost, -round(least, 6), chosen
    assert found is not None  # the three edges are always among them
    return [probes[k] for k in found[2]]


def image(symmetry: Symmetry, operation: int, atom: int, forces: np.ndarray) -> np.ndarray:
    """What the forces (n_cells, n, 3) of a displaced ``atom`` become for the displacement's image under an operation of its site."""
    turned = np.empty_like(forces)
    permutation = symmetry.permutations[operation]
    turned[symmetry.targets[operation][:, atom, :], permutation[None, :]] = forces @ symmetry.rotations[operation].T
    return turned


def force_constants_of(symmetry: Symmetry, probes: list[Probe], slopes: list[np.ndarray]) -> np.ndarray:
    """Blocks (n_cells, n, 3, 3) of an atom by least squares over all images of its displacements.

    ``slopes`` : minus the derivative of the forces (n_cells, n, 3) along each probe, eV/A^2.
    """
    atom = probes[0].atom
    site = np.flatnonzero(symmetry.permutations[:, atom] == atom)
    directions = [symmetry.rotations[g] @ probe.direction for probe in probes for g in site]
    rows = np.array([image(symmetry, int(g), atom, slope) for slope in slopes for g in site])
    return np.einsum("im,mrbj->rbij", np.linalg.pinv(np.array(directions)), rows)
