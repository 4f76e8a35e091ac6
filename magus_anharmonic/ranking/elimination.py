"""Successive elimination: who of the candidates deserves another population.

A candidate's G is bounded from above by its free energy so far (SSCHA is variational: every state
of the relaxation is an upper bound of its end) and from below by what it may still fall. One whose
lower bound lies above the upper bounds of the best few stops; the rest go on until the order of the
best few is known with the wanted confidence. Energies in eV/atom.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import norm

from magus_anharmonic.ranking.uncertainty import difference_error

DECREASE_FACTOR = 3.0
"""Times the predicted remaining decrease of G: the prediction is of second order, and the path to a
minimum may be longer."""
MIN_POPULATIONS = 2
"""Nobody is stopped on one population: how fast G falls shows only with the second."""
RESOLUTION = 0.3
"""Of the model's error: a smaller sampling error improves no comparison."""


@dataclass(frozen=True)
class Stop:
    """Why a candidate gets no more populations; ``eliminated`` when it is out of the race, not at
    its end.

    budget_spent : the budget of force evaluations that ended the race before its rank was known,
    else None.
    """

    reason: str = ""
    eliminated: bool = False
    budget_spent: int | None = None


@dataclass(frozen=True)
class Standing:
    """What is known of one candidate after ``n_populations``.

    gibbs, error : G and its standard error by sampling; predicted_decrease : of G, by the rest of
    the relaxation;
    fallen : by how much G fell with the last population (None with one); converged : every
    criterion of the relaxation is met; n_new : force evaluations of the last round.
    """

    gibbs: float
    error: float
    predicted_decrease: float
    fallen: float | None
    converged: bool
    n_populations: int
    n_new: int = 0

    def upper(self, z: float) -> float:
        """G at the end of the relaxation is below this."""
        return self.gibbs + z * self.error

    def lower(self, z: float) -> float:
        """G at the end is above this. It may fall by ``predicted_decrease`` times a factor, or once
        more by as much as the last time."""
        if self.converged:
            return self.gibbs - self.predicted_decrease - z * self.error
        if self.fallen is None:
            return -math.inf
        return (
            self.gibbs
            - max(DECREASE_FACTOR * self.predicted_decrease, self.fallen)
            - z * self.error
        )


def last_cost(standing: Standing | None) -> int:
    """As much as the last one."""
    return 0 if standing is None else standing.n_new


@dataclass(frozen=True)
class Rules:
    """confidence : that no stopped candidate belongs to the best ``keep_best`` and that their order
    is right.

    tolerance : eV/atom, sampling error below which more samples are of no use; max_populations : of
    one candidate; budget : force evaluations of the race, None: no limit; cost : of the next
    population of a candidate, at most, from what is known of it (None: it has not begun). No
    population is begun that the budget may not cover.
    """

    confidence: float
    keep_best: int
    max_populations: int
    tolerance: float = 0.0
    budget: int | None = None
    cost: Callable[[Standing | None], int] = last_cost

    def z(self, n_candidates: int) -> float:
        """Half width of the bounds in standard errors: one side, corrected for candidates times
        rounds (Bonferroni)."""
        comparisons = max(1, n_candidates) * self.max_populations
        return float(norm.isf((1.0 - self.confidence) / comparisons))


def resolution(model_error: float | None, free_energy_tolerance: float) -> float:
    """Sampling error of G that is small enough: 0.3 of the model's error, never below the tolerance
    of the relaxation; eV/atom."""
    return max(free_energy_tolerance, RESOLUTION * (model_error or 0.0))


Common = Callable[[str, str], float]
"""Covariance of the free energies of two candidates, eV^2/atom^2."""


FieldOf = Callable[[str], str]
"""What a candidate runs against: only those of one field (a composition) are compared."""


def one_field(name: str) -> str:
    """Everybody against everybody."""
    return ""


def verdicts(
    standings: Mapping[str, Standing],
    rules: Rules,
    n_candidates: int | None = None,
    common: Common | None = None,
    field_of: FieldOf = one_field,
) -> dict[str, Stop]:
    """Candidates that stop now; whoever is not in it goes on.

    ``n_candidates`` is the number at the start of the ranking, for the correction of the bounds
    (default: those given); ``common`` knows what the errors of two candidates have in common
    (default: nothing). ``rules.keep_best`` counts in each field. One that has had its populations
    and did not converge is not ranked: it eliminates no other, and no other waits for it.
    """
    z = rules.z(n_candidates or len(standings))
    stopped: dict[str, Stop] = {}
    for field in dict.fromkeys(map(field_of, standings)):
        rivals = {name: standing for name, standing in standings.items() if field_of(name) == field}
        stopped |= _verdicts_of_field(rivals, rules, z, common)
    return stopped


def _verdicts_of_field(
    standings: Mapping[str, Standing], rules: Rules, z: float, common: Common | None
) -> dict[str, Stop]:
    field = {
        name: standing
        for name, standing in standings.items()
        if standing.converged or standing.n_populations < rules.max_populations
    }
    uppers = sorted(standing.upper(z) for standing in field.values())
    limit = uppers[rules.keep_best - 1] if len(uppers) >= rules.keep_best else math.inf
    stopped = {}
    for name, standing in standings.items():
        if standing.n_populations >= MIN_POPULATIONS and standing.lower(z) > limit:
            best = "the lowest" if rules.keep_best == 1 else f"the lowest {rules.keep_best}"
            stopped[name] = Stop(
                f"stopped after {standing.n_populations} populations: not among {best} ({z:.1f}"
                " sigma)",
                eliminated=True,
            )
        elif standing.n_populations >= rules.max_populations:
            stopped[name] = Stop()
        elif standing.converged and (
            standing.error <= rules.tolerance
            or rank_is_known(name, field, z, rules.keep_best, common)
        ):
            stopped[name] = Stop()
    return stopped


def rank_is_known(
    name: str,
    standings: Mapping[str, Standing],
    z: float,
    keep_best: int,
    common: Common | None = None,
) -> bool:
    """Whether more samples of ``name`` would tell nobody apart: it differs from everybody by more
    than z errors, where it matters.

    Two matter to each other when one of them is among the best ``keep_best``. Somebody who is still
    relaxing does not: where it ends decides, not the error of ``name``; the question comes up again
    when it is there.
    """
    best = sorted(standings, key=lambda other: standings[other].gibbs)[:keep_best]
    return not any(
        _undecided((name, standings[name]), (rival, other), z, common)
        for rival, other in standings.items()
        if rival != name and (name in best or rival in best) and other.converged
    )


def _undecided(
    one: tuple[str, Standing], other: tuple[str, Standing], z: float, common: Common | None
) -> bool:
    """Whether two candidates may yet be in either order: their bounds without errors differ by less
    than z errors of the difference."""
    (low, lower), (high, upper) = sorted((one, other), key=lambda pair: pair[1].gibbs)
    error = difference_error(lower.error, upper.error, 0.0 if common is None else common(low, high))
    return upper.lower(0.0) - lower.gibbs <= z * error


Advance = Callable[[dict[str, int]], dict[str, Standing]]
"""Takes candidates and the number of populations each is to have; returns the standings of those
that did not fail."""


def race(
    names: Sequence[str],
    advance: Advance,
    rules: Rules,
    known: Mapping[str, Standing],
    eliminated_before: Mapping[str, Standing],
    common: Common | None = None,
    field_of: FieldOf = one_field,
) -> dict[str, Stop]:
    """Give populations to ``names`` round by round until each has stopped.

    ``known`` are candidates whose G is final, ``dormant`` ones that an earlier ranking eliminated:
    they, and those that were eliminated here, become active again when they could be among the best
    after all and all others have stopped. Returns a `Stop` for everyone that ran and did not fail.
    ``common``, ``field_of``: see `verdicts`.
    """
    total = len(names) + len(known) + len(eliminated_before)
    standings, eliminated, spent = {**known, **eliminated_before}, set(eliminated_before), 0
    field = dict.fromkeys([*names, *eliminated_before])
    ran: dict[str, None] = {}
    ended: set[str] = set()
    verdicts_of = functools.partial(
        verdicts, rules=rules, n_candidates=total, common=common, field_of=field_of
    )
    while True:
        stopped = verdicts_of(standings)
        eliminated |= {name for name in field if name in stopped and stopped[name].eliminated}
        wanted = [name for name in field if name not in stopped and name not in ended]
        running = _active(wanted, eliminated, field_of)
        stops = {
            name: stopped.get(name, Stop()) for name in ran if name in stopped or name in ended
        }
        if not running:
            return stops
        running = _affordable(running, standings, rules, spent)
        if not running:
            return _budget_spent(rules, standings, verdicts_of, stops, ran)
        eliminated -= set(running)
        asked = {
            name: standings[name].n_populations + 1 if name in standings else 1 for name in running
        }
        found = advance(asked)
        # A run that ends before the population it was asked for has met every criterion of its own,
        # and gives no more.
        ended |= {name for name, standing in found.items() if standing.n_populations < asked[name]}
        spent += sum(standing.n_new for standing in found.values())
        ran |= dict.fromkeys(found)
        standings.update(found)
        for failed in set(running) - found.keys():
            standings.pop(failed, None)
            field.pop(failed)
            ran.pop(failed, None)


def _budget_spent(
    rules: Rules,
    standings: Mapping[str, Standing],
    verdicts_of: Callable[[Mapping[str, Standing]], dict[str, Stop]],
    stops: Mapping[str, Stop],
    ran: Iterable[str],
) -> dict[str, Stop]:
    """How the race ends without more evaluations: what converged candidates eliminate stays
    eliminated, all others are left open."""
    last = {
        name: (
            standing
            if standing.converged
            else replace(standing, n_populations=rules.max_populations)
        )
        for name, standing in standings.items()
    }
    out = {name for name, stop in verdicts_of(last).items() if stop.eliminated}
    spent = Stop(
        f"the budget of {rules.budget} force evaluations is spent", budget_spent=rules.budget
    )
    known = {name: stop for name, stop in stops.items() if not stop.eliminated or name in out}
    return {name: known.get(name, spent) for name in ran}


def _affordable(
    running: Sequence[str], standings: Mapping[str, Standing], rules: Rules, spent: int
) -> list[str]:
    """Those of ``running`` whose next population the budget covers whatever it costs: who has had
    the fewest first, then the lowest."""
    if rules.budget is None:
        return list(running)
    left, found = rules.budget - spent, set[str]()

    def order(name: str) -> tuple[int, float]:
        known = standings.get(name)
        return (0, 0.0) if known is None else (known.n_populations, known.gibbs)

    for name in sorted(running, key=order):
        cost = rules.cost(standings.get(name))
        if left <= 0 or cost > left:
            break
        left -= cost
        found.add(name)
    return [name for name in running if name in found]


def _active(wanted: Sequence[str], eliminated: set[str], field_of: FieldOf) -> list[str]:
    """The active ones of ``wanted``; of a field in which none is active, the eliminated ones
    too."""
    busy = {field_of(name) for name in wanted if name not in eliminated}
    return [name for name in wanted if name not in eliminated or field_of(name) not in busy]
