"""What one round of learning labels: distorted structures and configurations of SSCHA ensembles,
with their family and side."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.io import write

from magus_anharmonic.errors import DamagedFile, MagusAnharmonicError
from magus_anharmonic.io.files import read_whole, replacing
from magus_anharmonic.learning.choose import (
    Contender,
    allocate,
    choose,
    distort,
    hold_back,
    parent_name,
    quotas,
    select,
    sides_of_families,
)
from magus_anharmonic.learning.dataset import LabelStore, plan_label, read_labels
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.settings import LearningSettings
from magus_anharmonic.structures import stripped

if TYPE_CHECKING:
    from magus_anharmonic.potential import Potential

log = logging.getLogger(__name__)

TOTAL = "n_planned"

"""In every structure of the file of a plan, how many it holds: a file that is cut between two of
them is noticed."""


class Purpose(IntEnum):
    """What random numbers of a round are for."""

    CHOOSE = 101
    DISTORT = 102
    REPLAY = 103
    TRAIN = 104
    HOLD_BACK = 110
    SELECT = 105


@dataclass(frozen=True)
class Round:
    """A round of learning; the same seed, population and labels give the same plan.

    Every family is on one side for life: that of its labels of rounds before.
    """

    generation: int
    settings: LearningSettings
    store: LabelStore
    seed: int

    def random(self, purpose: Purpose) -> np.random.Generator:
        """The random numbers of this round for one purpose."""
        return np.random.default_rng([self.seed, self.generation, purpose])

    def known_sides(self) -> dict[str, str]:
        """Family -> side, of those that have labels of rounds before."""
        return self.store.sides(self.settings.split, before=self.generation)

    def choose(
        self,
        population: Sequence[Atoms],
        potential: Potential,
        dataset: Sequence[Atoms] = (),
        purpose: Purpose = Purpose.CHOOSE,
    ) -> list[int]:
        """Indices of the structures to label by ``learning.select``, some held back for validation
        and test."""
        rule = self.settings.select
        known = [*dataset, *self.store.labels(before=self.generation)] if rule == "diverse" else []
        rng = self.random(purpose)
        chosen = select(population, self.settings.n_sample, rng, rule, potential, known)
        return hold_back(
            population,
            chosen,
            self.store.families,
            self.known_sides(),
            self.settings.split,
            self.random(Purpose.HOLD_BACK),
        )

    def plan_beside(self, planned: Sequence[Atoms], population: Sequence[Atoms]) -> list[Atoms]:
        """Distorted structures for validation and test, by their quotas, beside ensembles that
        train."""
        families = self.store.families
        known = self.known_sides() | {
            str(atoms.info["family"]): str(atoms.info["side"]) for atoms in planned
        }
        names = families.would_be([stripped(atoms) for atoms in population])
        order = self.random(Purpose.HOLD_BACK).permutation(len(population)).tolist()
        chosen: list[int] = []
        for side, n in quotas(self.settings.n_sample, self.settings.split).items():
            for index in [
                index
                for index in order
                if known.get(names[index], side) == side and index not in chosen
            ][:n]:
                parent = stripped(population[index])
                known[names[index]] = known[families.family(parent_name(parent), parent)] = side
                chosen.append(index)
        return self.plan(population, chosen, known)

    def plan(
        self,
        population: Sequence[Atoms],
        chosen: Sequence[int] | None = None,
        known: Mapping[str, str] | None = None,
    ) -> list[Atoms]:
        """The distorted structures to label, with everything about them in ``info``.

        ``chosen``: indices into the population; None draws them at random. Families that are not
        ``known`` (None: `known_sides`) are shared out so that validation and test get some of this
        round.
        """
        settings = self.settings
        if chosen is None:
            chosen = choose(population, settings.n_sample, self.random(Purpose.CHOOSE))
        parents = [stripped(population[index]) for index in chosen]
        names = [parent_name(parent) for parent in parents]
        families = [
            self.store.families.family(name, parent)
            for name, parent in zip(names, parents, strict=True)
        ]
        sides = sides_of_families(
            families, settings.split, self.known_sides() if known is None else known
        )
        distorted = []
        for draw, (parent, name, family) in enumerate(zip(parents, names, families, strict=True)):
            for number in range(settings.n_perturb):
                key = [self.seed, self.generation, int(Purpose.DISTORT), draw, number]
                try:
                    atoms = distort(
                        parent,
                        np.random.default_rng(key),
                        atom_displacement=settings.atom_displacement,
                        strain=settings.strain,
                    )
                except MagusAnharmonicError as error:
                    log.warning("%s is not distorted: %s", name, error)
                    break
                plan_label(
                    atoms,
                    generation=self.generation,
                    parent=name,
                    family=family,
                    side=sides[family],
                    kind="distorted",
                    distortion_seed="-".join(map(str, key)),
                )
                distorted.append(atoms)
        return distorted

    def plan_of(self, atoms: Atoms, parent: Atoms, known: Mapping[str, str], **what: str) -> None:
        """Write into ``atoms`` what identifies its label, on the side where the family of
        ``parent`` is ``known`` to be; a family that is new trains. ``what`` : see `plan_label`."""
        name = parent_name(parent)
        family = self.store.families.family(name, parent)
        side = known.get(family, "train")
        where = {"generation": self.generation, "parent": name, "family": family, "side": side}
        plan_label(atoms, **where, **what)

    def plan_ensembles(self, contenders: Sequence[Contender], folder: str | Path) -> list[Atoms]:
        """The ``n_sample * n_perturb`` configurations to label (whole pairs), with everything about
        them in ``info``. A phase that has no labels yet trains.

        The plan is kept in ``folder/ensembles/gen{N}.xyz`` and read from there when the round is
        taken up again (a damaged one is set aside and made anew); without contenders and without
        such a file it is empty.
        """
        file = SearchFolder(folder).ensembles / f"gen{self.generation}.xyz"
        if (kept := read_whole(file, read_plan)) is not None:
            return kept
        if not contenders:
            return []
        n_pairs = max(1, self.settings.n_sample * self.settings.n_perturb // 2)
        known = self.known_sides()
        shares = allocate(
            [c.spread for c in contenders],
            [c.probability for c in contenders],
            n_pairs,
            [len(c.configurations) // 2 for c in contenders],
        )
        planned = []
        for contender, share in zip(contenders, shares, strict=True):
            log.info(
                "%s (probability of being lowest %.2f, spread of the energy error %.2g eV/atom): %d"
                " pairs of its ensemble are labelled",
                contender.id,
                contender.probability,
                contender.spread,
                share,
            )
            parent, candidate = stripped(contender.centroids), f"c-{contender.id}"
            for number, configuration in enumerate(contender.configurations[: 2 * share]):
                atoms, seed = stripped(configuration), f"ensemble-{number}"
                what = {"kind": "sscha", "candidate": candidate, "distortion_seed": seed}
                self.plan_of(atoms, parent, known, **what)
                planned.append(atoms)
        if planned:
            for atoms in planned:
                atoms.info[TOTAL] = len(planned)
            with replacing(file) as temporary:
                write(temporary, planned, format="extxyz")
            # the digits of the file: a plan that is read again must name the same structures
            return read_plan(file)
        return planned


def read_plan(file: Path) -> list[Atoms]:
    """The structures of a plan; raises ``DamagedFile`` when they are not all there."""
    frames = read_labels(file)
    totals = {atoms.info.pop(TOTAL, None) for atoms in frames}
    if totals != {len(frames)} or any("id" not in atoms.info for atoms in frames):
        raise DamagedFile(f"{file}: holds {len(frames)} structures of a plan, which are not all")
    return frames
