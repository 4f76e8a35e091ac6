"""Free energies with quantum, thermal and anharmonic ions by the stochastic self-consistent
harmonic approximation (SSCHA), of any `Evaluator`.

`gibbs.free_energy` computes one and `result` reads it again; `run.SschaRun` gives it population by
population to whoever shares a budget out (ranking); `hessian`, `report`, `unstable` and `phonons`
say whether its state is a minimum and what its phonons are. All else is of this package alone, and
it imports nothing of the others but what every part may import.
"""

from __future__ import annotations

from magus_anharmonic.settings.born import Born
from magus_anharmonic.sscha.gibbs import free_energy
from magus_anharmonic.sscha.result import SschaResult
