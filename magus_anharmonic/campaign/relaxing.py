"""Steps ``relax`` (low-enthalpy structures and named phases at more pressures, Fig. 5) and ``foundation`` (Fig. 2)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import write

from magus_anharmonic.campaign.context import Context, Outcome, structure_file
from magus_anharmonic.campaign.found import Found, Phase, enthalpy_row, lowest_distinct, phase_name, phases_of, relaxed_structures
from magus_anharmonic.campaign.plan import Step, at, productions
from magus_anharmonic.campaign.tables import write_part
from magus_anharmonic.errors import DamagedFile
from magus_anharmonic.files import digest, read_whole, replacing, versions
from magus_anharmonic.search.archive import read_frames
from magus_anharmonic.settings import CalculatorSettings, parse
from magus_anharmonic.structures import bare, space_group, structure_id

log = logging.getLogger(__name__)


def relax(context: Context, step: Step) -> Outcome:
    """Every low-enthalpy distinct structure of the searches, and every phase given as a file, at each pressure."""
    settings = context.settings.relax
    assert settings is not None
    folder, phases = context.folder(step), phases_of(context.settings.phases)
    starts = [found.atoms for found in low_enthalpy(context, settings.max_structures, settings.window)]
    known = [phase for phase in phases if phase.atoms is not None]
    rows: list[tuple[object, ...]] = []
    failures: list[tuple[str, str]] = []
    evaluations = 0
    with structure_file(folder) as file:
        for number, pressure in enumerate(settings.pressures, start=1):
            free = _relaxed_at(context.final_model, context, folder, starts, pressure, fixed=False)
            held = _relaxed_at(context.final_model, context, folder, [phase.atoms for phase in known], pressure, fixed=True)
            named = {id(result): phase for result, phase in zip(held, known, strict=True)}
            found: dict[str, tuple[Found, Any]] = {}
            for start, result in [*zip(starts, free, strict=True), *zip([phase.atoms for phase in known], held, strict=True)]:
                evaluations += result.n_steps
                if result.failed:
                    failures.append((structure_id(start), f"{pressure:g} GPa: {result.reason}"))
                else:
                    item = Found(bare(result.atoms), float(result.enthalpy), step.id)
                    found.setdefault(item.id, (item, named.get(id(result))))
            for item, phase in found.values():
                rows.append(_named(enthalpy_row(item, phases, pressure, context.final_model.model_id, "relax"), phase))
                file.add(item.atoms, item.id, str(rows[-1][4]), pressure, "static")
            log.info("relax: %d of %d pressures, %d structures each", number, len(settings.pressures), len(starts) + len(known))
    write_part(folder, "enthalpies", rows)
    return Outcome(len(rows), evaluations, failures=failures, output=f"{len(rows)} {context.final_model.model_id}")


def _named(row: tuple[object, ...], phase: Phase | None) -> tuple[object, ...]:
    """The row with the name of the phase whose symmetry was kept in the relaxation."""
    return row if phase is None else (row[0], phase.name, *row[2:])


def low_enthalpy(context: Context, n: int, window: float | None = None) -> list[Found]:
    """The ``n`` lowest distinct structures of every production search, each phase once over all searches."""
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


def _relaxed_at(model: Any, context: Context, folder: Path, structures: Sequence[Atoms], pressure: float, *, fixed: bool) -> list[Relaxed]:
    """Relaxations in the order of ``structures``; kept on disk per pressure, so that a killed step goes on."""
    from magus_anharmonic.potential.portable import relax_options
    from magus_anharmonic.potential.relax import relax as relax_all

    if not structures:
        return []
    keys = parse(CalculatorSettings, {"calculator": "mattersim", **context.settings.calculator}, "calculator")
    identity = [versions(), model.model_id, keys.model_dump(mode="json"), fixed, [structure_id(atoms) for atoms in structures]]
    stored = folder / "relaxed" / f"{at('named' if fixed else 'found', pressure)}-{digest(json.dumps(identity))}.traj"
    kept = read_whole(stored, lambda file: _read_relaxed(file, len(structures)))
    if kept is None:
        # Kicks break a symmetry that is to be kept.
        options = relax_options(keys) | {"fix_symmetry": fixed, "relax_cell": True, "kicks": 0 if fixed else keys.kicks}
        found = relax_all(model, [bare(atoms) for atoms in structures], pressure, **options)
        with replacing(stored) as temporary:
            write(temporary, [_frame(result) for result in found], format="traj")
        kept = _read_relaxed(stored, len(structures))
    return kept


def _read_relaxed(file: Path, n: int) -> list[Relaxed]:
    """The ``n`` relaxed structures of a file; raises ``DamagedFile``."""
    names = ("enthalpy", "n_steps", "failed", "reason")
    frames = read_frames(file)
    try:
        found = [Relaxed(bare(frame), **{name: frame.info[name] for name in names}) for frame in frames]
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{file}: damaged: holds no relaxed structures ({type(error).__name__}: {error})") from None
    if len(found) != n:
        raise DamagedFile(f"{file}: holds {len(found)} of {n} structures")
    return found


def _frame(result: Any) -> Atoms:
    frame = bare(result.atoms)
    frame.info = {
        "enthalpy": float(result.enthalpy), "n_steps": int(result.n_steps), "failed": bool(result.failed), "reason": str(result.reason),
    }  # fmt: skip
    return frame


def foundation(context: Context, step: Step) -> Outcome:
    """The lowest structures of the nearest production search as the foundation model orders them."""
    settings = context.settings.foundation_check
    assert settings is not None
    folder, phases, name = context.folder(step), phases_of(context.settings.phases), step.needs[0]
    starts = [found.atoms for found in lowest_distinct(relaxed_structures(context.folder(name), name), settings.max_structures)]
    known = [phase for phase in phases if phase.atoms is not None]
    free = _relaxed_at(context.foundation, context, folder, starts, settings.pressure, fixed=False)
    held = _relaxed_at(context.foundation, context, folder, [phase.atoms for phase in known], settings.pressure, fixed=True)
    rows, failures = [], []
    with structure_file(folder) as file:
        for result, phase in [*((result, None) for result in free), *zip(held, known, strict=True)]:
            if result.failed:
                failures.append((structure_id(result.atoms), str(result.reason)))
                continue
            item = Found(bare(result.atoms), float(result.enthalpy), step.id)
            rows.append(_named(enthalpy_row(item, phases, settings.pressure, context.foundation.model_id, "foundation"), phase))
            file.add(item.atoms, item.id, str(rows[-1][4]), settings.pressure, "static")
    write_part(folder, "enthalpies", rows)
    evaluations = sum(result.n_steps for result in [*free, *held])
    return Outcome(len(rows), evaluations, failures=failures, output=context.foundation.model_id)


def phase_structure(context: Context, phase: Phase, pressure: float) -> Atoms | None:
    """A structure of the phase to start from: its file, or the lowest one found by the production searches; None when none was."""
    if phase.atoms is not None:
        return phase.atoms
    names = sorted(productions(context.settings), key=lambda name: abs(float(name.split("-")[-1].removesuffix("GPa")) - pressure))
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
