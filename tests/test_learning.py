"""Learning: what is chosen, how it is distorted, what is kept, and when a model is replaced."""

import json
import shutil

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from crystals import h3s

from magus_anharmonic.errors import InputError, MagusAnharmonicError
from magus_anharmonic.io.files import append_jsonl, read_jsonl
from magus_anharmonic.labelers import CallableLabeler
from magus_anharmonic.learning.choose import (
    SIDES,
    Families,
    choose,
    distort,
    fingerprint,
    random_directions,
    random_strain,
    shortest_distance,
)
from magus_anharmonic.learning.dataset import LabelStore, labelled, read_dataset, side, side_of
from magus_anharmonic.learning.learn import DATASET, learn, training_sets
from magus_anharmonic.learning.round import Round
from magus_anharmonic.settings import LearningSettings, parse
from magus_anharmonic.structures import structure_id


def random_structure(seed, n_sulfur=1):
    rng = np.random.default_rng(seed)
    while True:
        cell = 2.6 * np.eye(3) + rng.uniform(-0.5, 0.5, (3, 3))
        atoms = Atoms(
            "S" * n_sulfur + "H" * 3,
            scaled_positions=rng.random((3 + n_sulfur, 3)),
            cell=cell,
            pbc=True,
        )
        if shortest_distance(atoms) > 0.9:
            return atoms


class Counting:
    """Single points of a soft Lennard-Jones crystal that counts its calls; ``fails`` maps the
    position in a call to a reason.

    Its zero of energy is another one than the model's, as between any two DFT codes.
    """

    zero = 2.0  # eV/atom

    def __init__(self, fails=None, die_after=None):
        self.n, self.fails, self.die_after = 0, fails or {}, die_after

    def __call__(self, structures):
        results = []
        for index, atoms in enumerate(structures):
            self.n += 1
            if index in self.fails:
                results.append(self.fails[index])
                continue
            atoms.calc = LennardJones(sigma=0.9, epsilon=0.3, rc=3.0)
            results.append(
                {
                    "energy": atoms.get_potential_energy() + self.zero * len(atoms),
                    "forces": atoms.get_forces(),
                    "stress": atoms.get_stress(),
                }
            )
        return results


def labeler_of(function, **settings):
    return CallableLabeler(
        function, description="Lennard-Jones", settings=settings or {"sigma": 1.2}
    )


@pytest.fixture
def settings():
    return learning(n_sample=4, n_perturb=2, epochs=2, learning_rate=1e-3)


def learning(**keys):
    return parse(LearningSettings, {"labeler": {"calculator": "gpaw"}, **keys})


# ------------------------------------------------------------------ choose


def test_choice_is_without_replacement_and_reproducible():
    rng = np.random.default_rng
    population = list(range(50))
    first = choose(population, 10, rng(1))
    assert first == choose(population, 10, rng(1)) != choose(population, 10, rng(2))
    assert len(set(first)) == 10
    assert sorted(choose(population[:3], 10, rng(1))) == [0, 1, 2]


def test_a_phase_that_was_found_often_is_chosen_as_often():
    """Duplicates are kept: a phase that is 40 % of the population is 40 % of the choice."""
    population = ["Im-3m"] * 40 + [f"other {i}" for i in range(60)]
    rng = np.random.default_rng(0)
    share = np.mean(
        [population[index] == "Im-3m" for _ in range(400) for index in choose(population, 10, rng)]
    )
    assert share == pytest.approx(0.4, abs=0.03)


# ------------------------------------------------------------------ distort


def test_every_atom_moves_by_the_displacement_after_a_symmetric_strain_within_its_limits():
    start = h3s()
    for seed in range(20):
        distorted = distort(start, np.random.default_rng(seed), atom_displacement=0.05, strain=0.05)
        strained = start.copy()
        strained.set_cell(distorted.cell, scale_atoms=True)
        moved = np.linalg.norm(distorted.positions - strained.positions, axis=1)
        assert moved == pytest.approx(0.05, abs=1e-12)
        strain = np.linalg.solve(start.cell.array, distorted.cell.array) - np.eye(3)
        assert strain == pytest.approx(strain.T, abs=1e-12)
        assert np.abs(strain).max() <= 0.05


def test_strain_components_are_uniform_and_independent():
    rng = np.random.default_rng(5)
    samples = np.array(
        [random_strain(0.05, rng)[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] for _ in range(20000)]
    )
    uniform = np.linspace(-0.05, 0.05, 11)
    for component in samples.T:
        assert np.histogram(component, uniform)[0] == pytest.approx(2000, abs=200)
    correlation = np.corrcoef(samples.T)
    assert np.abs(correlation - np.eye(6)).max() < 0.03


def test_directions_are_uniform_on_the_sphere():
    vectors = random_directions(20000, np.random.default_rng(2))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0)
    # Archimedes: each Cartesian component of a uniform direction is uniform in [-1, 1].
    for component in vectors.T:
        assert np.histogram(component, np.linspace(-1, 1, 9))[0] == pytest.approx(2500, abs=200)


def test_distortions_are_reproducible_and_leave_the_structure_alone():
    start = h3s()
    before = start.positions.copy(), start.cell.array.copy()
    one, two = (
        distort(start, np.random.default_rng(7), atom_displacement=0.05, strain=0.05)
        for _ in range(2)
    )
    assert (one.positions == two.positions).all() and (one.cell.array == two.cell.array).all()
    assert (start.positions == before[0]).all() and (start.cell.array == before[1]).all()


def test_distortions_that_make_atoms_overlap_are_refused():
    pair = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.3]], cell=np.eye(3) * 4, pbc=True)
    for seed in range(30):
        assert (
            shortest_distance(
                distort(pair, np.random.default_rng(seed), atom_displacement=0.1, strain=0.0)
            )
            >= 0.18
        )
    with pytest.raises(MagusAnharmonicError, match="lower learning.atom_displacement"):
        distort(
            h3s().repeat((2, 2, 1)), np.random.default_rng(0), atom_displacement=1.0, strain=0.05
        )


# ------------------------------------------------------------------ split and families


def test_sides_follow_the_split_and_never_change():
    sides = [side(f"p-{i}") for i in range(4000)]
    assert [sides.count(name) / 4000 for name in ("train", "validation", "test")] == pytest.approx(
        [0.8, 0.1, 0.1], abs=0.02
    )
    assert sides == [side(f"p-{i}") for i in range(4000)]
    # Committed once: the side of a label must be the same in every version.
    assert [side(name) for name in ("set1-0000", "p-10", "p-11", "p-36")] == [
        "train",
        "train",
        "test",
        "validation",
    ]


def test_sides_are_those_by_which_checkpoints_are_trained():
    from magus_anharmonic.potential.labelled import split_by_parent

    frames = [Atoms("H", info={"parent": f"walk-{i // 3}"}) for i in range(300)]
    parts = split_by_parent(frames, (8, 1, 1))
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        assert part and all(side_of(atoms) == name for atoms in part)


def test_one_phase_is_one_family_in_any_cell_and_setting(tmp_path):
    families = Families(tmp_path / "families.jsonl")
    supercell = h3s(3.01).repeat((2, 1, 1))
    supercell.rotate(30, (1, 2, 3), rotate_cell=True)
    supercell.rattle(0.01, seed=1)
    assert families.family("p-1", h3s()) == "p-1"
    assert families.family("p-2", supercell) == "p-1"
    assert families.family("p-3", h3s(3.0, 0.2)) == "p-3", "R3m is another phase"
    assert families.family("p-4", h3s(3.2)) == "p-4", "far from it in volume"
    again = Families(tmp_path / "families.jsonl")
    assert again.family("p-9", h3s()) == "p-1" and again.family("p-2", supercell) == "p-1"


def test_different_structures_are_different_families():
    found = [fingerprint(random_structure(seed)) for seed in range(25)]
    assert not any(a.similar(b) for i, a in enumerate(found) for b in found[:i])
    assert not fingerprint(random_structure(0)).similar(
        fingerprint(random_structure(0, n_sulfur=2))
    )


# ------------------------------------------------------------------ store


def frame(number, generation=1, settings_hash="a1b2c3d4e5f6", **info):
    atoms = h3s(3.0 + 0.01 * number)
    atoms.info.update(
        id=f"g{generation}-{number:04d}",
        generation=generation,
        parent=f"p-{number // 2}",
        settings_hash=settings_hash,
        **info,
    )
    atoms.calc = SinglePointCalculator(
        atoms, energy=-1.0 * number, forces=np.full((4, 3), 0.1), stress=np.eye(3) * 0.2
    )
    return atoms


def test_labels_survive_a_kill_at_any_moment(tmp_path):
    store = LabelStore(tmp_path)
    for number in range(3):
        store.add(frame(number))
    killed = LabelStore(tmp_path)
    assert len(killed) == 3 and "g1-0002" in killed
    pending = tmp_path / "pending" / "gen001"
    kept = {file.name: file.read_bytes() for file in pending.iterdir()}
    batch = killed.close_batch(1)
    assert batch == tmp_path / "gen001.xyz" and not pending.exists()
    # Killed after the batch was written, before the single files were removed: nothing counts
    # twice.
    pending.mkdir(parents=True)
    for name, content in kept.items():
        (pending / name).write_bytes(content)
    before = batch.read_bytes()
    again = LabelStore(tmp_path)
    assert len(again.labels()) == 3 and again.close_batch(1) is None
    assert (
        batch.read_bytes() == before
        and not list(tmp_path.glob("gen001-*"))
        and len(LabelStore(tmp_path)) == 3
    )


def test_a_batch_never_changes(tmp_path):
    store = LabelStore(tmp_path)
    store.add(frame(0))
    first = store.close_batch(1)
    content = first.read_bytes()
    store.add(frame(1))
    assert store.close_batch(1) == tmp_path / "gen001-2.xyz"
    assert first.read_bytes() == content
    assert [atoms.info["id"] for atoms in LabelStore(tmp_path).labels(generation=1)] == [
        "g1-0000",
        "g1-0001",
    ]


def test_labels_come_back_with_all_that_was_known(tmp_path):
    store = LabelStore(tmp_path)
    store.add(
        frame(4, generation=2, free_energy=-4.1, distortion_seed="7-2-102-0-3", side="validation")
    )
    store.close_batch(2)
    (back,) = LabelStore(tmp_path).labels(before=3)
    assert back.get_potential_energy() == -4.0 and back.get_stress(voigt=False) == pytest.approx(
        np.eye(3) * 0.2
    )
    assert back.info["distortion_seed"] == "7-2-102-0-3" and back.info["free_energy"] == -4.1
    assert back.info["settings_hash"] == "a1b2c3d4e5f6" and side_of(back) == "validation"
    assert LabelStore(tmp_path).labels(before=2) == []


def test_labels_of_other_settings_are_refused(tmp_path):
    store = LabelStore(tmp_path)
    store.add(frame(0))
    store.check("a1b2c3d4e5f6")
    with pytest.raises(InputError, match="a1b2c3d4e5f6, now ffffffffffff"):
        store.check("ffffffffffff")


def test_a_dataset_of_other_or_unknown_settings_is_refused(tmp_path):
    file = tmp_path / "earlier.xyz"
    write(file, [frame(0), frame(1)], format="extxyz")
    assert len(read_dataset(file, "a1b2c3d4e5f6")) == 2
    with pytest.raises(
        InputError,
        match=r"earlier.xyz: structure 1 \(g1-0000\): was labelled with other DFT settings",
    ):
        read_dataset(file, "ffffffffffff")
    unknown = frame(1)
    del unknown.info["settings_hash"]
    write(file, [frame(0), unknown], format="extxyz")
    with pytest.raises(
        InputError, match="structure 2 .* has no settings_hash.* add settings_hash=a1b2c3d4e5f6"
    ):
        read_dataset(file, "a1b2c3d4e5f6")
    file.write_text("this is no xyz\n")
    with pytest.raises(InputError, match="earlier.xyz: damaged or not readable as extended XYZ"):
        read_dataset(file, "a1b2c3d4e5f6")
    with pytest.raises(InputError, match="no such file"):
        read_dataset(tmp_path / "absent.xyz", "a1b2c3d4e5f6")


# ------------------------------------------------------------------ what is trained on


def test_replay_is_from_the_training_side_only_and_validation_is_never_trained_on(tmp_path):
    new = [
        frame(n, generation=3, side=name)
        for n, name in enumerate(["train"] * 6 + ["validation"] * 2 + ["test"])
    ]
    old = [
        frame(n, generation=1 + n % 2, side=["train", "validation", "test"][n % 3])
        for n in range(100, 160)
    ]
    sets = training_sets(new, old, [], learning(n_replay=15), np.random.default_rng(0))
    assert sets.n_new == 6 and sets.n_replay == 15 and len(sets.train) == 21
    assert {side_of(atoms) for atoms in sets.train} == {"train"}
    assert len({atoms.info["id"] for atoms in sets.train}) == 21, "drawn without replacement"
    # two of this round are too few: those of the newest rounds before it are added
    generations = [atoms.info["generation"] for atoms in sets.validation]
    assert (
        generations[:2] == [3, 3]
        and set(generations[2:]) == {1, 2}
        and sets.validation_from == "this round and rounds 1 to 2"
    )
    assert {side_of(atoms) for atoms in sets.test} == {"test"} and sets.test[0].info[
        "generation"
    ] == 3


def test_a_model_is_judged_by_the_newest_rounds_alone_where_they_are_enough():
    new = [frame(n, generation=3, side="validation") for n in range(15)]
    old = [frame(n, generation=1 + n // 20, side="validation") for n in range(40)]
    sets = training_sets(
        new, old, [frame(0, side="validation")], learning(), np.random.default_rng(0)
    )
    assert [atoms.info["generation"] for atoms in sets.validation] == 15 * [3] + 20 * [2]
    assert sets.validation_from == "this round and round 2"
    alone = training_sets([*new, *new], old, [], learning(), np.random.default_rng(0))
    assert alone.validation_from == "this round" and len(alone.validation) == 30


def test_labels_of_the_search_judge_before_those_of_a_dataset():
    new = [frame(n, generation=3, side="train") for n in range(4)]
    old = [
        frame(n, generation=1, side=["train", "validation", "test"][n % 3]) for n in range(100, 109)
    ]
    dataset = [frame(n, generation=0, side="validation") for n in range(200, 202)]
    sets = training_sets(new, old, dataset, learning(n_replay=0), np.random.default_rng(0))
    assert len(sets.validation) == 3 and sets.validation_from == "round 1" and sets.n_replay == 0
    borrowed = training_sets(new, [], dataset, learning(), np.random.default_rng(0))
    assert len(borrowed.validation) == 2 and borrowed.validation_from == DATASET
    alone = training_sets(new, [], [], learning(), np.random.default_rng(0))
    assert (
        alone.validation == [] and alone.validation_from == "training" and alone.test_from == "none"
    )


# ------------------------------------------------------------------ learn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random-weights model of MatterSim's shape, one block of 8 units."""
    import torch

    from magus_anharmonic.potential import checkpoint as checkpoints

    m3gnet = pytest.importorskip("mattersim.forcefield.m3gnet.m3gnet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = m3gnet.M3Gnet(
            device="cpu", num_blocks=1, units=8, max_l=4, max_n=4, cutoff=3.5, threebody_cutoff=3.0
        )
    file = tmp_path_factory.mktemp("model") / "tiny.pth"
    checkpoints.save(module.eval(), file)
    return file


@pytest.fixture
def potential(checkpoint):
    from magus_anharmonic.potential import load

    return load(checkpoint, device="cpu")


POPULATION = [random_structure(seed) for seed in range(6)] + [h3s(3.1), h3s(3.1)]


def run(
    tmp_path,
    potential,
    settings,
    function=None,
    *,
    generation=1,
    population=POPULATION,
    seed=1,
    labeler=None,
):
    labeler = labeler or labeler_of(function or Counting())
    return learn(
        population, generation=generation, potential=potential, settings=settings, labeler=labeler,
        store=LabelStore(tmp_path / "labels"), run_dir=tmp_path, seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint):
    """The folder of a round that was not disturbed, and what it learned."""
    from magus_anharmonic.potential import load

    folder = tmp_path_factory.mktemp("round")
    keys = learning(n_sample=4, n_perturb=2, epochs=2, learning_rate=1e-3)
    return folder, run(folder, load(checkpoint, device="cpu"), keys)


@pytest.fixture
def first(finished, tmp_path):
    """What that round learned; its folder is copied to ``tmp_path``."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return finished[1]


def test_a_round_labels_finetunes_and_reports(tmp_path, potential, settings):
    counting = Counting()
    found = run(tmp_path, potential, settings, counting)
    assert counting.n == found.n_labels == 8 and found.n_failures == 0
    assert found.changed and found.model_id != potential.model_id
    (metrics,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert metrics["generation"] == 1
    assert metrics["old_model"] == potential.model_id and metrics["new_model"] == found.model_id
    assert set(metrics["shift"]) == {"H", "S"}
    decider = "validation" if metrics["n_validation"] else "train"
    assert metrics["new"][decider]["loss"] < metrics["old"][decider]["loss"]
    for scores in (metrics["old"], metrics["new"]):
        assert {"loss", "energy_rmse", "force_rmse", "stress_rmse", "n"} <= set(scores["train"])
        few = scores["validation"]
        assert (
            few["n"] < 20
            and 0.0 < few["energy_rmse_error"]
            and few["energy_rmse"] / np.sqrt(2) <= few["energy_rmse_error"]
        )
    from magus_anharmonic.potential import load

    assert load(tmp_path / "checkpoints" / "gen1.pth", device="cpu").model_id == found.model_id
    assert found.potential.path == tmp_path / "checkpoints" / "gen1.pth" and not list(
        (tmp_path / "training").glob("*")
    )


def test_labels_come_from_ensembles_where_candidates_are_undecided_and_else_at_random(
    tmp_path, potential, caplog
):
    from magus_anharmonic.learning.choose import Contender

    def contender(name, probability, seed):
        cell = h3s(3.1).repeat((2, 1, 1))
        u = 0.02 * np.random.default_rng(seed).normal(size=(8, len(cell), 3))
        configurations = []
        for one in u:
            for sign in (1, -1):
                configurations.append(cell.copy())
                configurations[-1].positions += sign * one
        return Contender(name, h3s(3.1), configurations, probability, 0.001)

    settings, store = (
        learning(select="sscha", n_sample=4, n_perturb=2, epochs=2),
        LabelStore(tmp_path / "labels"),
    )
    options = {
        "potential": potential,
        "settings": settings,
        "store": store,
        "run_dir": tmp_path,
        "seed": 1,
    }
    labeler = labeler_of(Counting())
    learn(
        POPULATION,
        generation=1,
        labeler=labeler,
        contenders=[contender("aa", 0.6, 1), contender("bb", 0.4, 2)],
        **options,
    )
    first = store.labels(generation=1)
    assert len(first) == 12 and [atoms.info["kind"] for atoms in first].count("sscha") == 8
    assert sorted(atoms.info["candidate"] for atoms in first if "candidate" in atoms.info) == 4 * [
        "c-aa"
    ] + 4 * ["c-bb"]
    # the phases that are undecided train; others of the population judge
    assert {atoms.info["side"] for atoms in first if "candidate" in atoms.info} == {"train"}
    assert (
        sorted(atoms.info["side"] for atoms in first if "candidate" not in atoms.info)
        == ["test"] * 2 + ["validation"] * 2
    )
    with caplog.at_level("INFO"):
        learn(POPULATION, generation=2, labeler=labeler, **options)
    assert {atoms.info["kind"] for atoms in store.labels(generation=2)} == {"distorted"}
    assert "this choice is random" in caplog.text


def test_labels_know_where_they_come_from(first, tmp_path):
    frames = read(tmp_path / "labels" / "gen001.xyz", index=":")
    assert len(frames) == 8
    for atoms in frames:
        known = {
            "id",
            "generation",
            "parent",
            "family",
            "side",
            "kind",
            "distortion_seed",
            "settings_hash",
        }
        assert known <= set(atoms.info)
        assert atoms.info["side"] in ("train", "validation", "test")
    assert len({(atoms.info["family"], atoms.info["side"]) for atoms in frames}) == len(
        {atoms.info["family"] for atoms in frames}
    )
    assert (
        len({atoms.info["id"] for atoms in frames}) == 8
        and len({atoms.info["distortion_seed"] for atoms in frames}) == 8
    )


def test_two_finds_of_one_phase_share_a_side(tmp_path, settings):
    population = [h3s(3.0), h3s(3.02).repeat((1, 1, 2))]
    planned = Round(1, learning(n_sample=2, n_perturb=1), LabelStore(tmp_path), 4).plan(population)
    assert len({atoms.info["parent"] for atoms in planned}) == 2
    assert (
        len({atoms.info["family"] for atoms in planned})
        == len({atoms.info["side"] for atoms in planned})
        == 1
    )


def rounds_of_labels(tmp_path, populations, settings, dataset=()):
    """What a search plans and labels in each generation, without training."""
    store, labels = LabelStore(tmp_path / "labels"), labeler_of(Counting())
    store.adopt(dataset, settings.split)
    for generation, population in enumerate(populations, start=1):
        now = Round(generation, settings, store, 7)
        planned = now.plan(population, now.choose(population, None))
        for atoms, label in zip(planned, labels.label(planned), strict=True):
            store.add(labelled(atoms, label))
    return store


def sides_by_generation(store, n):
    return [
        {side: sum(a.info["side"] == side for a in store.labels(generation=g)) for side in SIDES}
        for g in range(1, n + 1)
    ]


def test_every_generation_of_a_search_has_labels_that_judge_it(tmp_path):
    """Hashing by family left validation without any label of four generations, by chance of the
    names."""
    settings = learning(n_sample=6, n_perturb=2)
    populations = [
        [random_structure(100 * g + n) for n in range(12)] + 6 * [h3s(3.1)] for g in range(1, 5)
    ]
    store = rounds_of_labels(tmp_path, populations, settings)
    found = sides_by_generation(store, 4)
    assert all(
        counts["validation"] >= 2 and counts["test"] >= 2 and counts["train"] >= 6
        for counts in found
    ), found
    sides = {}
    for atoms in store.labels():
        sides.setdefault(atoms.info["family"], set()).add(atoms.info["side"])
    assert all(len(found) == 1 for found in sides.values())


def test_a_generation_whose_choice_trained_before_labels_others_of_its_population_to_judge(
    tmp_path,
):
    """Nearly all of the population is one phase, so that the draw is of families that train."""
    settings = learning(n_sample=4, n_perturb=2)
    first = [random_structure(n) for n in range(6)]
    later = 30 * [h3s(3.1)] + [random_structure(50), random_structure(51)]
    store = rounds_of_labels(tmp_path, [first, later, later], settings)
    found = sides_by_generation(store, 3)
    assert all(
        counts["validation"] == counts["test"] == 2 and counts["train"] == 4 for counts in found
    ), found
    names = [
        {a.info["family"] for a in store.labels(generation=g) if a.info["side"] != "train"}
        for g in (2, 3)
    ]
    assert names[0] == names[1], "a phase that was held back stays there, and is found again"


def test_a_phase_that_trained_never_judges_and_one_alone_trains(tmp_path):
    settings = learning(n_sample=4, n_perturb=1)
    store = rounds_of_labels(tmp_path / "one", [8 * [h3s(3.1)]] * 2, settings)
    assert {atoms.info["side"] for atoms in store.labels()} == {"train"}
    earlier = h3s(3.1)
    earlier.info.update(parent="old", id="old", side="train")
    store = rounds_of_labels(
        tmp_path / "two",
        [4 * [h3s(3.11)] + [random_structure(1), random_structure(2)]],
        settings,
        [earlier],
    )
    judged = {atoms.info["family"] for atoms in store.labels() if atoms.info["side"] != "train"}
    assert len(judged) == 2 and "old" not in judged
    assert {atoms.info["side"] for atoms in store.labels() if atoms.info["family"] == "old"} == {
        "train"
    }


def test_what_decides_when_to_stop_is_measured_on_the_search_itself():
    from magus_anharmonic.generation import validation_rmse

    new = {"validation": {"energy_rmse": 0.03, "n": 8}}
    assert validation_rmse({"new": new, "validation_from": "this round"}) == 0.03
    assert validation_rmse({"new": new, "validation_from": DATASET}) is None


def test_same_seed_same_model_and_another_seed_another(first, tmp_path, checkpoint, settings):
    from magus_anharmonic.potential import load

    same, other = (
        run(tmp_path / str(seed), load(checkpoint, device="cpu"), settings, seed=seed).model_id
        for seed in (1, 2)
    )
    assert first.model_id == same != other


def test_a_finished_round_is_not_done_again(first, tmp_path, potential, settings):
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    counting = Counting()
    again = run(tmp_path, potential, settings, counting)
    assert (
        counting.n == 0
        and again.model_id == first.model_id
        and again.metrics["new"] == first.metrics["new"]
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_killed_round_labels_only_what_is_missing_and_ends_the_same(
    first, tmp_path, checkpoint, settings
):
    from magus_anharmonic.potential import load

    class Killed(CallableLabeler):
        def label(self, structures, on_result=None):
            for index, atoms in enumerate(structures):
                if index == 5:
                    raise KeyboardInterrupt
                on_result(index, super().label([atoms])[0])

    killed = Killed(Counting(), description="killed", settings={"sigma": 1.2})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", load(checkpoint, device="cpu"), settings, labeler=killed)
    counting = Counting()
    found = run(tmp_path / "killed", load(checkpoint, device="cpu"), settings, counting)
    assert counting.n == 3 and found.n_labels == 8
    assert found.model_id == first.model_id


@pytest.mark.parametrize("lost", ["checkpoint", "metrics"])
def test_killed_between_metrics_and_checkpoint(first, tmp_path, potential, settings, lost):
    if lost == "checkpoint":
        shutil.move(tmp_path / "checkpoints" / "gen1.pth", tmp_path / "training" / "gen1.pth")
    else:
        (tmp_path / "metrics.jsonl").unlink()
    counting = Counting()
    again = run(tmp_path, potential, settings, counting)
    assert counting.n == 0 and again.model_id == first.model_id
    assert (
        len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
        and (tmp_path / "checkpoints" / "gen1.pth").is_file()
    )


def test_a_worse_model_is_never_kept(tmp_path, potential, settings, monkeypatch):
    """Training whose loss on the judging labels does not fall leaves weights, id and shift as they
    were."""
    import magus_anharmonic.learning.learn as scores

    real = scores.score

    def pessimistic(model, frames, settings=None):
        found = real(model, frames, settings)
        return (
            found
            if model is potential
            else type(found)(**{**found.as_dict(), "loss": found.loss + 1e6})
        )

    monkeypatch.setattr(scores, "score", pessimistic)
    found = run(tmp_path, potential, settings)
    assert (
        not found.changed and found.model_id == potential.model_id and found.potential is potential
    )
    assert (
        found.metrics["new"] == found.metrics["old"]
        and found.metrics["rejected"]["model"] != potential.model_id
    )
    from magus_anharmonic.potential import load

    assert load(tmp_path / "checkpoints" / "gen1.pth", device="cpu").model_id == potential.model_id


def test_the_second_round_replays_the_first(first, tmp_path, potential, settings):
    second = run(tmp_path, first.potential, settings, generation=2)
    n_train = sum(
        side_of(atoms) == "train" for atoms in LabelStore(tmp_path / "labels").labels(generation=1)
    )
    assert second.metrics["n_replay"] == n_train and second.metrics["old_model"] == first.model_id
    assert len(LabelStore(tmp_path / "labels")) == 16


def test_a_dataset_is_replayed(tmp_path, potential):
    labeler = labeler_of(Counting())
    earlier = [h3s(3.0 + 0.02 * n) for n in range(12)]
    frames = [
        labelled(atoms, label, id=f"old-{n}", parent=f"old-{n}")
        for n, (atoms, label) in enumerate(zip(earlier, labeler.label(earlier), strict=True))
    ]
    write(tmp_path / "earlier.xyz", frames, format="extxyz")
    settings = learning(
        n_sample=2, n_perturb=1, epochs=1, n_replay=5, dataset=str(tmp_path / "earlier.xyz")
    )
    assert run(tmp_path / "run", potential, settings).metrics["n_replay"] == 5
    with pytest.raises(InputError, match="other DFT settings"):
        run(tmp_path / "other", potential, settings, labeler=labeler_of(Counting(), sigma=1.3))
    assert not (tmp_path / "other").exists(), "refused before any work"


def test_labels_that_fail_are_recorded_and_the_round_goes_on(tmp_path, potential, settings):
    found = run(
        tmp_path,
        potential,
        settings,
        Counting(fails={0: "SCF did not converge", 3: "killed by SIGSEGV"}),
    )
    assert found.n_labels == 6 and found.n_failures == 2
    records = read_jsonl(tmp_path / "failures.jsonl")
    assert [record["reason"] for record in records] == ["SCF did not converge", "killed by SIGSEGV"]
    assert all(
        record["stage"] == "label" and record["generation"] == 1 and len(record["positions"]) >= 4
        for record in records
    )


def test_when_every_label_fails_the_model_stays_and_the_reason_is_recorded(
    tmp_path, potential, settings
):
    found = run(
        tmp_path, potential, settings, Counting(fails=dict.fromkeys(range(8), "no licence"))
    )
    assert not found.changed and found.potential is potential and found.n_failures == 8
    assert found.metrics["reason"] == "no label could be made" and found.metrics["new"] == {}
    assert len(read_jsonl(tmp_path / "failures.jsonl")) == 8
    assert run(tmp_path, potential, settings, Counting()).metrics == json.loads(
        json.dumps(found.metrics)
    )


def test_nan_and_unphysical_forces_are_not_learned_from(tmp_path, potential, settings):
    class Wild(Counting):
        def __call__(self, structures):
            results = super().__call__(structures)
            results[1]["forces"][0] = [60.0, 0, 0]
            results[2]["forces"][0, 0] = np.nan
            return results

    found = run(tmp_path, potential, settings, Wild())
    assert found.n_labels == 6 and found.n_failures == 2
    reasons = [record["reason"] for record in read_jsonl(tmp_path / "failures.jsonl")]
    assert any("60 eV/A, more than 50" in reason for reason in reasons) and any(
        "NaN" in reason for reason in reasons
    )
    store = LabelStore(tmp_path / "labels")
    assert len(store) == 7, "the wild label is kept"
    assert len(store.labels()) == 6


def test_a_damaged_record_of_a_round_is_done_again(first, tmp_path, potential, settings):
    append_jsonl(tmp_path / "metrics.jsonl", {**first.metrics, "new_model": "000000000000"})
    assert run(tmp_path, potential, settings).model_id == first.model_id


# ------------------------------------------------------------------ learning.select


def test_the_first_uncertain_choice_is_random_and_the_second_is_by_the_estimate(
    tmp_path, potential, caplog
):
    """The first round runs on a model without an estimate; training makes one, and the checkpoint
    keeps it."""
    from magus_anharmonic.potential import load

    caplog.set_level("INFO")
    keys = learning(select="uncertain", n_sample=2, n_perturb=1, epochs=1)
    first = run(tmp_path, potential, keys)
    assert "has no error estimate yet; this choice is random" in caplog.text
    loaded = load(tmp_path / "checkpoints" / "gen1.pth", device="cpu")
    assert loaded.error_model is not None and first.potential.error_model is not None
    caplog.clear()
    second = run(tmp_path, loaded, keys, generation=2)
    assert "the 2 most uncertain of" in caplog.text and second.n_labels == 2
    errors = loaded.uncertainty(POPULATION).force_error
    parents = {
        atoms.info["parent"] for atoms in LabelStore(tmp_path / "labels").labels(generation=2)
    }
    assert f"p-{structure_id(POPULATION[int(errors.argmax())])}" in parents


def test_a_model_that_is_kept_gets_an_estimate_too(tmp_path, potential, settings, monkeypatch):
    import magus_anharmonic.learning.learn as scores
    from magus_anharmonic.potential import load

    real = scores.score
    monkeypatch.setattr(
        scores,
        "score",
        lambda model, frames, settings=None: (
            real(model, frames, settings) if model is potential else nan_scores()
        ),
    )
    assert not run(tmp_path, potential, settings).changed
    again = run(tmp_path, load(potential.path, device="cpu"), settings)
    assert again.potential.error_model is not None, (
        "a restart finds the estimate in the checkpoint of the round"
    )
    assert again.potential.error_model.energy_scale == pytest.approx(
        potential.error_model.energy_scale
    )


def nan_scores():
    from magus_anharmonic.potential.labelled import Scores

    return Scores(np.nan, np.nan, np.nan, np.nan, 1)
