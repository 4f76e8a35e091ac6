"""Compositions, and convex hulls over them: formation energies, distance above the hull, and the
probability of being on it.

Errors are sampled: every sample of the free energies has a hull of its own. The margin is the
distance to the hull of all *other* entries (negative: how far below it); it has no wall at zero, so
that its standard error means what it says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from ase.data import atomic_numbers
from ase.formula import Formula

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.tables import column
from magus_anharmonic.structures import HYDROGEN

ON_HULL = 1e-9
"""eV/atom."""


def _energy(meaning: str) -> Any:
    return column(meaning, "eV/atom", digits=".10g")


@dataclass(frozen=True)
class HullEntry:
    """One phase at one pressure and temperature."""

    name: str = column("name of the phase", name="phase")
    formula: str = column("formula")
    fractions: tuple[float, ...] = column("atoms of each end member's kind, sum 1")
    formation: float = _energy("formation free energy against the end members")
    formation_error: float = _energy("its standard error")
    distance: float = _energy("above the hull, 0 on it")
    margin: float = _energy("to the hull of the others")
    error: float = _energy("standard error of the margin")
    p_on_hull: float = column("fraction of the samples in which it is on the hull", digits=".10g")


@cache
def _formula(text: str) -> Formula:
    try:
        counts = Formula(text).count()
    except ValueError:
        counts = {}
    plain = re.sub("[()]", "", text).isalnum() and not text[0].isdigit()
    if (
        not plain
        or not counts
        or min(counts.values()) < 1
        or not counts.keys() <= {*atomic_numbers, *HYDROGEN}
    ):
        raise InputError(f"{text!r}: is no chemical formula")
    return Formula(text)


def parse_formula(formula: str) -> dict[str, int]:
    """``"H2S"`` to ``{"H": 2, "S": 1}``; raises ``InputError``."""
    return _formula(formula).count()


@dataclass(frozen=True)
class HullStatistics:
    """What samples say about n entries; see `HullEntry` for the four arrays (n,)."""

    distance: np.ndarray
    margin: np.ndarray
    error: np.ndarray
    p_on_hull: np.ndarray


def reduced_formula(formula: str) -> str:
    """``"H6S2"`` to ``"H3S"``: one name for all cells of a composition; raises ``InputError``."""
    return str(_formula(formula).reduce()[0])


def atom_fractions(formula: str, elements: Sequence[str]) -> np.ndarray:
    """(n_elements,) atomic fractions."""
    counts = parse_formula(formula)
    return np.array([counts.get(symbol, 0) for symbol in elements], dtype=float) / sum(
        counts.values()
    )


def end_member_fractions(formulas: Sequence[str], end_members: Sequence[str]) -> np.ndarray:
    """(n, n_end_members): how much of each end member (in atoms) makes up each formula.

    Raises ``InputError`` for end members that depend on one another, and for formulas that they
    cannot make.
    """
    atoms = pool_fractions([*end_members, *formulas])
    corners, wanted = atoms[: len(end_members)], atoms[len(end_members) :]
    if np.linalg.matrix_rank(corners, tol=1e-9) < len(end_members):
        raise InputError(
            f"end_members: {', '.join(end_members)}: one of them is made of the others; leave"
            " it out"
        )
    found = np.linalg.lstsq(corners.T, wanted.T, rcond=None)[0].T
    missed = (np.abs(found @ corners - wanted).max(axis=1) > 1e-9) | (found.min(axis=1) < -1e-9)
    bad = [formula for formula, out in zip(formulas, missed, strict=True) if out]
    if bad:
        raise InputError(
            f"end_members: {', '.join(sorted(set(bad)))}: cannot be made of"
            f" {', '.join(end_members)}; give others, or phases of the elements"
        )
    return np.clip(found, 0.0, 1.0)


def choose_end_members(formulas: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The end members asked for, else the elements; raises ``InputError`` when there is no phase of
    one of them."""
    known = {_ratio(formula): formula for formula in formulas}
    elements = sorted({symbol for formula in formulas for symbol in parse_formula(formula)})
    chosen = list(wanted) or elements
    missing = [name for name in chosen if _ratio(name) not in known]
    if missing:
        hint = (
            ""
            if wanted
            else f" (or give end_members, e.g. [{', '.join(_extremes(formulas, elements))}])"
        )
        raise InputError(f"end_members: no phase of {', '.join(missing)}; add one{hint}")
    return [known[_ratio(name)] for name in chosen]


def _ratio(formula: str) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(_formula(formula).reduce()[0].count().items()))


def _extremes(formulas: Sequence[str], elements: Sequence[str]) -> list[str]:
    """For every element the formula richest in it."""
    rich = [
        max(formulas, key=lambda f: atom_fractions(f, elements)[k]) for k in range(len(elements))
    ]
    return list(dict.fromkeys(rich))


def lower_hull(fractions: np.ndarray, energies: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(m,) energies of the lower convex hull of entries (n, d) -> (n,) at compositions (m, d),
    whose entries sum to 1.

    Infinite where no mixture of the entries has the composition.
    """
    d = fractions.shape[1]
    if d == 1:
        return np.full(len(at), energies.min())
    if d == 2:
        return _lower_line(fractions[:, 0], energies, at[:, 0])
    return _lower_facets(fractions, energies, at)


def _lower_line(x: np.ndarray, energy: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Two end members: Andrew's monotone chain, lower half."""
    order = np.lexsort((energy, x))
    chain: list[tuple[float, float]] = []
    for i in order:
        point = (float(x[i]), float(energy[i]))
        if chain and point[0] - chain[-1][0] < 1e-12:
            continue
        while len(chain) > 1 and _turns_down(chain[-2], chain[-1], point):
            chain.pop()
        chain.append(point)
    xs, es = (np.array(column) for column in zip(*chain, strict=True))
    inside = (at >= xs[0] - 1e-9) & (at <= xs[-1] + 1e-9)
    return np.where(inside, np.interp(at, xs, es), np.inf)


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) <= 0


def _lower_facets(fractions: np.ndarray, energy: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Three end members or more: the lower facets of Qhull's hull, closed above by a lid over the
    end members."""
    from scipy.spatial import ConvexHull

    d = fractions.shape[1]
    # so high that no mixture with the smallest part of the lid lies below one without it
    lid = energy.max() + 1000.0 * (np.ptp(energy) + 1.0)
    points = np.vstack(
        [
            np.column_stack([fractions[:, 1:], energy]),
            np.column_stack([np.eye(d)[:, 1:], np.full(d, lid)]),
        ]
    )
    planes = ConvexHull(points).equations
    planes = planes[planes[:, d - 1] < -1e-12]
    height = -(at[:, 1:] @ planes[:, : d - 1].T + planes[:, d]) / planes[:, d - 1]
    found = height.max(axis=1)
    return np.where(found > energy.max() + 1e-9, np.inf, found)


def margins(fractions: np.ndarray, energies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) distances above the hull of all entries, and to the hull of the others (eV/atom; -inf
    where the others do not reach)."""
    hull = lower_hull(fractions, energies, fractions)
    distance = np.where(energies - hull > ON_HULL, energies - hull, 0.0)
    margin = distance.copy()
    for i in np.flatnonzero(distance == 0.0):
        others = np.arange(len(energies)) != i
        margin[i] = (
            energies[i] - lower_hull(fractions[others], energies[others], fractions[i : i + 1])[0]
            if others.any()
            else -np.inf
        )
    return distance, margin


def above_hull(formulas: Sequence[str], energies: np.ndarray) -> np.ndarray:
    """(n,) eV/atom above the lower hull that the entries (formulas, energies (n,) per atom) form
    themselves; their extremes are on it."""
    fractions = pool_fractions(formulas)
    return np.maximum(energies - lower_hull(fractions, energies, fractions), 0.0)


def comparable(formulas: Sequence[str], energies: Sequence[float]) -> list[float]:
    """What structures can be sorted by: their energies (eV/atom, infinite: unknown), or above their
    hull where compositions differ."""
    known = [i for i, energy in enumerate(energies) if np.isfinite(energy)]
    if len({_ratio(formulas[i]) for i in known}) < 2:
        return list(energies)
    heights = above_hull([formulas[i] for i in known], np.array([energies[i] for i in known]))
    by_index = dict(zip(known, heights.tolist(), strict=True))
    return [by_index.get(i, np.inf) for i in range(len(energies))]


def pool_fractions(formulas: Sequence[str]) -> np.ndarray:
    """(n, n_elements) atomic fractions of the elements that the formulas hold."""
    elements = sorted({symbol for formula in formulas for symbol in parse_formula(formula)})
    return np.array([atom_fractions(formula, elements) for formula in formulas])


def hull_probabilities(
    fractions: np.ndarray, energies: np.ndarray, samples: np.ndarray
) -> HullStatistics:
    """Hull distances of ``energies`` (n,) at compositions (n, d), with errors from ``samples``
    (n_samples, n), eV/atom."""
    distance, margin = margins(fractions, energies)
    sampled = [margins(fractions, row) for row in samples]
    sampled_margin = np.array([one[1] for one in sampled])
    with np.errstate(invalid="ignore"):
        error = np.where(
            np.isfinite(sampled_margin).all(axis=0), sampled_margin.std(axis=0, ddof=1), 0.0
        )
    return HullStatistics(
        distance, margin, error, np.array([one[0] <= ON_HULL for one in sampled]).mean(axis=0)
    )


def hull_entries(
    names: Sequence[str],
    formulas: Sequence[str],
    energies: np.ndarray,
    samples: np.ndarray,
    end_members: Sequence[str],
) -> list[HullEntry]:
    """Hull of ``energies`` (n,) with errors from ``samples`` (n_samples, n), eV/atom; the end
    members are formulas among ``formulas``.

    Raises ``InputError`` as `choose_end_members` and `end_member_fractions` do.
    """
    corners = choose_end_members(formulas, end_members)
    fractions = end_member_fractions(formulas, corners)
    formation = energies - fractions @ _corner_energies(fractions, energies[None], len(corners))[0]
    sampled_formation = samples - _corner_energies(fractions, samples, len(corners)) @ fractions.T
    found = hull_probabilities(fractions, formation, sampled_formation)
    return [
        HullEntry(
            name,
            formula,
            tuple(fractions[i].tolist()),
            float(formation[i]),
            float(sampled_formation[:, i].std(ddof=1)),
            float(found.distance[i]),
            float(found.margin[i]),
            float(found.error[i]),
            float(found.p_on_hull[i]),
        )
        for i, (name, formula) in enumerate(zip(names, formulas, strict=True))
    ]


def _corner_energies(fractions: np.ndarray, energies: np.ndarray, n_corners: int) -> np.ndarray:
    """(n_samples, n_corners) energy of the lowest phase of each end member."""
    return np.stack(
        [energies[:, fractions[:, k] > 1.0 - 1e-9].min(axis=1) for k in range(n_corners)], axis=1
    )
