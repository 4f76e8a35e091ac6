"""The minima are those of ASE's BFGS with FrechetCellFilter on the stock calculator, or lower
ones."""

import pytest


@pytest.mark.full
def test_random_h3s_cells_end_as_low_as_with_ase_on_the_stock_calculator():
    """Paths part where rounding decides on which side a saddle is left; further paths and perturbations
    make up for it. About an hour of a core."""
    from benchmarks.relaxation import minima

    count, lines = minima(100, seed=11)
    assert count >= 95, "\n".join(lines)
