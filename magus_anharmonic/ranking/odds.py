"""How sure the order is: the three errors of a difference of G, and the probability of being the lowest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.common_numbers import difference_error
from magus_anharmonic.ranking.elimination import probability_lowest

FINITE_SIZE_PART = 0.5
"""Of the finite-size terms' difference, as its error: the interpolation takes out the larger part of what it corrects."""


def with_odds(
    candidates: Sequence[Candidate], model_error: float | None, common: Callable[[Candidate, Candidate], float] = lambda one, other: 0.0
) -> list[Candidate]:
    """Fill in the difference of G to the lowest phase, its errors, and the odds; energies in eV/atom.

    sampling : both standard errors together, less what ``common`` (the covariance of two free energies, eV^2/atom^2) says they
    share; the odds take them as independent, which for candidates that share errors is on the safe side. finite size : half the
    difference of the two interpolation terms. model : the expected errors of both static energies together, or ``model_error``,
    the validation RMSE of the energy, where a structure has none (None: unknown, and no total); what two structures share cancels
    in truth, so this is an upper estimate.
    Phases that another candidate stands for, estimates and failures get none.
    """
    phases = sorted((c for c in candidates if c.ranked and not c.same_as), key=lambda c: (c.gibbs, c.id))
    if not phases:
        return list(candidates)
    best = phases[0]
    gibbs, sampling = [_number(c.gibbs) for c in phases], [_number(c.gibbs_error) for c in phases]
    finite = [FINITE_SIZE_PART * abs(_number(c.finite_size) - _number(best.finite_size)) for c in phases]
    odds = probability_lowest(gibbs, sampling)
    model = [model_error if c.model_error is None else c.model_error for c in phases]
    known = [value for value in model if value is not None]
    total = None
    if len(known) == len(phases):
        total = probability_lowest(gibbs, np.sqrt(np.square(sampling) + np.square(finite) + np.square(known)))
    filled = {
        c.id: replace(
            c,
            difference=_number(c.gibbs) - _number(best.gibbs),
            difference_sampling=0.0 if c is best else difference_error(_number(c.gibbs_error), _number(best.gibbs_error), common(c, best)),
            difference_finite_size=finite[place],
            difference_model=_together(model[place], model[0], c is best),
            p_lowest=float(odds[place]),
            p_lowest_total=None if total is None else float(total[place]),
        )
        for place, c in enumerate(phases)
    }
    return [filled.get(c.id, c) for c in candidates]


def _together(error: float | None, of_best: float | None, best: bool) -> float | None:
    if error is None or of_best is None:
        return None
    return 0.0 if best else math.hypot(error, of_best)


def _number(value: float | None) -> float:
    return 0.0 if value is None else value
