"""A model of F(R, cell) from the first N training labels: its errors on the test labels by kind,
how well it expects them, and what it costs against SSCHA.

    python evaluate.py N [--epochs 40]
"""

import copy
import sys
import time

import numpy as np
from ase import Atoms
from ase.io import read
from learn import HERE, POTENTIAL, errors, minus

from magus_anharmonic import free_energy, load
from magus_anharmonic.potential.finetune import finetune
from magus_anharmonic.potential.labelled import weights_by_error
from magus_anharmonic.potential.trainer import refit_shift
from magus_anharmonic.potential.uncertainty import error_scale
from magus_anharmonic.settings import FinetuneSettings
from magus_anharmonic.structures import space_group


def calibration(model, test, left):
    """Rms of the energy's deviation over what model and label expect of it."""
    expected = 4 * model.evaluate(test).energy_error
    label = np.array([atoms.info["label_energy_error"] for atoms in test])
    found = np.array([atoms.get_potential_energy() for atoms in left])
    return float(np.sqrt(np.mean(np.square(found) / (expected**2 + label**2))))


def r3m(number):
    """Im-3m at about 140 GPa, every hydrogen 0.15 A along its bond, rattled."""
    cell = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) * 1.55
    sites = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    atoms = Atoms("SH3", scaled_positions=sites, cell=cell, pbc=True)
    bonds = atoms.positions[1:] / np.linalg.norm(atoms.positions[1:], axis=1)[:, None]
    atoms.positions[1:] += 0.15 * bonds
    atoms.rattle(0.02, seed=number)
    return atoms


def relaxations(potential, model):
    """From R3m downhill on V and on F, a line for each pressure (GPa)."""
    for pressure in (100, 130, 150):
        ends = []
        for surface in (potential, model):
            found = surface.relax([r3m(number) for number in range(3)], pressure)
            ends.append(sorted({space_group(one.atoms, 0.03) for one in found}))
        print(f"{pressure} GPa, relaxed from R3m: on V {ends[0]}, on F {ends[1]}")


def trained_model(n, epochs=40, seed=1, file="labels.xyz"):
    """A model of the first n training labels of the file, a third of which choose the epoch and
    calibrate its errors; and the test labels."""
    labels = read(HERE / file, ":")
    test = [atoms for atoms in labels if atoms.info["side"] == "test"]
    chosen = [atoms for atoms in labels if atoms.info["side"] == "train"][:n]
    train, validation = chosen[: n * 2 // 3], chosen[n * 2 // 3 :]
    module = copy.deepcopy(load(POTENTIAL, device="cpu").module)
    refit_shift(module, train)
    stage = FinetuneSettings(epochs=epochs, learning_rate=1e-3, batch_size=4, schedule="cosine")
    out = HERE / "scratch" / f"{file.removesuffix('.xyz')}-{n}.pth"
    out.parent.mkdir(exist_ok=True)
    weights = weights_by_error(train)
    finetune(module, train, validation, stage, out=out, seed=seed, weights=weights)
    return load(out, device="cpu"), test


def own_error(left):
    """Rms error of the model (eV/atom) that the labels' own errors do not explain."""
    found = np.array([atoms.get_potential_energy() / len(atoms) for atoms in left])
    label = np.array([atoms.info["label_energy_error"] / len(atoms) for atoms in left])
    return error_scale(found, np.ones(len(left)), label)


def main(n, epochs):
    model, test = trained_model(n, epochs)
    potential = load(POTENTIAL, device="cpu")
    print(f"{n} labels; {model.surface}; {model.error_model}")
    left = minus(test, model)
    kinds = sorted({atoms.info["kind"] for atoms in test})
    for kind in ["all", *kinds]:
        mine = [i for i, atoms in enumerate(test) if kind in ("all", atoms.info["kind"])]
        noise = np.sqrt(np.mean([test[i].info["label_energy_error"] ** 2 for i in mine])) * 250
        rms = errors([left[i] for i in mine])
        print(f"{kind:9} {len(mine):3} labels: {rms} meV/atom, meV/A, GPa (labels {noise:.2f})")
    print(f"deviation over expected error: {calibration(model, test, left):.2f}")
    print(f"error of the model itself: {1e3 * own_error(left):.2f} meV/atom")
    relaxations(potential, model)
    began = time.process_time()
    for _ in range(20):
        model.evaluate(test[:1])
    each = (time.process_time() - began) / 20
    began = time.process_time()
    keys = dict(supercell=(2, 2, 2), n_configs=100, centroids="fixed", seed=2)
    run = free_energy(test[0], potential, **keys)
    spent = time.process_time() - began
    print(
        f"one cell: {1e3 * each:.1f} ms by the model, {spent:.1f} s by SSCHA to"
        f" {1e3 * run.gibbs_error:.2f} meV/atom: {spent / each:.0f} times"
    )


if __name__ == "__main__":
    words = sys.argv[1:]
    main(int(words[0]), int(words[2]) if words[1:2] == ["--epochs"] else 40)
