"""DFT labels of the configurations of an SSCHA state: drawn once, labelled one by one, each kept
the moment it is finished."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import write

from magus_anharmonic.errors import DamagedFile, InputError, MagusAnharmonicError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.io.digests import SCHEMA
from magus_anharmonic.io.files import read_json, read_whole, replacing, write_json
from magus_anharmonic.labelers.base import Failure, Label, Labeler
from magus_anharmonic.learning.dataset import label_digest, labelled, read_labels, with_digest
from magus_anharmonic.potential.label_check import outliers
from magus_anharmonic.runs.record import read_failures, record_failure
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.state import SschaState, displaced, sample, state_digest
from magus_anharmonic.structures import structure_id

log = logging.getLogger(__name__)

SAMPLING_TAG = 5381
"""Separates the random numbers of these ensembles from those of other purposes with the same
seed."""


WHAT = "magus-anharmonic errors"
"""Names this work in the lock of its folder."""


@dataclass(frozen=True)
class Labelled:
    """What two energy surfaces say about the same configurations of ``state`` (whole +u/-u pairs,
    next to each other).

    ``reference`` and ``model`` share their displacements; ``centroid`` are the forces (n_supercell,
    3) eV/A of reference and model at the centroids, None where there is no label of them.
    ``n_failed`` labels could not be made. ``electronic`` : (n,) eV per supercell, of each label the
    free energy of the electrons minus the energy at zero smearing; None where it was not asked for.
    """

    state: SschaState
    reference: Ensemble
    model: Ensemble
    centroid: tuple[np.ndarray, np.ndarray] | None
    n_failed: int = 0
    electronic: np.ndarray | None = None

    @property
    def n_pairs(self) -> int:
        return len(self.reference.energies) // 2


def sample_displacements(state: SschaState, n_configs: int, seed: int) -> np.ndarray:
    """Displacements (n_configs, n_supercell, 3) in A, +u/-u pairs; a longer sample begins with the
    shorter one.

    Raises ``InputError`` for an odd or too small number.
    """
    check_number(n_configs)
    return sample(state, n_configs, np.random.default_rng([seed, SAMPLING_TAG]))


def check_number(n_configs: int) -> None:
    """Raise ``InputError`` for a number of configurations that is odd or smaller than two pairs."""
    if n_configs < 4 or n_configs % 2:
        raise InputError(f"--n-configs: {n_configs}: must be even (pairs +u, -u) and at least 4")


def label_locked(
    state: SschaState, displacements: np.ndarray, labeler: Labeler, folder: str | Path
) -> None:
    """Label the centroids and then the ``displacements``, in order, into ``folder/labels.xyz``;
    what is there is not done again.

    The caller holds the lock of ``folder``. Failures go to ``failures.jsonl``; another call tries
    them again. ``source.json`` keeps state and DFT settings. Raises ``InputError`` for a folder
    that holds another state or other settings.
    """
    target = Path(folder)
    claim(target, state, labeler.settings_hash, labeler.description)
    file = target / "labels.xyz"
    done = _read_checked(file) if file.is_file() else []
    known = {str(atoms.info["id"]) for atoms in done}
    waiting = [
        atoms for atoms in configurations(state, displacements) if atoms.info["id"] not in known
    ]
    log.info(
        "%d of %d labels are there; labelling with %s",
        len(known),
        len(displacements) + 1,
        labeler.description,
    )

    def keep(index: int, result: Label | Failure) -> None:
        atoms = waiting[index]
        if isinstance(result, Failure):
            log.warning("configuration %s has no label: %s", atoms.info["id"], result.reason)
            record_failure(
                target, "label", result.reason, id=atoms.info["id"], number=atoms.info["number"]
            )
            return
        done.append(with_digest(labelled(atoms, result, seconds=round(result.seconds, 1))))
        with replacing(file) as temporary:
            write(temporary, done, format="extxyz")

    if waiting:
        labeler.label(waiting, keep)


def configurations(state: SschaState, displacements: np.ndarray) -> list[Atoms]:
    """The supercell at the centroids (``number`` -1) and at each of the displacements, ``info``
    with ``id`` and ``number``."""
    structures = [state.supercell.copy(), *displaced(state, displacements)]
    for number, atoms in enumerate(structures, start=-1):
        atoms.info.update(
            id=f"c-{structure_id(atoms)}",
            number=number,
            kind="centroids" if number < 0 else "ensemble",
        )
    return structures


def claim(folder: Path, state: SschaState, settings_hash: str, description: str) -> None:
    """Write ``source.json`` or compare with the one that is there; raises ``InputError`` when they
    differ.

    A damaged one is made anew, where the labels beside it are those of these DFT settings (labels
    of another state have other ids).
    """
    identity = {
        "schema": SCHEMA,
        "state": state_digest(state),
        "supercell": list(state.supercell_matrix),
        "masses_amu": state.atoms.get_masses().tolist(),
        "temperature_K": state.temperature,
        "settings_hash": settings_hash,
    }
    path = folder / "source.json"
    stored = read_whole(path, read_json)
    if stored is None:
        _check_settings(folder / "labels.xyz", settings_hash)
        write_json(path, {**identity, "labeler": description})
        return
    words = {
        "state": "another SSCHA state",
        "supercell": "another SSCHA state: supercell",
        "settings_hash": "labels of other DFT settings",
        "temperature_K": "another temperature",
    }
    for key, value in identity.items():
        if stored.get(key) != value:
            raise InputError(
                f"{folder}: holds {words.get(key, 'files of another version')} ({stored.get(key)},"
                f" now {value}); give another folder"
            )


def _read_checked(file: Path) -> list[Atoms]:
    """Labels that are what they were when they were made; raises ``DamagedFile`` that names the
    first that is not."""
    frames = read_labels(file)
    for atoms in frames:
        whole = atoms.calc is not None and {"energy", "forces", "stress"} <= set(atoms.calc.results)
        if "digest" in atoms.info and not (
            whole and atoms.info["digest"] == f"d-{label_digest(atoms)}"
        ):
            raise DamagedFile(
                f"{file}: label {atoms.info.get('id')} was changed since it was made; bring back an"
                " undamaged copy"
            )
    return frames


def _check_settings(file: Path, settings_hash: str) -> None:
    found = (
        {str(atoms.info.get("settings_hash")) for atoms in read_labels(file)}
        if file.is_file()
        else set()
    )
    if found - {settings_hash}:
        raise InputError(
            f"{file}: holds labels of other DFT settings ({', '.join(sorted(found))}, now"
            f" {settings_hash}); give another folder"
        )


def read_labelled(
    state: SschaState,
    displacements: np.ndarray,
    model: Evaluator,
    folder: str | Path,
    *,
    electronic: bool = False,
) -> Labelled:
    """The labels of ``folder/labels.xyz`` that belong to ``displacements``, and the model's numbers
    at the same configurations; ``electronic``: the labels' free energies too.

    Pairs of which a member has no label are left out. Raises ``InputError`` when fewer than two
    whole pairs were labelled, or a free energy is asked for that the code does not give, and
    ``MagusAnharmonicError`` with the reasons when that is because labels failed.
    """
    file = Path(folder) / "labels.xyz"
    structures = configurations(state, displacements)
    mine = {str(atoms.info["id"]) for atoms in structures}
    frames = [
        atoms
        for atoms in (_read_checked(file) if file.is_file() else [])
        if str(atoms.info["id"]) in mine
    ]
    wrong = outliers(frames, model)
    for i, reason in wrong.items():
        log.warning("%s: frame %d: %s; it is left out", file, i + 1, reason)
        record_failure(
            folder, "label", reason, id=frames[i].info["id"], number=frames[i].info["number"]
        )
    found = {str(atoms.info["id"]): atoms for i, atoms in enumerate(frames) if i not in wrong}
    centroids, ensemble = structures[0], structures[1:]
    there = np.array([atoms.info["id"] in found for atoms in ensemble])
    whole = np.flatnonzero(np.repeat(there.reshape(-1, 2).all(axis=1), 2))
    if len(whole) < 4:
        missing = {
            atoms.info["id"]
            for atoms, labelled in zip(ensemble, there, strict=True)
            if not labelled
        }
        failed = {
            record["id"]: str(record.get("reason"))
            for record in read_failures(folder)
            if record.get("id") in missing
        }
        text = (
            f"{file}: {len(whole) // 2} whole pairs +u, -u are labelled; at least two are needed"
            " for an error bar"
        )
        if failed:
            reason, count = Counter(failed.values()).most_common(1)[0]
            raise MagusAnharmonicError(
                f"{text}. {len(failed)} of {len(ensemble)} labels failed, {count} of them so:"
                f" {reason}"
            )
        raise InputError(text)
    chosen = [ensemble[index] for index in whole]
    labels = [found[atoms.info["id"]] for atoms in chosen]
    reference = evaluated_by_labels(labels, displacements[whole])
    centroid = None
    if centroids.info["id"] in found:
        at_centroids = model.evaluate([centroids]).forces[0]
        centroid = (
            np.asarray(found[centroids.info["id"]].get_forces()),
            np.asarray(at_centroids, dtype=float),
        )
    return Labelled(
        state,
        reference,
        evaluated_by(model, chosen, displacements[whole]),
        centroid,
        int((~there).sum()),
        _electronic(labels, reference.energies, file) if electronic else None,
    )


def _electronic(labels: Sequence[Atoms], energies: np.ndarray, file: Path) -> np.ndarray:
    """(n,) F_el - E_0 of ``labels``, eV."""
    free = [atoms.info.get("free_energy") for atoms in labels]
    if None in free:
        raise InputError(f"{file}: labels without a free energy: this code gives none of electrons")
    return np.array(free, dtype=float) - energies


def evaluated_by_labels(frames: Sequence[Atoms], displacements: np.ndarray) -> Ensemble:
    """The labels of ``frames`` as an ensemble."""
    return Ensemble(
        displacements,
        np.array([atoms.get_potential_energy() for atoms in frames]),
        np.array([atoms.get_forces() for atoms in frames]),
        np.array([atoms.get_stress(voigt=False) for atoms in frames]),
    )


def evaluated_by(
    model: Evaluator, structures: Sequence[Atoms], displacements: np.ndarray
) -> Ensemble:
    """The numbers of ``model`` as an ensemble."""
    found = model.evaluate(structures)
    return Ensemble(
        displacements,
        np.asarray(found.energy, dtype=float),
        np.array(found.forces, dtype=float),
        np.asarray(found.stress),
    )
