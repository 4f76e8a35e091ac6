"""Harmonic T1u modes of Im-3m H3S at Gamma against pressure, by GPAW and by a checkpoint.

The zone-centre dynamical matrix of the 4-atom cell splits into blocks by direction. Along z the T1u
block couples S, the H on the z bond, and the two H on the x and y bonds moving in phase: 3 x 3, one
acoustic and two optical branches (the softer of them leads to R3m). Force constants come from
central differences of 0.01 Angstrom for H; the row of S follows from the acoustic sum rule.

Usage: python t1u.py gpaw|gpaw-new|CHECKPOINT [output.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from ase.data import atomic_masses
from label import K_SPACING, labeler
from make_structures import cubic

from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.units import EV_IN_CM1, HBAR, ev_per_a3_to_gpa

LATTICE_CONSTANTS = np.linspace(2.84, 3.16, 7)
DISPLACEMENT = 0.01  # Angstrom


def t1u_squared_frequencies(
    evaluator: Evaluator, lattice_constant: float
) -> tuple[float, np.ndarray]:
    """Pressure in GPa and the three squared T1u frequencies in cm^-2 (signed), ascending."""
    structures = [cubic(lattice_constant)]
    for atom in (3, 1):  # H on the z bond, H on the x bond; both move along z
        for sign in (1, -1):
            moved = cubic(lattice_constant)
            moved.positions[atom, 2] += sign * DISPLACEMENT
            structures.append(moved)
    result = evaluator.evaluate(structures)
    pressure = -ev_per_a3_to_gpa(np.trace(result.stress[0]) / 3)
    columns = []
    for plus, minus in ((1, 2), (3, 4)):
        force = (result.forces[plus] - result.forces[minus])[:, 2] / (2 * DISPLACEMENT)
        columns.append(-np.array([force[0], force[3], force[1] + force[2]]))
    along, across = columns
    # block in the basis (S, H along z, H across z in phase): the in-phase pair has sqrt(2) times
    # one atom's column
    hh, hx, xx = along[1], along[2] / np.sqrt(2), across[2]
    block = np.array([[0, 0, 0], [0, hh, hx], [0, hx, xx]])
    uniform = np.array([1, 1, np.sqrt(2)])
    block[0, 1:] = block[1:, 0] = -block[1:, 1:] @ uniform[1:]
    block[0, 0] = -block[0, 1:] @ uniform[1:]
    mass = np.array([atomic_masses[16], atomic_masses[1], atomic_masses[1]])
    return (
        pressure,
        np.linalg.eigvalsh(block / np.sqrt(np.outer(mass, mass))) * (HBAR * EV_IN_CM1) ** 2,
    )


def critical_pressure(pressures: np.ndarray, squared: np.ndarray) -> float | None:
    """Pressure in GPa at which the softest optical branch changes sign (linear interpolation), or
    None."""
    for i in range(len(pressures) - 1):
        if squared[i] * squared[i + 1] < 0:
            return float(
                np.interp(
                    0.0,
                    *zip(
                        *sorted([(squared[i], pressures[i]), (squared[i + 1], pressures[i + 1])]),
                        strict=True,
                    ),
                )
            )
    return None


def get_evaluator(name: str) -> Evaluator:
    """GPAW with the settings of labels.xyz or of new-labels.xyz, or a checkpoint in float64."""
    if name not in ("gpaw", "gpaw-new"):
        from magus_anharmonic.potential import load

        return load(name, dtype="float64")
    from magus_anharmonic.evaluator import as_evaluator
    from magus_anharmonic.labelers import get_labeler
    from magus_anharmonic.settings import LabelerSettings

    if name == "gpaw-new":
        return as_evaluator(labeler(K_SPACING, Path("gpaw-t1u-new")))
    return as_evaluator(get_labeler(LabelerSettings(calculator="gpaw"), Path("gpaw-t1u")))


def main(name: str, output: str | None = None) -> None:
    evaluator = get_evaluator(name)
    rows = []
    for lattice_constant in LATTICE_CONSTANTS:
        pressure, squared = t1u_squared_frequencies(evaluator, lattice_constant)
        # the acoustic branch is the one closest to zero
        optical = np.delete(squared, np.argmin(np.abs(squared)))
        rows.append(
            {
                "a_A": lattice_constant,
                "pressure_GPa": pressure,
                "squared_frequencies_cm2": optical.tolist(),
            }
        )
        root = np.sign(optical) * np.sqrt(np.abs(optical))
        print(
            f"a = {lattice_constant:.3f} A, {pressure:6.1f} GPa, T1u {root[0]:8.1f} {root[1]:8.1f}"
            " cm-1",
            flush=True,
        )
    critical = critical_pressure(
        np.array([row["pressure_GPa"] for row in rows]),
        np.array([row["squared_frequencies_cm2"][0] for row in rows]),
    )
    print(f"T1u at Gamma becomes imaginary below {critical} GPa ({name})")
    if output:
        Path(output).write_text(
            json.dumps(
                {"evaluator": name, "critical_pressure_GPa": critical, "points": rows}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
