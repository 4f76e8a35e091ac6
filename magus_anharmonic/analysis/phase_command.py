"""What ``magus-anharmonic phase-diagram`` does: from its sources to points, and from points to the files of the diagram."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magus_anharmonic.analysis.gibbs_points import GibbsPoint, read_points, write_points
from magus_anharmonic.analysis.phase_diagram import phase_diagram, write_diagram
from magus_anharmonic.analysis.phase_words import sentences
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.lock import locked
from magus_anharmonic.settings import absolute_file, parse
from magus_anharmonic.settings.phase_diagram import PhaseDiagramSettings, load_phase_diagram

log = logging.getLogger(__name__)


WHAT = "magus-anharmonic phase-diagram"
"""Names this work in the lock of its folder."""


@dataclass(frozen=True)
class GridOptions:
    """What the command line says about a grid of structure files; empty where the source is another one."""

    pressures: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = ()
    checkpoint: str | None = None
    isotopes: tuple[str, ...] = ()
    supercell: tuple[int, int, int] = (2, 2, 2)
    n_configs: int = 1000
    device: str | None = None

    @property
    def given(self) -> bool:
        return bool(self.pressures or self.temperatures or self.checkpoint or self.isotopes)


def phase_diagram_command(
    sources: Sequence[Path],
    output: Path,
    *,
    grid: GridOptions | None = None,
    end_members: Sequence[str] | None = None,
    model_error: float | None = None,
    seed: int | None = None,
) -> tuple[list[str], dict[str, Path]]:
    """Sentences and pictures of the diagram; see the command's help for ``sources``.

    Raises ``InputError``, also where another process works in ``output``.
    """
    with locked(output, WHAT):
        return _held_command(sources, output, grid or GridOptions(), end_members, model_error, seed)


def _held_command(
    sources: Sequence[Path],
    output: Path,
    grid: GridOptions,
    end_members: Sequence[str] | None,
    model_error: float | None,
    seed: int | None,
) -> tuple[list[str], dict[str, Path]]:
    points, settings = read_source(sources, output, grid, seed)
    options: dict[str, Any] = {"end_members": [], "model_error": 0.0, "n_samples": 1000, "seed": 0}
    if settings is not None:
        options = {name: getattr(settings, name) for name in options}
    given = {"end_members": end_members, "model_error": model_error, "seed": seed}
    options.update({name: value for name, value in given.items() if value is not None})
    if options["model_error"] < 0:
        raise InputError(f"--model-error: {options['model_error']:g}: must not be negative (eV/atom)")
    diagram = phase_diagram(points, **options)
    pictures = write_diagram(diagram, output)
    return sentences(diagram), pictures


def read_source(
    sources: Sequence[Path], output: Path, grid: GridOptions, seed: int | None = None
) -> tuple[list[GibbsPoint], PhaseDiagramSettings | None]:
    """The points that the sources hold, or that SSCHA gives in ``output``, whose lock the caller holds; with the settings of a grid."""
    first = Path(sources[0])
    alone = first.is_dir() or first.suffix.lower() in (".yaml", ".yml", ".csv")
    if alone and (len(sources) > 1 or grid.given):
        raise InputError(f"{first}: holds everything; give it alone, without --pressure, --temperature, --checkpoint and --isotope")
    if first.is_dir():
        from magus_anharmonic.analysis.phase_grid import collect_runs

        table = first / "gibbs.csv"
        return (read_points(table) if table.is_file() else collect_runs(first)), None
    if first.suffix.lower() == ".csv":
        return read_points(first), None
    settings = load_phase_diagram(first) if alone else _from_options(sources, grid)
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed})
    return _run_held(settings, output), settings


def _from_options(sources: Sequence[Path], grid: GridOptions) -> PhaseDiagramSettings:
    """Settings of a grid from structure files, one phase each, named as the file."""
    if not grid.pressures:
        raise InputError("--pressure: is missing (GPa; give it more than once for a grid)")
    phases: dict[str, str] = {}
    for path in sources:
        if path.stem in phases:
            raise InputError(f"{path}: a phase is named as its file, and {path.stem} is there already; use a phase-diagram.yaml")
        phases[path.stem] = str(Path(path).resolve())
    data = {
        "phases": phases,
        "pressures": list(grid.pressures),
        "temperatures": list(grid.temperatures or (0.0,)),
        "isotopes": {"natural": {}, **dict(_masses(text) for text in grid.isotopes)},
        "sscha": {"supercell": list(grid.supercell), "n_configs": grid.n_configs},
        "device": grid.device,
    }
    if grid.checkpoint is not None:
        data["checkpoint"] = absolute_file(grid.checkpoint)
    return parse(PhaseDiagramSettings, data)


def _masses(text: str) -> tuple[str, dict[str, float]]:
    """``"D3S:H=2.014"``."""
    name, colon, rest = text.partition(":")
    pairs = re.findall(r"([A-Z][a-z]?)=([0-9.]+)", rest)
    if not colon or not name or ",".join(f"{symbol}={mass}" for symbol, mass in pairs) != rest.replace(" ", ""):
        raise InputError(f"--isotope: {text!r}: must be NAME:SYMBOL=MASS, e.g. D3S:H=2.014 (more masses after a comma)")
    return name, {symbol: float(mass) for symbol, mass in pairs}


def run_settings(settings: PhaseDiagramSettings, output: Path, evaluator: Any = None) -> list[GibbsPoint]:
    """Run or resume the grid in ``output``; ``gibbs.csv`` is up to date after every point. ``evaluator``: instead of the checkpoint.

    Raises ``InputError``: another version's or another grid's folder, or one in which another process works.
    """
    with locked(output, WHAT):
        return _run_held(settings, output, evaluator)


def _run_held(settings: PhaseDiagramSettings, output: Path, evaluator: Any = None) -> list[GibbsPoint]:
    from magus_anharmonic.analysis.phase_grid import read_phase, run_grid
    from magus_anharmonic.run_record import check_results_version, write_run_record

    structures = {name: read_phase(name, phase) for name, phase in settings.phases.items()}
    check_results_version(output)
    if evaluator is None:
        from magus_anharmonic.potential import load

        evaluator = load(settings.checkpoint, device=settings.device)
    evaluator = as_evaluator(evaluator, structures.values())
    write_run_record(output, settings, seed=settings.seed, model_id=evaluator.model_id)

    def keep(points: list[GibbsPoint]) -> None:
        write_points(output / "gibbs.csv", points)

    return run_grid(settings, structures, evaluator, output / "sscha", on_point=keep)
