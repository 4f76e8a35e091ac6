"""``learning.select: sscha``: labels from the SSCHA ensembles of candidates whose order is undecided.

What a label is worth is how much it narrows the differences of G that are undecided. G_DFT - G_model of a phase is the average of
(E_DFT - E_model)/N over its ensemble (`magus_anharmonic.analysis.gibbs_correction`), so that the squared error of its difference to the
lowest phase b is s_b^2/n_b + s_j^2/n_j for n pairs +u/-u with the spread s. Pairs are given out one by one to the phase in which one
more lowers sum_j p_j (s_b^2/n_b + s_j^2/n_j) most, p_j being the odds that phase j is the lowest after all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import write

from magus_anharmonic.errors import DamagedFile
from magus_anharmonic.files import read_whole, replacing
from magus_anharmonic.learning.dataset import LabelStore, plan_label, read_labels
from magus_anharmonic.learning.families import parent_name
from magus_anharmonic.settings import LearningSettings
from magus_anharmonic.structures import bare

log = logging.getLogger(__name__)

TOTAL = "n_planned"
"""In every structure of the file of a plan, how many it holds: a file that is cut between two of them is noticed."""


@dataclass(frozen=True)
class Contender:
    """A candidate that may be the lowest, as its SSCHA run left it; the first of a list is the lowest one so far.

    centroids : one primitive cell, the parent of its configurations. configurations : of the supercell, +u and -u next to each other, of
    which the first pairs are taken. odds : probability to be the lowest. spread : eV/atom, expected standard deviation of the model's
    energy error among the pairs of the ensemble.
    """

    id: str
    centroids: Atoms
    configurations: Sequence[Atoms]
    odds: float
    spread: float


def allocate(spreads: Sequence[float], odds: Sequence[float], n_pairs: int, most: Sequence[int] | None = None) -> list[int]:
    """Pairs for every contender, the first being the lowest; at most ``most`` of each.

    Each gets one before any gets two (in the order of their worth, when there are fewer pairs than contenders).
    """
    weights = np.array(odds, dtype=float)
    weights[0] = weights[1:].sum()
    worth = np.maximum(weights, 1e-12) * np.maximum(np.square(np.asarray(spreads, dtype=float)), 1e-24)
    room = np.full(len(worth), n_pairs) if most is None else np.array(most)
    given = np.zeros(len(worth), dtype=int)
    for _ in range(min(n_pairs, int(room.sum()))):
        gain = np.where(given == 0, np.inf, worth / np.maximum(given * (given + 1), 1))
        gain[given >= room] = -np.inf
        first = np.flatnonzero(gain == gain.max())
        given[first[np.argmax(worth[first])]] += 1
    return given.tolist()


def plan_ensembles(
    contenders: Sequence[Contender], generation: int, settings: LearningSettings, store: LabelStore, folder: str | Path
) -> list[Atoms]:
    """The ``n_sample * n_perturb`` configurations to label (whole pairs), with everything about them in ``info``. A phase that has no
    labels yet trains.

    The plan is kept in ``folder/ensembles/gen{N}.xyz`` and read from there when the round is taken up again (a damaged one is set aside and
    made anew); without contenders and without such a file it is empty.
    """
    file = plan_file(folder, generation)
    if (kept := read_whole(file, read_plan)) is not None:
        return kept
    if not contenders:
        return []
    n_pairs = max(1, settings.n_sample * settings.n_perturb // 2)
    known = store.sides(settings.split, before=generation)
    shares = allocate(
        [c.spread for c in contenders], [c.odds for c in contenders], n_pairs, [len(c.configurations) // 2 for c in contenders]
    )
    planned = []
    for contender, share in zip(contenders, shares, strict=True):
        log.info(
            "%s (odds to be lowest %.2f, spread of the energy error %.2g eV/atom): %d pairs of its ensemble are labelled",
            contender.id, contender.odds, contender.spread, share,
        )  # fmt: skip
        parent = bare(contender.centroids)
        name = parent_name(parent)
        family = store.families.family(name, parent)
        for number, configuration in enumerate(contender.configurations[: 2 * share]):
            atoms = bare(configuration)
            plan_label(
                atoms,
                generation=generation,
                parent=name,
                family=family,
                side=known.get(family, "train"),
                kind="sscha",
                candidate=f"c-{contender.id}",
                distortion_seed=f"ensemble-{number}",
            )
            planned.append(atoms)
    if planned:
        for atoms in planned:
            atoms.info[TOTAL] = len(planned)
        with replacing(file) as temporary:
            write(temporary, planned, format="extxyz")
        # the digits of the file: a plan that is read again must name the same structures
        return read_plan(file)
    return planned


def plan_file(folder: str | Path, generation: int) -> Path:
    """Where the plan of a round is kept."""
    return Path(folder) / "ensembles" / f"gen{generation}.xyz"


def read_plan(file: Path) -> list[Atoms]:
    """The structures of a plan; raises ``DamagedFile`` when they are not all there."""
    frames = read_labels(file)
    totals = {atoms.info.pop(TOTAL, None) for atoms in frames}
    if totals != {len(frames)} or any("id" not in atoms.info for atoms in frames):
        raise DamagedFile(f"{file}: holds {len(frames)} structures of a plan, which are not all")
    return frames
