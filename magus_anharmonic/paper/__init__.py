"""Tables of a campaign, and each number of the paper once (`quantities`, `enthalpies`); errors of a
model in an ensemble.

The scripts that draw and validate these numbers (`figures`, `validate`, `expected`) lie beside the
inputs of the paper, in ``inputs/h3s-paper``; a wheel has them here.
"""

from pathlib import Path

__path__ = [*__path__, str(Path(__file__).parents[2] / "inputs" / "h3s-paper")]
