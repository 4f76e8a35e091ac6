"""Successive elimination: who of the candidates deserves another population.

A candidate's G is bounded from above by its free energy so far (SSCHA is variational: every state
of the relaxation is an upper bound of its end) and from below by what it may still fall. One whose
lower bound lies above the upper bounds of the best few stops; the rest go on until the order of the
best few is known with the wanted confidence. Energies in eV/atom.

The best few are phases: of those that come to one phase only the one that stands for it goes on
(`_same_phase`), and one that ends far above the lowest stops though it is among them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import ndtri

from magus_anharmonic.ranking.phases import AGREEMENT, GIBBS_TOLERANCE, Alike
from magus_anharmonic.ranking.uncertainty import difference_error
from magus_anharmonic.sscha.record import FreeEnergy, WithFreeEnergy
from magus_anharmonic.units import ev_to_mev

DECREASE_FACTOR = 3.0
"""Times the predicted remaining decrease of G: the prediction is of second order, and the path to a
minimum may be longer."""
MIN_POPULATIONS = 2
"""Nobody is stopped on one population, but far above: how fast G falls shows only with the second.
"""
RESOLUTION = 0.3
"""Of the model's error: a smaller sampling error improves no comparison."""
UNKNOWN_ERROR = 1e-3
"""eV/atom, sampling error that is small enough where the model's error is not known: DFT itself is
converged (cutoff, k points) to about that, and no potential is better."""
FAR = 0.05
"""eV/atom above the lowest phase, where the order is of no interest. Wells that the static start
does not show, and what a relaxation takes from the kinetic energy, are smaller."""


@dataclass(frozen=True)
class Stop:
    """Why a candidate gets no more populations; ``eliminated`` when it is out of the race, not at
    its end.

    budget_spent : the budget of force evaluations that ended the race before its rank was known,
    else None. same_as : the candidate that goes on for the phase of both; empty: none.
    """

    reason: str = ""
    eliminated: bool = False
    budget_spent: int | None = None
    same_as: str = ""


@dataclass(frozen=True)
class Standing(WithFreeEnergy):
    """What is known of one candidate after as many populations as its ``free_energy`` has.

    fallen : by how much G fell with the last population (None with one); n_new : force evaluations
    of the last round; n_atoms : of the cell that is run; potential : mean potential energy (and
    P V) of the state above the static start, eV/atom: about half the zero-point energy.
    """

    free_energy: FreeEnergy
    fallen: float | None
    n_new: int = 0
    n_atoms: int = 0
    potential: float = math.inf

    @property
    def gibbs(self) -> float:
        """Who has none takes no part in a race."""
        assert self.free_energy.gibbs is not None
        return self.free_energy.gibbs

    @property
    def error(self) -> float:
        """Standard error of G by sampling."""
        return self.gibbs_error or 0.0

    @property
    def converged(self) -> bool:
        """Every criterion of the relaxation is met."""
        return self.free_energy.converged

    @property
    def n_populations(self) -> int:
        return self.free_energy.n_populations

    @property
    def rest(self) -> float:
        """What G may still fall by: ``predicted_decrease``; before the end of the relaxation times
        a factor, or once more as much as the last time; infinite with one population."""
        predicted = self.free_energy.predicted_decrease or 0.0
        if self.converged:
            return predicted
        if self.fallen is None:
            return math.inf
        return max(DECREASE_FACTOR * predicted, self.fallen)

    def upper(self, z: float) -> float:
        """G at the end of the relaxation is below this."""
        return self.gibbs + z * self.error

    def lower(self, z: float) -> float:
        """G at the end is above this."""
        return self.gibbs - self.rest - z * self.error

    def floor(self, z: float) -> float:
        """G at the end is above this within less than `FAR`, also where one population does not say
        how far it falls: of its potential energy a state can lose all, and keeps the rest."""
        return max(self.lower(z), self.gibbs - self.potential - z * self.error)


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
    far: float = math.inf

    def z(self, n_candidates: int) -> float:
        """Half width of the bounds in standard errors: one side, corrected for candidates times
        rounds (Bonferroni)."""
        comparisons = max(1, n_candidates) * self.max_populations
        return -float(ndtri((1.0 - self.confidence) / comparisons))


def resolution(model_error: float | None, free_energy_tolerance: float) -> float:
    """Sampling error of G that is small enough: 0.3 of the model's error, never below the tolerance
    of the relaxation; eV/atom. ``model_error`` None: not known."""
    wanted = UNKNOWN_ERROR if model_error is None else RESOLUTION * model_error
    return max(free_energy_tolerance, wanted)


Common = Callable[[str, str], float]
"""Covariance of the free energies of two candidates, eV^2/atom^2."""


AlikeOf = Callable[[str, str], Alike]
"""What cells and centroids of two candidates say (`phases.alike`)."""


def none_alike(one: str, other: str) -> Alike:
    """Every candidate a phase of its own."""
    return ""


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
    alike: AlikeOf = none_alike,
    merged: Mapping[str, str] | None = None,
) -> dict[str, Stop]:
    """Candidates that stop now; whoever is not in it goes on.

    ``n_candidates`` is the number at the start of the ranking, for the correction of the bounds
    (default: those given); ``common`` knows what the errors of two candidates have in common
    (default: nothing), ``alike`` what their structures say, ``merged`` who was seen to be
    of the phase of whom before. ``rules.keep_best`` counts phases in each field. One that has had
    its populations and did not converge is not ranked: it eliminates no other, and no other waits
    for it.
    """
    z = rules.z(n_candidates or len(standings))
    stopped: dict[str, Stop] = {}
    for field in dict.fromkeys(map(field_of, standings)):
        rivals = {name: standing for name, standing in standings.items() if field_of(name) == field}
        same_as = _same_phase(rivals, rules, common, alike, merged or {})
        stopped |= _verdicts_of_field(rivals, rules, z, common, same_as)
    return stopped


def _verdicts_of_field(
    standings: Mapping[str, Standing],
    rules: Rules,
    z: float,
    common: Common | None,
    same_as: Mapping[str, str],
) -> dict[str, Stop]:
    field = {
        name: standing
        for name, standing in standings.items()
        if _counts(standing, rules) and name not in same_as
    }
    uppers = sorted(standing.upper(z) for standing in field.values())
    limit = uppers[rules.keep_best - 1] if len(uppers) >= rules.keep_best else math.inf
    far = uppers[0] + rules.far if uppers else math.inf
    best = "the lowest" if rules.keep_best == 1 else f"the lowest {rules.keep_best}"
    stopped = {}
    for name, standing in standings.items():
        why = ""
        if name in same_as:
            why = f"the same phase as {same_as[name]}"
        elif standing.n_populations >= MIN_POPULATIONS and standing.lower(z) > limit:
            why = f"not among {best} ({z:.1f} sigma)"
        elif standing.floor(z) > far:
            why = f"more than {ev_to_mev(rules.far):.0f} meV/atom above the lowest ({z:.1f} sigma)"
        if why:
            n = standing.n_populations
            stopped[name] = Stop(
                f"stopped after {n} population{'s' * (n > 1)}: {why}",
                eliminated=True,
                same_as=same_as.get(name, ""),
            )
        elif standing.n_populations >= rules.max_populations:
            stopped[name] = Stop()
        elif standing.converged and (
            standing.error <= rules.tolerance
            or rank_is_known(name, field, z, rules.keep_best, common)
        ):
            stopped[name] = Stop()
    return stopped


def _counts(standing: Standing, rules: Rules) -> bool:
    return standing.converged or standing.n_populations < rules.max_populations


def _same_phase(
    standings: Mapping[str, Standing],
    rules: Rules,
    common: Common | None,
    alike: AlikeOf,
    merged: Mapping[str, str],
) -> dict[str, str]:
    """Who stops because another goes on for the phase of both: that of the smallest cell; of those
    one that has converged, then the one with the most populations and the smallest error.
    ``merged`` stay so while the other one is there: one that waits in a state does not move with
    it.

    Two are of one phase when their structures say so (`phases.alike`) and G at their ends is within
    `GIBBS_TOLERANCE`, with three errors of the difference and what the relaxations may still do:
    from one state both fall alike, else one may fall alone. Everyone is compared with those that go
    on, so that no chain of small steps merges two ends.
    """

    def order(name: str) -> tuple[int, bool, int, float, str]:
        one = standings[name]
        return one.n_atoms, not one.converged, -one.n_populations, one.error, name

    found = {name: leader for name, leader in merged.items() if {name, leader} <= set(standings)}
    leaders: list[str] = []
    for name in sorted(standings.keys() - found.keys(), key=order):
        near = (one for one in leaders if _one_phase(one, name, standings, common, alike))
        if leader := next(near, ""):
            found[name] = leader
        elif _counts(standings[name], rules):
            leaders.append(name)
    return found


def _one_phase(
    one: str, other: str, standings: Mapping[str, Standing], common: Common | None, alike: AlikeOf
) -> bool:
    a, b = standings[one], standings[other]
    if min(a.n_populations, b.n_populations) < MIN_POPULATIONS:
        return False
    apart = abs(a.gibbs - b.gibbs)
    if apart > GIBBS_TOLERANCE or not (known := alike(one, other)):
        return False
    apart += abs(a.rest - b.rest) if known == "state" else max(a.rest, b.rest)
    error = difference_error(a.error, b.error, 0.0 if common is None else common(one, other))
    return apart + AGREEMENT * error <= GIBBS_TOLERANCE


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
    alike: AlikeOf = none_alike,
) -> dict[str, Stop]:
    """Give populations to ``names`` round by round until each has stopped.

    ``known`` are candidates whose G is final, ``dormant`` ones that an earlier ranking eliminated:
    they, and those that were eliminated here, become active again when they could be among the best
    after all and all others have stopped. Returns a `Stop` for everyone that ran and did not fail.
    ``common``, ``field_of``, ``alike``: see `verdicts`.
    """
    total = len(names) + len(known) + len(eliminated_before)
    standings, eliminated, spent = {**known, **eliminated_before}, set(eliminated_before), 0
    field = dict.fromkeys([*names, *eliminated_before])
    ran: dict[str, None] = {}
    ended: set[str] = set()
    merged: dict[str, str] = {}
    verdicts_of = functools.partial(
        verdicts,
        rules=rules,
        n_candidates=total,
        common=common,
        field_of=field_of,
        alike=alike,
        merged=merged,
    )
    while True:
        stopped = verdicts_of(standings)
        merged |= {name: stop.same_as for name, stop in stopped.items() if stop.same_as}
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
            for name in [name for name, leader in merged.items() if leader == failed]:
                del merged[name]


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
            else standing.updated(n_populations=rules.max_populations)
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
