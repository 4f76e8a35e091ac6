"""``ranking.csv`` and ``quantum.traj``: what a ranking leaves for people and for other programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.files import remove, replacing, write_table
from magus_anharmonic.ranking.candidate import RANKED, Candidate
from magus_anharmonic.ranking.store import Record
from magus_anharmonic.structures import stripped

COLUMNS = (
    "id",
    "formula",
    "natoms",
    "pressure_GPa",
    "temperature_K",
    "spg_static",
    "spg_quantum",
    "enthalpy_eV_per_atom",
    "gibbs_eV_per_atom",
    "gibbs_error_eV_per_atom",
    "n_evaluations",
    "model",
    "status",
    "reason",
    "rank_static",
    "rank_quantum",
    "same_as",
    "gibbs_raw_eV_per_atom",
    "finite_size_eV_per_atom",
    "natoms_supercell",
    "volume_A3_per_atom",
    "n_merged",
    "seed_of",
    "sscha_folder",
    "difference_eV_per_atom",
    "difference_sampling_error_eV_per_atom",
    "difference_finite_size_error_eV_per_atom",
    "difference_model_error_eV_per_atom",
    "p_lowest_sampling",
    "p_lowest_total",
    "model_error_eV_per_atom",
    "ensemble_error_eV_per_A",
    "parent",
    "hessian_lowest_cm1",
    "hessian_error_cm1",
    "p_stable",
    "model_correction_eV_per_atom",
    "model_correction_error_eV_per_atom",
    "n_pooled",
    "duplicate_spread_eV_per_atom",
    "enthalpy_above_hull_eV_per_atom",
    "gibbs_above_hull_eV_per_atom",
    "gibbs_above_hull_error_eV_per_atom",
    "p_on_hull_sampling",
    "p_on_hull_total",
)


def row(candidate: Candidate) -> dict[str, Any]:
    """The columns of one candidate; energies in eV/atom with six digits, empty where there is no
    number."""
    c = candidate
    values = (
        c.id,
        c.formula,
        len(c.atoms),
        f"{c.pressure:g}",
        f"{c.temperature:g}",
        c.spg_static,
        c.spg_quantum,
        _digits(c.enthalpy),
        _digits(c.gibbs),
        _digits(c.gibbs_error),
        c.n_evaluations,
        c.model,
        c.status,
        c.reason,
        c.rank_static,
        c.rank_quantum,
        c.same_as,
        _digits(c.gibbs_raw),
        _digits(c.finite_size),
        c.n_supercell or "",
        _digits(c.volume),
        max(0, len(c.members) - 1),
        c.seed,
        c.folder,
        _digits(c.difference),
        _digits(c.difference_sampling),
        _digits(c.difference_finite_size),
        _digits(c.difference_model),
        _digits(c.p_lowest),
        _digits(c.p_lowest_total),
        _digits(c.model_error),
        _digits(c.ensemble_error),
        c.parent,
        _digits(c.hessian_lowest),
        _digits(c.hessian_error),
        _digits(c.p_stable),
        _digits(c.model_correction),
        _digits(c.model_correction_error),
        max(1, len(c.pooled)) if c.ranked else "",
        _digits(c.duplicate_spread),
        _digits(c.enthalpy_above_hull),
        _digits(c.gibbs_above_hull),
        _digits(c.gibbs_above_hull_error),
        _digits(c.p_on_hull),
        _digits(c.p_on_hull_total),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def write_ranking(path: str | Path, candidates: Sequence[Candidate]) -> None:
    """Write the table atomically, in the order given."""
    write_table(path, COLUMNS, (row(candidate).values() for candidate in candidates))


def draw_best(run_dir: Path, candidates: Sequence[Candidate], n_best: int) -> list[Path]:
    """``convergence.png`` in the run folders of the lowest ``n_best`` phases and of the saddle
    points; those that have a table."""
    from magus_anharmonic.sscha.convergence_figure import draw_convergence

    best = [
        c
        for c in candidates
        if c.folder and (c.status == "saddle" or (c.rank_quantum or n_best + 1) <= n_best)
    ]
    found = []
    for c in best:
        title = f"{c.formula}, {c.spg_quantum}, {c.pressure:g} GPa, {c.temperature:g} K"
        found.append(draw_convergence(run_dir / "sscha" / c.folder, title))
    return [path for path in found if path is not None]


def write_quantum(path: str | Path, records: Iterable[Record]) -> int:
    """Write the centroids of all records that have a G, lowest first, ``info`` as known; no file
    without any; returns how many.

    ``parent_id`` is the structure whose run led here, ``candidate_id`` the one this run started
    from.
    """
    from ase.io import write

    found = sorted(
        (
            r
            for r in records
            if r.status in RANKED and r.centroids is not None and r.gibbs is not None
        ),
        key=lambda r: (r.key.model, r.key.temperature, r.gibbs),
    )
    if not found:
        remove(path)  # of an earlier stage of the same ranking
        return 0
    with replacing(path) as temporary:
        write(temporary, [_frame(record) for record in found], format="traj")
    return len(found)


def _frame(record: Record) -> Atoms:
    atoms = stripped(record.phase)
    atoms.info = {
        "candidate_id": record.structure,
        "parent_id": record.parent or record.structure,
        "gibbs": record.gibbs,
        "gibbs_error": record.gibbs_error,
        "status": record.status,
        "gibbs_model": record.key.model,
        "spg_quantum": record.spg_quantum,
        "spg_static": record.spg_static,
        "pressure_GPa": record.key.pressure,
        "temperature_K": record.key.temperature,
        "sscha_folder": record.folder,
    }
    return atoms
