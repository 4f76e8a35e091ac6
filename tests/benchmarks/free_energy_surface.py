"""A learned free energy of H3S against the SSCHA that it learned from: ``OMP_NUM_THREADS=1 python
tests/benchmarks/free_energy_surface.py``.

The labels are stored (``inputs/h3s-free-energy``); models are trained here. Searches begin with
random crystals of low symmetry at 130 GPa, the same ones on the static surface and on the free
energy. Seconds are of the processor. Every row prints what was measured beside its bar; the exit
code is 0 only if all hold. A row that would begin after ``--limit`` seconds by the clock is not
measured, which is no bar that holds.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from ase.io import read
from bars import Bar, main, on_one_thread

INPUT = Path(__file__).resolve().parents[2] / "inputs" / "h3s-free-energy"
sys.path.insert(0, str(INPUT))

from evaluate import calibration, own_error, r3m, trained_model  # noqa: E402
from learn import POTENTIAL, errors, minus  # noqa: E402

from magus_anharmonic.potential import load  # noqa: E402
from magus_anharmonic.ranking.candidate import read_ranking  # noqa: E402
from magus_anharmonic.ranking.certify import Predictor  # noqa: E402
from magus_anharmonic.ranking.certify import calibration as of_certified  # noqa: E402
from magus_anharmonic.ranking.store import FreeEnergyStore  # noqa: E402
from magus_anharmonic.runs.folder import SearchFolder  # noqa: E402
from magus_anharmonic.search.host import run  # noqa: E402
from magus_anharmonic.settings import parse_settings  # noqa: E402
from magus_anharmonic.sscha.gibbs import free_energy  # noqa: E402
from magus_anharmonic.structures import space_group, with_isotopes  # noqa: E402

PRESSURE, N_LABELS, N_HEAVY, N_RANDOM, SEEDS = 130.0, 36, 7, 20, (1, 2, 3, 4, 5)
"""GPa; labels that a model has, of H3S and of D3S; crystals of a search; seeds of the searches."""
IM3M = "Im-3m (229)"
SSCHA = {"supercell": [2, 2, 2], "n_configs": 200, "hessian": 0, "seed_back": False}
SSCHA |= {"surrogate": "none"}  # as the labels are, which it is compared with


@functools.cache
def potential():
    return load(POTENTIAL, device="cpu")


@functools.cache
def model(file="labels.xyz", n=N_LABELS):
    """The model of the stored labels, and the labels that it has not seen."""
    return trained_model(n, file=file)


def accuracy():
    """On labels of other seeds and other families."""
    found, test = model()
    left = minus(test, found)
    energy, force, stress = errors(left)
    motion = [atoms.get_potential_energy() / len(atoms) for atoms in minus(test, potential())]
    kinds = Counter(atoms.info["kind"] for atoms in test)
    noise = np.sqrt(np.mean([atoms.info["label_energy_error"] ** 2 for atoms in test])) * 250
    zero_point = 0.1 * energy / np.mean(motion)
    return [
        Bar("training labels", N_LABELS, 0, 200, ""),
        Bar("held-out labels", len(test), 60, np.inf, str(dict(kinds))),
        Bar("F - V, RMSE, meV/atom", energy, 0, 3, f"the labels' own errors: {noise:.2f}"),
        Bar("dF/dR, RMSE, meV/A", force, 0, 60, ""),
        Bar("stress, RMSE, GPa", stress, 0, 1, ""),
        Bar("zero-point part, %", zero_point, 0, 1.5, f"of {1e3 * np.mean(motion):.0f} meV/atom"),
        Bar("deviation over expected error", calibration(found, test, left), 0.7, 1.4, ""),
    ]


def cost():
    """Processor time of one cell by the model, and of the SSCHA with the error that it has."""
    found, test = model()
    error = own_error(minus(test, found))
    found.evaluate(test[:1])
    began = time.process_time()
    for _ in range(20):
        found.evaluate(test[:1])
    each = (time.process_time() - began) / 20
    keys = {"supercell": (2, 2, 2), "n_configs": 100, "centroids": "fixed", "seed": 2}
    times = []
    for surrogate in ("polynomial", "none"):
        began = time.process_time()
        own = free_energy(test[0], potential(), surrogate=surrogate, **keys)
        times.append((time.process_time() - began) * (own.gibbs_error / error) ** 2)
    two, spent = times
    text = (
        f"{1e3 * each:.1f} ms; SSCHA with {1e3 * error:.2f} meV/atom: {spent:.1f} s, with a"
        f" surrogate {two:.1f}"
    )
    return [Bar("SSCHA over model, time of F, dF/dR and stress", spent / each, 1e3, np.inf, text)]


def search(seed, block, folder, **keys):
    """The lowest structure of a search, its force evaluations, and its SSCHA runs."""
    given = {
        "symbols": ["S", "H"], "formula": [1, 3], "formulaType": "fix", "min_n_atoms": 4,
        "max_n_atoms": 4, "spacegroup": [5, 8, 146, 160], "pPri": 0.5, "pressure": PRESSURE,
        "popSize": N_RANDOM, "initSize": N_RANDOM, "saveGood": 2, "numGen": 1, "d_ratio": 0.6,
        "volume_ratio": 2.7, "dE": 0.001, "Fitness": ["Enthalpy"], "seed": seed,
        "scheduler": "serial",
        "MainCalculator": {"calculator": "mattersim", "eps": 0.02, "maxStep": 400, **block},
    }  # fmt: skip
    outcome = run(parse_settings({**given, **keys}), folder)
    relaxed = read(folder / "results" / "raw1.traj", ":")
    relaxations = sum(atoms.info["n_evaluations"] for atoms in relaxed)
    file = SearchFolder(folder / "results" / "anharmonic").free_energies
    runs = list(FreeEnergyStore(file).runs()) if file.exists() else []
    sscha = sum(one.free_energy.n_evaluations for one in runs)
    return outcome.good[0], relaxations + sscha, runs


def free_energy_block(found):
    return {"checkpoint": str(found.path), "surface": "free-energy"}


def lowest_certified(runs):
    ranked = [one for one in runs if one.ranked]
    return min(ranked, key=lambda one: one.gibbs).free_energy if ranked else None


@functools.cache
def on_free_energy():
    """Of every seed: the lowest structure and the lowest certified one of a search on F; force
    evaluations of all of them and of the labels, in words too; and their SSCHA runs."""
    found, _ = model()
    lowest, certified, runs, spent = [], [], [], 0
    keys = {"sscha": {**SSCHA, "evaluator": POTENTIAL, "max_candidates": 20}}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as scratch:
            own = search(seed, free_energy_block(found), Path(scratch) / "f", **keys)
        lowest.append(space_group(own[0], 0.03))
        certified.append(lowest_certified(own[2]))
        spent += own[1]
        runs += own[2]
    stored = [one for one in read(INPUT / "labels.xyz", ":") if one.info["side"] == "train"]
    labels = sum(int(one.info["n_evaluations"]) for one in stored[:N_LABELS])
    text = f"{spent} in {len(SEEDS)} searches, {labels} in {N_LABELS} labels"
    return lowest, certified, spent + labels, text, runs


def searches():
    """Both surfaces from the same random crystals."""
    groups = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as scratch:
            best, *_ = search(seed, {"checkpoint": POTENTIAL}, Path(scratch) / "v")
        groups.append(space_group(best, 0.03))
    lowest, certified, _, _, runs = on_free_energy()
    names = ["none" if one is None else one.space_group for one in certified]
    static = sum(group != IM3M for group in groups)
    return [
        Bar("seeds whose lowest on V is not Im-3m", static, 5, 5, ", ".join(groups)),
        Bar("seeds whose lowest on F is Im-3m", lowest.count(IM3M), 5, 5, ", ".join(lowest)),
        Bar("seeds whose certified best is Im-3m", names.count(IM3M), 5, 5, str(of_certified(runs))),
    ]  # fmt: skip


def deviations(runs):
    """Of G by SSCHA from that of the model, over the expected error of both, of every run that has
    a free energy, at its end or where the race left it."""
    found = [(run.free_energy, run.predicted, run.predicted_error) for run in runs]
    return [
        (own.gibbs_raw - predicted) / np.hypot(error, own.gibbs_error)
        for own, predicted, error in found
        if None not in (own.gibbs_raw, predicted, error)
    ]


def today():
    """A search on V with SSCHA on its best 20, the first seed; the other seeds are taken to cost
    the same. Its phases, and those of the searches on F, say how well the model knows its errors:
    none of them trained."""
    *_, spent, text, certified = on_free_energy()
    keys = {"sscha": {**SSCHA, "max_candidates": 20}, "Fitness": ["SSCHA"]}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "t"
        _, evaluations, runs = search(1, {"checkpoint": POTENTIAL}, folder, **keys)
        table = read_ranking(SearchFolder(folder / "results" / "anharmonic").ranking)
    best = next(row for row in table if row.rank_quantum == 1)
    one_phase = {row.spg_quantum for row in table if best.id in (row.id, row.same_as)}
    predictor = Predictor(model()[0], PRESSURE)
    pulls = deviations([*certified, *map(predictor.at_end, runs)])
    phases = len({run.free_energy.space_group for run in runs})
    text += f"; {evaluations} in one of today's with SSCHA of {len(runs)}, times {len(SEEDS)}"
    return [
        Bar("force evaluations over those of today's searches", spent / (len(SEEDS) * evaluations),
            0, 1, text),
        Bar("deviation over expected error, SSCHA of the searches", np.sqrt(np.mean(np.square(pulls))),
            0.7, 1.4, f"{len(pulls)} runs of {phases} space groups, none of which trained"),
        Bar("today's winner is the same", IM3M in one_phase, 1, 1, ", ".join(sorted(one_phase))),
    ]  # fmt: skip


def hot():
    """300 K: a model of its own labels."""
    found, test = model("labels-300K.xyz", 30)
    left = minus(test, found)
    energy, force, stress = errors(left)
    keys = {"sscha": {**SSCHA, "evaluator": POTENTIAL, "temperature": 300, "max_candidates": 20}}
    lowest, certified, runs = [], [], []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as scratch:
            best, _, own = search(seed, free_energy_block(found), Path(scratch) / "f", **keys)
        winner = lowest_certified(own)
        lowest.append(space_group(best, 0.03))
        certified.append("none" if winner is None else winner.space_group)
        runs += own
    return [
        Bar("300 K: F - V, RMSE, meV/atom", energy, 0, 3, f"{len(test)} held-out labels"),
        Bar("300 K: dF/dR, RMSE, meV/A", force, 0, 60, f"stress {stress} GPa"),
        Bar("300 K: deviation over expected error", calibration(found, test, left), 0.7, 1.4, ""),
        Bar("300 K: seeds whose lowest on F is Im-3m", lowest.count(IM3M), 5, 5, ", ".join(lowest)),
        Bar("300 K: seeds whose certified best is Im-3m", certified.count(IM3M), 5, 5,
            str(of_certified(runs))),
    ]  # fmt: skip


def heavy():
    """D3S: relaxed on a model of labels from the configurations of H3S, against its own SSCHA."""
    found, test = model("labels-D3S.xyz", N_HEAVY)
    energy, force, _ = errors(minus(test, found))
    spent = sum(int(one.info["n_evaluations"]) for one in read(INPUT / "labels-D3S.xyz", ":"))
    masses = found.surface.masses
    (end,) = found.relax([with_isotopes(r3m(0), masses)], PRESSURE)
    own = free_energy(end.atoms, potential(), PRESSURE, supercell=(2, 2, 2), n_configs=200, seed=3)
    apart = 1e3 * (own.gibbs_raw - end.enthalpy)
    return [
        Bar("D3S: evaluations in its labels, from those of H3S", spent, 0, 0, ""),
        Bar("D3S: F - V, RMSE, meV/atom", energy, 0, 3, f"{len(test)} labels, {force} meV/A"),
        Bar("D3S: R3m relaxes to Im-3m on F", space_group(end.atoms, 0.03) == IM3M, 1, 1, ""),
        Bar("D3S: G by SSCHA minus G by the model, meV/atom", apart, -3, 3,
            f"+- {1e3 * own.gibbs_error:.2f}, {own.space_group}"),
    ]  # fmt: skip


ROWS = {
    "accuracy": accuracy,
    "cost": cost,
    "searches": searches,
    "today": today,
    "300K": hot,
    "D3S": heavy,
}


if __name__ == "__main__":
    on_one_thread()
    sys.exit(main(__doc__, ROWS, limit=2100.0))
