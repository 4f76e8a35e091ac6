"""Steps ``sscha`` (free energies of the lowest distinct structures, Fig. 6) and ``dft`` (are those that changed real minima?)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import read

from magus_anharmonic.campaign.context import Context, Outcome, structure_file
from magus_anharmonic.campaign.found import lowest_distinct, relaxed_structures
from magus_anharmonic.campaign.plan import Step
from magus_anharmonic.campaign.tables import read_rows, write_part
from magus_anharmonic.errors import DamagedFile, MagusAnharmonicError
from magus_anharmonic.files import append_jsonl, raise_trouble, read_jsonl, replacing
from magus_anharmonic.structures import bare, decided_group, space_group, structure_id

log = logging.getLogger(__name__)


def sscha(context: Context, step: Step) -> Outcome:
    """Rank the lowest distinct structures at one pressure; the table is ``ranking-<P>GPa.csv``."""
    from magus_anharmonic.ranking import rank_structures

    folder, pressure = context.folder(step), step.pressure or 0.0
    settings = context.settings.ranking_settings(pressure, context.final_checkpoint)
    assert settings.sscha is not None
    name = step.needs[-1]
    pool = lowest_distinct(relaxed_structures(context.folder(name), name), 2 * settings.sscha.max_candidates)
    if not pool:
        raise MagusAnharmonicError(f"{step.id}: {name} left no structure")
    seed = context.settings.seed
    candidates = rank_structures([found.atoms for found in pool], context.final_model, settings, folder, seed=seed)
    with replacing(folder / "tables" / f"ranking-{pressure:g}GPa.csv") as temporary:
        shutil.copyfile(folder / "ranking.csv", temporary)
    with structure_file(folder) as file:
        for candidate in candidates:
            file.add(candidate.atoms, candidate.id, candidate.spg_static, pressure, "static")
            if candidate.centroids is not None:
                file.add(candidate.centroids, candidate.id, candidate.spg_quantum, pressure, "centroids")
    failures = [(candidate.id, candidate.reason) for candidate in candidates if candidate.status == "failed"]
    best = next((candidate for candidate in candidates if candidate.rank_quantum == 1), None)
    if best is not None:
        log.info(
            "%s: lowest free energy %s, %s -> %s, %.4f eV/atom", step.id, best.id, best.spg_static, best.spg_quantum, best.gibbs or 0.0
        )
    elif any(candidate.status == "unconverged" for candidate in candidates):
        log.warning("%s: no free energy has converged, so there is no order; the reasons are in %s", step.id, folder / "ranking.csv")
    else:
        raise MagusAnharmonicError(f"{step.id}: no structure has a free energy; the reasons are in {folder / 'ranking.csv'}")
    evaluations = sum(candidate.n_evaluations for candidate in candidates)
    output = "none converged" if best is None else f"{best.id} {best.gibbs:.6f}"
    return Outcome(len(candidates), evaluations, output=output, failures=failures)


def dft(context: Context, step: Step) -> Outcome:
    """Relax by DFT, from its static structure, every candidate whose space group the SSCHA changed.

    A relaxation that is finished is kept in ``relaxed.jsonl`` and not done again.
    """
    settings = context.settings.dft
    assert settings is not None
    folder = context.folder(step)
    rows: list[tuple[object, ...]] = []
    failures: list[tuple[str, str]] = []
    n_labels = 0
    with context.labeler(folder) as labeler:
        for name in step.needs:
            chosen = changed_candidates(context.folder(name), settings.max_structures)
            pressure = float(chosen[0][0]["pressure_GPa"]) if chosen else 0.0
            log.info("%s: %d candidates changed their space group; relaxing them by DFT", name, len(chosen))
            relaxed = relaxed_by_dft(labeler, [atoms for _, atoms in chosen], pressure, folder / "relaxed.jsonl", settings)
            for (row, _), record in zip(chosen, relaxed, strict=True):
                n_labels += int(record["n_steps"])
                group = record["space_group"]
                if record["failed"]:
                    failures.append((row["id"], str(record["reason"])))
                rows.append((row["id"], pressure, row["spg_static"], group, row["spg_quantum"], record["enthalpy"], record["reason"]))
        output = labeler.settings_hash
    write_part(folder, "space_groups", rows)
    kept = sum(row[2] == row[3] for row in rows)
    log.info("dft: %d of %d candidates keep their static space group when relaxed by DFT", kept, len(rows))
    return Outcome(len(rows), 0, n_labels, output=output, failures=failures)


def changed_candidates(folder: Path, limit: int | None = None) -> list[tuple[dict[str, str], Atoms]]:
    """Rows of a ranking whose space group the SSCHA changed, with their static structures; lowest free energy first."""
    statics = {str(atoms.info["id"]): atoms for atoms in read_statics(folder)}
    rows = [row for row in read_rows(folder / "ranking.csv") if decided_group(row["spg_quantum"]) not in ("", row["spg_static"])]
    usable = [row for row in rows if row["status"] not in ("failed", "unconverged") and row["id"] in statics]
    return [(row, bare(statics[row["id"]])) for row in usable[:limit]]


def read_statics(folder: Path) -> list[Atoms]:
    """The static structures of a ranking's table; raises ``DamagedFile``."""
    file = folder / "tables" / "structures.extxyz"
    if not file.is_file():
        return []
    try:
        frames: Any = read(file, index=":", format="extxyz")
        return [atoms for atoms in frames if atoms.info["kind"] == "static" and atoms.info["id"]]
    except Exception as error:  # whatever ASE trips over in a damaged file
        raise_trouble(error, file)
        raise DamagedFile(f"{file}: damaged or not readable as extxyz ({type(error).__name__}: {error})") from None


def relaxed_by_dft(labeler: Any, structures: Sequence[Atoms], pressure: float, file: Path, settings: Any) -> list[dict[str, Any]]:
    """One record per structure: space_group (empty when it failed), enthalpy (eV/atom), n_steps, failed, reason."""
    common = [labeler.settings_hash, pressure, settings.force_tolerance, settings.max_steps, settings.symprec]
    keys = [str([structure_id(atoms), *common]) for atoms in structures]
    known = {record["key"]: record for record in read_jsonl(file)}
    waiting = [index for index, key in enumerate(keys) if key not in known]
    batch = max(1, int(getattr(labeler, "n_workers", 1)))
    for first in range(0, len(waiting), batch):
        part = waiting[first : first + batch]
        results = labeler.relax(
            [structures[index] for index in part], pressure, force_tolerance=settings.force_tolerance, max_steps=settings.max_steps
        )
        for index, result in zip(part, results, strict=True):
            record = {
                "key": keys[index],
                "space_group": "" if result.failed else space_group(result.atoms, settings.symprec),
                "enthalpy": None if result.failed else float(result.enthalpy),
                "n_steps": int(result.n_steps) + (not result.failed),
                "failed": bool(result.failed),
                "reason": str(result.reason),
                "symbols": result.atoms.get_chemical_symbols(),
                "cell": result.atoms.cell.array,
                "positions": result.atoms.positions,
            }
            append_jsonl(file, record)
            known[keys[index]] = record
    return [known[key] for key in keys]
