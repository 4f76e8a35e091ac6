"""A search that begins on a potential, makes labels of its free energy each round, moves on the
model of them, and certifies what it finds; whole, in the embedded host."""

import logging

import pytest
from ase.io import read

from magus_anharmonic import load
from magus_anharmonic.errors import InputError
from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.labelers import code_of
from magus_anharmonic.labelers.base import Failure, Label, Labeler
from magus_anharmonic.labelers.worker import run_job
from magus_anharmonic.learning.dataset import LabelStore
from magus_anharmonic.ranking.candidate import read_ranking
from magus_anharmonic.search.host import run
from magus_anharmonic.settings import parse_settings

MODEL = "h3s-gpaw-small"
LABELER = {"calculator": "sscha", "evaluator": MODEL, "supercell": [1, 1, 1], "n_configs": 20}
INPUT = {
    "symbols": ["S", "H"],
    "formula": [1, 3],
    "min_n_atoms": 4,
    "max_n_atoms": 4,
    "spacegroup": [160],
    "pPri": 1.0,
    "pressure": 150,
    "popSize": 4,
    "initSize": 4,
    "saveGood": 1,
    "numGen": 2,
    "d_ratio": 0.6,
    "volume_ratio": 2.7,
    "dE": 0.001,
    "Fitness": ["Enthalpy"],
    "seed": 1,
    "scheduler": "serial",
    "MainCalculator": {
        "calculator": "mattersim",
        "checkpoint": MODEL,
        "surface": "free-energy",
        "eps": 0.1,
        "maxStep": 100,
    },
    "learning": {
        "labeler": LABELER,
        "n_sample": 2,
        "n_perturb": 2,
        "strain": 0.02,
        "epochs": 8,
        "batch_size": 2,
        "learning_rate": 1e-3,
    },
    "sscha": {
        "evaluator": MODEL,
        "supercell": [1, 1, 1],
        "n_configs": 40,
        "max_candidates": 2,
        "hessian": 0,
    },
}


class InThisProcess(Labeler):
    """The labeler `sscha` without a process for every label."""

    description = "SSCHA at fixed centroids"

    def __init__(self, settings, folder, *_):
        self.code, self.folder = code_of("sscha"), folder
        self.recipe = self.code.recipe(settings)
        self.surface = self.code.surface(self.recipe)
        self.settings_hash = self.recipe.settings_hash

    def label(self, structures, keep=None):
        found = []
        for index, atoms in enumerate(structures):
            job = {"task": "label", "recipe": self.recipe, "atoms": atoms}
            answer = run_job({**job, "directory": str(self.folder / str(index))})
            if answer["ok"]:
                numbers = (answer[name] for name in ("energy", "free_energy", "forces", "stress"))
                one = Label(atoms, *numbers, self.settings_hash, 0.0, info=answer["info"])
            else:
                one = Failure(atoms, answer["reason"], self.settings_hash, 0.0)
            found.append(one)
            if keep is not None:
                keep(index, one)
        return found

    def found(self, folder, known=frozenset()):
        yield from self.code.found(self.recipe, folder, known)


@pytest.mark.full
def test_labels_models_and_certified_results_of_a_search_on_a_free_energy(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("magus_anharmonic.labelers.get_labeler", InThisProcess)
    caplog.set_level(logging.INFO)
    outcome = run(parse_settings(INPUT), tmp_path)
    results = tmp_path / "results" / "anharmonic"
    lines = read_jsonl(results / "metrics.jsonl", ("generation",))
    potential, surface = load(MODEL, device="cpu"), None
    assert [line["generation"] for line in lines] == [1, 2]
    assert lines[0]["old_model"] == potential.model_id and lines[0]["changed"]
    for generation in (1, 2):
        surface = load(results / "checkpoints" / f"gen{generation}.pth", device="cpu").surface
        assert surface.potential == potential.model_id and surface.temperature == 0.0
    labels = LabelStore(results / "labels").labels()
    assert {atoms.info["generation"] for atoms in labels} == {1, 2}
    # the second round relaxed on the first model
    second = read(tmp_path / "results" / "raw2.traj", ":")
    assert {atoms.info["model"] for atoms in second} == {lines[0]["new_model"]}
    table = read_ranking(results / "ranking.csv")
    best = table[0]
    assert best.rank_quantum == 1 and best.ranked and best.model == potential.model_id
    assert {row.predicted_by for row in table} == {lines[1]["new_model"]}
    # the motion of the ions is in what the search compares
    assert best.gibbs_predicted - best.enthalpy > 0.1
    # of copies within dE the certified one stays
    lowest = min(row.gibbs_predicted for row in table)
    assert outcome.good[0].info["enthalpy"] == pytest.approx(lowest, abs=INPUT["dE"])
    assert "calibration on" in caplog.text


def test_a_search_is_refused_before_it_begins_where_the_model_is_of_something_else(tmp_path):
    for change, words in (
        ({"learning": None}, "it knows no motion of the ions"),
        ({"sscha": {**INPUT["sscha"], "temperature": 300}}, "temperature 0 and 300 K"),
        ({"sscha": {**INPUT["sscha"], "supercell": [2, 2, 2]}}, "sscha.supercell"),
    ):
        with pytest.raises(InputError, match=words):
            run(
                parse_settings(
                    {key: value for key, value in {**INPUT, **change}.items() if value is not None}
                ),
                tmp_path / "search",
            )
        assert not (tmp_path / "search").exists()
