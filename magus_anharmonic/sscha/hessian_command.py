"""What ``magus-anharmonic hessian`` does: a finished SSCHA run (or a structure, which is run first)
to phonons and a verdict."""

from __future__ import annotations

import csv
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from magus_anharmonic.errors import InputError, SschaError
from magus_anharmonic.evaluator import Evaluator, as_evaluator
from magus_anharmonic.gate import read_structures
from magus_anharmonic.io.digests import versions
from magus_anharmonic.io.files import write_json, write_text
from magus_anharmonic.runs.lock import locked
from magus_anharmonic.sscha.ensemble import Ensemble, joined
from magus_anharmonic.sscha.hessian import Hessian, free_energy_hessian, levels
from magus_anharmonic.sscha.phonons import dispersion, draw_dispersion, write_dispersion
from magus_anharmonic.sscha.qe_files import write_dyn
from magus_anharmonic.sscha.result import SschaResult, final_ensemble
from magus_anharmonic.sscha.sampling import sample_ensemble
from magus_anharmonic.sscha.start import harmonic_force_constants, in_double_precision
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.unstable import supported_group
from magus_anharmonic.units import EV_IN_CM1

log = logging.getLogger(__name__)

SAMPLING_TAG = 4177
"""Separates the random numbers of these ensembles from those of other purposes with the same
seed."""


WHAT = "magus-anharmonic hessian"
"""Names this work in the lock of its folder."""


@dataclass(frozen=True)
class HessianReport:
    """What was found, and where the files are."""

    result: SschaResult
    hessian: Hessian
    folder: Path

    def sentences(self) -> list[str]:
        """The verdict in words."""
        lines = verdict(self.hessian)
        if not self.result.converged:
            lines.append(
                "The SSCHA run had not converged: the state may still move, and its Hessian"
                " with it."
            )
        return lines


def check_source(source: Path, checkpoint: str | None, n_configs: int | None) -> bool:
    """Whether ``source`` is the folder of a finished run (else it is a structure file). Raises
    ``InputError`` before any work."""
    if n_configs is not None and (n_configs < 4 or n_configs % 2):
        raise InputError(f"--n-configs: {n_configs}: must be even and at least 4")
    if source.is_dir():
        if not (source / "result.json").is_file():
            raise InputError(
                f"{source}: has no result.json: not the folder of a finished SSCHA run (rank keeps"
                " them in sscha/<id>)"
            )
        return True
    read_structure(source)
    if checkpoint is None:
        raise InputError(
            "--checkpoint: a structure needs one (a MatterSim name, a path, or a shipped"
            " checkpoint)"
        )
    return False


def hessian_of_run(
    run: str | Path,
    output: str | Path,
    *,
    evaluator: Evaluator | None = None,
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
    evaluator: Evaluator | None,
    n_configs: int | None,
    include_v4: bool,
    seed: int,
) -> HessianReport:
    result = SschaResult.read(run)
    state = result.state
    evaluator = None if evaluator is None else as_evaluator(evaluator, [state.atoms])
    if evaluator is not None and evaluator.model_id != result.model_id:
        raise InputError(
            f"--checkpoint: is the model {evaluator.model_id}, the run in {run} was made with"
            f" {result.model_id}"
        )
    ensemble = ensemble_of(state, final_ensemble(run, result), evaluator, n_configs, seed)
    symmetry = Symmetry(state.atoms, state.supercell_matrix)
    found = free_energy_hessian(state, ensemble, symmetry, include_v4=include_v4)
    harmonic = None
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
    """``stored``, or with more configurations drawn and evaluated; see `hessian_of_run`."""
    have = 0 if stored is None else len(stored.energies)
    wanted = have if n_configs is None else n_configs
    if wanted < 4 or wanted % 2:
        raise InputError(
            f"--n-configs: {wanted}: must be even and at least 4"
            + ("" if have else " (the run keeps no ensemble of its last state)")
        )
    if wanted <= have and stored is not None:
        return stored
    if evaluator is None:
        raise InputError(
            f"--n-configs: {wanted}: the run holds {have}; give --checkpoint to sample the rest"
        )
    log.info("sampling %d configurations of the final state", wanted - have)
    fresh = sample_ensemble(
        state, wanted - have, [seed, SAMPLING_TAG], evaluator, "configurations for the Hessian"
    )
    return fresh if stored is None else joined([stored, fresh])


def hessian_of_structure(
    structure: str | Path,
    output: str | Path,
    evaluator: Evaluator,
    *,
    pressure: float,
    temperature: float,
    supercell: Any,
    n_configs: int,
    max_populations: int = 30,
    fixed_cell: bool = False,
    include_v4: bool = False,
    seed: int = 0,
) -> HessianReport:
    """SSCHA relaxation of one structure into ``output/sscha``, then its Hessian.

    Raises ``SschaError`` when the relaxation fails, ``InputError`` where another process works in
    ``output``.
    """
    from magus_anharmonic.sscha.gibbs import free_energy

    output = Path(output)
    with locked(output, WHAT):
        result = free_energy(
            read_structure(structure),
            evaluator,
            pressure,
            temperature,
            supercell=supercell,
            cell="fixed" if fixed_cell else "variable",
            n_configs=n_configs,
            max_populations=max_populations,
            seed=seed,
            directory=output / "sscha",
        )
        if result.force_constants is None:
            raise SschaError(f"{structure}: SSCHA failed: {result.reason}")
        if not result.converged:
            log.warning("SSCHA %s; the Hessian is that of the last state", result.reason)
        return _hessian_of_run(output / "sscha", output, evaluator, n_configs, include_v4, seed)


def read_structure(path: str | Path) -> Any:
    """The one structure of a file; raises ``InputError``."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, and no folder of a finished SSCHA run")
    found = read_structures(path)
    if len(found) != 1:
        raise InputError(
            f"{path}: holds {len(found)} structures; give one (`magus-anharmonic rank` takes many)"
        )
    return found[0]


def verdict(hessian: Hessian) -> list[str]:
    """Stable, saddle or undecided, why, and how sure."""
    q, mode = hessian.lowest
    hbar_omega = hessian.hbar_omega[q, mode] * EV_IN_CM1
    error = (
        ""
        if hessian.hbar_omega_error is None
        else f" +- {hessian.hbar_omega_error[q, mode] * EV_IN_CM1:.1f}"
    )
    point = "(" + ", ".join(f"{value:g}" for value in np.round(hessian.points[q], 4)) + ")"
    lowest = (
        f"{'imaginary ' if hbar_omega < 0 else ''}{abs(hbar_omega):.1f}{error} cm^-1 at q = {point}"
    )
    words = {
        "stable": (
            "Stable: every mode of the supercell is positive beyond two standard errors; the least"
            f" certain is {lowest}."
        ),
        "saddle": (
            "Saddle point, not a minimum of the free energy: a mode is negative beyond two"
            f" standard errors, {lowest}."
        ),
        "undecided": (
            f"Undecided between a minimum and a saddle point; the mode in question is {lowest}. "
            "Take more configurations (--n-configs)."
        ),
    }
    lines = [
        words[hessian.status],
        f"Probability that it is stable: {hessian.probability_stable:.3f} (sampling errors alone).",
    ]
    if not hessian.fourth_order:
        lines.append("The fourth-order term is left out (--v4 adds it).")
    return lines


def summary(report: HessianReport) -> dict[str, Any]:
    """What ``hessian.json`` holds."""
    hessian, result = report.hessian, report.result
    q, mode = hessian.lowest
    errors = hessian.hbar_omega_error
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
        "unbiased": hessian.unbiased,
        "model": result.model_id,
        "sscha_status": result.status,
        "lowest": {
            "q": hessian.points[q].tolist(),
            "mode": mode + 1,
            "hbar_omega_meV": 1e3 * hessian.hbar_omega[q, mode],
            "error_meV": None if errors is None else 1e3 * errors[q, mode],
        },
        "space_group": supported_group(result.centroids, result.position_error).as_dict(),
    }


def write_report(report: HessianReport, harmonic: np.ndarray | None) -> None:
    """All files of the report; ``hessian.json`` comes last."""
    hessian, folder = report.hessian, report.folder
    state = hessian.state
    folder.mkdir(parents=True, exist_ok=True)
    write_dyn(state, folder / "dyn_auxiliary")
    write_dyn(state, folder / "dyn_hessian", hessian.force_constants)
    write_text(folder / "frequencies.csv", frequency_table(hessian))
    found = dispersion(hessian, harmonic)
    write_dispersion(found, folder / "dispersion.csv")
    title = (
        f"{state.atoms.get_chemical_formula()} at {report.result.target_pressure:g} GPa,"
        f" {state.temperature:g} K: {hessian.status}"
    )
    for suffix in ("png", "svg"):
        draw_dispersion(found, folder / f"dispersion.{suffix}", title)
    write_json(folder / "hessian.json", summary(report))


def frequency_table(hessian: Hessian) -> str:
    """CSV: one line per q point of the supercell and mode, imaginary frequencies negative; empty
    errors where there are none."""
    from magus_anharmonic.sscha.phonons import bands

    auxiliary = bands(hessian.state, hessian.state.force_constants, hessian.points)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "q1",
            "q2",
            "q3",
            "star",
            "mode",
            "auxiliary_meV",
            "hessian_meV",
            "error_meV",
            "hessian_per_cm",
            "error_per_cm",
        ]
    )
    errors = (
        np.full(hessian.squares.shape, np.nan)
        if hessian.hbar_omega_error is None
        else hessian.hbar_omega_error
    )
    for q, point in enumerate(hessian.points):
        for mode, hbar_omega in enumerate(hessian.hbar_omega[q]):
            numbers = [
                auxiliary[q, mode] * 1e3,
                hbar_omega * 1e3,
                errors[q, mode] * 1e3,
                hbar_omega * EV_IN_CM1,
                errors[q, mode] * EV_IN_CM1,
            ]
            shown = ["" if np.isnan(number) else f"{number:.6f}" for number in numbers]
            writer.writerow(
                [*(f"{value:.8f}" for value in point), hessian.star[q] + 1, mode + 1, *shown]
            )
    return text.getvalue()


def table_rows(hessian: Hessian, limit: int = 6) -> list[tuple[str, str, str, str]]:
    """The softest levels for the screen: q, degeneracy, auxiliary and Hessian wave number with
    error, cm^-1."""
    from magus_anharmonic.sscha.phonons import bands

    auxiliary = bands(hessian.state, hessian.state.force_constants, hessian.points) * EV_IN_CM1
    rows = []
    for star in np.unique(hessian.star):
        q = int(np.argmax(hessian.star == star))
        for level in levels(hessian.squares[q]):
            if q == 0 and level[0] < 3 and np.abs(hessian.squares[0, level]).max() < 1e-12:
                continue
            error = (
                ""
                if hessian.hbar_omega_error is None
                else f" +- {hessian.hbar_omega_error[q, level[0]] * EV_IN_CM1:.1f}"
            )
            value = hessian.hbar_omega[q, level[0]] * EV_IN_CM1
            point = "(" + ", ".join(f"{x:g}" for x in np.round(hessian.points[q], 4)) + ")"
            rows.append(
                (
                    value,
                    (
                        point,
                        f"{len(level)} x {int((hessian.star == star).sum())}",
                        f"{auxiliary[q, level[0]]:.1f}",
                        f"{value:.1f}{error}",
                    ),
                )
            )
    return [row for _, row in sorted(rows)[:limit]]
