"""Where the files of a search and of a campaign are: the one place that knows their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from magus_anharmonic.errors import InputError


def _named(name: str, doc: str) -> property:
    return property(lambda self: self.root / name, doc=doc)


class SearchFolder:
    """The files of a search (``results/anharmonic``), or of a ranking, which has some of them."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @classmethod
    def below(cls, directory: str | Path) -> SearchFolder:
        """Of the search that was started in ``directory``."""
        return cls(Path(directory) / "results" / "anharmonic")

    record = _named("run.json", "What it was started with.")
    state = _named("search.json", "How far the embedded host is.")
    history = _named("generations.jsonl", "A line for every generation of the embedded host.")
    failures = _named("failures.jsonl", "Everything that went wrong.")
    metrics = _named("metrics.jsonl", "A line for every round of learning.")
    checkpoints = _named("checkpoints", "Folder of the models after each round.")
    training = _named("training", "Folder of a training that is not finished.")
    labels = _named("labels", "Folder of all labels.")
    labeling = _named("labeling", "Folder in which labels are made.")
    ensembles = _named("ensembles", "Folder of the ensembles that are to be labelled.")
    truth = _named("truth", "Folder of the labels that put the ranking into G of DFT.")
    seeds = _named("seeds", "Folder of SSCHA centroids as seeds.")
    relaxing = _named("relax", "Folder of relaxations that are not finished.")
    sscha = _named("sscha", "Folder of the SSCHA runs.")
    free_energies = _named("free_energies.db", "Every free energy of the ranking.")
    ranking = _named("ranking.csv", "The ranking, of one temperature.")
    results = _named("results.json", "The ranking with units.")
    quantum = _named("quantum.traj", "Centroids with their free energies.")
    report = _named("report.html", "The report.")

    def checkpoint(self, generation: int) -> Path:
        """The model after a round."""
        return self.checkpoints / f"gen{generation}.pth"

    def trained(self, generation: int) -> Path:
        """What the training of a round writes."""
        return self.training / f"gen{generation}.pth"


@dataclass(frozen=True)
class CampaignFolder:
    """The files of a campaign (``PATH/campaign``)."""

    root: Path

    @classmethod
    def find(cls, path: str | Path) -> CampaignFolder | None:
        """The campaign in a folder, below it or the folder itself; None where it holds none. Raises
        ``InputError``: no such folder."""
        given = Path(path)
        if not given.is_dir():
            raise InputError(f"{given}: no such folder")
        found = (cls(one) for one in (given / "campaign", given))
        return next((one for one in found if one.steps.is_file() or one.tables.is_dir()), None)

    steps = _named("steps.json", "What is known of every step.")
    record = _named("run.json", "What it was started with.")
    tables = _named("tables", "Folder of the tables of all finished steps.")
    figures = _named("figures", "Folder of the figures.")
