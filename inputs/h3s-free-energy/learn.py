"""How many labels of F(R, cell) a model needs: F learned from the potential's weights, or F - V by
a network of its own.

    python learn.py N [N ...] [--epochs 80]

For each N, the first N training labels of ``labels.xyz``; errors are those of F, its gradient and
stress on all test labels. A line for each goes to ``learning.jsonl`` and to the screen:

constant : V and the mean of F - V of the labels; no network learns anything.
F : the potential, finetuned on F (what `train` and learning do): one checkpoint.
F - V : new weights of the potential's shape, trained on F - V; V is added where it is used.
F - V, known features : the same from the potential's weights, its readout `SCALED` down.
"""

import copy
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read

from magus_anharmonic import load
from magus_anharmonic.potential import Potential
from magus_anharmonic.potential.finetune import finetune
from magus_anharmonic.potential.labelled import weights_by_error
from magus_anharmonic.potential.trainer import Architecture, from_scratch, refit_shift
from magus_anharmonic.settings import FinetuneSettings
from magus_anharmonic.units import EV_PER_A3_IN_GPA

HERE = Path(__file__).resolve().parent
POTENTIAL = "h3s-gpaw-small"
SCALED = 0.05
"""Sizes of F - V over those of V."""


def minus(labelled, potential):
    """The labels less the potential's energies, forces and stresses."""
    found, left = potential.evaluate(labelled), []
    for i, atoms in enumerate(labelled):
        other = atoms.copy()
        other.calc = SinglePointCalculator(
            other,
            energy=atoms.get_potential_energy() - found.energy[i],
            forces=atoms.get_forces() - found.forces[i],
            stress=atoms.get_stress(voigt=False) - found.stress[i],
        )
        left.append(other)
    return left


def errors(residuals):
    """RMSE: meV/atom, meV/A, GPa."""
    n = len(residuals[0])
    parts = (
        [1e3 * atoms.get_potential_energy() / n for atoms in residuals],
        [1e3 * atoms.get_forces() for atoms in residuals],
        [EV_PER_A3_IN_GPA * atoms.get_stress(voigt=False) for atoms in residuals],
    )
    return [round(float(np.sqrt(np.mean(np.square(part)))), 2) for part in parts]


def trained(module, labels, epochs, seed):
    """The averaged weights after all epochs."""
    stage = FinetuneSettings(
        epochs=epochs, learning_rate=1e-3, batch_size=4, schedule="cosine", keep="last"
    )
    with TemporaryDirectory() as folder:
        result = finetune(
            module, labels, [], stage, out=Path(folder) / "model.pth", seed=seed,
            weights=weights_by_error(labels), error_estimate=False,
        )  # fmt: skip
    return Potential(result.module)


def main(sizes, epochs, seed=1):
    labels = read(HERE / "labels.xyz", ":")
    test = [atoms for atoms in labels if atoms.info["side"] == "test"]
    training = [atoms for atoms in labels if atoms.info["side"] == "train"]
    potential = load(POTENTIAL, device="cpu")
    shape = {name: potential.module.model_args[name] for name in Architecture.model_fields}
    difference = minus(test, potential)
    for n in sizes:
        chosen = training[:n]
        own = minus(chosen, potential)
        mean = np.mean([atoms.get_potential_energy() for atoms in own])
        rest = [atoms.copy() for atoms in difference]
        for atoms, known in zip(rest, difference, strict=True):
            results = {**known.calc.results, "energy": known.get_potential_energy() - mean}
            atoms.calc = SinglePointCalculator(atoms, **results)
        began, found = time.process_time(), {"constant": errors(rest)}
        module = copy.deepcopy(potential.module)
        refit_shift(module, chosen)
        found["F"] = errors(minus(test, trained(module, chosen, epochs, seed)))
        module = from_scratch(own, Architecture(**shape), seed=seed)
        found["F - V"] = errors(minus(difference, trained(module, own, epochs, seed)))
        module = copy.deepcopy(potential.module)
        module.normalizer.scale *= SCALED
        module.normalizer.shift *= SCALED
        refit_shift(module, own)
        residual = minus(difference, trained(module, own, epochs, seed))
        found["F - V, known features"] = errors(residual)
        line = {
            "n": len(chosen),
            "n_test": len(test),
            "epochs": epochs,
            "meV/atom, meV/A, GPa": found,
            "seconds": round(time.process_time() - began, 1),
        }
        print(json.dumps(line), flush=True)
        with (HERE / "learning.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    words = sys.argv[1:]
    epochs = int(words[words.index("--epochs") + 1]) if "--epochs" in words else 80
    words = words[: words.index("--epochs")] if "--epochs" in words else words
    main([int(word) for word in words], epochs)
