"""``learning.select: sscha``: labels go where they narrow the undecided differences of G most."""

import numpy as np
import pytest
from harmonic_pair import crystal, pair
from records import a_candidate

from magus_anharmonic import generation as rounds
from magus_anharmonic.errors import InputError
from magus_anharmonic.generation import SearchState
from magus_anharmonic.learning.choose import Contender, allocate
from magus_anharmonic.learning.dataset import LabelStore
from magus_anharmonic.learning.round import Round
from magus_anharmonic.settings import LearningSettings, parse_settings
from magus_anharmonic.sscha.state import displaced, sample


def learning(n_sample=4, n_perturb=5):
    return LearningSettings(
        labeler={"calculator": "gpaw"}, select="sscha", n_sample=n_sample, n_perturb=n_perturb
    )


def test_pairs_are_shared_in_proportion_to_the_spread():
    assert allocate([1.0, 1.0], [0.6, 0.4], 10) == [5, 5]
    assert allocate([3.0, 1.0], [0.6, 0.4], 40) == [30, 10]


def test_the_lowest_phase_is_in_every_difference_and_the_unlikely_ones_get_less():
    given = allocate([1.0, 1.0, 1.0, 1.0], [0.4, 0.3, 0.29, 0.01], 60)
    assert given[0] > given[1] >= given[2] > given[3] >= 1 and sum(given) == 60
    # sqrt of the weights 0.6, 0.3, 0.29, 0.01
    assert given[0] / given[1] == pytest.approx(np.sqrt(2.0), rel=0.15)


def test_too_few_pairs_go_to_those_that_matter_most_and_none_to_an_empty_ensemble():
    assert allocate([1.0, 1.0, 5.0], [0.5, 0.2, 0.3], 2) == [1, 0, 1]
    assert allocate([1.0, 1.0], [0.5, 0.5], 10, most=[2, 3]) == [2, 3]


def phases():
    """A phase that the model knows well and one that it does not; each as (model, reference)."""
    return pair(0.02), pair(0.4)


def energy_errors(model, reference, n, rng):
    """(E_ref - E_model)/N of n configurations, in pairs, eV/atom."""
    structures = displaced(model.state, sample(model.state, n, rng))
    return (reference.evaluate(structures).energy - model.evaluate(structures).energy) / len(
        model.state.supercell
    )


def test_fewer_labels_than_random_choice_for_the_same_error_of_the_difference():
    """Two analytic phases: spread over 300 experiments of G_2 - G_1, from labels chosen here and at
    random from both ensembles; each experiment takes its labels out of 4,000 of either."""
    rng = np.random.default_rng(11)
    both, n_labels = phases(), 40
    many = [energy_errors(*phase, 4000, rng).reshape(-1, 2) for phase in both]
    spreads = [float(np.std(errors)) for errors in many]
    shares = allocate(spreads, [0.5, 0.5], n_labels // 2)
    ours, random = [], []
    for _ in range(300):
        means = [
            errors[rng.choice(len(errors), share, replace=False)].mean()
            for errors, share in zip(many, shares, strict=True)
        ]
        ours.append(means[1] - means[0])
        pool = [errors[rng.choice(len(errors), n_labels)].ravel() for errors in many]
        drawn = rng.permutation(4 * n_labels)[:n_labels]
        means = [
            pool[0][drawn[drawn < 2 * n_labels]].mean(),
            pool[1][drawn[drawn >= 2 * n_labels] - 2 * n_labels].mean(),
        ]
        random.append(means[1] - means[0])
    exact = [
        0.5 * np.sum((r.state.full - m.state.full) * m.state.covariance)
        + 0.5 * (s := np.tile(r.shift, (m.state.n_cells, 1)).ravel()) @ r.state.full @ s
        for m, r in both
    ]
    assert np.mean(ours) == pytest.approx(
        (exact[1] - exact[0]) / 6,
        abs=4 * np.hypot(*[np.std(errors) for errors in many]) / np.sqrt(2000),
    )
    # the squared error goes with 1/n: this is the number of labels that random choice needs over
    # ours
    assert np.var(random) / np.var(ours) > 1.8


def contender(name, probability, spread, seed, n=20):
    state = crystal(seed=seed)
    return Contender(
        name,
        state.atoms,
        displaced(state, sample(state, n, np.random.default_rng(seed))),
        probability,
        spread,
    )


def test_a_plan_holds_whole_pairs_with_their_origin_and_survives_a_restart(tmp_path):
    contenders = [contender("aa", 0.6, 0.003, 1), contender("bb", 0.4, 0.001, 2)]
    store = LabelStore(tmp_path / "labels")
    planned = Round(3, learning(), store, 0).plan_ensembles(contenders, tmp_path)
    assert len(planned) == 20 and {atoms.info["kind"] for atoms in planned} == {"sscha"}
    names = [atoms.info["candidate"] for atoms in planned]
    assert names.count("c-aa") > names.count("c-bb") and names.count("c-bb") % 2 == 0
    centre = crystal(seed=1).supercell.positions
    assert planned[0].positions + planned[1].positions == pytest.approx(2 * centre, abs=1e-6)
    assert len({atoms.info["side"] for atoms in planned if atoms.info["candidate"] == "c-aa"}) == 1
    again = Round(3, learning(), LabelStore(tmp_path / "labels"), 0).plan_ensembles([], tmp_path)
    assert [atoms.info["id"] for atoms in again] == [atoms.info["id"] for atoms in planned]
    assert Round(4, learning(), store, 0).plan_ensembles([], tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("between", [False, True], ids=["in a structure", "between structures"])
def test_a_plan_that_is_cut_is_noticed_and_made_anew(tmp_path, share, between):
    contenders = [contender("aa", 0.6, 0.003, 1), contender("bb", 0.4, 0.001, 2)]
    store = LabelStore(tmp_path / "labels")
    planned = Round(3, learning(), store, 0).plan_ensembles(contenders, tmp_path)
    file = tmp_path / "ensembles" / "gen3.xyz"
    lines = file.read_bytes().splitlines(keepends=True)
    each = len(planned[0]) + 2
    keep = int(share * len(planned)) * each + (0 if between else 3)
    file.write_bytes(b"".join(lines[:keep]))
    again = Round(3, learning(), store, 0).plan_ensembles(contenders, tmp_path)
    assert [atoms.info["id"] for atoms in again] == [atoms.info["id"] for atoms in planned]
    assert all("n_planned" not in atoms.info for atoms in again)
    assert (tmp_path / "ensembles" / "gen3.xyz.damaged").is_file()


class Lottery:
    """A model that expects its energy error to vary equally in every ensemble."""

    model_id = "lottery"

    def energy_error_spread(self, structures, group_size=1):
        assert group_size == 2 and len(structures) % 2 == 0
        return 0.002


def search(tmp_path, candidates):
    keys = {
        "learning": {"labeler": {"calculator": "gpaw"}, "select": "sscha"},
        "sscha": {"when": "every_generation"},
    }
    settings = parse_settings(
        {"pressure": 0.0, "MainCalculator": {"calculator": "mattersim"}, **keys}
    )
    return SearchState(settings, tmp_path, Lottery(), 7, candidates=candidates)


def finished(tmp_path, name, seed):
    """A ranked candidate whose SSCHA run left its state."""
    from magus_anharmonic.sscha.result import SschaResult

    state = crystal(seed=seed)
    number = dict.fromkeys(
        (
            "gibbs",
            "gibbs_error",
            "gibbs_raw",
            "finite_size",
            "helmholtz",
            "volume",
            "pressure",
            "target_pressure",
            "temperature",
        )
        + ("predicted_decrease", "position_error", "interpolated_imaginary", "seconds"),
        0.0,
    )
    counts = dict.fromkeys(("n_evaluations", "n_populations", "n_configs", "n_atoms_supercell"), 1)
    words = dict.fromkeys(("space_group_start", "space_group"), "P1 (1)")
    result = SschaResult(
        status="converged",
        reason="",
        **number,
        **counts,
        **words,
        stress=np.zeros((3, 3)),
        stress_error=np.zeros((3, 3)),
        centroids=state.atoms,
        symmetry_tolerance=0.05,
        supercell=state.supercell_matrix,
        model_id="m",
        force_constants=state.force_constants,
    )
    (tmp_path / "sscha" / name).mkdir(parents=True)
    result.write(tmp_path / "sscha" / name)
    return a_candidate(
        name,
        state.atoms,
        enthalpy=-1.0,
        model="m",
        status="converged",
        gibbs=0.001 * seed,
        gibbs_error=0.001,
        sscha_folder=name,
    )


def test_the_undecided_candidates_of_the_latest_ranking_are_handed_over(tmp_path):
    from dataclasses import replace

    rows = [finished(tmp_path, f"{seed:012x}", seed) for seed in (1, 2, 3)]
    probability = [0.7, 0.299, 0.001]
    candidates = [
        replace(row, p_lowest_sampling=1.0 - p, p_lowest_total=p)
        for row, p in zip(rows, probability, strict=True)
    ]
    candidates += [
        replace(candidates[1], id="failed").updated(status="failed"),
        replace(candidates[1], id="duplicate", same_as=rows[0].id),
    ]
    state = search(tmp_path, candidates[::-1])
    found = rounds.undecided(state, 2)
    assert [(c.id, c.probability, c.spread) for c in found] == [
        (rows[0].id, 0.7, 0.002),
        (rows[1].id, 0.299, 0.002),
    ]
    assert len(found[0].configurations) == 100
    again = rounds.undecided(state, 2)
    assert again[0].configurations[0] == found[0].configurations[0]
    assert rounds.undecided(search(tmp_path, [replace(candidates[0], p_lowest_total=1.0)]), 2) == []


def test_the_measured_terms_are_those_of_the_pressure(tmp_path):
    from magus_anharmonic.paper import tables

    rows = [
        tables.GibbsCorrection("Im-3m", p, 20, 0.001 * p, error, None)
        for p, error in ((100.0, 0.002), (150.0, 0.003))
    ]
    tables.write(
        tables.GibbsCorrection,
        tmp_path / "gibbs_correction.csv",
        [*rows, tables.GibbsCorrection("R3m", 100.0, 2, 0.1, None, None)],
    )
    found = rounds.measured_terms(tmp_path, 100.0)
    assert list(found) == ["Im-3m"] and (
        found["Im-3m"].correction,
        found["Im-3m"].error,
    ) == pytest.approx((0.1, 0.002))
    assert rounds.measured_terms(tmp_path / "empty", 100.0) == {}


def test_labels_from_ensembles_need_ensembles():
    keys = {
        "learning": {"labeler": {"calculator": "gpaw"}, "select": "sscha"},
        "MainCalculator": {"calculator": "mattersim"},
    }
    with pytest.raises(InputError, match="needs the block sscha"):
        parse_settings({"pressure": 0.0, **keys})
