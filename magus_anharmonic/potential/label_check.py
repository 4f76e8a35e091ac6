"""Labels that cannot be right: compared with a model and with each other before anything is learned
from them.

Robust throughout, so that a third of the labels may be wrong: medians, and a fit of the energies
per species by absolute deviations (two codes count energies from different atoms). What all labels
share (a sign, a unit) is an error of who made them; what one has alone sets it aside.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.calculator_check import FORCE_FACTORS, NEAR, STRESS_FACTORS, likely_cause
from magus_anharmonic.energy_surface import surface_of_labels
from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.labelled import labels_of, name_of
from magus_anharmonic.units import RYDBERG

log = logging.getLogger(__name__)

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]
"""Label and model, one of each per structure."""

OUTLIER_SIGMAS = 8.0
"""Robust standard deviations beyond which a label is an outlier."""
LEAST_ENERGY, LEAST_FORCE, LEAST_STRESS = 0.3, 1.0, 0.1
"""eV/atom, eV/A (rms of a component) and eV/A^3: nearer than this to the others a label is never
one."""
LENGTH = 1.0
"""A: a model whose forces are wrong by f may be wrong by f times this in the energy per atom;
labels where it fails are what it needs."""
WILD = 20.0
"""Times the least: forces or a stress that no known factor explains."""
ALONE, ALONE_ENERGY = 300.0, 50.0
"""Without a model: how many times the usual size, and eV/atom."""
FACTOR_OF_ITS_OWN = 3.0
"""Times the usual misfit: a known factor, or zeros, tell a label that is no outlier by its size
alone."""
MEASURABLE = 1 / 20
"""Of the least: forces or a stress of the model that are none by symmetry or by rounding."""
ENERGY_FACTORS = {
    "Ry": 1 / RYDBERG,
    "Ha": 0.5 / RYDBERG,
    "meV": 1e3,
    "kJ/mol": 96.485,
    "kcal/mol": 23.061,
}
ALIKE_ENERGIES = 0.95
"""As `ALIKE`, of energies, whose scale is compared with that of the forces."""
GROSS = 5.0
"""Factor between label and model that, with a known cause, tells one label alone."""
FEWEST = 3
"""Labels that can be compared with each other."""
ALIKE = 0.8
"""Correlation of labels and model above which a factor between them means something."""
ALIKE_ALONE = 0.9
"""The same of one label alone: forces that a model of few labels has at half their size, and at a
correlation of 0.8, are no forces in eV/bohr."""


def outliers(labelled: Sequence[Atoms], model: Any | None = None) -> dict[int, str]:
    """Place -> reason of the labels that cannot be right; ``model`` (an evaluator) is what they are
    compared with, None: each other alone.

    Raises ``InputError`` when forces or stresses of all of them differ from the model by a sign or
    a unit, or a label is missing.
    """
    if not labelled:
        return {}
    if surface_of_labels(labelled) is not None and getattr(model, "surface", None) is None:
        # forces of a free energy may well point the other way than those of its potential
        model = None
    found = {
        i: "its own flag says that the calculation did not converge"
        for i, atoms in enumerate(labelled)
        if not says_converged(atoms)
    }
    labels = [labels_of(atoms) for atoms in labelled]
    n_atoms = np.array([len(atoms) for atoms in labelled])
    numbers = None if model is None else model.evaluate(list(labelled))
    energy, zero = np.array([label[0] for label in labels]), np.zeros((3, 3))
    forces = [
        (label[1], np.zeros_like(label[1]) if numbers is None else np.asarray(numbers.forces[i]))
        for i, label in enumerate(labels)
    ]
    stress = [
        (label[2], zero if numbers is None else np.asarray(numbers.stress[i]))
        for i, label in enumerate(labels)
    ]
    _refuse_axes(forces, "forces")
    _refuse_axes([(_shape(label), _shape(other)) for label, other in stress], "stress")
    _refuse_common(forces, "forces", "eV/A", FORCE_FACTORS, LEAST_FORCE)
    if numbers is not None and np.isfinite(
        _ratio(forces)
    ):  # a model that knows nothing of the forces says nothing of the rest either
        _refuse_common(stress, "stress", "eV/A^3", STRESS_FACTORS, LEAST_STRESS)
        _refuse_stress_per_cell(labelled, stress)
        _refuse_energies(labelled, energy, np.asarray(numbers.energy), _ratio(forces))
    apart = energy_residuals(
        labelled, (energy - (0.0 if numbers is None else np.asarray(numbers.energy))) / n_atoms
    )
    misfit = {"forces": _misfits(forces), "stress": _misfits(stress)}
    for i in outlying(apart, LEAST_ENERGY if model is not None else ALONE_ENERGY):
        if model is None or abs(apart[i]) > LENGTH * misfit["forces"][i]:
            zeroed = "; the energy is 0, as where it was left out" if energy[i] == 0.0 else ""
            found.setdefault(
                i,
                f"its energy is {apart[i]:+.4g} eV/atom away from what model and other labels"
                f" say{zeroed}",
            )
    for what, unit, pairs, least, factors in (
        ("forces", "eV/A", forces, LEAST_FORCE, FORCE_FACTORS),
        ("stress", "eV/A^3", stress, LEAST_STRESS, STRESS_FACTORS),
    ):
        sizes = misfit[what]
        usual = float(np.median(sizes))
        for i in outlying(sizes, least):
            cause = _cause([pairs[i]], unit, factors)
            wild = sizes[i] > (
                WILD * least if model is not None else max(WILD * least, ALONE * usual)
            )
            if sizes[i] > usual and (
                cause or (wild and 2.0 * sizes[i] > np.sqrt(np.mean(pairs[i][0] ** 2)))
            ):
                said = f" ({cause}?)" if cause else ""
                found.setdefault(
                    i,
                    f"its {what} differ by {sizes[i]:.3g} {unit} from what is expected, others by"
                    f" {usual:.2g}{said}",
                )
        few = model is not None and len(labelled) < FEWEST
        for i in np.flatnonzero(sizes > least) if few else ():
            ratio = _ratio([pairs[i]])
            if (ratio < 0.0 or not 1 / GROSS < ratio < GROSS) and (
                cause := _cause([pairs[i]], unit, factors)
            ):
                found.setdefault(
                    int(i),
                    f"its {what} are {ratio:.3g} times those of the model that training starts from"
                    f" ({cause}?)",
                )
        for i in (
            np.flatnonzero(sizes > FACTOR_OF_ITS_OWN * usual)
            if model is not None and len(sizes) >= FEWEST
            else ()
        ):
            if cause := _cause_of_one(pairs[i], unit, factors, least):
                found.setdefault(
                    int(i),
                    f"its {what} differ by {sizes[i]:.3g} {unit} from what is expected ({cause}?)",
                )
    return found


def says_converged(atoms: Atoms) -> bool:
    """Whether no flag in ``info`` (converged, scf_converged, ...) says that the calculation did not
    converge."""
    for key, value in atoms.info.items():
        name = str(key).lower()
        if not re.fullmatch(
            r"(.*_)?(un|not|non)?converge(d|nce)(_(scf|electronic|elec|ionic|ions?))?", name
        ):
            continue
        bad = (
            ("true", "t", "1", "yes")
            if re.search(r"(^|_)(un|not_?|non_?)converge", name)
            else ("false", "f", "0", "no")
        )
        if any(str(word).lower() in bad for word in np.ravel(np.asarray(value, dtype=object))):
            return False
    return True


def energy_residuals(structures: Sequence[Atoms], energies: np.ndarray) -> np.ndarray:
    """``energies`` (n,) eV/atom less the constants per species that leave the smallest sum of
    absolute values."""
    species = sorted({int(number) for atoms in structures for number in atoms.numbers})
    fractions = np.array(
        [[np.mean(atoms.numbers == number) for number in species] for atoms in structures]
    )
    left = energies - np.median(energies)
    for _ in range(50):  # reweighted least squares
        weights = 1.0 / np.sqrt(np.maximum(np.abs(left), 1e-6))
        constants = np.linalg.lstsq(weights[:, None] * fractions, weights * energies, rcond=1e-6)[0]
        left = energies - fractions @ constants
    return left - np.median(left)


def _misfits(pairs: Pairs) -> np.ndarray:
    """Root mean square of label minus model for every label."""
    return np.array([np.sqrt(np.mean((label - other) ** 2)) for label, other in pairs])


def outlying(values: np.ndarray, least: float) -> list[int]:
    """Indices of ``values`` farther from their median than `OUTLIER_SIGMAS` robust standard
    deviations and than ``least``."""
    if len(values) < FEWEST:
        return []
    away = values - np.median(values)
    scale = 1.4826 * np.median(np.abs(away))
    return [int(i) for i in np.flatnonzero(np.abs(away) > max(OUTLIER_SIGMAS * scale, least))]


def _ratio(pairs: Pairs, alike: float = ALIKE) -> float:
    """Median over labels of their factor against the model, of those that correlate with it by more
    than ``alike``; NaN for too few."""
    ratios, n = [], 0
    for label, model in pairs:
        norms = float(np.linalg.norm(label) * np.linalg.norm(model))
        n += norms > 0.0
        if norms > 0.0 and abs(float(np.sum(label * model))) > alike * norms:
            ratios.append(float(np.sum(label * model) / np.sum(model**2)))
    return float(np.median(ratios)) if ratios and 2 * len(ratios) > n else float("nan")


def _cause(pairs: Pairs, unit: str, factors: dict[str, float], alike: float = ALIKE) -> str:
    ratio = _ratio(pairs, alike)
    return likely_cause(ratio, unit, factors, recognised=True) if np.isfinite(ratio) else ""


def _cause_of_one(
    pair: tuple[np.ndarray, np.ndarray], unit: str, factors: dict[str, float], least: float
) -> str:
    """Why one label is no number in ``unit`` whatever the model is worth: it is all 0, or another
    unit explains it."""
    label, model = pair
    if np.sqrt(np.mean(model**2)) < MEASURABLE * least:
        return ""
    cause = _cause([pair], unit, factors, ALIKE_ALONE)
    return (
        "0, as where they were left out"
        if not label.any()
        else cause
        if "instead of" in cause
        else ""
    )


def _refuse_stress_per_cell(labelled: Sequence[Atoms], stress: Pairs) -> None:
    per_cell = _ratio(
        [
            (label / atoms.get_volume(), model)
            for atoms, (label, model) in zip(labelled, stress, strict=True)
        ]
    )
    if len(labelled) >= FEWEST and abs(abs(per_cell) - 1.0) < NEAR and abs(_ratio(stress)) > 2.0:
        raise InputError(
            f"labels: the stress of most of the {len(labelled)} labels is that of the cell, in eV;"
            " divide it by the volume"
        )


def _refuse_energies(
    labelled: Sequence[Atoms], energy: np.ndarray, model: np.ndarray, forces: float
) -> None:
    """Raise ``InputError`` where the energies change by a known factor less or more than the
    ``forces`` (their ratio to the model's)."""
    n_atoms = np.array([len(atoms) for atoms in labelled])
    expected = forces * energy_residuals(labelled, model / n_atoms)
    factor, whole = (
        _slope(energy_residuals(labelled, values), expected)
        for values in (energy / n_atoms, energy)
    )
    if len(labelled) < 2 * FEWEST or not np.isfinite(factor):
        return
    per_atom = abs(whole - 1.0) < NEAR and factor < 1.0 - 3.0 * NEAR
    cause = (
        "per atom instead of per structure"
        if per_atom
        else likely_cause(factor, "eV", ENERGY_FACTORS, recognised=True)
    )
    if cause:
        raise InputError(
            f"labels: the energies of the {len(labelled)} labels change by {factor:.3g} times what"
            f" their forces say: {cause}; give those of the whole structure in eV"
        )


def _slope(label: np.ndarray, model: np.ndarray) -> float:
    """Factor of ``label`` against ``model``; NaN where they are not `ALIKE_ENERGIES`."""
    product, norms = float(label @ model), float(np.linalg.norm(label) * np.linalg.norm(model))
    return (
        product / float(model @ model)
        if norms > 0.0 and abs(product) > ALIKE_ENERGIES * norms
        else float("nan")
    )


def _shape(stress: np.ndarray) -> np.ndarray:
    """A stress (3, 3) without its pressure, which is the same along all axes."""
    return stress - np.eye(3) * np.trace(stress) / 3.0


def _refuse_axes(pairs: Pairs, what: str) -> None:
    """Raise ``InputError`` where most labels are those of the model only with x, y and z in another
    order."""
    alike = {}
    for order in permutations(range(3)):
        turned = [
            (label[:, order] if what == "forces" else label[np.ix_(order, order)], model)
            for label, model in pairs
        ]
        norms = [float(np.linalg.norm(label) * np.linalg.norm(model)) for label, model in turned]
        alike[order] = [
            float(np.sum(label * model)) / norm
            for (label, model), norm in zip(turned, norms, strict=True)
            if norm > 0.0
        ]
    if len(alike[0, 1, 2]) < 2 * FEWEST:
        return
    typical = {order: float(np.median(values)) for order, values in alike.items()}
    best = max(typical, key=typical.__getitem__)
    if typical[0, 1, 2] < ALIKE < typical[best]:
        given = ", ".join("xyz"[best.index(axis)] for axis in range(3))
        raise InputError(
            f"labels: the {what} of most of the {len(pairs)} labels are along other axes than those"
            f" of the model that training starts from: {given} instead of x, y, z (correlation"
            f" {typical[0, 1, 2]:.2f}, and {typical[best]:.2f} in that order)"
        )


def _refuse_common(
    pairs: Pairs, what: str, unit: str, factors: dict[str, float], least: float
) -> None:
    empty = [
        not label.any() and np.sqrt(np.mean(model**2)) > MEASURABLE * least
        for label, model in pairs
    ]
    if len(pairs) >= FEWEST and 2 * sum(empty) > len(pairs):
        raise InputError(
            f"labels: the {what} of {sum(empty)} of the {len(pairs)} labels are 0, as where they"
            " were left out; compute them"
        )
    cause = _cause(pairs, unit, factors) if len(pairs) >= FEWEST else ""
    if cause:
        raise InputError(
            f"labels: the {what} of most of the {len(pairs)} labels are {_ratio(pairs):.3g} times"
            f" those of the model that training starts from: {cause}; give them in {unit} with"
            " ASE's sign (a stress is positive where the cell is pulled)"
        )


def sound(labelled: Sequence[Atoms], model: Any, where: object) -> tuple[list[Atoms], list[str]]:
    """Those that are none of the `outliers`, and a line for each other one, which the log has too.

    where : of the labels, for the log; a label with ``info['_frame']`` has its own.
    """
    wrong = outliers(labelled, model)
    lines = [
        f"frame {labelled[i].info.get('_frame', i + 1)}, {name_of(labelled[i])}: {reason}"
        for i, reason in wrong.items()
    ]
    for line in lines:
        log.warning("%s: a label that cannot be right is left out: %s", where, line)
    return [atoms for i, atoms in enumerate(labelled) if i not in wrong], lines
