"""Where an SSCHA run starts: primitive cell, relaxation in its symmetry, harmonic force constants,
stress response.

Force constants come from the fewest displacements: an operation g that leaves an atom where it is
takes its force constants to themselves, so that the forces of a displacement d give those of its
image R d. Of a cubic site one direction is enough, of a site without symmetry three are needed.
Central differences need -d too, unless it is an image of d.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from magus_anharmonic.errors import SschaError
from magus_anharmonic.evaluator import Evaluation, Evaluator, has_stress
from magus_anharmonic.sscha.cell import CellStiffness, StaticResponse, static_response_to_strain
from magus_anharmonic.sscha.ensemble import gamma_matrix
from magus_anharmonic.sscha.state import (
    CLOSE_PACKING,
    SschaState,
    expand,
    fold,
    normal_modes,
    repeated,
    sum_rule,
    variance,
)
from magus_anharmonic.sscha.supercells import SupercellMatrix, cell_index, cell_offsets
from magus_anharmonic.sscha.symmetry import Symmetry, symmetric_primitive
from magus_anharmonic.structures import space_group, stripped
from magus_anharmonic.units import HBAR, GPa, gpa_to_ev_per_a3

EVENNESS = 0.15
"""Of the three directions of space, the least that one may have of what each has of evenly spread
displacements."""
DIRECTIONS = np.array(
    sorted(
        (d for d in itertools.product((0, 1, -1), repeat=3) if next(filter(None, d), 0) > 0),
        key=np.count_nonzero,
        reverse=True,
    ),
    dtype=float,
)
"""(13, 3) space and face diagonals and edges of a cube, each in one sense. The diagonals first:
they ask for all components at once, so that an evaluator which does not quite have the symmetry of
the crystal is averaged over."""


def displacements_of(symmetry: Symmetry, atom: int) -> np.ndarray:
    """(m, 3) unit vectors: the cheapest displacements of an atom from which its force constants
    follow, among those the most evenly spread. Each that no operation of the site turns round is
    followed by its opposite."""
    rotations = symmetry.rotations[symmetry.site(atom)]
    units = DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=1)[:, None]
    images = np.einsum("gij,dj->dgi", rotations, units)
    spread = np.einsum("dgi,dgj->dij", images, images) / len(rotations)
    turned = (np.linalg.norm(images + units[:, None], axis=2) < 1e-4).any(axis=1)
    cost = np.where(turned, 1, 2)

    def rank(chosen: list[int]) -> tuple[bool, int, float]:
        evenness = 3.0 * float(np.linalg.eigvalsh(spread[chosen].mean(axis=0))[0])
        return evenness < EVENNESS, cost[chosen].sum(), -round(evenness, 6)

    sets = (itertools.combinations(range(len(units)), count) for count in (1, 2, 3))
    chosen = min(map(list, itertools.chain(*sets)), key=rank)
    return np.array([sign * units[k] for k in chosen for sign in (1.0, -1.0)[: cost[k]]])


def image(symmetry: Symmetry, operation: int, atom: int, forces: np.ndarray) -> np.ndarray:
    """What the forces (n_cells, n, 3) of a displaced ``atom`` become for the displacement's image
    under an operation of its site."""
    turned = np.empty_like(forces)
    permutation = symmetry.permutations[operation]
    turned[symmetry.targets[operation][:, atom, :], permutation[None, :]] = (
        forces @ symmetry.rotations[operation].T
    )
    return turned


log = logging.getLogger(__name__)

FORCE_TOLERANCE = 1e-3
"""eV/A, end of the relaxation before the start."""
STRESS_TOLERANCE = gpa_to_ev_per_a3(0.05)
"""eV/A^3, end of the relaxation before the start."""
RELAXATION_STEPS = 200
DISPLACEMENT = 0.015
"""A, of the central differences."""
LARGEST_AMPLITUDE = 0.2
"""Most by which one mode moves neighbours against each other at the start, in their distances
(rms)."""
LARGEST_AMPLITUDE_LATER = 0.45
"""The same between two populations: a noisy minimisation can drive a mode to zero, and the next
ensemble would be lost."""
NEIGHBOURS = 1.15
"""Neighbours are this much further apart than in a close packing, at most."""


class CountingEvaluator:
    """Passes on to ``evaluator``, counts the structures and refuses numbers that are not finite
    (``SschaError``)."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.count = 0

    @property
    def model_id(self) -> str:
        return self.evaluator.model_id

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        found = self.evaluator.evaluate(structures)
        self.count += len(structures)
        stress = has_stress(found)
        finite = [
            np.isfinite(e) and np.isfinite(f).all() and (not stress or np.isfinite(s).all())
            for e, f, s in _rows(found)
        ]
        if not all(finite):
            raise SschaError(
                f"{finite.count(False)} of {len(finite)} configurations have energies, forces or"
                " stresses that are not finite"
            )
        return found


def in_double_precision(evaluator: Evaluator) -> Evaluator:
    """The evaluator in float64 where it offers that (``Potential.double``): differences of forces
    lose digits."""
    double = getattr(evaluator, "double", None)
    return double() if callable(double) else evaluator


def _rows(found: Evaluation) -> zip:
    return zip(found.energy, found.forces, found.stress, strict=True)


class EvaluatorCalculator(Calculator):
    """ASE calculator on top of an evaluator, for ASE's optimisers."""

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__()
        self.evaluator = evaluator

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        from ase.stress import full_3x3_to_voigt_6_stress

        super().calculate(atoms, properties, system_changes)
        found = self.evaluator.evaluate([stripped(self.atoms)])
        self.results = {
            "energy": float(found.energy[0]),
            "forces": np.asarray(found.forces[0], dtype=float),
            "stress": full_3x3_to_voigt_6_stress(np.asarray(found.stress[0], dtype=float)),
        }


@dataclass(frozen=True)
class Start:
    """First state, the static answer to strains (None with a fixed cell), evaluations spent."""

    state: SschaState
    response: StaticResponse | None
    n_evaluations: int

    def stiffness(self, symmetry: Symmetry, pressure: GPa) -> CellStiffness | None:
        """Of the cell, for a target ``pressure`` in GPa; None with a fixed cell."""
        if self.response is None:
            return None
        return CellStiffness.of(
            self.response,
            gamma_matrix(self.state),
            self.state.atoms.get_volume(),
            symmetry,
            pressure,
        )


def relax_in_symmetry(
    atoms: Atoms, evaluator: Evaluator, pressure: GPa, *, variable_cell: bool
) -> Atoms:
    """Relax positions, and the cell at ``pressure`` (GPa) if wanted, within the space group of
    ``atoms``.

    Ends at 1e-3 eV/A and 0.05 GPa or after 200 steps (logged). Raises ``SschaError`` when the
    volume runs away.
    """
    from ase.constraints import FixSymmetry
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS

    relaxed = stripped(atoms)
    relaxed.calc = EvaluatorCalculator(evaluator)
    relaxed.set_constraint(FixSymmetry(relaxed, symprec=1e-3))
    volume = relaxed.get_volume()
    target: Any = relaxed
    tolerance = FORCE_TOLERANCE
    if variable_cell:
        target = FrechetCellFilter(relaxed, scalar_pressure=gpa_to_ev_per_a3(pressure))
        tolerance = min(FORCE_TOLERANCE, STRESS_TOLERANCE * volume / len(relaxed))
    optimiser = BFGS(target, logfile=None, maxstep=0.1)
    for _ in optimiser.irun(fmax=tolerance, steps=RELAXATION_STEPS):
        if not 0.4 < relaxed.get_volume() / volume < 2.5:
            raise SschaError(
                f"relaxation before the start: the volume went from {volume:.1f} to"
                f" {relaxed.get_volume():.1f} A^3"
            )
    # ASE's own `converged` takes other arguments in every few versions
    if not np.linalg.norm(target.get_forces(), axis=1).max() < tolerance:
        log.info(
            "relaxation before the start: not converged after %d steps, going on", RELAXATION_STEPS
        )
    return stripped(relaxed)


def relaxed_primitive(
    atoms: Atoms, evaluator: Evaluator, pressure: GPa, *, symprec: float, variable_cell: bool
) -> Atoms:
    """Relax a symmetric primitive cell in its symmetry; once more where that led to a higher one
    (within ``symprec`` A)."""
    relaxed = relax_in_symmetry(atoms, evaluator, pressure, variable_cell=variable_cell)
    again = symmetric_primitive(relaxed, symprec)
    if len(again) == len(relaxed) and space_group(again, 1e-3) == space_group(relaxed, 1e-3):
        return relaxed
    log.info(
        "the relaxation before the start led from %s to %s",
        space_group(atoms, 1e-3),
        space_group(again, 1e-3),
    )
    return relax_in_symmetry(again, evaluator, pressure, variable_cell=variable_cell)


def harmonic_force_constants(
    atoms: Atoms, supercell_matrix: SupercellMatrix, symmetry: Symmetry, evaluator: Evaluator
) -> np.ndarray:
    """Compact force constants in eV/A^2 by central differences along the displacements that
    symmetry does not tell: by least squares over all their images, symmetrised."""
    supercell, n = repeated(atoms, supercell_matrix), len(atoms)
    moves = {
        atom: DISPLACEMENT * displacements_of(symmetry, atom) for atom in symmetry.representatives()
    }
    displaced = []
    for atom, vectors in moves.items():
        for vector in vectors:
            displaced.append(supercell.copy())
            displaced[-1].positions[atom] += vector
    forces = np.array(evaluator.evaluate(displaced).forces, dtype=float).reshape(
        len(displaced), -1, n, 3
    )
    compact = np.zeros((forces.shape[1], n, n, 3, 3))
    for atom, vectors in moves.items():
        mine, forces = forces[: len(vectors)], forces[len(vectors) :]
        site = symmetry.site(atom)
        turned = np.einsum("gij,vj->vgi", symmetry.rotations[site], vectors).reshape(-1, 3)
        rows = [image(symmetry, operation, atom, one) for one in mine for operation in site]
        blocks = -np.einsum("im,mrbj->rbij", np.linalg.pinv(turned), rows)
        # the average over the operations gives an equal share to each of the equivalent atoms
        compact[:, atom] = len(symmetry) // len(site) * blocks
    return symmetry.force_constants(compact)


def nearest_neighbour(atoms: Atoms) -> np.ndarray:
    """(n,) distance of every atom to its nearest neighbour (periodic images included), Angstrom."""
    from ase.neighborlist import neighbor_list

    cutoff = (
        1.5 * atoms.get_volume() ** (1 / 3) if len(atoms) == 1 else atoms.get_volume() ** (1 / 3)
    )
    while True:
        first, distance = neighbor_list("id", atoms, cutoff)
        if len(np.unique(first)) == len(atoms):
            nearest = np.full(len(atoms), np.inf)
            np.minimum.at(nearest, first, distance)
            return nearest
        cutoff *= 1.4


def floor_modes(
    state: SschaState, symmetry: Symmetry, largest: float = LARGEST_AMPLITUDE
) -> SschaState:
    """Make the force constants positive definite; the state itself where nothing has to change.

    Imaginary modes keep the size of their frequency. Then every phonon energy is raised until no
    two neighbours move against each other, in this mode and as if all q points had its frequency
    (so that it does not depend on the supercell), by more than ``largest`` times their distance
    (rms). The atoms of a rigid unit that moves as a whole do not count: its neighbours do.
    """
    root = np.sqrt(np.repeat(state.supercell.get_masses(), 3))
    full = state.full
    for attempt in range(10):
        modes = normal_modes(full, state.supercell.get_masses())
        limit = largest**2 / relative_motion(state, modes.vectors / root[:, None])
        smallest = _smallest_hbar_omega(limit, state.temperature)
        if np.all(modes.hbar_omega >= smallest * (1 - 1e-6)):
            return (
                replace(state, force_constants=fold(full, state.supercell_matrix))
                if attempt
                else state
            )
        raised = np.maximum(np.abs(modes.hbar_omega), smallest)
        change = (
            np.sign(raised) * raised**2 - np.sign(modes.hbar_omega) * modes.hbar_omega**2
        ) / HBAR**2
        vectors = modes.vectors * root[:, None]
        full = full + (vectors * change) @ vectors.T
        full = expand(
            symmetry.force_constants(fold(sum_rule(full), state.supercell_matrix)),
            state.supercell_matrix,
        )
    return replace(state, force_constants=fold(full, state.supercell_matrix))


def relative_motion(state: SschaState, patterns: np.ndarray) -> np.ndarray:
    """(m,) of the ``patterns`` (3 n_supercell, m): the largest n_cells |x_i - x_j|^2 / d_ij^2 of
    all neighbours, averaged over cells.

    Neighbours are the pairs closer than about those in a close packing of this density, and every
    atom's nearest ones.
    """
    from ase.neighborlist import neighbor_list

    atoms, n_cells = state.atoms, state.n_cells
    packing = NEIGHBOURS * CLOSE_PACKING * (atoms.get_volume() / len(atoms)) ** (1 / 3)
    cutoff = max(packing, 1.05 * float(nearest_neighbour(atoms).max()))
    first, second, shifts, distances = neighbor_list("ijSd", atoms, cutoff)
    offsets = cell_offsets(state.supercell_matrix)
    cells = patterns.reshape(n_cells, len(atoms), 3, -1)
    largest = np.full(patterns.shape[1], 1e-12)
    for i, j, shift, distance in zip(first, second, shifts, distances, strict=True):
        if i <= j:
            apart = cells[:, i] - cells[cell_index(offsets + shift, state.supercell_matrix), j]
            np.maximum(largest, (apart**2).sum(axis=(0, 1)) / distance**2, out=largest)
    return largest


def _smallest_hbar_omega(largest_variance: np.ndarray, temperature: float) -> np.ndarray:
    """Phonon energy in eV at which the variance (A^2 amu) equals ``largest_variance``; bisection in
    the logarithm."""
    low, high = np.full(len(largest_variance), 1e-8), np.full(len(largest_variance), 1e2)
    for _ in range(80):
        middle = np.sqrt(low * high)
        too_soft = variance(middle, temperature) > largest_variance
        low, high = np.where(too_soft, middle, low), np.where(too_soft, high, middle)
    return high


def harmonic_start(
    atoms: Atoms,
    evaluator: Evaluator,
    *,
    temperature: float,
    supercell_matrix: SupercellMatrix,
    variable_cell: bool,
) -> Start:
    """Floored harmonic force constants, and the stress response, of a relaxed symmetric primitive
    cell."""
    counting = CountingEvaluator(evaluator)
    symmetry = Symmetry(atoms, supercell_matrix)
    compact = harmonic_force_constants(atoms, supercell_matrix, symmetry, counting)
    state = SschaState(atoms, supercell_matrix, compact, temperature)
    soft = int((state.modes.hbar_omega <= 0).sum())
    log.info(
        "start: %s, %.3f A^3/atom, %d operations, %d of %d harmonic modes imaginary",
        atoms.get_chemical_formula(),
        atoms.get_volume() / len(atoms),
        len(symmetry),
        soft,
        len(state.modes.hbar_omega),
    )
    response = static_response_to_strain(atoms, counting) if variable_cell else None
    return Start(floor_modes(state, symmetry), response, counting.count)
