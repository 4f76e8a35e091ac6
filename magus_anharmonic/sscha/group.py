"""The space group of SSCHA centroids: what their statistical error supports, and the group against the tolerance.

A tolerance alone decides nothing: at 0.1 A everything is cubic. For every group that spglib finds at some tolerance, the
structure is moved onto that symmetry; a group is supported when no atom has to move by more than three of its standard
errors, and the cell by no more than its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import spglib
from ase import Atoms

from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.structures import space_group, spglib_cell, spglib_or_none

SIGMAS = 3.0
"""Standard errors by which an atom may have to move."""
TOLERANCES = np.geomspace(1e-3, 0.5, 55)
"""Angstrom."""
STRAIN_ERROR = 1e-3
"""Standard error of the cell where none is known: 0.5 GPa over the bulk modulus of a crystal at high pressure."""


@dataclass(frozen=True)
class GroupStep:
    """One space group and the tolerances (A) at which it is found.

    shift : largest move of an atom onto the symmetry, A; pull : the same in standard errors; strain : largest
    component of the strain onto the symmetry; n_operations : of the cell as given.
    """

    group: str
    first: float
    last: float
    n_operations: int
    shift: float
    pull: float
    strain: float
    supported: bool


@dataclass(frozen=True)
class SupportedGroup:
    """group : the highest supported one, at ``tolerance`` A; steps : from the finest to the coarsest tolerance."""

    group: str
    tolerance: float
    steps: tuple[GroupStep, ...]

    def curve(self) -> list[tuple[float, str]]:
        """(tolerance in A, space group) for a table or a figure."""
        return [(float(t), step.group) for step in self.steps for t in TOLERANCES if step.first <= t <= step.last]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"group": self.group, "tolerance_A": self.tolerance, "steps": [vars(step) for step in self.steps]}


def supported_group(atoms: Atoms, position_error: np.ndarray | float, strain_error: float = STRAIN_ERROR) -> SupportedGroup:
    """The group that the errors of the centroids support.

    position_error : standard error of each coordinate in A, (n, 3), (n, 1) or one number; strain_error : of the cell.
    """
    error = np.broadcast_to(np.maximum(np.asarray(position_error, dtype=float), 1e-6), (len(atoms), 3))
    steps: list[GroupStep] = []
    for tolerance in TOLERANCES:
        group = space_group(atoms, float(tolerance))
        if steps and steps[-1].group == group:
            steps[-1] = GroupStep(**{**vars(steps[-1]), "last": float(tolerance)})
            continue
        count, shifts, strain = move_onto(atoms, float(tolerance))
        pull = float((np.abs(shifts) / error).max())
        supported = pull <= SIGMAS and strain <= SIGMAS * strain_error + 1e-6
        steps.append(GroupStep(group, float(tolerance), float(tolerance), count, float(np.abs(shifts).max()), pull, strain, supported))
    best = max((step for step in steps if step.supported), key=lambda step: step.n_operations, default=steps[0])
    return SupportedGroup(best.group, best.first, tuple(steps))


def group_of_result(result: SschaResult) -> SupportedGroup:
    """The same for a finished run; all centroids are given the error of the least certain one."""
    return supported_group(result.centroids, result.position_error)


def move_onto(atoms: Atoms, tolerance: float) -> tuple[int, np.ndarray, float]:
    """Number of operations at ``tolerance``, moves (n, 3) in A of the atoms onto that symmetry, and the largest strain of the cell.

    A shift of the whole crystal is no move: the mean over the atoms is taken out operation by operation.
    """
    found = spglib_or_none(spglib.get_symmetry, spglib_cell(atoms), symprec=tolerance)
    if not found:
        return 1, np.zeros((len(atoms), 3)), 0.0
    cell, scaled = atoms.cell.array, atoms.get_scaled_positions(wrap=False)
    metric = cell @ cell.T
    moves = np.zeros_like(scaled)
    average = np.zeros((3, 3))
    for rotation, translation in zip(found["rotations"], found["translations"], strict=True):
        difference = (scaled @ rotation.T + translation)[:, None] - scaled[None]
        difference -= np.round(difference)
        distance = np.linalg.norm(difference @ cell, axis=2)
        distance[atoms.numbers[:, None] != atoms.numbers[None, :]] = np.inf
        target = distance.argmin(axis=1)
        off = difference[np.arange(len(scaled)), target]
        moves[target] += off - off.mean(axis=0)
        average += rotation.T @ metric @ rotation
    count = len(found["rotations"])
    inverse = np.linalg.inv(cell)
    strain = 0.5 * (inverse @ (average / count) @ inverse.T - np.eye(3))
    return count, moves / count @ cell, float(np.abs(strain).max())
