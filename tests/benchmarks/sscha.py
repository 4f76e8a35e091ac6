"""The native SSCHA engine against python-sscha 1.6.2, in one run on one core: ``python
tests/benchmarks/sscha.py``.

Same ensembles on both sides. Every row is a function that returns a `Row`; the last line says how
many bars hold, and the exit code is 0 only if all that were measured do. Seconds are of the process
(user and system), so that a busy machine does not decide. A row that would begin after ``--limit``
seconds by the clock is left out, and named.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ase import Atoms
from bars import beside, on_one_thread, options_of
from crystals import h3s

from magus_anharmonic.sscha import engines, python_sscha
from magus_anharmonic.sscha.engines import Pool
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.state import SschaState, expand, sample
from magus_anharmonic.sscha.symmetry import Symmetry

STOCK_POPULATIONS = 6
"""Most populations of python-sscha's ``vc_relax``: 30 s of evaluations each."""
LOG = Path(tempfile.mkdtemp()) / "log"


ranking, sscha_hessian = beside("ranking"), beside("sscha_hessian")


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds of both sides, how many times faster ours must at least be,
    and whether all else asked holds."""

    what: str
    theirs: float
    ours: float
    bar: float
    remark: str = ""
    good: bool = True
    unit: str = "s"

    @property
    def holds(self):
        return self.good and self.theirs >= self.bar * self.ours

    def line(self):
        ratio = self.theirs / self.ours
        verdict = "holds" if self.holds else "MISSED"
        sides = f"{self.theirs:10.5g} {self.unit} {self.ours:10.4g} {self.unit}"
        return (
            f"{self.what:64s} {sides} {ratio:7.1f}x (bar {self.bar:.0f}x: {verdict}) {self.remark}"
        )


def cpu(function, supercell_matrix=1):
    """Shortest processor time in seconds of ``repeats`` calls."""
    times = []
    for _ in range(supercell_matrix):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return min(times)


def low_symmetry_cell(n_atoms, seed=1):
    """S and H at random places of a cell of 3.6 A^3 per atom, at least 1.1 A apart."""
    rng = np.random.default_rng(seed)
    cell = (3.6 * n_atoms) ** (1 / 3) * (np.eye(3) + 0.08 * rng.normal(size=(3, 3)))
    places = []
    while len(places) < n_atoms:
        place = rng.random(3)
        apart = [
            np.linalg.norm((other - place - np.round(other - place)) @ cell) for other in places
        ]
        if not apart or min(apart) > 1.1:
            places.append(place)
    return Atoms("SH3" * (n_atoms // 4), scaled_positions=places, cell=cell, pbc=True)


def synthetic(atoms, supercell_matrix, n_configs):
    """A state, and an ensemble of an anharmonic surface of the same symmetry whose minimum the
    sample reaches.

    Energy 1/2 u K u + c sum_i |u_i|^4 without the mean displacement: it costs nothing, so that
    algebra alone is compared.
    """
    symmetry = Symmetry(atoms, supercell_matrix)
    rng = np.random.default_rng(0)
    n, n_cells = len(atoms), int(np.prod(supercell_matrix))
    compact = 0.1 * rng.normal(size=(n_cells, n, n, 3, 3))
    compact[0] += 12.0 * np.einsum("ab,ij->abij", np.eye(n), np.eye(3))
    compact = symmetry.force_constants(compact)
    state = SschaState(atoms, supercell_matrix, compact, 0.0)
    u = sample(state, n_configs, rng)
    quartic = 5.0 * (u**2).sum(axis=2, keepdims=True)
    flat = u.reshape(n_configs, -1)
    pull = 0.985 * (flat @ expand(compact, supercell_matrix)).reshape(u.shape)
    energies = 0.5 * (pull * u).sum(axis=(1, 2)) + (quartic * u**2).sum(axis=(1, 2))
    forces = -(pull + 4.0 * quartic * u)
    stresses = 0.1 * rng.normal(size=(n_configs, 1, 1)) * np.eye(3)
    return (
        state,
        Ensemble(u, energies, forces - forces.mean(axis=1, keepdims=True), stresses),
        symmetry,
    )


def one_step(what, atoms, supercell_matrix, bar, n_configs=1000):
    """Weights, free energy with its error, both gradients and the stress of one moved state;
    symmetrised."""
    state, ensemble, symmetry = synthetic(atoms, supercell_matrix, n_configs)
    target = replace(state, force_constants=1.01 * state.force_constants)
    pool = Pool([(state, ensemble)])
    matrices, nowhere = (
        pool.reciprocal.matrices(target.force_constants),
        np.zeros_like(atoms.positions),
    )
    with python_sscha.quiet(LOG):
        import sscha.Ensemble

        loaded = python_sscha.to_ensemble(state, ensemble)
        # python-sscha as it comes: without our own shortcut for its Fourier transform
        object.__setattr__(
            loaded,
            "_get_gradient_qspace",
            sscha.Ensemble.Ensemble._get_gradient_qspace.__get__(loaded),
        )
        dyn = python_sscha.to_phonons(target)

        def theirs():
            loaded.update_weights(dyn, state.temperature)
            loaded.get_preconditioned_gradient(True, True)
            loaded.get_free_energy(return_error=True)
            loaded.get_average_forces(True)
            loaded.get_stress_tensor()

        stock = cpu(theirs, 2)
    ours = cpu(lambda: engines._Point.at(pool, pool.trial(nowhere, matrices), symmetry), 10)
    return Row(f"one minimisation step, {what}, {n_configs} configurations", stock, ours, bar)


def one_ensemble(what, atoms, supercell_matrix, bar, n_configs=1000):
    """Minimise F on one ensemble to a gradient at least as small as python-sscha's; both stop by
    their own criterion."""
    state, ensemble, symmetry = synthetic(atoms, supercell_matrix, n_configs)
    results = {}

    def theirs():
        results["theirs"] = python_sscha.minimise(
            [(state, ensemble)], symmetry, min_effective_sample=0.2, log=LOG
        )

    def ours():
        results["ours"] = engines.minimise([(state, ensemble)], symmetry, min_effective_sample=0.2)

    stock, mine = cpu(theirs), cpu(ours, 3)
    one, other = results["ours"], results["theirs"]
    remark = (
        f"{one.n_steps} against {other.n_steps} steps, gradient {one.fc_gradient:.1e} against"
        f" {other.fc_gradient:.1e} eV/A^2"
    )
    if one.fc_gradient > other.fc_gradient:
        return Row(
            f"minimise one ensemble, {what}",
            stock,
            mine,
            bar,
            "NOT the same gradient: " + remark,
            good=False,
        )
    return Row(f"minimise one ensemble, {what}", stock, mine, bar, remark)


def hessian(case):
    """Third-order tensor and Hessian; the memory that the call takes must be no more than half of
    python-sscha's."""
    found = sscha_hessian.compare(list(sscha_hessian.CASES)[case])
    good = found.their_memory >= 2.0 * found.memory
    remark = found.remark if good else f"MORE than half of its memory: {found.remark}"
    return Row(
        f"third order and Hessian, {found.name}", found.theirs, found.ours, 50.0, remark, good
    )


def whole_candidate(error=1e-3, n_configs=60):
    """R3m H3S, four atoms, 2x2x2, variable cell at 150 GPa, 0 K, from the structure to G +- 1
    meV/atom.

    Theirs: stock MatterSim under python-sscha's own ``vc_relax``, after the relaxation and the
    harmonic start of this package (which need fewer evaluations than CellConstructor's). Both have
    ``n_configs`` in the last population; theirs ends after `STOCK_POPULATIONS` whether it has
    converged or not, which only makes the ratio smaller.
    """
    from mattersim.forcefield.potential import MatterSimCalculator
    from mattersim.forcefield.potential import Potential as StockPotential

    from magus_anharmonic.potential import load
    from magus_anharmonic.sscha import free_energy

    atoms = h3s()
    atoms.set_cell(atoms.cell.array * 1.02, scale_atoms=True)
    atoms.positions[1:] += 0.1 * np.eye(3)
    checkpoint = Path(engines.__file__).parents[1] / "data" / "h3s-gpaw-small.pth"
    fast = load("h3s-gpaw-small", device="cpu")
    # what is done once for every process (compiling, measuring memory) is no part of a candidate,
    # on either side
    fast.evaluate([atoms])
    fast.double().evaluate([atoms])
    begun = time.process_time()
    ours = free_energy(atoms, fast, 150.0, 0.0, n_configs=n_configs, max_populations=12)
    mine = time.process_time() - begun
    stock = MatterSimCalculator(
        StockPotential.from_checkpoint(str(checkpoint), device="cpu", load_training_state=False),
        device="cpu",
    )
    stock.calculate(atoms, ["energy"])
    begun = time.process_time()
    gibbs, gibbs_error, evaluations, converged = stock_candidate(atoms, stock, n_configs)
    theirs = time.process_time() - begun
    remark = (
        f"ours: {ours.status}, G {ours.gibbs_raw:.5f} +- {ours.gibbs_error:.5f} eV/atom,"
        f" {ours.n_evaluations} evaluations; theirs:"
        f" {'converged' if converged else 'not converged'}, {gibbs:.5f} +- {gibbs_error:.5f},"
        f" {evaluations}"
    )
    good = ours.converged and ours.gibbs_error <= error
    return Row(
        "whole candidate against python-sscha + stock MatterSim", theirs, mine, 10.0, remark, good
    )


def stock_candidate(atoms, calculator, n_configs, pressure=150.0):
    """G and its error (eV/atom), evaluations, and whether ``vc_relax`` of python-sscha says that it
    converged, at 0 K."""
    from magus_anharmonic.evaluator import as_evaluator
    from magus_anharmonic.sscha.start import CountingEvaluator, harmonic_start, relaxed_primitive
    from magus_anharmonic.sscha.symmetry import symmetric_primitive
    from magus_anharmonic.units import EV_PER_A3_IN_GPA, RYDBERG

    counting = CountingEvaluator(as_evaluator(calculator))
    relaxed = relaxed_primitive(
        symmetric_primitive(atoms, 0.05), counting, pressure, symprec=0.05, variable_cell=True
    )
    begin = harmonic_start(
        relaxed, counting, temperature=0.0, supercell_matrix=(2, 2, 2), variable_cell=True
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), python_sscha.quiet(LOG):
        import sscha.Ensemble
        import sscha.Relax
        import sscha.SchaMinimizer

        np.random.seed(0)
        dyn = python_sscha.to_phonons(begin.state)
        dyn.AdjustQStar()
        dyn.Symmetrize()
        ensemble = sscha.Ensemble.Ensemble(dyn, T0=0.0)
        minimizer = sscha.SchaMinimizer.SSCHA_Minimizer(
            ensemble, meaningful_factor=0.02, kong_liu_ratio=0.5
        )
        minimizer.min_step_dyn = minimizer.min_step_struc = 0.5
        relax = sscha.Relax.SSCHA(
            minimizer, ase_calculator=calculator, N_configs=n_configs, max_pop=STOCK_POPULATIONS
        )
        stiffness = float(begin.response.stress[:3, :3].mean()) * EV_PER_A3_IN_GPA
        converged = relax.vc_relax(target_press=pressure, static_bulk_modulus=stiffness)
        energy, spread = minimizer.get_free_energy(return_error=True)
        volume = minimizer.ensemble.current_dyn.structure.get_volume()
    n = len(relaxed)
    gibbs = (energy * RYDBERG + pressure / EV_PER_A3_IN_GPA * volume) / n
    return (
        gibbs,
        spread * RYDBERG / n,
        counting.count + n_configs * minimizer.population,
        bool(converged),
    )


def rankings(n_seeds=10):
    """Force evaluations of the paper's 30 x 1,000 for each of twenty crystals against the dearest
    of ``n_seeds`` races (`ranking`)."""
    races = ranking.compare(n_seeds, 10_000)
    remark = (
        f"mean {races.mean:.0f}; winner right in {races.winners}, order of the best {ranking.BEST}"
        f" in {races.orders} of {n_seeds} seeds"
    )
    good = all(holds for _, holds in races.bars())
    return Row(
        "ranking 20 candidates, force evaluations", races.paper, races.most, 5.0, remark, good, ""
    )


ROWS = [
    lambda: one_step("64 atoms P1", low_symmetry_cell(8), (2, 2, 2), 20.0),
    lambda: one_ensemble("64 atoms P1", low_symmetry_cell(8), (2, 2, 2), 50.0),
    lambda: one_step("128 atoms P1", low_symmetry_cell(16), (2, 2, 2), 20.0),
    lambda: one_ensemble("128 atoms P1", low_symmetry_cell(16), (2, 2, 2), 50.0),
    lambda: one_step("Im-3m 3x3x3 (108 atoms)", h3s(), (3, 3, 3), 20.0),
    lambda: one_ensemble("Im-3m 3x3x3 (108 atoms)", h3s(), (3, 3, 3), 50.0),
    lambda: hessian(0),
    lambda: hessian(1),
    lambda: hessian(2),
    rankings,
    whole_candidate,
]
"""The table, in this order; a further comparison is one more function here."""


def main():
    parser = options_of(__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the rows to run, from 1")
    parser.add_argument(
        "--limit",
        type=float,
        default=1500.0,
        help="seconds by the clock after which no further row begins",
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    chosen = [
        row for number, row in enumerate(ROWS, 1) if not options.only or number in options.only
    ]
    begun = time.monotonic()
    print(f"{'':64s} {'python-sscha':>11s} {'ours':>11s}")
    rows = []
    for row in chosen:
        if time.monotonic() - begun > options.limit:
            break
        rows.append(row())
        print(rows[-1].line(), flush=True)
    if len(rows) < len(chosen):
        print(
            f"not measured for lack of time: the last {len(chosen) - len(rows)} of {len(chosen)}"
            " rows"
        )
    print(f"{sum(row.holds for row in rows)} of {len(rows)} bars hold")
    return 0 if rows and all(row.holds for row in rows) else 1


if __name__ == "__main__":
    on_one_thread()
    sys.exit(main())
