"""Where an SSCHA run starts: primitive cell, relaxation in its symmetry, harmonic force constants,
stress response.

Force constants come from the fewest displacements: an operation g that leaves an atom where it is
takes its force constants to themselves, so that the forces of a displacement d give those of its
image R d. Of a cubic site one direction is enough, of a site without symmetry three are needed.
Central differences need -d too, unless it is an image of d.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.data import atomic_masses, atomic_numbers

from magus_anharmonic.calculator_check import check_calculator
from magus_anharmonic.errors import InputError, SschaError
from magus_anharmonic.evaluator import Evaluation, Evaluator, has_stress
from magus_anharmonic.gate import check_structure
from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha.cell import Start, static_response_to_strain
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.qe_files import state_from_dyn
from magus_anharmonic.sscha.reciprocal import interpolated, nearest_images
from magus_anharmonic.sscha.result import SschaResult, final_ensemble
from magus_anharmonic.sscha.state import (
    SschaState,
    displaced,
    floor_modes,
    inverse_fourier,
    repeated,
    sample,
)
from magus_anharmonic.sscha.supercells import (
    SupercellMatrix,
    as_supercell_matrix,
    is_diagonal,
    n_cells,
    q_points,
)
from magus_anharmonic.sscha.symmetry import (
    Symmetry,
    choose_supercell_matrix,
    displacements_of,
    image,
    symmetric_primitive,
)
from magus_anharmonic.sscha.task import Task
from magus_anharmonic.structures import isotopes, kinds, space_group, stripped, with_isotopes
from magus_anharmonic.units import GPa, gpa_to_ev_per_a3

log = logging.getLogger(__name__)

FORCE_TOLERANCE = 1e-3
"""eV/A, end of the relaxation before the start."""
STRESS_TOLERANCE = gpa_to_ev_per_a3(0.05)
"""eV/A^3, end of the relaxation before the start."""
RELAXATION_STEPS = 200
DISPLACEMENT = 0.015
"""A, of the central differences."""


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
            for e, f, s in zip(found.energy, found.forces, found.stress, strict=True)
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


def harmonic_start(
    atoms: Atoms,
    evaluator: Evaluator,
    *,
    temperature: float,
    supercell_matrix: SupercellMatrix,
    variable_cell: bool,
    symmetry: Symmetry | None = None,
) -> Start:
    """Floored harmonic force constants, and the stress response, of a relaxed symmetric primitive
    cell; or of any other, whose ``symmetry`` is given."""
    counting = CountingEvaluator(evaluator)
    symmetry = symmetry or Symmetry(atoms, supercell_matrix)
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


SYMMETRY_OF_A_STATE = 1e-3
"""A, tolerance for the symmetry of a structure that is already symmetric."""
SYMMETRY_AS_GIVEN = 1e-5
"""A, the same of one that is not to be moved at all: the forces of what is averaged differ by less
than 1 meV/A."""


def symmetry_of(
    atoms: Atoms, supercell_matrix: SupercellMatrix, settings: SschaSettings
) -> Symmetry:
    """Of the states of a run: with fixed centroids, what the structure has as it is given."""
    fixed = settings.centroids == "fixed"
    tolerance = SYMMETRY_AS_GIVEN if fixed else SYMMETRY_OF_A_STATE
    return Symmetry(atoms, supercell_matrix, tolerance, movable=not fixed)


def check_crystal(atoms: Atoms, masses: Mapping[str, float] | None) -> None:
    """Raise ``InputError`` for what does not pass the `gate`, and for masses that cannot be
    meant."""
    if not isinstance(atoms, Atoms):
        raise InputError(f"atoms: {type(atoms).__name__}: must be one ase.Atoms")
    check_structure(atoms)
    for symbol, mass in (masses or {}).items():
        if symbol not in atoms.get_chemical_symbols():
            raise InputError(f"masses.{symbol}: not in {atoms.get_chemical_formula()}")
        if isinstance(mass, bool) or not isinstance(mass, Real) or not 0 < mass < 500:
            raise InputError(f"masses.{symbol}: {mass!r}: must be a mass in amu")


def with_masses(structure: Atoms, atoms: Atoms, masses: Mapping[str, float] | None) -> Atoms:
    """A copy of ``structure`` with the masses (amu) that ``masses`` gives by symbol, else with
    those of ``atoms``, of the same composition.

    Where ``atoms`` has several isotopes of one element, ``structure`` must have as many of each:
    nothing else says which is where. Raises ``InputError`` where it has not.
    """
    chosen: dict[str, float] = dict(masses or {})
    symbols = np.array(atoms.get_chemical_symbols())
    for symbol in sorted(set(symbols) - set(chosen)):
        found = np.unique(kinds(atoms)[symbols == symbol])
        if len(found) == 1:
            natural = found[0] == atomic_numbers[symbol]
            chosen[symbol] = float(
                atomic_masses[found[0]] if natural else atoms.get_masses()[symbols == symbol][0]
            )
        elif composition(kinds(structure)) != composition(kinds(atoms)):
            raise InputError(
                f"start: has other isotopes of {symbol} than {atoms.get_chemical_formula()}, which"
                f" has several ({isotopes(atoms)}): nothing says which atom is which; start"
                " without it"
            )
    return with_isotopes(structure, chosen)


def read_state(start: Any, temperature: float) -> SschaState:
    """The state behind ``start``: a `SschaResult`, an `SschaState`, the folder of a run, or a
    prefix of dynamical matrices."""
    if isinstance(start, SschaState):
        return start
    if isinstance(start, SschaResult):
        return start.state
    if not isinstance(start, str | Path):
        raise InputError(
            f"start: {type(start).__name__}: must be an SschaResult, the folder of a run, or the"
            " prefix of dynamical matrices"
        )
    if Path(start).is_dir():
        return SschaResult.read(start).state
    return state_from_dyn(start, temperature)


def configurations_of(start: Any, model_id: str) -> np.ndarray | None:
    """Displacements (n, n_supercell, 3) in A that a run of another model than ``model_id`` drew
    from the state it ended in.

    None where ``start`` is no folder of a run, or of the same model (whose energies would only be
    worked out again).
    """
    if not isinstance(start, str | Path) or not Path(start).is_dir():
        return None
    result = SschaResult.read(start)
    if result.model_id == model_id:
        return None
    ensemble = final_ensemble(Path(start), result)
    return None if ensemble is None else ensemble.displacements


def start_run(task: Task, evaluator: Evaluator) -> Start:
    """First state of a run; evaluates forces (and stresses, if the cell may change)."""
    atoms, settings = task.atoms, task.settings
    variable_cell = settings.cell == "variable"
    check_calculator(evaluator, atoms, stress=variable_cell)
    if task.start is not None:
        return continue_from(task.start, task, evaluator)
    # two levels sample cheaply: their start may be as rough as single precision leaves it
    accurate = in_double_precision(evaluator) if task.surrogate is None else evaluator
    counting = CountingEvaluator(accurate)
    relaxed = stripped(atoms)
    if settings.centroids == "relaxed":
        reduced = symmetric_primitive(relaxed, settings.symprec)
        supercell_of(reduced, settings)
        relaxed = relaxed_primitive(
            reduced, counting, task.pressure, symprec=settings.symprec, variable_cell=variable_cell
        )
    structure = with_masses(relaxed, relaxed, task.masses)
    if heavy := isotopes(structure):
        log.info("%s: masses %s amu", structure.get_chemical_formula(), heavy)
    matrix = supercell_of(structure, settings)
    first = harmonic_start(
        structure,
        counting,
        temperature=task.temperature,
        supercell_matrix=matrix,
        variable_cell=variable_cell,
        symmetry=symmetry_of(structure, matrix, settings),
    )
    return replace(first, n_evaluations=counting.count)


def continue_from(start: SschaState, task: Task, evaluator: Evaluator) -> Start:
    """Take cell, centroids and force constants of another run; supercell, masses and temperature
    may change. With fixed centroids it takes the force constants alone."""
    if composition(start.atoms.numbers) != composition(task.atoms.numbers):
        raise InputError(
            f"start: is {start.atoms.get_chemical_formula()}, the structure is"
            f" {task.atoms.get_chemical_formula()}"
        )
    structure = with_masses(start.atoms, task.atoms, task.masses)
    if task.settings.centroids == "fixed":
        if not np.array_equal(start.atoms.numbers, task.atoms.numbers):
            raise InputError(
                "start: has its atoms in another order or number than the structure, whose"
                " centroids are fixed; start without it"
            )
        structure = with_masses(stripped(task.atoms), task.atoms, task.masses)
    matrix = supercell_of(structure, task.settings)
    symmetry = symmetry_of(structure, matrix, task.settings)
    same = matrix == start.supercell_matrix
    compact = symmetry.force_constants(
        start.force_constants if same else interpolate(start, matrix)
    )
    # As a harmonic start: it may be one, with modes near zero on either side of it, and its sample
    # would be lost.
    state = floor_modes(SschaState(structure, matrix, compact, task.temperature), symmetry)
    if task.settings.cell != "variable":
        return Start(state, None, 0)
    counting = CountingEvaluator(evaluator)
    return Start(state, static_response_to_strain(structure, counting), counting.count)


def supercell_of(atoms: Atoms, settings: SschaSettings) -> SupercellMatrix:
    """The supercell of a primitive cell; raises ``InputError`` for one atom in one cell, and for
    what the engine cannot take.

    With fixed centroids the one that is asked for, whatever the symmetry: neighbours on the surface
    F(R) have the same.
    """
    diagonal = settings.engine == "python-sscha"
    if settings.centroids == "fixed" and not isinstance(settings.supercell, dict):
        supercell_matrix = as_supercell_matrix(settings.supercell)
    else:
        supercell_matrix = choose_supercell_matrix(
            atoms, settings.supercell, SYMMETRY_OF_A_STATE, diagonal=diagonal
        )
    if diagonal and not is_diagonal(supercell_matrix):
        raise InputError(
            f"sscha.supercell: {[list(row) for row in supercell_matrix]}: is not diagonal, and"
            " engine: python-sscha only repeats cells; take engine: native, or three repetitions"
        )
    if len(atoms) * n_cells(supercell_matrix) < 2:
        raise InputError(
            f"sscha.supercell: {list(supercell_matrix)}: one atom has no vibrations;"
            " take a larger supercell"
        )
    return supercell_matrix


def composition(kinds_of_atoms: np.ndarray) -> dict[int, float]:
    """Fraction of every kind of atom."""
    counts = Counter(kinds_of_atoms.tolist())
    return {kind: round(count / len(kinds_of_atoms), 6) for kind, count in counts.items()}


def interpolate(state: SschaState, supercell_matrix: SupercellMatrix) -> np.ndarray:
    """Compact force constants of another supercell by Fourier interpolation."""
    q = q_points(supercell_matrix)
    return inverse_fourier(interpolated(*nearest_images(state), q), supercell_matrix, q)


def sample_ensemble(
    state: SschaState, n_configs: int, seed: list[int], evaluator: Evaluator, what: str
) -> Ensemble:
    """``n_configs`` configurations drawn from the state with ``seed`` and evaluated; ``what`` is
    for the messages."""
    return evaluated(state, sample(state, n_configs, np.random.default_rng(seed)), evaluator, what)


def evaluated(
    state: SschaState, displacements: np.ndarray, evaluator: Evaluator, what: str
) -> Ensemble:
    """The ensemble of ``displacements`` (n_configs, n_supercell, 3), A. Raises ``SschaError`` for
    numbers that are not finite, or none."""
    try:
        found = CountingEvaluator(evaluator).evaluate(displaced(state, displacements))
    except InputError as error:
        raise SschaError(f"{what}: a sampled configuration cannot be evaluated: {error}") from error
    return Ensemble(
        displacements,
        np.asarray(found.energy, dtype=float),
        np.array(found.forces, dtype=float),
        np.array(found.stress, dtype=float).reshape(-1, 3, 3),
    )
