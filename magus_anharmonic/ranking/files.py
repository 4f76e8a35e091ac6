"""Ranking of structures from anywhere: ``magus-anharmonic rank FILE``, or `rank_structures` in a script."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.gate import check_structures, read_structures
from magus_anharmonic.lock import locked
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.jobs import Workers
from magus_anharmonic.ranking.model_errors import ModelTerm
from magus_anharmonic.ranking.rank import rank
from magus_anharmonic.ranking.statics import reevaluate, relax_in_place
from magus_anharmonic.run_record import check_results_version, read_run_record, write_run_record
from magus_anharmonic.settings import CalculatorSettings, Settings
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.structures import bare

log = logging.getLogger(__name__)


def rank_file(path: str | Path, settings: Settings, output: str | Path) -> list[Candidate]:
    """Rank the structures of any file that ASE reads with the model that ``settings`` name; everything goes to ``output``.

    The same call again takes up what is finished. Raises ``InputError`` (file, structure, checkpoint, a folder of another version, or
    one in which another process works); nothing is written then.
    """
    structures = read_structures(path)
    if settings.calculator is None:
        raise InputError("MainCalculator: rank needs calculator: mattersim with a checkpoint")
    return rank_alone(structures, settings, settings.calculator, output, {"structures": str(path)})


def rank_alone(
    structures: Sequence[Atoms],
    settings: Settings,
    calculator: CalculatorSettings,
    output: str | Path,
    sources: dict[str, Any],
    **options: Any,
) -> list[Candidate]:
    """Rank with the checkpoint of ``calculator`` while no other process works in ``output``; ``sources`` go into its run record.

    ``options`` are those of `rank_structures`. Raises ``InputError`` (also where ``output`` holds a ranking of another ``start`` than
    that of ``sources``).
    """
    with locked(output, "magus-anharmonic rank"):
        check_results_version(output)
        begun = (Path(output) / "run.json").is_file()
        if "start" in sources and begun and read_run_record(output).get("start") != sources["start"]:
            raise InputError(f"{output}: holds a ranking with another start; give another folder")
        from magus_anharmonic.potential import load

        potential = load(calculator.checkpoint, device=calculator.device)
        seed = settings.seed or 0
        write_run_record(output, settings, seed=seed, model_id=potential.model_id, extra=sources)
        return rank_structures(structures, potential, settings, output, seed=seed, **options)


def rank_structures(
    structures: Sequence[Atoms],
    evaluator: Any,
    settings: Settings,
    run_dir: str | Path,
    *,
    seed: int = 0,
    relax: bool = True,
    free_energy: Callable[..., Any] | None = None,
    workers: Workers = None,
    starts: Mapping[str, SschaState] | None = None,
    measured: Mapping[str, ModelTerm] | None = None,
) -> list[Candidate]:
    """Relax at ``settings.pressure``, find the distinct ones, and rank them by free energy; see `rank` for the files.

    ``evaluator``: our Potential, an ASE calculator or a labeler. ``relax=False`` takes the structures as they are.
    ``starts``, ``measured``: see `rank`. The structures are not changed; one that cannot be relaxed is in the table as failed, with
    the reason.
    """
    check_structures(structures)
    source = as_evaluator(evaluator, structures)
    if constrained := sum(bool(atoms.constraints) for atoms in structures):
        log.warning("constraints of %d of %d structures do not hold here: SSCHA moves every atom", constrained, len(structures))
    copies = [bare(atoms) for atoms in structures]
    reasons = relax_in_place(copies, source, settings) if relax else [""] * len(copies)
    good = [atoms for atoms, reason in zip(copies, reasons, strict=True) if not reason]
    reevaluate(good, source, settings)
    for index, (atoms, reason) in enumerate(zip(copies, reasons, strict=True)):
        if reason:
            atoms.info["reason"] = f"relaxation: {reason}"
            log.warning("structure %d is out of the ranking: %s", index, atoms.info["reason"])
    return rank(
        copies,
        evaluator=source,
        settings=settings,
        run_dir=run_dir,
        seed=seed,
        free_energy=free_energy,
        workers=workers,
        starts=starts,
        measured=measured,
    )
