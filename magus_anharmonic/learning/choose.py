"""Which structures of a population are labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def choose(population: Sequence[Any], n: int, rng: np.random.Generator) -> list[int]:
    """Indices of ``n`` individuals, drawn uniformly without replacement; all of them when there are fewer.

    The population keeps its duplicates ("simple random selection while retaining duplicates in the population", Sec. III A):
    a phase found k times is k times as likely to be drawn, and may be drawn up to k times.
    """
    return [int(index) for index in rng.permutation(len(population))[:n]]
