"""Step ``merge``: one data set from all learning searches, every phase on one side of the split."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import write

from magus_anharmonic.campaign.context import Context, Outcome
from magus_anharmonic.campaign.plan import Step
from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.files import digest, replacing
from magus_anharmonic.learning.dataset import LabelStore, read_dataset
from magus_anharmonic.learning.families import SIDES, Families, Fingerprint, fingerprint, sides_of_families

log = logging.getLogger(__name__)

LABELS = "labels.xyz"


def merge(context: Context, step: Step) -> Outcome:
    """``labels.xyz`` with ``parent``, ``family``, ``side``, ``step`` and ``settings_hash`` of every label.

    Raises ``InputError`` when the searches were labelled with different DFT settings.
    """
    settings, folder = context.settings.merge, context.folder(step)
    stores = {name: LabelStore(context.folder(name) / "results" / "anharmonic" / "labels") for name in step.needs}
    labels = {name: store.labels() for name, store in stores.items()}
    settings_hash = one_settings_hash(labels)
    earlier = [] if settings.dataset is None else read_dataset(settings.dataset, settings_hash)
    rng = np.random.default_rng([context.settings.seed, step.cycle, 7])
    if settings.n_dataset is not None and len(earlier) > settings.n_dataset:
        earlier = [earlier[i] for i in sorted(rng.permutation(len(earlier))[: settings.n_dataset])]
    families = common_families({name: store.families for name, store in stores.items()}, earlier)
    merged = list(_tagged(labels, earlier, families))
    sides = merged_sides(merged, settings.split)
    for atoms in merged:
        atoms.info["side"] = sides[str(atoms.info["family"])]
    with replacing(folder / LABELS) as temporary:
        write(temporary, merged, format="extxyz")
    counts = {side: sum(atoms.info["side"] == side for atoms in merged) for side in SIDES}
    log.info("merged %d labels of %d phases: %s", len(merged), len(sides), ", ".join(f"{n} {side}" for side, n in counts.items()))
    return Outcome(n_structures=len(merged), output=digest(folder / LABELS))


def one_settings_hash(labels: Mapping[str, Sequence[Atoms]]) -> str:
    """The one hash of the DFT settings of all labels; raises ``InputError`` for two, ``MagusAnharmonicError`` for no labels."""
    found: dict[str, str] = {}
    for name, frames in labels.items():
        for atoms in frames:
            found.setdefault(str(atoms.info.get("settings_hash")), name)
    if not found:
        raise MagusAnharmonicError(f"merge: no label in {', '.join(labels)}: every label failed, see failures.jsonl there")
    if len(found) > 1:
        (first, a), (second, b) = list(found.items())[:2]
        raise InputError(
            f"merge: labels of two different DFT settings: {first} in {a}, {second} in {b}; energies of two settings must not be mixed: "
            f"run one of the two again with the settings of the other (campaign --only {b})"
        )
    return next(iter(found))


def common_families(searches: Mapping[str, Families], earlier: Sequence[Atoms]) -> dict[tuple[str, str], str]:
    """(step, parent) -> family over all searches and earlier labels (step ``dataset``): the same phase found twice is one family.

    Earlier labels know their parents by name alone: the first label of each stands for it.
    """
    known: list[tuple[str, Fingerprint]] = []
    found: dict[tuple[str, str], str] = {}

    def add(step: str, parent: str, mine: Fingerprint) -> None:
        family = next((name for name, other in known if mine.similar(other)), f"{step}/{parent}")
        known.append((family, mine))
        found[step, parent] = family

    first: dict[str, Atoms] = {}
    for atoms in earlier:
        first.setdefault(parent_name(atoms), atoms)
    for parent, atoms in first.items():
        add("dataset", parent, fingerprint(atoms))
    for step, families in searches.items():
        for parent, mine in families.members():
            add(step, parent, mine)
    return found


def parent_name(atoms: Atoms) -> str:
    """Parent of an earlier label, or its own id."""
    return str(atoms.info.get("parent") or atoms.info.get("id"))


def _tagged(labels: Mapping[str, Sequence[Atoms]], earlier: Sequence[Atoms], families: Mapping[tuple[str, str], str]) -> Iterator[Atoms]:
    for step, frames in [("dataset", earlier), *labels.items()]:
        for atoms in frames:
            parent = parent_name(atoms)
            atoms.info.update(step=step, parent=parent, family=families.get((step, parent), f"{step}/{parent}"))
            yield atoms


def merged_sides(merged: Sequence[Atoms], split: Sequence[int]) -> dict[str, str]:
    """Side of every family: those of earlier labels train, then the newest generation of the searches is shared out, then the others."""
    sides = {str(atoms.info["family"]): "train" for atoms in merged if atoms.info["step"] == "dataset"}
    found = [(int(atoms.info.get("generation", 0)), str(atoms.info["family"])) for atoms in merged if atoms.info["step"] != "dataset"]
    newest = max((generation for generation, _ in found), default=0)
    for batch in ([family for generation, family in found if generation == newest], [family for _, family in found]):
        sides |= sides_of_families(batch, split, sides)
    return sides


def labels_on_side(file: Path, side: str) -> list[Atoms]:
    """Merged labels on one side: train, validation or test."""
    from magus_anharmonic.learning.dataset import read_labels

    return [atoms for atoms in read_labels(file) if atoms.info["side"] == side]
