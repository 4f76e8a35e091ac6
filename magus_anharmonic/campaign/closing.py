"""Steps made of other parts of the package: ``errors`` (gradient errors, first-order Gibbs correction) and ``report``."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magus_anharmonic.campaign.context import Context, Outcome
from magus_anharmonic.campaign.plan import Step, place
from magus_anharmonic.errors import MagusAnharmonicError

log = logging.getLogger(__name__)

ERRORS_HOOK = "magus_anharmonic.analysis.campaign_errors"
FIGURES_HOOK = "magus_anharmonic.analysis.make_figures"
REPORT_HOOK = "magus_anharmonic.report.page.write_report"


@dataclass(frozen=True)
class ErrorTask:
    """What `ERRORS_HOOK` gets: one phase at one pressure (GPa).

    run : folder of the finished SSCHA run whose last ensemble is labelled; folder : where the hook keeps its labels and writes its part of
    ``gradient_errors.csv`` and ``gibbs_correction.csv``, as ``folder/tables/*.csv``. The hook returns the number of labels it made.
    """

    phase: str
    pressure: float
    run: Path
    model: Any
    labeler: Any
    n_configs: int
    seed: int
    folder: Path


def hook(name: str) -> Callable[..., Any]:
    """The function of this dotted name; raises ``MagusAnharmonicError`` when this version of the package has none."""
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise MagusAnharmonicError(f"this version has no {name} ({error})") from None


def errors(context: Context, step: Step) -> Outcome:
    """Errors of forces and free-energy gradients against DFT, phase by phase and pressure by pressure."""
    settings, folder = context.settings.errors, context.folder(step)
    assert settings is not None
    compute, n_labels = hook(ERRORS_HOOK), 0
    parts: list[Path] = []
    with context.labeler(folder) as labeler:
        for phase in settings.phases:
            for pressure in settings.pressures:
                own = folder / place(phase, pressure)
                run = context.folder("hessian") / place(phase, pressure) / f"sscha-{context.final_model.model_id}"
                task = ErrorTask(phase, pressure, run, context.final_model, labeler, settings.n_configs, context.settings.seed, own)
                n_labels += int(compute(task))
                parts.append(own)
    _join(folder, parts)
    return Outcome(len(parts), 0, n_labels, output=str(n_labels))


def _join(folder: Path, parts: list[Path]) -> None:
    from magus_anharmonic.campaign.tables import assemble

    assemble(folder / "tables", parts)


def report(context: Context, step: Step) -> Outcome:
    """Figures of everything that is there, and the page that shows them."""
    hook(FIGURES_HOOK)(context.root)
    hook(REPORT_HOOK)(context.root)
    figures = sorted((context.root / "figures").glob("*.png"))
    log.info("%d figures in %s; report: %s", len(figures), context.root / "figures", context.root / "report.html")
    return Outcome(output=f"{len(figures)} figures")
