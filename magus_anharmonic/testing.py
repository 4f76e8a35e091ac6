"""Checks that a package with an evaluator, a calculator or a labeler of its own runs in its tests:
see docs/write-your-own.md.

Each check has a name; what fails raises AssertionError that begins with it.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.calculator_check import NOISE, check_calculator
from magus_anharmonic.errors import typed_line
from magus_anharmonic.evaluator import (
    CalculatorEvaluator,
    Evaluation,
    LabelerEvaluator,
    as_evaluator,
    has_stress,
    is_unnamed,
)
from magus_anharmonic.structures import change_of, strain_cell


def check_evaluator(evaluator_or_calculator: Any, atoms: Atoms | None = None) -> list[str]:
    """The names of the checks that an evaluator or ASE calculator has passed on ``atoms`` (None:
    four copper atoms, strained and displaced) and changes of it.

    An id of the energy surface, the shape of the results, structures left as they are, batches in
    their order, twice the energy in twice the cell, forces and stress (where it gives one) against
    the energy, the same numbers again and in a copy for other processes. Raises AssertionError.
    """
    probe = _probe(atoms)
    passed = _Passed()
    with passed("kind"):
        evaluator = as_evaluator(evaluator_or_calculator, [probe])
    with passed("model id"):
        model_id = evaluator.model_id
        assert isinstance(model_id, str) and model_id, f"model_id must be a text, is {model_id!r}"
        assert not is_unnamed(model_id), (
            f"no id can be made of the calculator ({model_id}), so no finished number of another"
            " start would be reused; give it an attribute model_id, another for every set of"
            " parameters"
        )
    with passed("copy for other processes"):  # which are handed one before the first evaluation
        copy = pickle.loads(pickle.dumps(evaluator))
        assert copy.model_id == model_id, f"the copy's model_id is {copy.model_id}, not {model_id}"
    first = _checked_results(passed, evaluator.evaluate, probe)
    _checked_batch(passed, evaluator.evaluate, probe, first)
    _checked_work(passed, evaluator, probe, stress=has_stress(first))
    with passed("again"):
        _assert_same(evaluator.evaluate([probe]), first, len(probe), "a second time")
        assert evaluator.model_id == model_id, (
            f"model_id was {model_id} and is {evaluator.model_id} after structures were evaluated"
        )
    with passed("numbers of the copy"):
        _assert_same(copy.evaluate([probe]), first, len(probe), "from a copy (pickle)")
    return passed.names


def check_labeler(labeler: Any, atoms: Atoms | None = None) -> list[str]:
    """The names of the checks that a labeler (as of ``get_labeler``) has passed; it is then closed.

    A settings hash, in every label and the same afterwards (by it a killed run knows its labels
    again); a structure without a result is a failure with a reason and spoils no other; each result
    is told once, as it is there; and what `check_evaluator` asks of results. Raises AssertionError.
    """
    probe = _probe(atoms)
    passed = _Passed()
    with passed("settings hash"):
        known = labeler.settings_hash
        assert isinstance(known, str) and re.fullmatch("[0-9a-f]{12}", known), (
            f"settings_hash must be twelve hexadecimal digits, is {known!r}"
        )
        assert not re.fullmatch(r"\d+(e\d+)?", known), (
            f"settings_hash {known} would be read back from extended XYZ as a number"
        )
        assert labeler.description, "description must say in words what makes the labels"
    evaluator = LabelerEvaluator(labeler)
    first = _checked_results(passed, evaluator.evaluate, probe)
    _checked_batch(passed, evaluator.evaluate, probe, first)
    _checked_work(passed, evaluator, probe, stress=True)
    broken = probe.copy()
    broken.positions[0] = np.nan
    told: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    with passed("failure reasons"):
        results = labeler.label(
            [probe, broken, probe], lambda index, result: told[index].append(result)
        )
        assert [bool(result.ok) for result in results] == [True, False, True], (
            "of three structures the second has positions that are no numbers; it must be a Failure"
            f" and the others labels, found {[type(result).__name__ for result in results]}"
        )
        reason = results[1].reason
        assert isinstance(reason, str) and reason.strip(), "a Failure must say why"
    with passed("results are told"):
        for index, result in enumerate(results):
            assert len(told[index]) == 1 and told[index][0] is result, (
                f"on_result must be called once for each structure with its result, was called"
                f" {len(told[index])} times for that with index {index}"
            )
    with passed("resume by settings hash"):
        hashes = {labeler.settings_hash, *(result.settings_hash for result in results)}
        assert hashes == {known}, (
            f"labeler, labels and failures must have one settings_hash, {known}, found"
            f" {sorted(hashes)}"
        )
    with passed("close"):
        labeler.close()
        labeler.close()
    return passed.names


class _Passed:
    """The names of the checks so far; called with a name it is the context of one more."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        except Exception as error:
            raise AssertionError(f"{name}: raised {typed_line(error)}") from error
        self.names.append(name)


Evaluate = Callable[[Sequence[Atoms]], Evaluation]


def _probe(atoms: Atoms | None) -> Atoms:
    from ase.build import bulk

    probe = bulk("Cu", cubic=True) if atoms is None else atoms.copy()
    if atoms is None:
        strain_cell(probe, np.diag([0.02, -0.01, 0.03]))
        probe.rattle(0.05, seed=1)
    return probe


def _checked_results(passed: _Passed, evaluate: Evaluate, probe: Atoms) -> Evaluation:
    given = probe.copy()
    with passed("results"):
        found = evaluate([given])
        shapes = [np.shape(part) for part in (found.energy, found.forces[0], found.stress)]
        wanted = [(1,), (len(probe), 3), (1, 3, 3)]
        assert shapes == wanted and len(found.forces) == 1, (
            f"energy, forces and stress of one structure with {len(probe)} atoms must have the"
            f" shapes {wanted}, have {shapes}"
        )
        for name, part in (("energy", found.energy), ("forces", found.forces[0])):
            assert np.isfinite(part).all(), f"{name} that are no numbers"
        if has_stress(found):
            assert np.isfinite(found.stress).all(), "stress that is partly no number"
            assert np.allclose(found.stress, found.stress.swapaxes(1, 2), atol=1e-4), (
                "the stress must be symmetric"
            )
    with passed("structures"):
        changed = change_of(probe, given)
        assert not changed, f"a structure must be left as it is: it {changed}"
    return found


def _checked_batch(passed: _Passed, evaluate: Evaluate, probe: Atoms, first: Evaluation) -> None:
    moved, twice = probe.copy(), probe.repeat((2, 1, 1))
    moved.rattle(0.03, seed=2)
    with passed("batch"):
        batch = evaluate([twice, probe, moved])
        assert len(batch.energy) == 3, f"of three structures came {len(batch.energy)} results"
        _assert_same(batch.one(1), first, len(probe), "in a batch with others")
        _assert_same(batch.one(2), evaluate([moved]), len(probe), "in a batch with others")
    if probe.pbc[0]:
        with passed("cell of twice the size"):
            off = abs(float(batch.energy[0]) - 2.0 * float(first.energy[0])) / len(twice)
            assert off < NOISE, f"the energy must be twice as large, is off by {off:.2g} eV/atom"


def _checked_work(passed: _Passed, evaluator: Any, probe: Atoms, *, stress: bool) -> None:
    """Forces, and stress where asked for, against the energy."""
    periodic = stress and bool(probe.pbc.all())
    with passed("forces and stress against energy" if periodic else "forces against energy"):
        asked = check_calculator(_Any(evaluator), probe, stress=periodic)
        assert asked, "displaced or strained structures cannot be evaluated (the log says why)"


class _Any(CalculatorEvaluator):
    """Any evaluator as one that is asked by `check_calculator`."""

    def __init__(self, evaluator: Any) -> None:
        super().__init__(evaluator, model_id=evaluator.model_id)

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """As the evaluator."""
        return self.calculator.evaluate(structures)


def _assert_same(found: Evaluation, known: Evaluation, n_atoms: int, when: str) -> None:
    assert np.shape(found.forces[0]) == np.shape(known.forces[0]), (
        f"the same structure has forces of another shape {when}: are they in another order?"
    )
    energy = abs(float(found.energy[0]) - float(known.energy[0])) / n_atoms
    forces = float(np.abs(np.asarray(found.forces[0]) - known.forces[0]).max())
    assert energy < NOISE and forces < 100 * NOISE, (
        f"the same structure has other numbers {when}: energy {energy:.2g} eV/atom, forces"
        f" {forces:.2g} eV/A"
    )
