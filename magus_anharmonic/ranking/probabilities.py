"""How sure the order is: the three errors of a difference of G, and the probability of being the
lowest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from magus_anharmonic.ranking.candidate import Candidate, by_composition
from magus_anharmonic.ranking.elimination import probability_lowest
from magus_anharmonic.ranking.uncertainty import (
    ModelErrors,
    ModelTerm,
    difference_error,
    model_errors,
)
from magus_anharmonic.structures import symbol_of

FINITE_SIZE_PART = 0.5
"""Of the finite-size terms' difference, as its error: the interpolation takes out the larger part
of what it corrects."""

N_SAMPLES = 2**15
"""Of the model's errors where phases share them: probabilities to 0.003."""
_SEED = 109


def with_probabilities(
    candidates: Sequence[Candidate],
    model_error: float | None,
    measured: Mapping[str, ModelTerm] | None = None,
    common: Callable[[Candidate, Candidate], float] = lambda one, other: 0.0,
) -> list[Candidate]:
    """Fill in the difference of G to the lowest phase of the composition, its errors, and the
    probabilities; energies in eV/atom.

    sampling : both standard errors together, less what ``common`` (the covariance of two free
    energies, eV^2/atom^2) says they share; the probabilities take them as independent, which for
    candidates that share errors is on the safe side. finite size : half the difference of the two
    interpolation terms, together with the spreads of both phases over supercells. model : see
    below. Phases that another candidate stands for, estimates and failures get none.

    The model term of a phase in ``measured`` (by candidate id, or by the space-group symbol that it
    alone has) is measured: the error of the difference is that of the two corrections together with
    their difference, which G itself does not contain, and the total probabilities are those of the
    corrected G. Elsewhere it is what the model expects of itself over the two ensembles, what they
    share left out (`uncertainty`). Where a phase has no such estimate it is the expected error of
    its static energy, or ``model_error``, the validation RMSE of the energy (None: unknown, and no
    total), an upper estimate. A phase without a measurement is taken to be shifted as the measured
    ones are on average.
    """
    phases = sorted((c for c in candidates if c.phase_ranked), key=lambda c: (c.gibbs, c.id))
    terms = dict(zip((c.id for c in phases), model_terms(phases, measured or {}), strict=True))
    filled: dict[str, Candidate] = {}
    for block in by_composition(phases):
        filled |= _with_probabilities(block, [terms[c.id] for c in block], model_error, common)
    return [filled.get(c.id, c) for c in candidates]


def _with_probabilities(
    phases: Sequence[Candidate],
    terms: Sequence[ModelTerm | None],
    model_error: float | None,
    common: Callable[[Candidate, Candidate], float],
) -> dict[str, Candidate]:
    """By id the phases of one composition, the lowest first, against the first of them."""
    best = phases[0]
    gibbs, sampling = [_number(c.gibbs) for c in phases], [_number(c.gibbs_error) for c in phases]
    finite = [0.0 if c is best else _finite_size_error(c, best) for c in phases]
    probability = probability_lowest(gibbs, sampling)
    shift = _shifts(terms)
    errors = model_errors(phases, terms, model_error)
    total = (
        _total_probabilities(np.add(gibbs, shift), np.hypot(sampling, finite), errors)
        if errors.known
        else None
    )
    return {
        c.id: replace(
            c,
            difference=_number(c.gibbs) - _number(best.gibbs),
            difference_sampling_error=0.0
            if c is best
            else difference_error(
                _number(c.gibbs_error), _number(best.gibbs_error), common(c, best)
            ),
            difference_finite_size_error=finite[index],
            difference_model_error=_with_shift(
                errors.of_difference(index, 0), shift[index] - shift[0]
            ),
            model_correction=None if term is None else term.correction,
            model_correction_error=None if term is None else term.error,
            p_lowest_sampling=float(probability[index]),
            p_lowest_total=None if total is None else float(total[index]),
        )
        for index, (c, term) in enumerate(zip(phases, terms, strict=True))
    }


def model_terms(
    phases: Sequence[Candidate], measured: Mapping[str, ModelTerm]
) -> list[ModelTerm | None]:
    """The measured term of each phase: by its id, by that of its run, or by a space-group symbol
    that no other phase has."""
    symbols = [symbol_of(c.free_energy.space_group) for c in phases]
    found: list[ModelTerm | None] = []
    for c, symbol in zip(phases, symbols, strict=True):
        alone = symbol if symbols.count(symbol) == 1 else ""
        found.append(
            next(
                (
                    measured[key]
                    for key in (c.id, c.run.structure if c.run else "", alone)
                    if key and key in measured
                ),
                None,
            )
        )
    return found


def _shifts(terms: Sequence[ModelTerm | None]) -> list[float]:
    corrections = [term.correction for term in terms if term is not None]
    mean = float(np.mean(corrections)) if corrections else 0.0
    return [mean if term is None else term.correction for term in terms]


def _total_probabilities(gibbs: np.ndarray, others: np.ndarray, errors: ModelErrors) -> np.ndarray:
    """Probabilities of being the lowest with the errors by sampling and size (``others``) and those
    of the model, (n,)."""
    widths = np.hypot(others, errors.own)
    if errors.independent:
        return probability_lowest(gibbs, widths)
    rng = np.random.default_rng(_SEED)
    sampled = (
        gibbs + widths * rng.normal(size=(N_SAMPLES, len(gibbs))) + errors.sample(N_SAMPLES, rng)
    )
    return np.bincount(sampled.argmin(axis=1), minlength=len(gibbs)) / N_SAMPLES


def _with_shift(error: float | None, shift: float) -> float | None:
    return None if error is None else math.hypot(error, shift)


def _finite_size_error(one: Candidate, other: Candidate) -> float:
    by_interpolation = FINITE_SIZE_PART * abs(
        _number(one.free_energy.finite_size) - _number(other.free_energy.finite_size)
    )
    return math.hypot(
        by_interpolation, _number(one.duplicate_spread), _number(other.duplicate_spread)
    )


def _number(value: float | None) -> float:
    return 0.0 if value is None else value
