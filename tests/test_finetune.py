"""Training: the same steps as stock MatterSim, never a worse model than before, reproducible,
restartable."""

import copy
import inspect
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.units import GPa
from crystals import h3s

from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.potential import checkpoint, load, loading
from magus_anharmonic.potential.evaluate import Potential
from magus_anharmonic.potential.finetune import _Run, finetune
from magus_anharmonic.potential.labelled import (
    LabelledGraphs,
    mean_loss,
    score,
    scores_by,
    split_by_parent,
    torch_loss,
)
from magus_anharmonic.potential.train import (
    TrainRecipe,
    load_recipe,
    read_labels,
    train_command,
    train_file,
)
from magus_anharmonic.potential.trainer import Architecture, Trainer, from_scratch, refit_shift
from magus_anharmonic.settings import FinetuneSettings, LearningSettings, parse

TINY = Architecture(num_blocks=1, units=8)
FAST = FinetuneSettings(epochs=3, learning_rate=5e-3, batch_size=4)


def random_model(seed):
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return M3Gnet(device="cpu", **TINY.model_dump()).eval()


def rattled_h3s(rng, n_sulfur=1):
    atoms = h3s(2 * rng.uniform(1.5, 1.6))
    atoms.symbols[:n_sulfur] = "S"
    atoms.positions += 0.08 * rng.normal(size=(4, 3))
    return atoms


def with_labels(structures, module, offset=None):
    """Labels by ``module``; ``offset``: a constant in eV per atom of a species."""
    found = Potential(module).evaluate(structures)
    for index, atoms in enumerate(structures):
        constant = sum((offset or {}).get(symbol, 0.0) for symbol in atoms.symbols)
        energy = found.energy[index] + constant
        atoms.calc = SinglePointCalculator(
            atoms, energy=energy, forces=found.forces[index], stress=found.stress[index]
        )
        atoms.info.update(
            id=f"s{index}", parent=f"p{index // 2}", kind="even" if index % 2 == 0 else "odd"
        )
    return structures


@pytest.fixture(scope="module")
def labelled():
    rng = np.random.default_rng(1)
    return with_labels(
        [rattled_h3s(rng) for _ in range(12)], random_model(7), {"H": -0.5, "S": -0.5}
    )


@pytest.fixture
def train_set(labelled):
    return labelled[:8]


@pytest.fixture
def validation_set(labelled):
    return labelled[8:]


@pytest.fixture
def student():
    return random_model(3)


@pytest.fixture
def train(tmp_path, student, train_set, validation_set):
    """Train the student with seed 0 in ``new.pth``, or as it is said."""

    def run(settings=FAST, **options):
        options = {"out": tmp_path / "new.pth", "seed": 0, **options}
        return finetune(student, train_set, validation_set, settings, **options)

    return run


# --- the step is MatterSim's ---------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_steps_equal_stock_mattersim(loss, student, train_set, validation_set):
    """Loss of each of eight steps (two passes; ratios so large that gradients are clipped) and the
    loss of the averaged weights."""
    from mattersim.datasets.utils.build import build_dataloader
    from mattersim.forcefield.potential import Potential as Stock

    settings = FinetuneSettings(
        epochs=2,
        learning_rate=1e-3,
        batch_size=2,
        loss=loss,
        force_loss_ratio=50.0,
        stress_loss_ratio=5.0,
    )
    stock = Stock(copy.deepcopy(student), device="cpu", lr=1e-3)
    # in mattersim 1.2.5 the default batches give triplets of later structures bonds of the first
    newer = "batch_converter" in inspect.signature(build_dataloader).parameters
    batches_right = {"batch_converter": True} if newer else {}

    def stock_losses(structures, mode):
        stresses = [atoms.get_stress(voigt=False) / GPa for atoms in structures]
        energies, forces = (
            [atoms.get_potential_energy() for atoms in structures],
            [atoms.get_forces() for atoms in structures],
        )
        loader = build_dataloader(
            structures, energies, forces, stresses, batch_size=2, shuffle=False, **batches_right
        )
        function = torch_loss(loss)
        return [
            stock.train_one_epoch(
                [batch], 0, function, True, True, True, 50.0, 5.0, None, mode=mode, log=False
            )[0]
            for batch in loader
        ]

    expected = [value for _ in range(2) for value in stock_losses(train_set, "train")]
    trainer, data = Trainer(student, settings), LabelledGraphs(train_set, student)
    found = [trainer.step(*batch) for _ in range(2) for batch in data.batches(2)]
    assert len(found) == 8 and len(set(found)) == 8
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with trainer.ema.average_parameters():
        averaged = trainer.scores(LabelledGraphs(validation_set, student)).loss
    # equal batches: the mean of stock's batch means is the mean over the set
    assert averaged == pytest.approx(np.mean(stock_losses(validation_set, "val")), rel=1e-4)


def test_schedules(student):
    step = Trainer(copy.deepcopy(student), FinetuneSettings(epochs=20, learning_rate=1e-2))
    cosine = Trainer(
        copy.deepcopy(student), FinetuneSettings(epochs=20, learning_rate=1e-2, schedule="cosine")
    )
    for trainer in (step, cosine):
        trainer.optimizer.step()
        for _ in range(20):
            trainer.scheduler.step()
    assert step.scheduler.get_last_lr()[0] == pytest.approx(1e-2 * 0.95**2)
    assert cosine.scheduler.get_last_lr()[0] == pytest.approx(1e-4)


def test_numpy_loss_is_torchs():
    residual = np.random.default_rng(0).normal(scale=0.02, size=(7, 3))
    for name in ("mse", "huber"):
        expected = torch_loss(name)(
            torch.as_tensor(residual), torch.zeros(7, 3, dtype=torch.float64)
        )
        assert mean_loss(name, residual) == pytest.approx(float(expected), rel=1e-12)


# --- what is kept --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(labelled, tmp_path_factory):
    """What `train` gives, once for all: the result and its file."""
    out = tmp_path_factory.mktemp("trained") / "new.pth"
    return finetune(random_model(3), labelled[:8], labelled[8:], FAST, out=out, seed=0)


def test_training_lowers_the_validation_loss_and_the_file_holds_that_model(
    trained, student, validation_set
):
    """Scale and shift stay, and so does the model that is given."""
    before = checkpoint.model_id(student)
    result = trained
    assert result.improved and result.after.loss < 0.9 * result.before.loss
    assert (result.n_train, result.n_validation, len(result.history)) == (8, 4, 4)
    assert checkpoint.model_id(student) == before == result.parent_id
    potential = load(result.path, "cpu")
    assert potential.model_id == result.model_id != before
    written = score(potential, validation_set, FAST)
    assert written.loss == pytest.approx(result.after.loss, rel=1e-4)
    assert written.energy_rmse == pytest.approx(result.after.energy_rmse, rel=1e-3)
    assert not result.path.with_name("new.pth.state").exists()
    for name in ("scale", "shift"):
        assert torch.equal(
            getattr(result.module.normalizer, name), getattr(student.normalizer, name)
        )


def test_a_model_that_is_already_right_is_kept(tmp_path):
    teacher = random_model(5)
    rng = np.random.default_rng(2)
    labelled = with_labels([rattled_h3s(rng) for _ in range(4)], teacher)
    result = finetune(teacher, labelled[:3], labelled[3:], FAST, out=tmp_path / "new.pth", seed=0)
    assert not result.improved and result.best_epoch == 0 and result.after == result.before
    assert load(tmp_path / "new.pth", "cpu").model_id == result.parent_id


def test_a_divergent_training_ends_and_keeps_the_model(train, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda self, graph, targets: math.inf)
    result = train()
    assert not result.improved and "not finite in epoch 1" in result.stopped
    assert result.model_id == result.parent_id


def test_the_last_model_is_kept_where_the_settings_say_so(tmp_path):
    """The teacher's own labels: nothing can be better than the start, and the best is the start."""
    teacher = random_model(7)
    labels = with_labels([rattled_h3s(np.random.default_rng(4)) for _ in range(6)], teacher)
    best, last = (
        finetune(
            teacher,
            labels[:4],
            labels[4:],
            FAST.model_copy(update={"keep": keep}),
            out=tmp_path / f"{keep}.pth",
            seed=0,
        )
        for keep in ("best", "last")
    )
    assert best.best_epoch == 0 and best.model_id == checkpoint.model_id(teacher)
    assert (
        last.best_epoch == 3
        and last.model_id != best.model_id
        and last.after == last.history[3].validation
    )


def test_early_stopping(tmp_path):
    teacher = random_model(5)
    labelled = with_labels([rattled_h3s(np.random.default_rng(3)) for _ in range(3)], teacher)
    settings = FinetuneSettings(epochs=50, learning_rate=0.05, patience=2)
    result = finetune(
        teacher, labelled[:2], labelled[2:], settings, out=tmp_path / "new.pth", seed=0
    )
    assert "no improvement in 2 epochs" in result.stopped and len(result.history) == 3


def test_a_checkpoint_that_stock_mattersim_trained_to_epoch_99_is_trained_again(
    tmp_path, student, train_set, validation_set
):
    from mattersim.forcefield.potential import Potential as Stock

    Stock(student, device="cpu", last_epoch=99).save(str(tmp_path / "stock.pth"))
    result = finetune(
        tmp_path / "stock.pth",
        train_set,
        validation_set,
        FAST,
        out=tmp_path / "new.pth",
        seed=0,
        device="cpu",
    )
    assert [epoch.epoch for epoch in result.history] == [0, 1, 2, 3] and result.improved
    stock = Stock.from_checkpoint(str(result.path), device="cpu")
    assert checkpoint.model_id(stock.model) == result.model_id


def test_learning_settings_are_enough(tmp_path, student, train_set):
    settings = parse(
        LearningSettings,
        {"labeler": {"calculator": "gpaw"}, "epochs": 1, "batch_size": 4, "learning_rate": 1e-3},
    )
    result = finetune(student, train_set, [], settings, out=tmp_path / "new.pth", seed=0)
    assert result.stopped == "all epochs done" and result.n_validation == 8


# --- same seed, same model; interrupted, same model -----------------------------------------------


class Stop(Exception):
    """An interrupt."""


def interrupt_after(epoch):
    def progress(record):
        if record.epoch == epoch:
            raise Stop

    return progress


def test_weights_say_how_often_a_structure_is_seen(tmp_path, student, train_set, validation_set):
    weights = np.array([3.0, 0.5, *[1.0] * 6])
    run = _Run(
        student, train_set, validation_set, FAST, tmp_path / "a", 0, weights, "", None, False
    )
    passes = [run._order(8, number) for number in range(1, 21)]
    counts = np.bincount(np.concatenate(passes), minlength=8)
    assert counts[0] == 60 and 4 <= counts[1] <= 16 and (counts[2:] == 20).all()


def test_weights_are_part_of_what_is_trained(train, trained, tmp_path):
    run = {"out": shutil.copy(trained.path, tmp_path / "a.pth"), "seed": 0}
    weighted = train(weights=[0.5] * 8, **run)
    assert weighted.model_id != trained.model_id, (
        "a checkpoint trained with other weights must not count as finished"
    )
    with pytest.raises(InputError, match="2 weights for 8 training structures"):
        train(weights=[1.0, 1.0], **run)


def test_an_interrupted_training_resumes_to_the_same_model(train, tmp_path):
    settings = FAST.model_copy(update={"schedule": "cosine"})
    whole = train(settings, out=tmp_path / "whole.pth")
    out = tmp_path / "parts.pth"
    with pytest.raises(Stop):
        train(settings, out=out, progress=interrupt_after(1))
    assert (tmp_path / "parts.pth.state").exists() and not out.exists()
    seen = []
    rest = train(settings, out=out, progress=lambda record: seen.append(record.epoch))
    assert seen == [2, 3]
    assert rest.model_id == whole.model_id and rest.after == whole.after


def test_the_best_before_an_interrupt_is_not_lost(train, tmp_path, validation_set, monkeypatch):
    out = tmp_path / "new.pth"
    with pytest.raises(Stop):
        train(out=out, progress=interrupt_after(2))
    monkeypatch.setattr(Trainer, "step", lambda self, graph, targets: math.inf)
    result = train(out=out)
    assert result.best_epoch == 2 and result.improved
    assert score(load(out, "cpu"), validation_set, FAST).loss == pytest.approx(
        result.after.loss, rel=1e-4
    )


@pytest.mark.parametrize("damage", ["other inputs", "truncated"])
def test_a_state_that_does_not_fit_is_not_used(train, tmp_path, damage):
    out, state = tmp_path / "new.pth", tmp_path / "new.pth.state"
    other = FAST.model_copy(update={"learning_rate": 1e-4})
    with pytest.raises(Stop):
        train(other if damage == "other inputs" else FAST, out=out, progress=interrupt_after(1))
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:200])
    assert [epoch.epoch for epoch in train(out=out).history] == [0, 1, 2, 3]
    assert not state.exists()


def _without_a_moment(state):
    state["trainer"]["optimizer"]["state"].popitem()
    return state


def _with_a_changed_weight(state):
    next(iter(state["best_state"].values())).mul_(1.01)
    return state


DAMAGES = {
    "no key": lambda state: {"trainer": state["trainer"]},
    "empty trainer": lambda state: {**state, "trainer": {}},
    "half a trainer": _without_a_moment,
    "damaged history": lambda state: {**state, "history": [{"epoch": 0}]},
    "an epoch that was not": lambda state: {**state, "best_epoch": 9},
    "a changed weight": _with_a_changed_weight,
}


@pytest.fixture(scope="module")
def interrupted(labelled, tmp_path_factory):
    """The state file of a training of `random_model(3)` after its first epoch."""
    out = tmp_path_factory.mktemp("interrupted") / "new.pth"
    with pytest.raises(Stop):
        finetune(
            random_model(3),
            labelled[:8],
            labelled[8:],
            FAST,
            out=out,
            seed=0,
            progress=interrupt_after(1),
        )
    return out.with_name("new.pth.state").read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_set_aside_whole_and_training_starts_anew(
    train, tmp_path, interrupted, trained, damage, caplog
):
    """Its first epoch is that of an undisturbed one, to the last digit."""
    state, seen = tmp_path / "new.pth.state", []

    def first_epoch(record):
        seen.append(record)
        raise Stop

    state.write_bytes(interrupted)
    torch.save(DAMAGES[damage](torch.load(state, weights_only=True)), state)
    with pytest.raises(Stop):
        train(progress=first_epoch)
    assert [replace(one, seconds=0) for one in seen] == [replace(trained.history[1], seconds=0)]
    assert "training starts anew" in caplog.text and (tmp_path / "new.pth.state.damaged").exists()


def test_a_state_of_another_version_that_restores_in_part_leaves_the_trainer_as_it_was(
    train, tmp_path, interrupted, trained, monkeypatch
):
    (tmp_path / "new.pth.state").write_bytes(interrupted)
    restore = Trainer.restore

    def half(self, state):
        restore(self, state)
        raise KeyError("a part that the other version does not have")

    monkeypatch.setattr(Trainer, "restore", half)
    assert train().model_id == trained.model_id


def test_a_finished_checkpoint_that_lacks_its_record_is_trained_anew(train, tmp_path, trained):
    """And one seed gives one model."""
    content = torch.load(trained.path, weights_only=True)
    del content["metrics"]["history"]
    torch.save(content, tmp_path / "new.pth")
    seen = []
    again = train(progress=lambda record: seen.append(record.epoch))
    assert seen == [1, 2, 3] and again.model_id == trained.model_id


def test_settings_may_be_a_mapping_and_wrong_ones_are_refused_before_training(train):
    def run(settings):
        return train(settings)

    assert [epoch.learning_rate for epoch in run({"epochs": 1, "learning_rate": 1e-3}).history] == [
        1e-3,
        1e-3,
    ]
    for settings, message in (
        ({"epoch": 1}, "settings.epoch: unknown key; did you mean epochs"),
        ({"epochs": "many"}, "settings.epochs: 'many'"),
        (None, "settings: None: should be a valid dictionary"),
        (7, "settings: 7: should be a valid dictionary"),
    ):
        with pytest.raises(InputError, match=message):
            run(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [-1.0, *[1.0] * 7]}, r"weights: -1\.0 is not allowed"),
        ({"weights": [math.nan, *[1.0] * 7]}, "weights: nan is not allowed"),
        ({"weights": ["a", *[1.0] * 7]}, "weights: 'a' is not allowed"),
        ({"out": "."}, "is a folder"),
        ({"train": 0}, r"\[atoms\] instead of atoms"),
        ({"validation": 0}, r"\[atoms\] instead of atoms"),
    ],
)
def test_wrong_arguments_are_one_line_before_the_first_epoch(
    tmp_path, student, train_set, validation_set, monkeypatch, changes, message
):
    monkeypatch.setattr(Trainer, "step", lambda *arguments: pytest.fail("an epoch began"))
    sets = {"train": train_set, "validation": validation_set}
    given = [sets[name][0] if name in changes else sets[name] for name in sets]
    rest = {name: value for name, value in changes.items() if name not in sets}
    with pytest.raises(InputError, match=message) as error:
        finetune(
            student,
            *given,
            FAST,
            **{
                "out": tmp_path / "new.pth",
                "seed": 0,
                **rest,
                **({"out": tmp_path} if "out" in rest else {}),
            },
        )
    assert "\n" not in str(error.value)


def test_what_finetune_returns_has_been_compared_with_stock_mattersim(train, monkeypatch):
    def differs(potential):
        raise MagusAnharmonicError(f"{potential.model_id} differs")

    monkeypatch.setattr(loading, "check_against_stock", differs)
    settings = FAST.model_copy(update={"epochs": 1, "learning_rate": 3e-3})
    for _ in ("trained", "found finished"):
        with pytest.raises(MagusAnharmonicError, match="differs"):
            train(settings)


def test_a_finished_training_is_not_repeated_and_another_seed_is_another_model(train, trained):
    seen, run = [], {"out": trained.path, "progress": lambda record: seen.append(record.epoch)}
    again = train(**run)
    assert not seen and again.as_dict() == trained.as_dict() and again.history == trained.history
    other = train(
        seed=1, **run | {"out": shutil.copy(trained.path, trained.path.with_name("b.pth"))}
    )
    assert seen == [1, 2, 3] and other.model_id != trained.model_id


# --- new models, shift, scores --------------------------------------------------------------------


def test_scaling_of_a_new_model_is_stock_mattersims(labelled):
    """One composition leaves the shifts open: the fit of minimum norm, as the pseudo-inverse of the
    stock code."""
    from mattersim.forcefield.m3gnet.scaling import AtomScaling

    stock = AtomScaling(
        atoms=labelled,
        total_energy=[atoms.get_potential_energy() for atoms in labelled],
        forces=[atoms.get_forces() for atoms in labelled],
        shift_key="per_species_energy_mean_linear_reg",
        scale_key="per_species_forces_rms",
        device="cpu",
    )
    module = from_scratch(labelled, TINY, seed=0)
    torch.testing.assert_close(module.normalizer.shift, stock.shift)
    torch.testing.assert_close(module.normalizer.scale, stock.scale)
    assert float(module.normalizer.shift[1]) == pytest.approx(
        3 * float(module.normalizer.shift[16]), rel=1e-4
    )


def test_weights_of_a_new_model_depend_on_the_seed_alone(labelled):
    state = torch.random.get_rng_state()
    ids = [checkpoint.model_id(from_scratch(labelled, TINY, seed=seed)) for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_shift_of_two_compositions_is_found():
    """Labels of "another code": two constants more, nothing else."""
    module, rng = random_model(4), np.random.default_rng(5)
    structures = [rattled_h3s(rng, 1 + index % 2) for index in range(8)]
    labelled = with_labels(structures, module, {"H": -1.25, "S": 3.5})
    change = refit_shift(module, labelled)
    assert change == pytest.approx({"H": -1.25, "S": 3.5}, abs=1e-4)
    assert score(Potential(module), labelled).energy_rmse < 1e-4


def test_shift_of_one_composition_is_the_smallest_change():
    module, rng = random_model(4), np.random.default_rng(5)
    before = module.normalizer.shift.clone()
    labelled = with_labels([rattled_h3s(rng) for _ in range(4)], module, {"H": -1.0, "S": -1.0})
    change = refit_shift(module, labelled)
    assert change == pytest.approx(
        {"H": -1.2, "S": -0.4}, abs=1e-4
    )  # 0.75 H + 0.25 S = -1 eV/atom, parallel to (3, 1)
    assert score(Potential(module), labelled).energy_rmse < 1e-4
    assert int((module.normalizer.shift != before).sum()) == 2


def test_scores_of_known_errors():
    module, rng = random_model(4), np.random.default_rng(5)
    labelled = with_labels([rattled_h3s(rng) for _ in range(4)], module)
    for atoms in labelled:
        sign = 1 if atoms.info["kind"] == "odd" else 2
        results = atoms.calc.results
        results["energy"] += 0.02 * sign * len(atoms)
        results["forces"] = results["forces"] + 0.3 * sign
        results["stress"] = results["stress"] + 0.5 * sign * GPa
    kinds = scores_by(Potential(module), labelled, "kind")
    for kind, sign in (("odd", 1), ("even", 2)):
        found = kinds[kind]
        assert (found.energy_rmse, found.force_rmse, found.stress_rmse) == pytest.approx(
            (0.02 * sign, 0.3 * sign, 0.5 * sign), rel=1e-4
        )
        assert found.n == 2
    huber = 0.01 * (0.02 - 0.005) + 0.01 * (0.3 - 0.005) + 0.1 * 0.01 * (0.5 - 0.005)
    assert kinds["odd"].loss == pytest.approx(huber, rel=1e-4)
    everything = score(Potential(module), labelled)
    assert everything.n == 4 and everything.force_rmse == pytest.approx(
        0.3 * math.sqrt(2.5), rel=1e-4
    )


@pytest.mark.parametrize("problem", ["no calculator", "no stress", "nan"])
def test_a_missing_or_broken_label_names_the_structure(tmp_path, student, labelled, problem):
    bad = labelled[0].copy()
    results = {"energy": -1.0, "forces": np.zeros((4, 3)), "stress": np.zeros(6)}
    if problem == "no stress":
        del results["stress"]
    if problem == "nan":
        results["forces"] = np.full((4, 3), np.nan)
    if problem != "no calculator":
        bad.calc = SinglePointCalculator(bad, **results)
    bad.info["id"] = "the-bad-one"
    with pytest.raises(InputError, match="the-bad-one"):
        finetune(student, [*labelled[1:3], bad], [], FAST, out=tmp_path / "new.pth", seed=0)
    assert not list(tmp_path.iterdir())


def test_no_training_structures(tmp_path, student, validation_set):
    with pytest.raises(InputError, match="no training structures"):
        finetune(student, [], validation_set, FAST, out=tmp_path / "new.pth", seed=0)


def test_split_keeps_families_together_and_does_not_move_when_the_set_grows():
    structures = [Atoms("H", info={"parent": f"p{index // 3}"}) for index in range(1500)]
    parts = split_by_parent(structures, (8, 1, 1))
    families = [{atoms.info["parent"] for atoms in part} for part in parts]
    assert not (families[0] & families[1] or families[0] & families[2] or families[1] & families[2])
    assert [len(part) / 1500 for part in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.05)
    assert [len(part) for part in split_by_parent(structures[:30], (8, 1, 1))] == [
        sum(any(atoms is other for other in structures[:30]) for atoms in part) for part in parts
    ]


# --- recipes --------------------------------------------------------------------------------------

RECIPE = """
architecture: {num_blocks: 1, units: 8}
seed: 3
split: [2, 1, 1]
stages:
  - {epochs: 2, learning_rate: 5.0e-3, batchSize: 4}
  - {epochs: 1, learning_rate: 1.0e-3, batch_size: 4, loss: mse, force_loss_ratio: 0.1, stress_loss_ratio: 0.1, schedule: cosine}
"""


@pytest.fixture
def label_file(tmp_path, labelled):
    write(tmp_path / "labels.extxyz", labelled)
    return tmp_path / "labels.extxyz"


def test_recipe_to_checkpoint_and_report(tmp_path, label_file):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    text = train_command(
        [label_file], tmp_path / "h3s.pth", recipe=tmp_path / "recipe.yaml", device="cpu"
    )
    potential = load(tmp_path / "h3s.pth", "cpu")
    assert potential.model_id in text and potential.species_seen == {1, 16}
    report = json.loads((tmp_path / "h3s.json").read_text())
    assert report["model_id"] == potential.model_id
    assert [len(stage["history"]) for stage in report["stages"]] == [3, 2]
    assert report["provenance"]["recipe"]["stages"][1]["loss"] == "mse"
    train, validation, test = split_by_parent(read_labels(label_file), (2, 1, 1))
    for part, structures in (("train", train), ("validation", validation), ("test", test)):
        found = report["scores"][part]["all"]
        assert found["n"] == len(structures) > 0
        assert found["force_rmse"] == pytest.approx(
            score(potential, structures).force_rmse, rel=1e-4
        )
    assert {file.name for file in tmp_path.iterdir()} == {
        "labels.extxyz",
        "recipe.yaml",
        "h3s.pth",
        "h3s.json",
    }
    from mattersim.forcefield.potential import Potential as Stock

    assert (
        checkpoint.model_id(Stock.from_checkpoint(str(tmp_path / "h3s.pth"), device="cpu").model)
        == potential.model_id
    )


def test_finetuning_a_file_refits_the_shift_and_never_ends_worse(
    tmp_path, label_file, student, labelled
):
    checkpoint.save(student, tmp_path / "start.pth", species={16})
    recipe = TrainRecipe(checkpoint=str(tmp_path / "start.pth"), split=(1, 0, 0), stages=[FAST])
    report = train_file([label_file], tmp_path / "new.pth", recipe, device="cpu")
    assert report.shift_change["H"] == pytest.approx(3 * report.shift_change["S"], rel=1e-3)
    shifted = copy.deepcopy(student)
    refit_shift(shifted, labelled)
    assert report.stages[0].before.loss == pytest.approx(
        score(Potential(shifted), labelled).loss, rel=1e-4
    )
    assert report.scores["train"]["all"].loss <= report.stages[0].before.loss
    assert load(tmp_path / "new.pth", "cpu").species_seen == {1, 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{epoch: 3}]", "did you mean epochs"),
        ("stages: [{loss: mae}]", r"stages\.0\.loss"),
        ("{checkpoint: a.pth, architecture: {units: 8}}", "not both"),
        ("split: [0, 1, 1]", "training share"),
        ("architecture: {unit: 8}", "did you mean units"),
    ],
)
def test_wrong_recipes_are_explained(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_weights_of_a_recipe_go_by_kind(tmp_path, label_file):
    recipe = TrainRecipe(architecture=TINY, stages=[FAST], weights={"even": 2.0})
    assert train_file([label_file], tmp_path / "a.pth", recipe).stages[0].improved
    with pytest.raises(
        InputError, match=r"weights: no training label is of the kind evan \(there are even, odd\)"
    ):
        train_file(
            [label_file], tmp_path / "b.pth", recipe.model_copy(update={"weights": {"evan": 2.0}})
        )


def test_files_of_a_recipe_are_beside_it(tmp_path, label_file):
    (tmp_path / "recipe.yaml").write_text("validation: labels.extxyz")
    assert load_recipe(tmp_path / "recipe.yaml").validation == str(label_file)
    with pytest.raises(InputError, match="nothing.xyz: no such file"):
        read_labels(tmp_path / "nothing.xyz")


def test_a_small_model_trains_on_one_thread_and_gives_the_others_back(potential):
    from magus_anharmonic.potential.resources import threads_for_training

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for_training(potential.module):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
