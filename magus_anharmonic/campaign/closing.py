"""Steps made of other parts of the package: ``errors`` (gradient errors, first-order Gibbs
correction) and ``report``."""

from __future__ import annotations

import logging
from pathlib import Path

from magus_anharmonic.campaign.steps import Context, Outcome, Step, phase_folder
from magus_anharmonic.campaign.tables import assemble
from magus_anharmonic.errors import DamagedFile, MagusAnharmonicError
from magus_anharmonic.io.files import read_json

log = logging.getLogger(__name__)


def errors(context: Context, step: Step) -> Outcome:
    """Errors of forces and free-energy gradients against DFT, and the first-order correction of G,
    in the states of the Hessians.

    The functions of the analysis keep their labels in ``errors/<phase>-<P>GPa/``, and are asked
    again for what is there.
    """
    from magus_anharmonic.paper import ensemble_errors
    from magus_anharmonic.sscha.result import SschaResult

    settings, folder = context.settings.errors, context.folder(step)
    assert settings is not None
    parts: list[Path] = []
    with context.labeler(folder) as labeler:
        for phase in settings.phases:
            for pressure in settings.pressures:
                run = run_of_record(context.folder("hessian") / phase_folder(phase, pressure))
                own = folder / phase_folder(phase, pressure)
                source = ensemble_errors.source_of_result(SschaResult.read(run), phase)
                log.info(
                    "errors: %s at %g GPa, %d configurations by DFT",
                    phase,
                    pressure,
                    settings.n_configs,
                )
                ensemble_errors.measure_errors(
                    source,
                    context.final_model,
                    labeler,
                    own,
                    n_configs=settings.n_configs,
                    seed=context.settings.seed,
                )
                parts.append(own)
    assemble(folder / "tables", parts, inside=".")
    # the centroids are one configuration more
    n_labels = len(parts) * (settings.n_configs + 1)
    return Outcome(len(parts), 0, n_labels, output=f"{len(parts)} {context.final_model.model_id}")


def run_of_record(folder: Path) -> Path:
    """The SSCHA run behind the modes of a phase at a pressure; raises ``MagusAnharmonicError``
    where there is none or its name is lost."""
    from magus_anharmonic.campaign.modes import RUN_OF_RECORD

    file = folder / RUN_OF_RECORD
    if not file.is_file():
        raise MagusAnharmonicError(
            f"errors: the step hessian has no SSCHA run of {folder.name} (it failed there: see"
            " failures.csv)"
        )
    try:
        name = read_json(file).get("run")
    except DamagedFile as error:
        raise MagusAnharmonicError(f"errors: {error}; `--only hessian` makes it anew") from None
    if not isinstance(name, str) or not name:
        raise MagusAnharmonicError(
            f"errors: {file}: names no SSCHA run; `--only hessian` makes it anew"
        )
    return folder / name


def report(context: Context, step: Step) -> Outcome:
    """The page of everything that is there; whoever writes it has the figures drawn that the page
    shows."""
    from magus_anharmonic.report.page import write_report

    write_report(context.root)
    figures = sorted((context.root / "figures").glob("*.png"))
    log.info(
        "%d figures in %s; report: %s",
        len(figures),
        context.root / "figures",
        context.root / "report.html",
    )
    return Outcome(output=f"{len(figures)} figures")
