"""Is the error estimate calibrated, and does choosing by it save labels?  ``python
tests/benchmarks/uncertainty.py [PART]``.

``calibration`` fits the estimate of the checkpoint ``h3s-gpaw-small`` (or, with ``--n-train``, of a
small model trained from new weights) to training and validation labels of
``inputs/h3s-checkpoint``, and compares expected with true errors on labels that the model has not
seen: the test side of ``labels.xyz``, cells around Im-3m and R3m apart from random and searched
ones. Writes ``docs/calibration.svg``. Then the same for differences of energy between structures of
like volume: with what the two errors share, and as if they were independent.

``learning`` trains a small model (2 blocks of 32 units) on a few random labels of the training side
and adds as many again and again, chosen by each rule of ``learning.select``, with finetuning in
between; all are scored on the test side. Writes ``docs/learning-curve.svg``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from ase import Atoms

from magus_anharmonic.learning.choose import choose, farthest_points
from magus_anharmonic.potential import Potential, load, uncertainty
from magus_anharmonic.potential.finetune import finetune
from magus_anharmonic.potential.labelled import Scores, labels_of, score, split_by_parent
from magus_anharmonic.potential.train import read_labels
from magus_anharmonic.potential.trainer import Architecture, from_scratch
from magus_anharmonic.settings import FinetuneSettings

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
LABELS = ROOT / "inputs" / "h3s-checkpoint"
SMALL = Architecture(num_blocks=2, units=32)
RULES = ("random", "uncertain", "diverse")


def trained(
    start: torch.nn.Module,
    train: Sequence[Atoms],
    validation: Sequence[Atoms],
    epochs: int,
    seed: int,
) -> Potential:
    """``start`` finetuned on ``train``, with its error estimate."""
    settings = FinetuneSettings(
        epochs=epochs, learning_rate=4e-3, batch_size=4, schedule="cosine", ema_decay=0.9
    )
    with tempfile.TemporaryDirectory() as folder:
        return load(
            finetune(
                start, train, validation, settings, out=Path(folder) / "model.pth", seed=seed
            ).path,
            device="cpu",
        )


def true_errors(potential: Potential, labelled: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) |error of the energy| in eV/atom and (n,) root mean square error of the forces in
    eV/A."""
    found = potential.evaluate(labelled)
    labels = [labels_of(atoms) for atoms in labelled]
    energy = [
        abs(e - label[0]) / len(atoms)
        for e, label, atoms in zip(found.energy, labels, labelled, strict=True)
    ]
    forces = [
        np.sqrt(np.mean((f - label[1]) ** 2)) for f, label in zip(found.forces, labels, strict=True)
    ]
    return np.array(energy), np.array(forces)


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values))


def report(
    name: str, expected: np.ndarray, true: np.ndarray, unit: str
) -> tuple[np.ndarray, np.ndarray]:
    """Print one set's numbers; returns the root mean squares of expected and true errors in five
    bins of the expected one."""
    spearman = np.corrcoef(ranks(expected), ranks(true))[0, 1]
    inside = np.mean(true < expected)
    bins = np.array_split(np.argsort(expected), 5)
    points = np.array(
        [[np.sqrt(np.mean(values[part] ** 2)) for part in bins] for values in (expected, true)]
    )
    ratio = np.sqrt(np.mean((true / expected) ** 2))
    print(
        f"{name}: rank correlation {spearman:.2f}; true below expected {100 * inside:.0f} %;"
        f" rms(true/expected) {ratio:.2f}"
    )
    print(
        "   expected -> true: " + ", ".join(f"{a:.3f} -> {b:.3f}" for a, b in points.T) + f" {unit}"
    )
    return points[0], points[1]


def cost(potential: Potential, structures: Sequence[Atoms]) -> None:
    """Print what the estimate costs as a part of an evaluation; interleaved, median of nine."""
    without = Potential(potential.module, device="cpu")
    calls = {
        "with": potential.evaluate,
        "without": without.evaluate,
        "alone": potential.uncertainty,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(9):
        for name, call in calls.items():
            begun = time.perf_counter()
            call(structures)
            seconds[name].append(time.perf_counter() - begun)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    within, alone = median["with"] / median["without"] - 1, median["alone"] / median["without"]
    print(
        f"cost: {100 * within:+.1f} % of an evaluation within evaluate; alone (forward pass only)"
        f" {100 * alone:.0f} %"
    )


def calibration(n_train: int, epochs: int, seed: int) -> None:
    train, validation, test = split_by_parent(read_labels(LABELS / "labels.xyz"))
    wide = [atoms for atoms in test if atoms.info["kind"] in ("random", "search")]
    near = [atoms for atoms in test if atoms not in wide]
    if n_train:
        train = [train[i] for i in choose(train, n_train, np.random.default_rng(seed))]
        potential = trained(from_scratch(train, SMALL, seed=seed), train, validation, epochs, seed)
    else:
        potential = load("h3s-gpaw-small", device="cpu")
        potential.error_model = uncertainty.fit(potential.module, train, validation)
    print(
        f"{len(train)} training labels: around H3S {score(potential, near)}; wide"
        f" {score(potential, wide)}"
    )
    print(f"estimate: {potential.error_model}")
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.0))
    for name, labelled in (("around Im-3m and R3m", near), ("random and search", wide)):
        expected = potential.uncertainty(labelled)
        for axis, estimate, true, unit in zip(
            axes,
            (expected.energy_error, expected.force_error),
            true_errors(potential, labelled),
            ("eV/atom", "eV/A"),
            strict=True,
        ):
            x, y = report(
                f"{name}, {'energy' if unit == 'eV/atom' else 'forces'} (n = {len(labelled)})",
                estimate,
                true,
                unit,
            )
            axis.loglog(x, y, "o-", label=name)
    for axis, label in zip(axes, ("energy, eV/atom", "forces, eV/Å"), strict=True):
        limits = np.array(axis.get_xlim())
        axis.loglog(limits, limits, "k:", lw=1)
        axis.set(xlabel=f"expected error ({label})", ylabel="true error, rms in bins of a fifth")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "calibration.svg")
    differences(potential, test)
    cost(potential, test[:8])


def signed_errors(potential: Potential, labelled: Sequence[Atoms]) -> np.ndarray:
    """E(DFT) - E(model) of each structure, eV/atom."""
    known = np.array([labels_of(atoms)[0] / len(atoms) for atoms in labelled])
    return known - potential.evaluate(labelled).energy / [len(atoms) for atoms in labelled]


def pairs_of_like_volume(
    potential: Potential, labelled: Sequence[Atoms]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences of energy (eV/atom) between all structures whose volumes are within 5 %.

    Their true errors, those expected with what both errors share, and those expected of independent
    errors.
    """
    signed, vectors = (
        signed_errors(potential, labelled),
        potential.error_model.vectors(potential.mean_features(labelled)),
    )
    volumes = np.array([atoms.get_volume() / len(atoms) for atoms in labelled])
    one, other = np.triu_indices(len(labelled), 1)
    alike = np.abs(volumes[one] / volumes[other] - 1) < 0.05
    one, other = one[alike], other[alike]
    levels = np.linalg.norm(vectors, axis=1)
    shared = np.linalg.norm(vectors[one] - vectors[other], axis=1)
    return np.abs(signed[one] - signed[other]), shared, np.hypot(levels[one], levels[other])


def differences(potential: Potential, labelled: Sequence[Atoms]) -> None:
    """Print expected and true errors of `pairs_of_like_volume`."""
    true, shared, independent = pairs_of_like_volume(potential, labelled)
    print(
        f"differences between {len(true)} pairs of like volume, {np.sqrt(np.mean(true**2)):.3f}"
        " eV/atom (root mean square)"
    )
    report("   with what errors share", shared, true, "eV/atom")
    report("   taken as independent", independent, true, "eV/atom")


def pick(
    rule: str,
    potential: Potential,
    pool: Sequence[Atoms],
    known: Sequence[Atoms],
    n: int,
    rng: np.random.Generator,
) -> list[int]:
    """The rule of `magus_anharmonic.learning.choose.select` on the whole pool, whose members are
    all worth a label."""
    if rule == "random":
        return choose(pool, n, rng)
    if rule == "uncertain":
        return [int(i) for i in np.argsort(-potential.uncertainty(pool).force_error)[:n]]
    return farthest_points(potential.mean_features(pool), n, rng, potential.mean_features(known))


def learning(
    size: int, n_start: int, n_add: int, rounds: int, epochs: tuple[int, int], seeds: int
) -> None:
    train, validation, test = split_by_parent(
        [atoms for atoms in read_labels(LABELS / "labels.xyz") if len(atoms) <= size]
    )
    validation = validation[::2]
    sizes = [n_start + n_add * k for k in range(rounds + 1)]
    curves: dict[str, list[list[Scores]]] = {rule: [] for rule in RULES}
    print(
        f"pool {len(train)}, validation {len(validation)}, test {len(test)}; energy meV/atom and"
        " forces eV/A on the test side"
    )
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        first = choose(train, n_start, rng)
        labelled = [train[i] for i in first]
        begin = trained(
            from_scratch(labelled, SMALL, seed=seed), labelled, validation, epochs[0], seed
        )
        for rule in RULES:
            chosen, potential, found = list(first), begin, [score(begin, test)]
            for _ in range(rounds):
                rest = [i for i in range(len(train)) if i not in set(chosen)]
                picked = pick(
                    rule,
                    potential,
                    [train[i] for i in rest],
                    [train[i] for i in chosen],
                    n_add,
                    rng,
                )
                chosen += [rest[place] for place in picked]
                potential = trained(
                    potential.module, [train[i] for i in chosen], validation, epochs[1], seed
                )
                found.append(score(potential, test))
            curves[rule].append(found)
            words = ", ".join(
                f"{n}: {1e3 * s.energy_rmse:.1f} {s.force_rmse:.3f}"
                for n, s in zip(sizes, found, strict=True)
            )
            true, expected = (
                true_errors(potential, test)[1],
                potential.uncertainty(test).force_error,
            )
            rank, ratio = (
                np.corrcoef(ranks(expected), ranks(true))[0, 1],
                np.sqrt(np.mean((true / expected) ** 2)),
            )
            print(
                f"seed {seed} {rule:<10}{words}; forces: rank correlation {rank:.2f},"
                f" rms(true/expected) {ratio:.2f}",
                flush=True,
            )
    draw(sizes, curves)


def draw(sizes: list[int], curves: dict[str, list[list[Scores]]]) -> None:
    """Print the means over seeds and the labels needed for what random choice reaches at the end;
    the picture."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.0))
    for axis, name, unit in zip(
        axes, ("energy_rmse", "force_rmse"), ("energy, eV/atom", "forces, eV/Å"), strict=True
    ):
        values = {
            rule: np.array([[getattr(s, name) for s in run] for run in runs])
            for rule, runs in curves.items()
        }
        goal = values["random"].mean(axis=0)[-1]
        for rule, array in values.items():
            mean = array.mean(axis=0)
            axis.errorbar(sizes, mean, np.ptp(array, axis=0) / 2, fmt="o-", capsize=3, label=rule)
            print(
                f"{name} {rule:<10}"
                + " ".join(f"{v:.4f}" for v in mean)
                + f"; {needed(sizes, mean, goal)} labels for {goal:.4f}"
            )
        axis.set(
            xlabel="labels", ylabel=f"RMSE on the test side ({unit})", xscale="log", yscale="log"
        )
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "learning-curve.svg")


def needed(sizes: Sequence[int], errors: np.ndarray, goal: float) -> str:
    """Number of labels at which a curve first goes below ``goal``, interpolated."""
    for k, error in enumerate(errors):
        if error <= goal:
            if k == 0:
                return f"{sizes[0]}"
            part = (errors[k - 1] - goal) / (errors[k - 1] - error)
            return f"{sizes[k - 1] + part * (sizes[k] - sizes[k - 1]):.0f}"
    return f"more than {sizes[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "part", nargs="?", choices=("calibration", "learning"), help="left out: both"
    )
    parser.add_argument(
        "--n-train",
        type=int,
        default=0,
        help="calibration: labels for a small model of its own; 0: h3s-gpaw-small",
    )
    parser.add_argument("--epochs", type=int, default=25, help="calibration: of that model")
    parser.add_argument("--size", type=int, default=4, help="learning: largest number of atoms")
    parser.add_argument("--start", type=int, default=40, help="learning: labels at the start")
    parser.add_argument("--start-epochs", type=int, default=40, help="learning: on these")
    parser.add_argument("--add", type=int, default=40, help="learning: labels added in each round")
    parser.add_argument("--rounds", type=int, default=2, help="learning: rounds")
    parser.add_argument(
        "--round-epochs", type=int, default=8, help="learning: finetuning epochs per round"
    )
    parser.add_argument("--seeds", type=int, default=2, help="learning: repetitions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    if options.part != "learning":
        calibration(options.n_train, options.epochs, 0)
    if options.part != "calibration":
        epochs = (options.start_epochs, options.round_epochs)
        learning(options.size, options.start, options.add, options.rounds, epochs, options.seeds)
    print(
        f"{(time.perf_counter() - begun) / 60:.1f} min, CPU time {time.process_time() / 60:.1f} min"
    )


if __name__ == "__main__":
    main()
