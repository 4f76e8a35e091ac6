"""Relaxations and SSCHA of the pool.

Steps ``relax`` (low-enthalpy structures and named phases at more pressures, Fig. 5) and
``foundation`` (Fig. 2).

Steps ``sscha`` (free energies of the lowest distinct structures, Fig. 6) and ``dft`` (are those
that changed real minima?).
"""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ase import Atoms
from ase.io import read, write

from magus_anharmonic.campaign.steps import (
    Context,
    Outcome,
    Step,
    at,
    productions,
    structure_file,
    write_part,
)
from magus_anharmonic.campaign.structures import (
    Found,
    Phase,
    enthalpy_row,
    lowest_distinct,
    phase_name,
    phases_of,
    relaxed_structures,
)
from magus_anharmonic.errors import DamagedFile, MagusAnharmonicError
from magus_anharmonic.io.digests import digest, to_json, versions
from magus_anharmonic.io.files import (
    append_jsonl,
    read_jsonl,
    read_whole,
    readable,
    reading_table,
    replacing,
    replacing_table,
)
from magus_anharmonic.paper.quantities import kept_by_dft
from magus_anharmonic.paper.tables import Enthalpy, SpaceGroups, ranking_file
from magus_anharmonic.ranking.candidate import Candidate, read_ranking
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.search.archive import read_frames
from magus_anharmonic.settings import CalculatorSettings, parse
from magus_anharmonic.structures import decided_group, space_group, stripped, structure_id
from magus_anharmonic.units import GPa

log = logging.getLogger(__name__)


def relax(context: Context, step: Step) -> Outcome:
    """Every low-enthalpy distinct structure of the searches, and every phase given as a file, at
    each pressure."""
    settings, model = context.settings.relax, context.final_model
    assert settings is not None
    found = low_enthalpy(context, settings.max_structures, settings.window)
    with Relaxations(context, step, model, "relax") as relaxations:
        for number, pressure in enumerate(settings.pressures, start=1):
            relaxations.run([one.atoms for one in found], pressure)
            log.info("relax: %d of %d pressures", number, len(settings.pressures))
    return relaxations.outcome(f"{len(relaxations.rows)} {model.model_id}")


def foundation(context: Context, step: Step) -> Outcome:
    """The lowest structures of the nearest production search as the foundation model orders
    them."""
    settings, name = context.settings.foundation_check, step.needs[0]
    assert settings is not None
    structures = relaxed_structures(context.folder(name), name)
    starts = [one.atoms for one in lowest_distinct(structures, settings.max_structures)]
    with Relaxations(context, step, context.foundation, "foundation") as relaxations:
        relaxations.run(starts, settings.pressure)
    return relaxations.outcome(context.foundation.model_id)


class Relaxations(ExitStack):
    """Structures, and the phases given as files in their symmetry, relaxed with one model: rows of
    ``enthalpies.csv``, the structures themselves, and what failed."""

    def __init__(
        self, context: Context, step: Step, model: Any, source: Literal["relax", "foundation"]
    ) -> None:
        super().__init__()
        self.context, self.step, self.model, self.source = context, step, model, source
        self.folder, self.phases = context.folder(step), phases_of(context.settings.phases)
        self.rows: list[Enthalpy] = []
        self.failures: list[tuple[str, str]] = []
        self.evaluations = 0

    def __enter__(self) -> Relaxations:
        super().__enter__()
        self.file = self.enter_context(structure_file(self.folder))
        return self

    def run(self, starts: Sequence[Atoms], pressure: GPa) -> None:
        """Relax at one pressure (GPa); structures that end as one are one row."""
        known = [phase for phase in self.phases if phase.atoms is not None]
        fixed = [phase.atoms for phase in known if phase.atoms is not None]
        named: dict[int, str] = {}
        results: list[tuple[Atoms, Relaxed]] = []
        for structures, keep in ((starts, False), (fixed, True)):
            found = _relaxed_at(
                self.model, self.context, self.folder, structures, pressure, fixed=keep
            )
            results += zip(structures, found, strict=True)
            if keep:
                named = {id(one): phase.name for one, phase in zip(found, known, strict=True)}
        seen: set[str] = set()
        for start, result in results:
            self.evaluations += result.n_steps
            if result.failed:
                reason = f"{pressure:g} GPa: {result.reason}"
                self.failures.append((structure_id(start), reason))
                continue
            item = Found(stripped(result.atoms), float(result.enthalpy), self.step.id)
            if item.id not in seen:
                seen.add(item.id)
                name, model_id = named.get(id(result), ""), self.model.model_id
                row = enthalpy_row(item, self.phases, pressure, model_id, self.source, name)
                self.rows.append(row)
                self.file.add(item.atoms, item.id, row.space_group, pressure, "static")

    def outcome(self, output: str) -> Outcome:
        """The rows written, and what the step did."""
        write_part(self.folder, Enthalpy, self.rows)
        return Outcome(len(self.rows), self.evaluations, failures=self.failures, output=output)


def low_enthalpy(context: Context, n: int, window: float | None = None) -> list[Found]:
    """The ``n`` lowest distinct structures of every production search, each phase once over all
    searches."""
    from magus_anharmonic.ranking.matcher import Fingerprint, same_phase

    kept: list[tuple[Found, Fingerprint]] = []
    for name in productions(context.settings):
        for found in lowest_distinct(relaxed_structures(context.folder(name), name), n, window):
            mine = Fingerprint(found.atoms)
            if not any(same_phase(mine, other) for _, other in kept):
                kept.append((found, mine))
    return [found for found, _ in kept]


@dataclass(frozen=True)
class Relaxed:
    """The end of one relaxation, enthalpy in eV/atom."""

    atoms: Atoms
    enthalpy: float
    n_steps: int
    failed: bool
    reason: str


def _relaxed_at(
    model: Any,
    context: Context,
    folder: Path,
    structures: Sequence[Atoms],
    pressure: GPa,
    *,
    fixed: bool,
) -> list[Relaxed]:
    """Relaxations in the order of ``structures``; kept on disk per pressure, so that a killed step
    goes on."""
    from magus_anharmonic.potential.relax import relax as relax_all
    from magus_anharmonic.potential.relax import relax_options

    if not structures:
        return []
    keys = parse(
        CalculatorSettings, {"calculator": "mattersim", **context.settings.calculator}, "calculator"
    )
    identity = [
        versions(),
        model.model_id,
        keys.model_dump(mode="json"),
        fixed,
        [structure_id(atoms) for atoms in structures],
    ]
    stored = (
        folder
        / "relaxed"
        / f"{at('named' if fixed else 'found', pressure)}-{digest(to_json(identity))}.traj"
    )
    kept = read_whole(stored, lambda file: _read_relaxed(file, len(structures)))
    if kept is None:
        # Kicks break a symmetry that is to be kept.
        options = relax_options(keys) | {
            "fix_symmetry": fixed,
            "relax_cell": True,
            "perturbations": 0 if fixed else keys.perturbations,
        }
        found = relax_all(model, [stripped(atoms) for atoms in structures], pressure, **options)
        with replacing(stored) as temporary:
            write(temporary, [_frame(result) for result in found], format="traj")
        kept = _read_relaxed(stored, len(structures))
    return kept


def _read_relaxed(file: Path, n: int) -> list[Relaxed]:
    """The ``n`` relaxed structures of a file; raises ``DamagedFile``."""
    names = ("enthalpy", "n_steps", "failed", "reason")
    frames = read_frames(file)
    with readable(file, "relaxed structures"):
        found = [
            Relaxed(stripped(frame), **{name: frame.info[name] for name in names})
            for frame in frames
        ]
    if len(found) != n:
        raise DamagedFile(f"{file}: holds {len(found)} of {n} structures")
    return found


def _frame(result: Any) -> Atoms:
    frame = stripped(result.atoms)
    frame.info = {
        "enthalpy": float(result.enthalpy),
        "n_steps": int(result.n_steps),
        "failed": bool(result.failed),
        "reason": str(result.reason),
    }
    return frame


def phase_structure(context: Context, phase: Phase, pressure: GPa) -> Atoms | None:
    """A structure of the phase to start from: its file, or the lowest one found by the production
    searches; None when none was."""
    if phase.atoms is not None:
        return phase.atoms
    names = sorted(
        productions(context.settings),
        key=lambda name: abs(float(name.split("-")[-1].removesuffix("GPa")) - pressure),
    )
    for name in names:
        matching = (
            found
            for found in relaxed_structures(context.folder(name), name)
            if phase_name([phase], found.atoms, space_group(found.atoms, 0.05)) == phase.name
        )
        lowest = min(matching, key=lambda found: found.enthalpy, default=None)
        if lowest is not None:
            return lowest.atoms
    return None


def sscha(context: Context, step: Step) -> Outcome:
    """Rank the lowest distinct structures at one pressure; the table is ``ranking-<P>GPa.csv``."""
    from magus_anharmonic.paper.truth import labels_of
    from magus_anharmonic.ranking.structures import rank_structures

    folder, pressure = context.folder(step), step.pressure or 0.0
    settings = context.settings.ranking_settings(pressure, context.final_checkpoint)
    assert settings.sscha is not None
    name = step.needs[-1]
    pool = lowest_distinct(
        relaxed_structures(context.folder(name), name), 2 * settings.sscha.max_candidates
    )
    if not pool:
        raise MagusAnharmonicError(f"{step.id}: {name} left no structure")
    seed = context.settings.seed
    candidates = rank_structures(
        [found.atoms for found in pool],
        context.final_model,
        settings,
        folder,
        seed=seed,
        truth=labels_of(settings, folder),
    )
    with replacing_table(folder / "tables" / ranking_file(pressure)) as temporary:
        shutil.copyfile(SearchFolder(folder).ranking, temporary)
    with structure_file(folder) as file:
        for candidate in candidates:
            file.add(candidate.atoms, candidate.id, candidate.spg_static, pressure, "static")
            if candidate.centroids is not None:
                file.add(
                    candidate.centroids, candidate.id, candidate.spg_quantum, pressure, "centroids"
                )
    failures = [
        (candidate.id, candidate.reason) for candidate in candidates if candidate.status == "failed"
    ]
    best = next((candidate for candidate in candidates if candidate.rank_quantum == 1), None)
    if best is not None:
        log.info(
            "%s: lowest free energy %s, %s -> %s, %.4f eV/atom",
            step.id,
            best.id,
            best.spg_static,
            best.spg_quantum,
            best.gibbs or 0.0,
        )
    elif any(candidate.status == "unconverged" for candidate in candidates):
        log.warning(
            "%s: no free energy has converged, so there is no order; the reasons are in %s",
            step.id,
            SearchFolder(folder).ranking,
        )
    else:
        raise MagusAnharmonicError(
            f"{step.id}: no structure has a free energy; the reasons are in"
            f" {folder / 'ranking.csv'}"
        )
    evaluations = sum(candidate.free_energy.n_evaluations for candidate in candidates)
    output = "none converged" if best is None else f"{best.id} {best.gibbs:.6f}"
    return Outcome(len(candidates), evaluations, output=output, failures=failures)


def dft(context: Context, step: Step) -> Outcome:
    """Relax by DFT, from its static structure, every candidate whose space group the SSCHA changed.

    A relaxation that is finished is kept in ``relaxed.jsonl`` and not done again.
    """
    settings = context.settings.dft
    assert settings is not None
    folder = context.folder(step)
    rows: list[SpaceGroups] = []
    failures: list[tuple[str, str]] = []
    n_labels = 0
    with context.labeler(folder) as labeler:
        for name in step.needs:
            chosen = changed_candidates(context.folder(name), settings.max_structures)
            pressure = chosen[0][0].pressure if chosen else 0.0
            told = "%s: %d candidates changed their space group; relaxing them by DFT"
            log.info(told, name, len(chosen))
            starts, file = [atoms for _, atoms in chosen], folder / "relaxed.jsonl"
            relaxed = relaxed_by_dft(labeler, starts, pressure, file, settings)
            for (row, _), record in zip(chosen, relaxed, strict=True):
                n_labels += int(record["n_steps"])
                if record["failed"]:
                    failures.append((row.id, str(record["reason"])))
                groups = row.spg_static, record["space_group"], row.spg_quantum
                end = record["enthalpy"], record["reason"]
                rows.append(SpaceGroups(row.id, pressure, *groups, *end))
        output = labeler.settings_hash
    write_part(folder, SpaceGroups, rows)
    kept, checked = kept_by_dft(rows)
    log.info("dft: %d of %d candidates keep their static space group", kept, checked)
    return Outcome(len(rows), 0, n_labels, output=output, failures=failures)


def changed_candidates(folder: Path, limit: int | None = None) -> list[tuple[Candidate, Atoms]]:
    """Rows of a ranking whose space group the SSCHA changed, with their static structures; lowest
    free energy first."""
    statics = {str(atoms.info["id"]): atoms for atoms in read_statics(folder)}
    rows = [
        row
        for row in read_ranking(SearchFolder(folder).ranking)
        if decided_group(row.spg_quantum) not in ("", row.spg_static)
    ]
    usable = [
        row for row in rows if row.status not in ("failed", "unconverged") and row.id in statics
    ]
    return [(row, stripped(statics[row.id])) for row in usable[:limit]]


def read_statics(folder: Path) -> list[Atoms]:
    """The static structures of a ranking's table; raises ``DamagedFile``."""
    file = folder / "tables" / "structures.extxyz"
    if not file.is_file():
        return []
    with readable(file, "extxyz"):
        with reading_table(file) as opened:
            frames: Any = read(
                io.TextIOWrapper(opened, encoding="utf-8"), index=":", format="extxyz"
            )
        return [atoms for atoms in frames if atoms.info["kind"] == "static" and atoms.info["id"]]


def relaxed_by_dft(
    labeler: Any, structures: Sequence[Atoms], pressure: GPa, file: Path, settings: Any
) -> list[dict[str, Any]]:
    """One record per structure: space_group (empty when it failed), enthalpy (eV/atom), n_steps,
    failed, reason."""
    common = [
        labeler.settings_hash,
        pressure,
        settings.force_tolerance,
        settings.max_steps,
        settings.symprec,
    ]
    keys = [str([structure_id(atoms), *common]) for atoms in structures]
    known = {record["key"]: record for record in read_jsonl(file)}
    waiting = [index for index, key in enumerate(keys) if key not in known]
    batch = max(1, int(getattr(labeler, "n_workers", 1)))
    for first in range(0, len(waiting), batch):
        part = waiting[first : first + batch]
        results = labeler.relax(
            [structures[index] for index in part],
            pressure,
            force_tolerance=settings.force_tolerance,
            max_steps=settings.max_steps,
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
