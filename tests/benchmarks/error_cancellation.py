"""Error cancellation measured (Figs. 7 and 8 of the paper): GPAW labels of an SSCHA ensemble
against the model that made it.

Usage: python error_cancellation.py label FOLDER im-3m|r3m|PHASE.cif [options]     (run again, it goes on; can be stopped at any time)
       python error_cancellation.py grid FOLDER [options]                      (what the k points of the label's cell do to the energy)
       python error_cancellation.py analyse FOLDER [options]                   (whatever labels are there)

The SSCHA run is made first (FOLDER/sscha); one that is there is taken as it is, whatever model the
package ships by now: labels belong to its state. GPAW's settings are the defaults of the labeler,
those of the shipped label set. What is kept of earlier measurements: inputs/h3s-error-cancellation.
"""

import argparse
import json
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.files import write_json
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.base import Label, k_points
from magus_anharmonic.labelers.codes import Gpaw
from magus_anharmonic.paper.ensemble_errors import (
    Source,
    analyse_errors,
    draw_report,
    source_of_result,
)
from magus_anharmonic.paper.ensemble_labels import label_locked, sample_displacements
from magus_anharmonic.potential import load
from magus_anharmonic.settings import LabelerSettings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.state import SschaState


def im3m(a=3.0):
    """Primitive cell of Im-3m H3S with lattice constant ``a`` (A)."""
    cell = [[-a / 2, a / 2, a / 2], [a / 2, -a / 2, a / 2], [a / 2, a / 2, -a / 2]]
    return Atoms(
        "SH3",
        scaled_positions=[(0, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)],
        cell=cell,
        pbc=True,
    )


def r3m(a=3.25, shift=0.12):
    """Primitive cell of R3m H3S: Im-3m with every hydrogen off the middle of its bond by ``shift``
    (A)."""
    atoms = im3m(a)
    atoms.positions[1:] *= 1.0 + shift / np.linalg.norm(atoms.positions[1:], axis=1, keepdims=True)
    return atoms


PHASES = {"im-3m": im3m, "r3m": r3m}
CONVENTIONAL = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
"""The (pseudo)cubic 8-atom cell of a body-centred or rhombohedral primitive cell; a 2x2x2 supercell
repeats it."""


def in_smaller_cell(state, cell):
    """The state restricted to the modes that repeat with ``cell`` (3, 3) A, whose lattice holds
    that of the state's supercell.

    Force constants between atoms that this cell makes the same are added: exact at the q points
    that both cells share.
    """
    supercell = state.supercell
    scaled = supercell.positions @ np.linalg.inv(cell)
    difference = scaled[:, None] - scaled[None]
    same = np.abs(difference - np.round(difference)).max(axis=2) < 1e-6
    first = np.unique(same.argmax(axis=1))
    if not np.isclose(
        len(first) * supercell.get_volume(), len(supercell) * abs(np.linalg.det(cell))
    ):
        raise InputError("the smaller cell does not repeat into the supercell of the state")
    blocks = state.full.reshape(len(supercell), 3, len(supercell), 3)
    matrix = np.einsum("ixjy,bj->ibxy", blocks[first], same[first].astype(float))
    atoms = Atoms(
        supercell.numbers[first], positions=supercell.positions[first], cell=cell, pbc=True
    )
    atoms.set_masses(supercell.get_masses()[first])
    return SschaState(atoms, (1, 1, 1), matrix[None], state.temperature)


def state_of(result, options):
    """The state of the run, in its supercell or in the (pseudo)cubic cell."""
    if not options.conventional:
        return result.state
    return in_smaller_cell(result.state, CONVENTIONAL @ result.centroids.cell.array)


def sscha(options):
    if (options.folder / "sscha" / "result.json").is_file():
        return SschaResult.read(options.folder / "sscha")
    atoms = PHASES[options.phase]() if options.phase in PHASES else read(options.phase)
    return free_energy(
        atoms,
        load(options.checkpoint),
        pressure=options.pressure,
        supercell=tuple(options.supercell),
        n_configs=500,
        max_populations=20,
        seed=0,
        directory=options.folder / "sscha",
    )


def label(options):
    result = sscha(options)
    print(
        f"model {result.model_id}: {result.space_group}, G = {result.numbers.gibbs:.5f} +-"
        f" {result.gibbs_error:.5f} eV/atom, {result.status}"
    )
    state = state_of(result, options)
    with closing(gpaw(options, "labels")) as labeler:
        label_locked(state, sample_displacements(state, options.n, seed=0), labeler, options.folder)


def gpaw(options, purpose):
    return get_labeler(
        LabelerSettings(calculator="gpaw", n_workers=options.workers, timeout=36000.0),
        options.folder / "gpaw" / purpose,
    )


def grid(options):
    """The energy of the centroids in the primitive cell minus that in the cell of the labels, by
    their own grids of k points.

    One crystal, two grids: the difference belongs to the k points alone. `grid.json` keeps it.
    """
    result = SschaResult.read(options.folder / "sscha")
    state = state_of(result, options)
    with closing(gpaw(options, "grid")) as labeler:
        labels = labeler.label([result.centroids, state.supercell])
    energies, grids = [], []
    for label in labels:
        if not isinstance(label, Label):
            raise SystemExit(f"no label of the centroids: {label.reason}")
        energies.append(label.energy / len(label.structure))
        grids.append(list(k_points(label.structure, Gpaw.k_spacing)))
    step = energies[0] - energies[1]
    write_json(
        options.folder / "grid.json",
        {"grids": grids, "energies_eV_per_atom": energies, "step_eV_per_atom": step},
    )
    print(
        f"k points {grids[0]} in the primitive cell, {grids[1]} in that of the labels:"
        f" {1e3 * step:.1f} meV/atom between them"
    )


def analyse(options):
    """Print the errors of the whole pairs that are labelled, of all of them and of halves, and
    write the tables and the figure."""
    result = SschaResult.read(options.folder / "sscha")
    state = state_of(result, options)
    whole = source_of_result(result)
    source = (
        replace(whole, state=state)
        if state is result.state
        else Source(state, whole.phase, whole.pressure, whole.model_id)
    )
    u = sample_displacements(state, options.n, seed=0)
    model = load(options.checkpoint)
    report = analyse_errors(source, model, u, options.folder)
    draw_report(report)
    found, correction = report.errors, report.correction
    print(
        f"{source.phase}, {source.pressure:g} GPa, {state.temperature:g} K, {len(state.supercell)}"
        f" atoms, state of model {source.model_id}"
    )
    print(
        "errors of model"
        f" {model.model_id}{'' if model.model_id == source.model_id else ', which is another one'}"
    )
    print(
        f"{found.n_configs} configurations in pairs; {report.n_failed} of {options.n} not labelled"
    )
    print(f"force RMSE {1e3 * found.force:.1f} meV/A")
    for name, unit, parts in (
        ("gradient by centroids", "meV/A", found.centroid),
        ("  averaged by symmetry", "meV/A", found.symmetric_centroid),
        ("gradient by force constants", "meV/A^2", found.force_constants),
        ("  averaged by symmetry", "meV/A^2", found.symmetric_force_constants),
    ):
        print(
            f"{name}: one configuration {1e3 * parts.single:.1f}, average {1e3 * parts.mean:.2f},"
            f" systematic {1e3 * parts.systematic:.2f} +- {1e3 * parts.systematic_error:.2f},"
            f" statistical {1e3 * parts.statistical:.2f}, floor {1e3 * parts.floor:.2f} {unit}"
        )
    if found.bo_centroid is not None:
        print(f"Born-Oppenheimer force at the centroids: {1e3 * found.bo_centroid:.3f} meV/A")
    print(
        f"G(DFT) - G(model): {1e3 * correction.first_order:.2f} +-"
        f" {1e3 * correction.first_order_error:.2f} meV/atom (first order),"
        f" {1e3 * correction.second_order:.2f} meV/atom (second order)"
    )
    if (options.folder / "grid.json").is_file():
        step = json.loads((options.folder / "grid.json").read_text())["step_eV_per_atom"]
        print(
            f"the same on the grid of the primitive cell ({1e3 * step:+.1f}):"
            f" {1e3 * (correction.first_order + step):.2f} meV/atom"
        )
    print(
        f"pressure of DFT minus that of the model: {report.pressure_error[0]:.2f} +-"
        f" {report.pressure_error[1]:.2f} GPa"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["label", "grid", "analyse"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("phase", nargs="?", default="im-3m", help="im-3m, r3m, or a structure file")
    parser.add_argument("--checkpoint", default="h3s-gpaw-small")
    parser.add_argument("--pressure", type=float, default=150.0, help="GPa")
    parser.add_argument("--supercell", type=int, nargs=3, default=[2, 2, 2])
    parser.add_argument(
        "--conventional",
        action="store_true",
        help="label in the (pseudo)cubic 8-atom cell instead of the 2x2x2 supercell",
    )
    parser.add_argument("--workers", type=int, default=1, help="labels side by side")
    parser.add_argument("-n", type=int, default=60, help="configurations, in +u/-u pairs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    {"label": label, "grid": grid, "analyse": analyse}[options.task](options)


if __name__ == "__main__":
    main()
