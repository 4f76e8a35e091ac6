"""What ``magus-anharmonic phase-diagram`` does: from its sources to points, and from points to the
files of the diagram."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.io.files import write_json
from magus_anharmonic.io.tables import write_table
from magus_anharmonic.phase_diagram.boundaries import BoundaryPoint
from magus_anharmonic.phase_diagram.diagram import HullRow, PhaseDiagram, Stable, phase_diagram
from magus_anharmonic.phase_diagram.figures import draw, draw_hull
from magus_anharmonic.phase_diagram.points import GibbsPoint, read_points, write_points
from magus_anharmonic.phase_diagram.text import sentences
from magus_anharmonic.runs.lock import locked
from magus_anharmonic.settings import absolute_file, parse
from magus_anharmonic.settings.phase_diagram import PhaseDiagramSettings, load_phase_diagram

WHAT = "magus-anharmonic phase-diagram"
"""Names this work in the lock of its folder."""


@dataclass(frozen=True)
class GridOptions:
    """What the command line says about a grid of structure files; empty where the source is another
    one."""

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
        return _locked_command(
            sources, output, grid or GridOptions(), end_members, model_error, seed
        )


def _locked_command(
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
        raise InputError(
            f"--model-error: {options['model_error']:g}: must not be negative (eV/atom)"
        )
    diagram = phase_diagram(points, **options)
    pictures = write_diagram(diagram, output)
    return sentences(diagram), pictures


def read_source(
    sources: Sequence[Path], output: Path, grid: GridOptions, seed: int | None = None
) -> tuple[list[GibbsPoint], PhaseDiagramSettings | None]:
    """The points that the sources hold, or that SSCHA gives in ``output``, whose lock the caller
    holds; with the settings of a grid."""
    first = Path(sources[0])
    alone = first.is_dir() or first.suffix.lower() in (".yaml", ".yml", ".csv")
    if alone and (len(sources) > 1 or grid.given):
        raise InputError(
            f"{first}: holds everything; give it alone, without --pressure, --temperature,"
            " --checkpoint and --isotope"
        )
    if first.is_dir():
        from magus_anharmonic.phase_diagram.grid import collect_runs

        table = first / "gibbs.csv"
        return (read_points(table) if table.is_file() else collect_runs(first)), None
    if first.suffix.lower() == ".csv":
        return read_points(first), None
    settings = load_phase_diagram(first) if alone else _from_options(sources, grid)
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed})
    return run_locked(settings, output), settings


def _from_options(sources: Sequence[Path], grid: GridOptions) -> PhaseDiagramSettings:
    """Settings of a grid from structure files, one phase each, named as the file."""
    if not grid.pressures:
        raise InputError("--pressure: is missing (GPa; give it more than once for a grid)")
    phases: dict[str, str] = {}
    for path in sources:
        if path.stem in phases:
            raise InputError(
                f"{path}: a phase is named as its file, and {path.stem} is there already; use a"
                " phase-diagram.yaml"
            )
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
    if (
        not colon
        or not name
        or ",".join(f"{symbol}={mass}" for symbol, mass in pairs) != rest.replace(" ", "")
    ):
        raise InputError(
            f"--isotope: {text!r}: must be NAME:SYMBOL=MASS, e.g. D3S:H=2.014 (more masses after a"
            " comma)"
        )
    return name, {symbol: float(mass) for symbol, mass in pairs}


def run_locked(
    settings: PhaseDiagramSettings, output: Path, evaluator: Any = None
) -> list[GibbsPoint]:
    """Run or resume the grid in ``output``, whose lock the caller holds; ``gibbs.csv`` is up to
    date after every point.

    ``evaluator``: instead of the checkpoint. Raises ``InputError`` for another version's or another
        grid's folder.
    """
    from magus_anharmonic.phase_diagram.grid import read_phase, run_grid
    from magus_anharmonic.runs.record import check_results_version, write_run_record

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


def write_diagram(diagram: PhaseDiagram, folder: str | Path) -> dict[str, Path]:
    """``gibbs.csv``, ``boundaries.csv``, ``stability.csv``, ``summary.json`` and the picture as SVG
    and PNG; with a hull that too.

    Returns the pictures: ``png``, ``svg`` and, with a hull, ``hull`` (PNG; ``hull.svg`` lies beside
    it).
    """
    target = Path(folder)
    write_points(target / "gibbs.csv", diagram.points)
    _write_rows(
        target / "boundaries.csv",
        BOUNDARY_COLUMNS,
        [_boundary_row(one) for one in diagram.boundaries],
    )
    _write_rows(
        target / "stability.csv", STABLE_COLUMNS, [_stable_row(one) for one in diagram.stable]
    )
    pictures = {
        "png": draw(diagram, target / "phase-diagram.png"),
        "svg": draw(diagram, target / "phase-diagram.svg"),
    }
    if diagram.hull:
        _write_rows(target / "hull.csv", HULL_COLUMNS, [_hull_row(row) for row in diagram.hull])
        pictures["hull"] = next(
            path
            for path in draw_hull(diagram.hull, diagram.end_members, target)
            if path.suffix == ".png"
        )
    write_json(target / "summary.json", summary(diagram, sentences(diagram)))
    return pictures


BOUNDARY_COLUMNS = (
    "isotopes",
    "below",
    "above",
    "temperature_K",
    "pressure_GPa",
    "error_GPa",
    "lower_95_GPa",
    "lower_68_GPa",
    "upper_68_GPa",
    "upper_95_GPa",
    "probability_inside",
    "slope_GPa_per_K",
    "slope_error_GPa_per_K",
    "entropy_change_eV_per_K_per_atom",
    "volume_change_A3_per_atom",
    "stable",
)
STABLE_COLUMNS = (
    "isotopes",
    "formula",
    "pressure_GPa",
    "temperature_K",
    "phase",
    "probability",
    "gap_eV_per_atom",
    "gap_error_eV_per_atom",
)
HULL_COLUMNS = (
    "isotopes",
    "pressure_GPa",
    "temperature_K",
    "phase",
    "formula",
    "fractions",
    "formation_eV_per_atom",
    "formation_error_eV_per_atom",
    "distance_eV_per_atom",
    "margin_eV_per_atom",
    "error_eV_per_atom",
    "p_on_hull",
)


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    write_table(path, columns, ([_cell(value) for value in row] for row in rows))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.8g}" if math.isfinite(value) else ""
    return str(value)


def _boundary_row(one: BoundaryPoint) -> list[Any]:
    return [getattr(one, field.name) for field in fields(BoundaryPoint)]


def _stable_row(one: Stable) -> list[Any]:
    return [getattr(one, field.name) for field in fields(Stable)]


def _hull_row(row: HullRow) -> list[Any]:
    one = row.entry
    shares = " ".join(f"{x:.6g}" for x in one.fractions)
    numbers = [
        one.formation,
        one.formation_error,
        one.distance,
        one.margin,
        one.error,
        one.p_on_hull,
    ]
    return [row.isotopes, row.pressure, row.temperature, one.name, one.formula, shares, *numbers]


def summary(diagram: PhaseDiagram, sentences: Sequence[str]) -> dict[str, Any]:
    """Everything in one dictionary ready for JSON: words, boundaries, quality of the fits, checks;
    infinite numbers as null."""
    fits = [
        {
            "isotopes": isotopes,
            "formula": formula,
            "phase": name,
            "chi2": surface.quality.chi2,
            "degrees_of_freedom": surface.quality.dof,
            "covariance_inflation": surface.quality.inflation,
            "n": surface.quality.n,
            "rms_of_residuals_over_errors": surface.quality.rms,
            "terms": [
                {
                    "weight": m.weight,
                    "powers_of_P": m.basis.cold,
                    "powers_of_P_thermal": m.basis.thermal,
                    "einstein_K": list(m.basis.thetas),
                }
                for m in surface.models
            ],
        }
        for (isotopes, formula), phases in diagram.sets.items()
        for name, surface in phases.surfaces.items()
    ]
    return _finite(
        {
            "sentences": list(sentences),
            "n_points": len(diagram.points),
            "n_usable": sum(point.usable for point in diagram.points),
            "models": sorted({point.model for point in diagram.points if point.model}),
            "model_error_eV_per_atom": diagram.model_error,
            "boundaries": [
                dict(zip(BOUNDARY_COLUMNS, _boundary_row(one), strict=True))
                for one in diagram.boundaries
            ],
            "continuous_transitions": [asdict(one) for one in diagram.continuous_transitions],
            "clausius_clapeyron": [
                {**asdict(one), "deviation": None if one.reason else one.deviation}
                for one in diagram.checks
            ],
            "isotope_shifts": list(diagram.shifts),
            "fits": fits,
            "notes": list(diagram.notes),
        }
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
