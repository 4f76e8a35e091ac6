"""Who gets an SSCHA run, and in which round of a search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from magus_anharmonic.settings import Settings, SschaSettings

RMSE_FACTOR = 3.0


def sscha_is_due(settings: Settings, generation: int | None, n_generations: int | None, energy_rmse: float | None) -> bool:
    """``sscha.when``: every time without learning; else in the last round, or once the model is good enough."""
    if settings.sscha is None:
        return False
    if settings.sscha.when == "every_generation" or settings.learning is None or generation is None:
        return True
    if n_generations is not None and generation >= n_generations:
        return True
    target = settings.learning.target_rmse
    return target is not None and energy_rmse is not None and energy_rmse <= target


def why_not(settings: Settings, energy_rmse: float | None) -> str:
    """Why there is no SSCHA in this round, for the log."""
    target = settings.learning.target_rmse if settings.learning else None
    if target is None:
        return "sscha.when is converged_model and learning.target_rmse is not set, so it runs in the last round"
    known = "unknown" if energy_rmse is None else f"{1000 * energy_rmse:.1f} meV/atom"
    return f"the model's validation RMSE is {known}, learning.target_rmse {1000 * target:.1f} meV/atom"


def chosen_groups(
    groups: Sequence[Sequence[int]], energies: Sequence[float], settings: SschaSettings, energy_rmse: float | None
) -> list[int]:
    """Positions in ``groups`` of the structures that get a free energy: the lowest distinct ones within the window.

    ``energies`` (eV/atom) are the enthalpies, or the distances above their hull (`hull.comparable`). The window is widened to
    three times the model's validation RMSE: closer structures are not told apart by it.
    """
    if not groups:
        return []
    window = np.inf if settings.window is None else settings.window
    if energy_rmse is not None:
        window = max(window, RMSE_FACTOR * energy_rmse)
    lowest = [energies[members[0]] for members in groups]
    order = sorted(range(len(groups)), key=lambda g: lowest[g])
    limit = lowest[order[0]] + window
    return [g for g in order if lowest[g] <= limit][: settings.max_candidates]
