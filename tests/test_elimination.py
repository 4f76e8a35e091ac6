"""Successive elimination: the best are never eliminated, those without a chance stop early, and the probabilities are
those of a simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from records import standing

from magus_anharmonic.ranking.elimination import Rules, Stop, race, resolution, verdicts
from magus_anharmonic.ranking.uncertainty import probability_lowest

RULES = Rules(confidence=0.95, keep_best=1, max_populations=30)


def test_a_candidate_far_above_stops_and_one_within_the_noise_goes_on():
    found = verdicts({"a": standing(0.0), "b": standing(0.1), "c": standing(0.002)}, RULES)
    assert (
        list(found) == ["b"]
        and found["b"].eliminated
        and "not among the lowest" in found["b"].reason
    )


def test_a_candidate_that_is_still_falling_is_never_eliminated():
    far = {"a": standing(0.0, converged=True), "b": standing(0.1, left=0.04)}
    assert "b" not in verdicts(far, RULES), "three times the predicted decrease reaches the best"
    far["b"] = standing(0.1, left=0.001, fallen=0.2)
    assert "b" not in verdicts(far, RULES), "it fell by 0.2 with the last population"
    far["b"] = standing(5.0, fallen=None, n_populations=1)
    assert "b" not in verdicts(far, RULES), "one population says nothing about how far it falls"
    far["b"] = standing(0.1, left=0.001, fallen=0.01)
    assert "b" in verdicts(far, RULES)


def test_the_best_goes_on_until_it_has_converged():
    relaxing = {"a": standing(0.0, left=1e-3), "b": standing(0.5)}
    assert "a" not in verdicts(relaxing, RULES)
    assert verdicts(relaxing | {"a": standing(0.0, converged=True)}, RULES)["a"] == Stop()


def test_sampling_ends_where_the_model_cannot_tell_them_apart():
    tied = {"a": standing(0.0, 1e-3, converged=True), "b": standing(0.0005, 1e-3, converged=True)}
    assert verdicts(tied, RULES) == {}
    known = Rules(
        confidence=0.95, keep_best=1, max_populations=30, tolerance=resolution(5e-3, 2e-4)
    )
    assert verdicts(tied, known) == {"a": Stop(), "b": Stop()}
    assert resolution(1e-6, 2e-4) == 2e-4
    assert resolution(None, 2e-4) == 1e-3, "an error that nobody knows is not that of no model"


def test_only_those_that_are_not_told_apart_are_sampled_further():
    rules = Rules(confidence=0.95, keep_best=3, max_populations=30)
    apart = {
        name: standing(g, converged=True)
        for name, g in {"a": 0.0, "b": 0.05, "c": 0.1, "d": 0.2, "e": 0.2}.items()
    }
    assert set(verdicts(apart, rules)) == set(apart)
    close = apart | {"c": standing(0.0505, converged=True)}
    assert set(verdicts(close, rules)) == {"a", "d", "e"}
    relaxing = apart | {"c": standing(0.052, left=0.02)}
    assert "b" in verdicts(relaxing, rules), "where c ends decides, not the error of b"
    assert "c" not in verdicts(relaxing, rules)
    beyond = apart | {"d": standing(0.2, converged=True), "e": standing(0.1995, converged=True)}
    assert set(verdicts(beyond, rules)) == set(beyond), (
        "the order behind the best three is of no interest"
    )


def test_the_bounds_hold_with_the_wanted_confidence():
    """100 candidates, the best 2 meV below the rest, every population with fresh noise: in at least
    95 % the best survives."""
    rng = np.random.default_rng(0)
    truth = np.concatenate([[0.0], np.linspace(2e-3, 50e-3, 99)])
    lost = 0
    for _ in range(60):
        alive = dict(enumerate(truth))
        for n in range(2, 12):
            measured = {
                str(i): standing(g + rng.normal(0.0, 2e-3), 2e-3, n_populations=n, converged=True)
                for i, g in alive.items()
            }
            stopped = {
                int(name)
                for name, stop in verdicts(measured, RULES, 100).items()
                if stop.eliminated
            }
            alive = {i: g for i, g in alive.items() if i not in stopped}
        lost += 0 not in alive
    assert lost <= 3
    assert len(alive) < 30, "most of the others must have been stopped"


def test_probabilities_are_those_of_a_simulation():
    gibbs, errors = np.array([0.0, 0.5, 0.4, 3.0]), np.array([1.0, 0.3, 2.0, 1.0])
    samples = gibbs + errors * np.random.default_rng(1).normal(size=(400_000, 4))
    expected = np.bincount(samples.argmin(axis=1), minlength=4) / len(samples)
    assert np.allclose(probability_lowest(gibbs, errors), expected, atol=4e-3)


class Relaxations:
    """Candidates whose G falls towards ``truth`` by half of the rest with every population; counts
    the populations."""

    def __init__(self, truth, error=1e-4):
        self.truth, self.error = truth, error
        self.calls: dict[str, int] = {}

    def standing(self, name, n):
        rest = 0.08 * 0.5**n
        bounds = self.error, rest, rest, rest < 2e-4, n
        return standing(self.truth[name] + rest, *bounds, n_new=100)

    def advance(self, wanted):
        self.calls.update(wanted)
        return {
            name: self.standing(name, n)
            for name, n in wanted.items()
            if not name.startswith("broken")
        }


def test_a_race_runs_the_best_to_the_end_and_the_others_not():
    field = Relaxations({f"c{i}": 0.01 * i for i in range(20)})
    stops = race(list(field.truth), field.advance, Rules(0.95, 3, 30), {}, {})
    ends = {name for name, stop in stops.items() if not stop.eliminated}
    assert ends == {"c0", "c1", "c2"} and len(stops) == 20
    assert field.calls["c0"] >= 9 and field.calls["c19"] == 2
    assert sum(field.calls.values()) < 20 * 30 / 5


def test_a_failed_candidate_leaves_the_race_to_the_others():
    field = Relaxations({"broken": -1.0, "a": 0.0, "b": 0.05})
    stops = race(["broken", "a", "b"], field.advance, Rules(0.95, 1, 30), {}, {})
    assert set(stops) == {"a", "b"} and not stops["a"].eliminated and field.calls["broken"] == 1


def test_a_budget_ends_the_race():
    field = Relaxations({"a": 0.0, "b": 1e-5})
    stops = race(["a", "b"], field.advance, Rules(0.95, 1, 30, budget=600), {}, {})
    assert field.calls == {"a": 3, "b": 3}
    assert all("budget of 600" in stop.reason and not stop.eliminated for stop in stops.values())


def test_no_population_is_begun_that_the_budget_may_not_cover():
    """Populations of 100, 200, 400, ... configurations and a start of 10: what is used stays within
    what was asked, for any budget."""

    def cost(known):
        return 110 if known is None else 100 * 2**known.n_populations

    for budget in range(50, 9000, 370):
        field, used = Relaxations({f"c{i}": 1e-5 * i for i in range(8)}), [0]

        def advance(wanted, field=field, used=used):
            found = {}
            for name, one in field.advance(wanted).items():
                n_new = 110 if wanted[name] == 1 else 100 * 2 ** (wanted[name] - 1)
                found[name] = replace(one, n_new=n_new)
                used[0] += n_new
            return found

        stops = race(
            list(field.truth), advance, Rules(0.95, 3, 30, budget=budget, cost=cost), {}, {}
        )
        assert used[0] <= budget
        assert all(str(budget) in stops[name].reason or stops[name].eliminated for name in stops)
        if budget > 8 * 110:
            assert len(stops) == 8, "everybody begins before somebody goes on"


def test_a_budget_leaves_out_only_whom_somebody_at_the_end_has_beaten():
    """Both leaders are still falling when the budget ends, and are not ranked: what they threw out
    waits as they do."""
    field = Relaxations({"a": 0.0, "b": 1e-5, "far": 0.6, "highest": 3.0})
    known = {"done": standing(0.7, converged=True)}
    stops = race(
        ["a", "b", "far", "highest"], field.advance, Rules(0.95, 1, 30, budget=1000), known, {}
    )
    assert field.calls["far"] == 2, "it was eliminated"
    assert stops["highest"].eliminated, "by the one whose relaxation has ended"
    assert all(
        "budget of 1000" in stops[name].reason and not stops[name].eliminated
        for name in ("a", "b", "far")
    )


def test_one_that_never_converges_eliminates_nobody():
    """The lowest spends its 30 populations without coming to its end: the next one is the winner,
    and must be relaxed."""
    field = Relaxations({"best": 0.0, "second": 0.2, "third": 0.6})

    def advance(wanted):
        return {
            n: found.updated(status="unconverged") if n == "best" else found
            for n, found in field.advance(wanted).items()
        }

    stops = race(list(field.truth), advance, Rules(0.95, 1, 30), {}, {})
    assert field.calls["best"] == 30 and stops["best"] == Stop()
    assert stops["second"] == Stop() and field.calls["second"] >= 9
    assert stops["third"].eliminated and field.calls["third"] == 2


def test_one_that_was_eliminated_among_others_is_taken_up_again_when_it_could_win():
    field = Relaxations({"new": 0.1, "old": 0.0, "highest": 0.5})
    eliminated_before = {name: field.standing(name, 2) for name in ("old", "highest")}
    stops = race(["new"], field.advance, Rules(0.95, 1, 30), {}, eliminated_before)
    assert field.calls["old"] > 2 and "highest" not in field.calls
    assert not stops["old"].eliminated


def test_known_results_take_part_without_running():
    field = Relaxations({"a": 0.1})
    known = {"best": standing(0.0, converged=True)}
    stops = race(["a"], field.advance, Rules(0.95, 1, 30), known, {})
    assert stops["a"].eliminated and "best" not in stops


def test_the_eliminated_come_back_when_the_best_falls_apart():
    """The winner dissociates in its fifth population; the one that was eliminated because of it
    must run to its end."""
    field = Relaxations({"best": 0.0, "second": 0.2, "third": 0.6})

    def advance(wanted):
        return {
            name: found
            for name, found in field.advance(wanted).items()
            if not (name == "best" and found.n_populations == 5)
        }

    stops = race(list(field.truth), advance, Rules(0.95, 1, 30), {}, {})
    assert set(stops) == {"second", "third"}
    assert stops["second"] == Stop() and field.calls["second"] >= 9
    assert stops["third"].eliminated and field.calls["third"] == 2


def test_one_that_has_stopped_is_sampled_again_when_another_comes_near():
    """b ends 0.5 meV/atom above a, whose error was small enough while b was far away."""

    def advance(wanted):
        counts.update(wanted)
        sharp = {name: 1e-3 / n for name, n in wanted.items()}
        found = {
            name: standing(0.0, sharp["a"], converged=True, n_populations=n)
            for name, n in wanted.items()
            if name == "a"
        }
        if "b" in wanted:
            rest = max(0.0, 0.1 - 0.02 * wanted["b"])
            found["b"] = standing(
                5e-4 + rest,
                sharp["b"],
                2 * rest,
                rest,
                converged=rest == 0.0,
                n_populations=wanted["b"],
            )
        return found

    counts = {}
    race(["a", "b"], advance, Rules(0.95, 1, 30), {}, {})
    assert counts["a"] > 5 and counts["b"] > 5, "sampled until they are told apart"
    assert counts["a"] < counts["b"] + 5


def test_a_run_that_gives_no_more_populations_ends_its_race():
    """Two that are not told apart, and whose runs have met their own criteria."""
    calls = []

    def advance(wanted):
        calls.append(wanted)
        return {name: standing(0.0, 1e-3, converged=True, n_populations=1) for name in wanted}

    stops = race(["a", "b"], advance, Rules(0.95, 1, 30), {}, {})
    assert stops == {"a": Stop(), "b": Stop()} and calls == [{"a": 1, "b": 1}, {"a": 2, "b": 2}]
