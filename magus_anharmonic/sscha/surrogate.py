"""Averages with a surrogate: a cheap energy surface over a large sample, corrected over a small
one.

<V - V_0> = <V_s - V_0> + <V - V_s>, and the same of stress, gradients and higher averages
(`ensemble`): the first over many configurations of the surrogate s, the second over a few of the
truth, all of them new draws of the state.
"""

from __future__ import annotations

import numpy as np

from magus_anharmonic.sscha.ensemble import Ensemble, joined


def two_levels(large: Ensemble, truth: Ensemble, surrogate: Ensemble) -> Ensemble:
    """The ensemble of two levels of the surrogate over the ``large`` sample, and of ``truth`` and
    ``surrogate`` at the same configurations, which the surrogate has not seen and ``large`` does
    not have."""
    names = ("energies", "forces", "stresses")
    differences = (getattr(truth, name) - getattr(surrogate, name) for name in names)
    level = np.ones(len(truth.energies))
    return joined([large, Ensemble(truth.displacements, *differences, level)])
