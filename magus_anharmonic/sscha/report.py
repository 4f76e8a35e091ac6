"""What a finished SSCHA run has to show: the Hessian (of a run, or of a structure, which is run
first) as files, phonons and a verdict, and the picture of ``convergence.csv``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError, SschaError
from magus_anharmonic.evaluator import EnergySource, Evaluator, as_evaluator
from magus_anharmonic.io import pictures
from magus_anharmonic.io.digests import versions
from magus_anharmonic.io.files import replacing, write_json
from magus_anharmonic.io.tables import cell, table_rows, write_table
from magus_anharmonic.notebook import Described
from magus_anharmonic.runs.lock import locked
from magus_anharmonic.sscha.ensemble import Ensemble, joined
from magus_anharmonic.sscha.gibbs import DEFAULTS
from magus_anharmonic.sscha.hessian import Hessian, free_energy_hessian, levels
from magus_anharmonic.sscha.nonanalytic import NonAnalytic, phonopy_crystal
from magus_anharmonic.sscha.phonons import (
    BandPath,
    bands,
    dispersion,
    draw_dispersion,
    write_dispersion,
)
from magus_anharmonic.sscha.qe_files import write_dyn
from magus_anharmonic.sscha.record import SYMPREC
from magus_anharmonic.sscha.result import SschaResult, final_ensemble
from magus_anharmonic.sscha.start import (
    harmonic_force_constants,
    in_double_precision,
    sample_ensemble,
)
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.unstable import supported_group
from magus_anharmonic.units import EV_IN_CM1, ev_to_mev

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

SAMPLING_TAG = 4177
"""Separates the random numbers of these ensembles from those of other purposes with the same
seed."""
WHAT = "magus-anharmonic hessian"
"""Names this work in the lock of its folder."""


WORDS = {
    "stable": "Stable: every mode of the supercell is positive beyond two standard errors",
    "saddle": "Saddle point: a mode is negative beyond two standard errors",
    "undecided": "Undecided between a minimum and a saddle point; take more --n-configs",
}


@dataclass(frozen=True, repr=False)
class HessianReport(Described):
    """What was found, and where the files are."""

    result: SschaResult
    hessian: Hessian
    folder: Path

    def described(self) -> dict[str, str]:
        """What the Hessian says, and where its files are."""
        return {**self.hessian.described(), "files": str(self.folder)}

    def sentences(self) -> list[str]:
        """Stable, saddle or undecided, why, and how sure."""
        hessian = self.hessian
        q, mode = hessian.deciding
        return [
            f"{WORDS[hessian.status]}. The mode that decides: {shown_wavenumber(hessian, q, mode)}"
            f" cm^-1 at q = {shown_point(hessian.points[q])}.",
            f"Probability that it is stable: {hessian.probability_stable:.3f} (sampling alone).",
            *(() if hessian.fourth_order else ("Without the fourth-order term (--v4 adds it).",)),
            *(() if self.result.converged else ("The SSCHA run had not converged.",)),
        ]


def hessian_of_run(
    run: str | Path,
    output: str | Path,
    *,
    evaluator: EnergySource | None = None,
    n_configs: int | None = None,
    include_v4: bool = False,
    seed: int = 0,
) -> HessianReport:
    """Hessian of the state in which a run ended, with all files in ``output``.

    ``n_configs`` above what the populations of the last state hold draws the rest with
    ``evaluator``, which also gives the harmonic bands. Raises ``InputError`` for a folder without a
    finished run, for a run without a state, where an evaluator is needed and missing or another
    model's than the run's, and where another process works in ``output``; ``SschaError`` where the
    equation of ``include_v4`` has no solution.
    """
    with locked(output, WHAT):
        return _hessian_of_run(Path(run), Path(output), evaluator, n_configs, include_v4, seed)


def _hessian_of_run(
    run: Path,
    output: Path,
    source: EnergySource | None,
    n_configs: int | None,
    include_v4: bool,
    seed: int,
) -> HessianReport:
    result = SschaResult.read(run)
    state = result.state
    symmetry, harmonic = Symmetry(state.atoms, state.supercell_matrix), None
    evaluator = None if source is None else as_evaluator(source, [state.atoms])
    if evaluator is not None and evaluator.model_id != result.model_id:
        raise InputError(
            f"--checkpoint: is the model {evaluator.model_id}, the run in {run} was made with"
            f" {result.model_id}"
        )
    ensemble = ensemble_of(state, final_ensemble(run, result), evaluator, n_configs, seed)
    found = free_energy_hessian(state, ensemble, symmetry, include_v4=include_v4)
    if evaluator is not None:
        harmonic = harmonic_force_constants(
            state.atoms, state.supercell_matrix, symmetry, in_double_precision(evaluator)
        )
    report = HessianReport(result, found, output)
    write_report(report, harmonic)
    return report


def ensemble_of(
    state: SschaState,
    stored: Ensemble | None,
    evaluator: Evaluator | None,
    n_configs: int | None,
    seed: int,
) -> Ensemble:
    """``stored``, or with more configurations drawn and evaluated; see `hessian_of_run`. To one of
    two levels none are added: they are all drawn anew."""
    have = 0 if stored is None else len(stored.energies)
    wanted = have if n_configs is None else n_configs
    if wanted < 4 or wanted % 2:
        raise InputError(f"--n-configs: {wanted}: must be even and at least 4; the run has {have}")
    if wanted <= have and stored is not None:
        return stored
    if evaluator is None:
        raise InputError(
            f"--n-configs: {wanted}: the run holds {have}; give --checkpoint to sample the rest"
        )
    if stored is not None and stored.two_level:
        have, stored = 0, None
    missing, what = wanted - have, "configurations for the Hessian"
    log.info("sampling %d configurations of the final state", missing)
    fresh = sample_ensemble(state, missing, [seed, SAMPLING_TAG], evaluator, what)
    return fresh if stored is None else joined([stored, fresh])


def hessian_of_structure(
    atoms: Atoms,
    output: str | Path,
    evaluator: Evaluator,
    *,
    run: Callable[[Atoms, Evaluator, Path], SschaResult],
    n_configs: int = DEFAULTS.n_configs,
    include_v4: bool = False,
    seed: int = 0,
) -> HessianReport:
    """SSCHA relaxation of one structure into ``output/sscha`` by ``run``
    (`ranking.jobs.free_energy_on`), then its Hessian.

    Raises ``SschaError`` when the relaxation fails, ``InputError`` where another process works in
    ``output``.
    """
    folder, output = Path(output) / "sscha", Path(output)
    with locked(output, WHAT):
        result = run(atoms, evaluator, folder)
        if result.force_constants is None:
            raise SschaError(f"{atoms.get_chemical_formula()}: SSCHA failed: {result.reason}")
        if not result.converged:
            log.warning("SSCHA %s; the Hessian is that of the last state", result.reason)
        return _hessian_of_run(folder, output, evaluator, n_configs, include_v4, seed)


def shown_point(q: np.ndarray) -> str:
    """``(0.5, 0, 0)``."""
    return "(" + ", ".join(f"{value:g}" for value in np.round(q, 4)) + ")"


def shown_wavenumber(hessian: Hessian, q: int, mode: int) -> str:
    """``-12.3 +- 0.4``: of a mode in cm^-1, with its standard error where it is known."""
    shown = f"{hessian.hbar_omega[q, mode] * EV_IN_CM1:.1f}"
    error = hessian.hbar_omega_error[q, mode] * EV_IN_CM1
    return shown if np.isnan(error) else f"{shown} +- {error:.1f}"


def summary(report: HessianReport) -> dict[str, Any]:
    """What ``hessian.json`` holds."""
    hessian, result = report.hessian, report.result
    q, mode = hessian.deciding
    group = supported_group(result.centroids, result.position_error)
    error = float(ev_to_mev(hessian.hbar_omega_error[q, mode]))
    return {
        **versions(),
        "status": hessian.status,
        "probability_stable": hessian.probability_stable,
        "verdict": report.sentences(),
        "formula": hessian.state.atoms.get_chemical_formula(),
        "pressure_GPa": result.target_pressure,
        "temperature_K": hessian.state.temperature,
        "supercell": list(hessian.state.supercell_matrix),
        "n_configs": hessian.n_configs,
        "fourth_order": hessian.fourth_order,
        "nonanalytic": result.dipoles is not None,
        "unbiased": hessian.unbiased,
        "model": result.model_id,
        "sscha_status": result.status,
        "deciding": {
            "q": hessian.points[q].tolist(),
            "mode": mode + 1,
            "hbar_omega_meV": ev_to_mev(hessian.hbar_omega[q, mode]),
            "error_meV": None if np.isnan(error) else error,
        },
        "space_group": {
            "group": group.group,
            "tolerance_A": group.tolerance,
            "steps": [vars(step) for step in group.steps],
        },
    }


def write_report(report: HessianReport, harmonic: np.ndarray | None) -> None:
    """All files of the report; ``hessian.json`` comes last."""
    hessian, folder = report.hessian, report.folder
    state = hessian.state
    folder.mkdir(parents=True, exist_ok=True)
    write_dyn(state, folder / "dyn_auxiliary")
    write_dyn(state, folder / "dyn_hessian", hessian.force_constants)
    write_frequencies(hessian, folder / "frequencies.csv")
    dipoles = report.result.dipoles
    found = dispersion(hessian, harmonic, report.result.symmetry_tolerance or SYMPREC, dipoles)
    write_dispersion(found, folder / "dispersion.csv")
    physical = replace(state, force_constants=hessian.force_constants)
    write_phonopy(physical, found.path, folder, dipoles)
    title = (
        f"{state.atoms.get_chemical_formula()} at {report.result.target_pressure:g} GPa,"
        f" {state.temperature:g} K: {hessian.status}"
    )
    draw_dispersion(found, folder, title)
    write_json(folder / "hessian.json", summary(report))


def write_phonopy(
    state: SschaState, path: BandPath, folder: Path, dipoles: NonAnalytic | None = None
) -> None:
    """``phonopy.yaml`` with the force constants of ``state``, and Born charges where they are
    given, as ``phonopy-load`` reads them, the same as ``FORCE_CONSTANTS`` (it writes a
    ``phonopy.yaml`` without them over ours, and takes these from then on), and phonopy's own
    ``band.yaml`` along ``path``."""
    from phonopy.file_IO import write_FORCE_CONSTANTS

    labels, phonon = dict(path.ticks), phonopy_crystal(state, dipoles)
    pieces = [path.q[first : last + 1] for first, last in path.segments]
    joins = [np.allclose(one[-1], other[0]) for one, other in pairwise(pieces)] + [False]
    names = []
    for (first, last), joined_on in zip(path.segments, joins, strict=True):
        start, end = (labels[path.distance[index]] for index in (first, last))
        names += [start.split("|")[-1], *(() if joined_on else (end.split("|")[0],))]
    phonon.run_band_structure(pieces, path_connections=joins, labels=names)
    with replacing(folder / "phonopy.yaml") as temporary:
        phonon.save(str(temporary), settings={"force_constants": True})
    with replacing(folder / "FORCE_CONSTANTS") as temporary:
        write_FORCE_CONSTANTS(phonon.force_constants, filename=temporary)
    with replacing(folder / "band.yaml") as temporary:
        phonon.write_yaml_band_structure(filename=str(temporary))


def write_frequencies(hessian: Hessian, path: Path) -> None:
    """CSV: one line per q point of the supercell and mode, imaginary frequencies negative; empty
    errors where there are none."""
    columns = ["q1", "q2", "q3", "star", "mode", "auxiliary_meV", "hessian_meV", "error_meV"]
    auxiliary = ev_to_mev(bands(hessian.state, hessian.state.force_constants, hessian.points))
    numbers = np.stack([hessian.hbar_omega, hessian.hbar_omega_error], axis=-1)
    rows = (
        [*point, hessian.star[q] + 1, mode + 1, auxiliary[q, mode]]
        + [*ev_to_mev(numbers[q, mode]), *(EV_IN_CM1 * numbers[q, mode])]
        for q, point in enumerate(hessian.points)
        for mode in range(numbers.shape[1])
    )
    columns += ["hessian_per_cm", "error_per_cm"]
    write_table(path, columns, (map(cell, row) for row in rows))


def softest_levels(hessian: Hessian, limit: int = 6) -> list[tuple[str, str, str, str]]:
    """The softest levels for the screen: q, degeneracy, auxiliary and Hessian wave number with
    error, cm^-1."""
    auxiliary = bands(hessian.state, hessian.state.force_constants, hessian.points) * EV_IN_CM1
    rows = []
    for star in np.unique(hessian.star):
        q = int(np.argmax(hessian.star == star))
        for level in levels(hessian.squares[q]):
            mode = int(level[0])
            if q == 0 and mode < 3 and np.abs(hessian.squares[0, level]).max() < 1e-12:
                continue
            row = (
                shown_point(hessian.points[q]),
                f"{len(level)} x {int((hessian.star == star).sum())}",
                f"{auxiliary[q, mode]:.1f}",
                shown_wavenumber(hessian, q, mode),
            )
            rows.append((hessian.hbar_omega[q, mode], row))
    return [row for _, row in sorted(rows)[:limit]]


def read_convergence(path: Path) -> dict[str, list[float]]:
    """The columns of a ``convergence.csv``; NaN where a field is empty."""
    with table_rows(path) as reader:
        rows = list(reader)
    names = rows[0].keys() if rows else ()
    return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in names}


def draw_convergence(folder: str | Path, title: str = "") -> Path | None:
    """Draw F and G, pressure, effective sample and gradients against population into
    ``folder/convergence.png`` and ``.svg``.

    Returns the picture, also one that is as new as the table; None without a table, or with a
    warning where it was changed. Error bars are one standard error.
    """
    table, picture = Path(folder) / "convergence.csv", Path(folder) / "convergence.png"
    if not table.is_file():
        return None
    if picture.is_file() and picture.stat().st_mtime >= table.stat().st_mtime:
        return picture
    try:
        columns = read_convergence(table)
    except InputError as error:
        log.warning("no picture of the convergence: %s", error)
        return None
    if not columns:
        return None
    with pictures.figure(2, 2, title=title) as (figure, panels):
        _draw(panels, columns)
        return pictures.save(figure, picture.parent, picture.stem)[1]


def _draw(panels: Sequence[Axes], columns: dict[str, list[float]]) -> None:
    energy, pressure, sample, gradient = panels
    x = columns["population"]
    error = [ev_to_mev(value) for value in columns["error_eV_per_atom"]]
    for index, (name, letter) in enumerate(
        (("gibbs_eV_per_atom", "G"), ("free_energy_eV_per_atom", "F"))
    ):
        last = columns[name][-1]
        heights = [ev_to_mev(value - last) for value in columns[name]]
        label = f"{letter} - ({last:.4f} eV/atom)"
        beside = [population + 0.1 * index for population in x]
        pictures.points(energy, beside, heights, error, index=index, label=label, mfc="none")
    energy.set_ylabel("meV/atom")
    pictures.points(pressure, x, columns["pressure_GPa"], columns.get("pressure_error_GPa"))
    pressure.set_ylabel("pressure (GPa)")
    pictures.points(sample, x, columns["effective_sample"])
    sample.set_ylabel("effective sample / configurations")
    sample.set_ylim(bottom=0.0)
    gradients = {
        "centroid_force_eV_per_A": "largest force on a centroid (eV/\N{ANGSTROM SIGN})",
        "fc_gradient_eV_per_A2": "force constants, at the end (eV/\N{ANGSTROM SIGN}²)",
    }
    for index, (name, label) in enumerate(gradients.items()):
        pictures.points(gradient, x, columns[name], index=index, label=label, mfc="none")
    if any(value > 0 for name in gradients for value in columns[name]):
        pictures.log_scale(gradient)
    gradient.set_ylabel("gradient")
    for axes in (energy, gradient):
        pictures.legend(axes, fontsize=8)
    for axes in panels:
        axes.set_xlabel("population")
        axes.xaxis.get_major_locator().set_params(integer=True)
