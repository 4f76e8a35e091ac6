"""How many labels `learning.select: sscha` needs on H3S against random choice, for the same error
of G(Im-3m) - G(best other).

Usage: python select_labels.py FOLDER [--pressure 100] [--labeler gpaw] ...     (run again, it goes on)

1. A model that is worse than the shipped one is trained on ``--labels`` of the label set (or given
by ``--checkpoint``).
2. Im-3m, R3m and ``--others`` low structures of the label set are ranked with it by SSCHA.
3. Of every candidate whose order is undecided, ``--pool`` configurations of its SSCHA ensemble get
   reference energies: by the checkpoint `h3s-gpaw-small` in the place of DFT, or by ``--labeler
   gpaw``.
4. From that pool labels are drawn, pairs +u/-u, again and again: as ``select: sscha`` shares them
   out; at random from the undecided candidates; at random from all candidates that have a free
   energy. From each draw the first-order correction of the difference of G is estimated, and
   compared with that of the whole pool.

Printed: error of the difference against the number of labels, and how many labels each way needs
    for the same error.

       python select_labels.py FOLDER --measured PHASE PHASE

draws instead from the labels that `error_cancellation.py` has made of two phases
(`inputs/h3s-error-cancellation`), without any ranking.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read, write
from error_cancellation import im3m, r3m, state_of

from magus_anharmonic.generation import SearchState, expected_spread, undecided
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.base import Label
from magus_anharmonic.learning.choose import Contender, allocate
from magus_anharmonic.paper.ensemble_labels import read_labelled, sample_displacements
from magus_anharmonic.potential import Potential, load
from magus_anharmonic.potential.train import TrainRecipe, train_file
from magus_anharmonic.potential.trainer import Architecture
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.matcher import Fingerprint, same_phase
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.settings import FinetuneSettings, LabelerSettings, Settings, parse_settings
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.state import displaced
from magus_anharmonic.structures import stripped

LABELS = Path(__file__).parents[2] / "inputs" / "h3s-checkpoint" / "labels.xyz"
LABEL_COUNTS = (8, 16, 32, 64)
N_MEASURED = 60
"""Configurations of each measured phase that have labels."""


@dataclass(frozen=True)
class Pool:
    """Reference minus model of one undecided candidate: pair means, eV/atom (n_pairs,)."""

    id: str
    space_group: str
    probability: float
    spread: float
    errors: np.ndarray


def worse_model(options: argparse.Namespace) -> Potential:
    """The model of ``--checkpoint``, or one trained on a part of the label set."""
    if options.checkpoint:
        return load(options.checkpoint)
    target = options.folder / "worse.pth"
    if not target.is_file():
        known = read(LABELS, ":")
        chosen = np.random.default_rng(options.seed).choice(
            len(known), options.labels, replace=False
        )
        part = options.folder / "part.xyz"
        write(part, [known[i] for i in sorted(chosen)], format="extxyz")
        first = FinetuneSettings(
            epochs=30,
            learning_rate=2e-3,
            batch_size=4,
            schedule="cosine",
            force_loss_ratio=0.3,
            stress_loss_ratio=0.03,
        )
        second = first.model_copy(
            update={
                "epochs": 15,
                "learning_rate": 1e-3,
                "force_loss_ratio": 0.05,
                "stress_loss_ratio": 0.005,
            }
        )
        recipe = TrainRecipe(
            seed=options.seed,
            architecture=Architecture(num_blocks=2, units=64),
            weights={"random": 0.4, "search": 0.4},
            stages=[first, second],
        )
        print(train_file([part], target, recipe))
    return load(target)


def search_settings(options: argparse.Namespace) -> Settings:
    return parse_settings(
        {
            "symbols": ["H", "S"],
            "formula": [3, 1],
            "pressure": options.pressure,
            "Fitness": ["SSCHA"],
            "seed": options.seed,
            "MainCalculator": {"calculator": "mattersim"},
            "sscha": {
                "n_configs": options.n_configs,
                "max_populations": 8,
                "supercell": [2, 2, 2],
                "when": "every_generation",
                "hessian": 0,
                "keep_best": 2,
            },
            "learning": {
                "labeler": {"calculator": "gpaw"},
                "select": "sscha",
                "n_sample": options.pool,
                "n_perturb": 1,
            },
        }
    )


def structures(model: Potential, options: argparse.Namespace) -> list[Atoms]:
    """Im-3m, R3m, and the lowest distinct other 4-atom structures of the label set, as the model
    relaxes them."""
    known = [
        stripped(a)
        for a in read(LABELS, ":")
        if len(a) == 4 and a.info["kind"] in ("random", "search")
    ]
    relaxed = sorted(
        (
            found
            for found in model.relax(
                known[:: max(1, len(known) // 60)], options.pressure, max_steps=150
            )
            if found.converged
        ),
        key=lambda found: found.enthalpy,
    )
    starts = [im3m(3.1), r3m(3.15)]
    prints = [
        Fingerprint(found.atoms)
        for found in model.relax(starts, options.pressure, fix_symmetry=True)
    ]
    others: list[Atoms] = []
    for found in relaxed:
        mine = Fingerprint(found.atoms)
        if len(others) < options.others and not any(same_phase(mine, other) for other in prints):
            prints.append(mine)
            others.append(found.atoms)
    return [*starts, *others]


def pools(
    contenders: list[Contender],
    candidates: list[Candidate],
    model: Potential,
    options: argparse.Namespace,
) -> list[Pool]:
    """Reference energies of the contenders' configurations; kept in
    ``reference-<name>-<id>.npy``."""
    symbols = {c.id: c.spg_quantum for c in candidates}
    found = []
    for contender in contenders:
        configurations = [stripped(atoms) for atoms in contender.configurations]
        file = (
            options.folder
            / f"reference-{options.labeler}-{contender.id}-{len(configurations)}-{model.model_id}.npy"
        )
        if not file.is_file():
            np.save(file, reference_energies(configurations, options))
        difference = (np.load(file) - model.evaluate(configurations).energy) / len(
            configurations[0]
        )
        pairs = difference.reshape(-1, 2).mean(axis=1)
        found.append(
            Pool(
                contender.id,
                symbols[contender.id],
                contender.probability,
                contender.spread,
                pairs[np.isfinite(pairs)],
            )
        )
    return found


def reference_energies(configurations: list[Atoms], options: argparse.Namespace) -> np.ndarray:
    """eV, (n,); NaN where DFT failed."""
    if options.labeler == "checkpoint":
        return load("h3s-gpaw-small").evaluate(configurations).energy
    labeler = get_labeler(
        LabelerSettings(calculator=options.labeler, n_workers=1, timeout=36000.0),
        options.folder / options.labeler,
    )
    try:
        labels = labeler.label(configurations)
    finally:
        labeler.close()
    return np.array([label.energy if isinstance(label, Label) else np.nan for label in labels])


def measured_pools(folders: list[Path], model: Potential) -> list[Pool]:
    """Of phases whose SSCHA run and labels are in ``folders``, in the (pseudo)cubic cell; neither
    of them is sure to be the lowest."""
    found = []
    for folder in folders:
        result = SschaResult.read(folder / "sscha")
        if result.model_id != model.model_id:
            print(
                f"{folder}: the state is one of the model {result.model_id}, the energies are those"
                f" of {model.model_id}"
            )
        state = state_of(result, argparse.Namespace(conventional=True))
        displacements = sample_displacements(state, N_MEASURED, seed=0)
        labels = read_labelled(state, displacements, model, folder)
        difference = (labels.reference.energies - labels.model.energies) / len(state.supercell)
        spread = expected_spread(model, displaced(state, displacements))
        pairs = difference.reshape(-1, 2).mean(axis=1)
        found.append(Pool(folder.name, result.space_group, 0.5, spread, pairs))
    return found


def shares(
    method: str, found: list[Pool], n_pairs: int, n_candidates: int, rng: np.random.Generator
) -> list[int]:
    """Pairs for each pool."""
    if method == "sscha":
        return allocate(
            [pool.spread for pool in found], [pool.probability for pool in found], n_pairs
        )
    among = len(found) if method == "random, undecided" else n_candidates
    sampled = rng.integers(among, size=n_pairs)
    return [int((sampled == k).sum()) for k in range(len(found))]


def error_of_difference(
    method: str, found: list[Pool], n_pairs: int, n_candidates: int, samples: int, seed: int
) -> float:
    """RMSE (eV/atom) of the corrected difference of the two lowest; a phase without labels is
    shifted as the other is."""
    rng = np.random.default_rng([seed, n_pairs])
    truth = found[0].errors.mean() - found[1].errors.mean()
    misses = []
    for _ in range(samples):
        given = shares(method, found, n_pairs, n_candidates, rng)
        means = [
            rng.choice(pool.errors, n).mean() if n else None
            for pool, n in zip(found, given, strict=True)
        ]
        estimate = 0.0 if means[0] is None or means[1] is None else means[0] - means[1]
        misses.append(estimate - truth)
    return float(np.sqrt(np.mean(np.square(misses))))


def labels_for(error: float, counts: np.ndarray, errors: np.ndarray) -> float:
    """Labels at which the error, falling with their number, reaches ``error``: linear in the
    logarithms."""
    return float(
        np.exp(
            np.interp(-np.log(error), -np.log(errors), np.log(counts), right=np.nan, left=np.nan)
        )
    )


def report(found: list[Pool], n_candidates: int, options: argparse.Namespace) -> None:
    for pool in found:
        print(
            f"{pool.space_group} {pool.id}: probability of being lowest {pool.probability:.2f}; expected spread"
            f" {1e3 * pool.spread:.1f} meV/atom, found {1e3 * pool.errors.std(ddof=1):.1f} of pair"
            f" means ({len(pool.errors)} pairs); G(reference) - G(model)"
            f" {1e3 * pool.errors.mean():.1f} meV/atom"
        )
    ways = ("sscha", "random, undecided", "random, all candidates")
    fine = np.unique(np.geomspace(4, 1024, 25).astype(int) // 2 * 2)
    curves = {
        method: np.array(
            [
                error_of_difference(
                    method, found, n // 2, n_candidates, options.samples, options.seed
                )
                for n in fine
            ]
        )
        for method in ways
    }
    print(
        f"\nerror of the difference of G (meV/atom) over {options.samples} samples; {n_candidates}"
        " candidates have a free energy"
    )
    print(f"{'labels':>8}" + "".join(f"{method:>24}" for method in ways))
    for n in LABEL_COUNTS:
        print(
            f"{n:>8}"
            + "".join(f"{1e3 * np.interp(n, fine, curves[method]):>24.2f}" for method in ways)
        )
    print(
        "\nlabels that random choice needs for the error that select: sscha has with n labels,"
        " over n"
    )
    for n in LABEL_COUNTS:
        error = float(np.interp(n, fine, curves["sscha"]))
        ratios = [
            f"{method}: {labels_for(error, fine, curves[method]) / n:.2f}" for method in ways[1:]
        ]
        print(f"{n:>8}  {'   '.join(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", help="the model, instead of one trained here")
    parser.add_argument(
        "--labels", type=int, default=120, help="labels that the worse model is trained on"
    )
    parser.add_argument(
        "--labeler",
        default="checkpoint",
        choices=["checkpoint", "gpaw"],
        help="who gives reference energies",
    )
    parser.add_argument("--pressure", type=float, default=100.0, help="GPa")
    parser.add_argument("--others", type=int, default=4, help="candidates beside Im-3m and R3m")
    parser.add_argument("--n-configs", type=int, default=200, help="of an SSCHA population")
    parser.add_argument(
        "--pool",
        type=int,
        default=400,
        help="configurations with reference energies for each undecided candidate, even",
    )
    parser.add_argument(
        "--measured",
        nargs=2,
        type=Path,
        metavar="PHASE",
        help="folders of error_cancellation.py: its labels are the pool",
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.measured:
        found = measured_pools(options.measured, load(options.checkpoint or "h3s-gpaw-small"))
        report(found, len(found), options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    model, settings = worse_model(options), search_settings(options)
    run_dir = options.folder / f"ranking-{options.pressure:g}GPa-{model.model_id}"
    candidates = rank_structures(
        structures(model, options), model, settings, run_dir, seed=options.seed
    )
    for c in candidates:
        print(
            f"{c.id} {c.spg_static} -> {c.spg_quantum}: G {c.gibbs} +- {c.gibbs_error}, {c.status};"
            f" probabilities {c.p_lowest_total} {c.reason}"
        )
    state = SearchState(settings, run_dir, model, options.seed, candidates=candidates)
    contenders = undecided(state, 1)
    if len(contenders) < 2:
        print("nothing is undecided: another pressure")
        return
    n_candidates = sum(c.ranked and not c.same_as for c in candidates)
    report(pools(contenders, candidates, model, options), n_candidates, options)


if __name__ == "__main__":
    main()
