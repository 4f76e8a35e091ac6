"""``checkpoint: scratch``: a search that begins without any model labels random crystals first."""

import numpy as np
import pytest
import yaml
from ase.calculators.emt import EMT
from ase.io import read, write
from campaign_tables import read_rows

from magus_anharmonic.campaign.run import run_campaign
from magus_anharmonic.errors import CheckpointError, InputError
from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.learning.dataset import LabelStore
from magus_anharmonic.learning.first import first_model
from magus_anharmonic.potential import load
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.search.archive import Archive
from magus_anharmonic.search.generate import crystals_of
from magus_anharmonic.search.host import run
from magus_anharmonic.settings import parse, parse_settings, rank_settings
from magus_anharmonic.settings.campaign import CampaignSettings

SHAPE = {"num_blocks": 1, "units": 16, "cutoff": 4.0, "threebody_cutoff": 3.0}
STAGE = {"epochs": 3, "learning_rate": 5e-3, "batch_size": 4, "keep": "last"}
SEARCH = {
    "seed": 4,
    "symbols": ["Cu"],
    "formulaType": "fix",
    "formula": [1],
    "min_n_atoms": 2,
    "max_n_atoms": 2,
    "popSize": 3,
    "saveGood": 1,
    "numGen": 1,
    "spacegroup": [1, 2, 12],
    "scheduler": "serial",
    "MainCalculator": {"calculator": "mattersim", "checkpoint": "scratch", "max_step": 4},
    "learning": {
        "labeler": {"calculator": "ase.calculators.emt.EMT", "n_workers": 1},
        "n_sample": 1,
        "n_perturb": 1,
        "epochs": 1,
        "scratch": {"n_structures": 8, "batches": 2, "architecture": SHAPE, "stages": [STAGE]},
    },
}


def made(folder, settings, limit=None):
    """The file of the first model in ``folder``; of the first ``limit`` labels alone, then a
    kill."""
    labeler = get_labeler(settings.learning.labeler, folder / "labeling")
    label, left = labeler.label, [limit]

    def killed_in_between(structures, on_result=None):
        def keep(index, result):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] = None if left[0] is None else left[0] - 1
            on_result(index, result)

        return label(structures, keep)

    labeler.label = killed_in_between
    return first_model(
        lambda batch, n: crystals_of(settings, 4, batch, n),
        pressure=0.0,
        settings=settings.learning,
        labeler=labeler,
        store=LabelStore(folder / "labels"),
        run_dir=folder,
        seed=4,
    )


def test_the_first_generation_is_relaxed_with_a_model_of_labelled_random_crystals(tmp_path):
    run(parse_settings(SEARCH), tmp_path)
    archive = Archive(tmp_path)
    labels = LabelStore(archive.anharmonic / "labels").labels(generation=0)
    lines = {line["generation"]: line for line in read_jsonl(archive.anharmonic / "metrics.jsonl")}
    first = load(archive.anharmonic / "checkpoints" / "gen0.pth")
    assert len(labels) == lines[0]["n_labels"] == 16
    assert first.model_id == lines[0]["new_model"] == lines[1]["old_model"]
    for atoms in labels:
        bare = atoms.copy()
        bare.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(bare.get_potential_energy(), abs=1e-6)
    relaxed = read(tmp_path / "results" / "raw1.traj", ":")
    assert {atoms.info["model"] for atoms in relaxed} == {first.model_id}


def test_a_kill_among_the_labels_of_the_second_batch_changes_nothing(tmp_path):
    settings = parse_settings(SEARCH)
    whole = load(made(tmp_path / "whole", settings))
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "killed", settings, 11)
    again = load(made(tmp_path / "killed", settings))
    assert again.model_id == whole.model_id


def test_earlier_labels_take_part_from_the_start_and_the_first_crystals_are_followed_too(tmp_path):
    settings = parse_settings(SEARCH)
    made(tmp_path / "before", settings)
    earlier = LabelStore(tmp_path / "before" / "labels").labels()
    write(tmp_path / "earlier.xyz", earlier, format="extxyz")
    scratch = SEARCH["learning"]["scratch"] | {"n_structures": 4, "batches": 1}
    learning = SEARCH["learning"] | {"dataset": str(tmp_path / "earlier.xyz"), "scratch": scratch}
    settings = parse_settings(SEARCH | {"learning": learning})
    made(tmp_path, settings)
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert line["n_train"] == line["n_new"] + line["n_replay"]
    assert line["n_replay"] == sum(atoms.info["side"] == "train" for atoms in earlier)
    drawn = crystals_of(settings, 4, 1, 4)
    labels = LabelStore(tmp_path / "labels").labels()
    assert len(labels) == 4
    for atoms in labels:
        assert all(abs(atoms.get_volume() - one.get_volume()) > 1e-3 for one in drawn)
    sides = {}
    for atoms in [*earlier, *labels]:
        assert sides.setdefault(atoms.info["family"], atoms.info["side"]) == atoms.info["side"]


def test_new_weights_learn_the_forces_of_crystals_that_they_have_not_seen(tmp_path):
    stage = STAGE | {"epochs": 40, "schedule": "cosine", "force_loss_ratio": 0.3}
    scratch = {"n_structures": 30, "batches": 1, "architecture": SHAPE, "stages": [stage]}
    settings = parse_settings(SEARCH | {"learning": SEARCH["learning"] | {"scratch": scratch}})
    model = load(made(tmp_path, settings))
    fresh = crystals_of(settings, 99, 1, 20)
    wanted = []
    for atoms in fresh:
        atoms.calc = EMT()
        wanted.append(atoms.get_forces())
    wanted = np.concatenate(wanted)
    error = np.concatenate(model.evaluate([atoms.copy() for atoms in fresh]).forces) - wanted
    assert np.sqrt(np.mean(error**2)) < 0.5 * np.sqrt(np.mean(wanted**2))


def test_scratch_is_refused_where_nothing_could_train_it():
    alone = {key: value for key, value in SEARCH.items() if key != "learning"}
    with pytest.raises(InputError, match="checkpoint: scratch.*learning"):
        parse_settings(alone)
    with pytest.raises(InputError, match="checkpoint: scratch"):
        rank_settings(None, {}, calculator={"checkpoint": "scratch"}, sscha={})
    with pytest.raises(InputError, match="MLCalculator.checkpoint: scratch"):
        parse_settings(SEARCH | {"MLCalculator": SEARCH["MainCalculator"]})
    with pytest.raises(CheckpointError, match="stands for new weights"):
        load("scratch")


def campaign(**changes):
    owned = {"seed", "MainCalculator", "learning", "scheduler"}
    learning = {key: value for key, value in SEARCH["learning"].items() if key != "labeler"}
    learning["scratch"] = {**learning["scratch"], "n_structures": 5, "batches": 1}
    return {
        "seed": 4,
        "foundation": "scratch",
        "host": "embedded",
        "search": {key: value for key, value in SEARCH.items() if key not in owned},
        "calculator": {"maxStep": 4},
        "labeler": SEARCH["learning"]["labeler"],
        "learning": {"pressures": [0, 10], "settings": learning},
        **changes,
    }


def test_a_campaign_begins_without_any_model_and_each_search_with_the_one_before(tmp_path):
    file = tmp_path / "campaign.yaml"
    file.write_text(yaml.safe_dump(campaign()))
    records = run_campaign(file)
    assert {record.status for record in records.values()} == {"done"}, records
    root = tmp_path / "campaign"
    first, second = (SearchFolder.below(root / name) for name in ("learn-000GPa", "learn-010GPa"))
    (began,) = read_jsonl(second.metrics)
    assert began["generation"] == 1 and began["old_model"] == records["learn-000GPa"].output
    n_labels = [len(LabelStore(found.labels).labels()) for found in (first, second)]
    assert n_labels == [6, 1], "random crystals are labelled by the first search alone"
    assert records["merge"].n_structures == sum(n_labels)
    final = load(root / "final" / "final.pth")
    assert final.species_seen == {29} and final.module.model_args["units"] == SHAPE["units"]
    assert {row["model"] for row in read_rows(root / "tables" / "model_errors.csv")} == {
        "finetuned"
    }
    before = {name: record.finished for name, record in records.items() if name != "report"}
    again = run_campaign(file)
    assert before == {name: again[name].finished for name in before}


def test_a_campaign_from_scratch_is_refused_where_nothing_could_train_it():
    with pytest.raises(InputError, match=r"foundation: scratch.*learning"):
        parse(CampaignSettings, campaign(learning=None))
    checked = campaign(produce={"pressures": [5]}, foundation_check={"pressure": 5})
    with pytest.raises(InputError, match=r"foundation_check: .*leave it out"):
        parse(CampaignSettings, checked)
