"""hessian, phase-diagram and errors.

``hessian``: the free-energy Hessian of a structure or of a finished run.

``phase-diagram``: which phase is stable at which pressure and temperature, with confidence bands.

``errors``: a model against DFT in an SSCHA ensemble, and what its free energy is worth.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from magus_anharmonic.cli.common import (
    SETTINGS,
    Calculator,
    Checkpoint,
    Device,
    Results,
    Seed,
    SettingsFile,
    command,
    console,
    key,
    measured,
    say,
    settings_of,
)
from magus_anharmonic.errors import InputError
from magus_anharmonic.runs.folder import SearchFolder

Supercell = Annotated[
    tuple[int, int, int] | None, key("Repetitions of the primitive cell; for a structure.")
]
Pressure = Annotated[float | None, measured("GPa", "For a structure.", show_default=SETTINGS)]
Temperature = Annotated[float | None, measured("K", "For a structure.", show_default=SETTINGS)]


@command()
def hessian(
    source: Annotated[
        Path,
        typer.Argument(
            help=(
                "A structure that ASE reads (also all.extxyz@1), or the folder of a finished SSCHA"
                " run (with its result.json)."
            )
        ),
    ],
    pressure: Pressure = None,
    temperature: Temperature = None,
    checkpoint: Checkpoint = None,
    calculator: Calculator = None,
    input_file: SettingsFile = None,
    supercell: Supercell = None,
    n_configs: Annotated[
        int | None, key("Configurations, even; of a folder: what it holds.")
    ] = None,
    max_populations: Annotated[int | None, key("Most populations; for a structure.")] = None,
    fixed_cell: Annotated[
        bool, typer.Option("--fixed-cell", help="Keep the cell; for a structure.")
    ] = False,
    v4: Annotated[bool, typer.Option("--v4", help="Add the fourth-order term.")] = False,
    seed: Seed = None,
    output: Results = Path("hessian"),
    device: Device = None,
) -> None:
    """Physical phonons from the free-energy Hessian: is the structure a minimum of the free energy
    or a saddle point?

    The model is needed for a structure, and for more configurations than the folder of a run holds.
    """
    from magus_anharmonic.ranking.evaluators import ranking_evaluator
    from magus_anharmonic.ranking.jobs import free_energy_on
    from magus_anharmonic.sscha.report import DEFAULTS, hessian_of_run, hessian_of_structure

    atoms = _structure_to_run(source, n_configs)
    settings = settings_of(
        input_file,
        pressure,
        seed,
        (calculator, checkpoint, device),
        temperature=temperature,
        supercell=supercell,
        cell="fixed" if fixed_cell else None,
        n_configs=n_configs,
        max_populations=max_populations,
    )
    more: dict[str, Any] = {"include_v4": v4, "seed": settings.seed or 0}
    if atoms is None:
        named = any((checkpoint, calculator, input_file))
        evaluator = ranking_evaluator(settings) if named else None
        report = hessian_of_run(source, output, evaluator=evaluator, n_configs=n_configs, **more)
    else:
        report = hessian_of_structure(
            atoms,
            output,
            ranking_evaluator(settings),
            run=free_energy_on(settings),
            n_configs=(settings.sscha or DEFAULTS).n_configs,
            **more,
        )
    _show_hessian(report)


def _structure_to_run(source: Path, n_configs: int | None) -> Any:
    """The one structure of a file; None where ``source`` is the folder of a finished run. Raises
    ``InputError`` before any work."""
    from magus_anharmonic.gate import read_sources

    if n_configs is not None and (n_configs < 4 or n_configs % 2):
        raise InputError(f"--n-configs: {n_configs}: must be even and at least 4")
    if source.is_dir():
        if not (source / "result.json").is_file():
            raise InputError(
                f"{source}: has no result.json: not the folder of a finished SSCHA run (rank keeps"
                " them in sscha/<id>)"
            )
        return None
    found = read_sources([source])
    if len(found) != 1:
        raise InputError(
            f"{source}: holds {len(found)} structures; give one, e.g. {source}@0 (`magus-anharmonic"
            " rank` takes many)"
        )
    return found[0]


def _show_hessian(report: Any) -> None:
    """Print the softest modes, the verdict in words, and where everything is."""
    from rich.table import Table

    from magus_anharmonic.sscha.report import softest_levels

    shown = Table(title="Softest modes (cm^-1; imaginary as negative)")
    for name in ("q", "modes x q points", "SSCHA auxiliary", "free-energy Hessian"):
        shown.add_column(name, justify="right")
    for row in softest_levels(report.hessian):
        shown.add_row(*row)
    screen = console()
    screen.print(shown)
    for line in report.sentences():
        screen.print(f"* {line}", highlight=False)
    screen.print(
        f"\nPicture: {report.folder / 'dispersion.png'}\nEverything else:"
        f" {report.folder.resolve()}",
        highlight=False,
        soft_wrap=True,
    )


@command("phase-diagram")
def phase_diagram(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help=(
                "phase-diagram.yaml; or a CSV of free energies (gibbs.csv); or a folder of finished"
                " SSCHA runs; or structure files, one "
                "per phase, with --pressure, --temperature and --checkpoint."
            )
        ),
    ],
    pressure: Annotated[
        list[float] | None, measured("GPa", "Rising; more than once. With structure files.")
    ] = None,
    temperature: Annotated[
        list[float] | None,
        measured("K", "Rising; more than once. With structure files; left out: 0."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="A MatterSim name, a path, or a shipped checkpoint. With structure files."
        ),
    ] = None,
    isotope: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Masses beside the natural ones, e.g. D3S:H=2.014; more than once. With structure"
                " files."
            )
        ),
    ] = None,
    supercell: Annotated[
        tuple[int, int, int] | None, key("Repetitions of the primitive cell. With structure files.")
    ] = None,
    n_configs: Annotated[
        int | None, key("Configurations per population, even. With structure files.")
    ] = None,
    end_member: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Formula or phase that formation energies count from; more than once; left out: the"
                " elements."
            )
        ),
    ] = None,
    model_error: Annotated[
        float | None,
        measured("eV/atom", "Error of the potential in G of each phase; widens the bands."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Same input and seed, same result; left out: 0, or what the input says."),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for all results; again: go on.")
    ] = Path("phase-diagram"),
    device: Device = None,
) -> None:
    """P-T phase diagram from SSCHA free energies: boundaries with confidence bands, isotope shifts,
    hull over composition.

    One smooth G(P,T) per phase is fitted to the free energies, volumes and entropies of the same
    ensembles, so that V = dG/dP and S = -dG/dT hold. Writes gibbs.csv, boundaries.csv,
    stability.csv, summary.json, phase-diagram.svg and .png; with several compositions hull.csv,
    hull.svg and hull.png.
    """
    from magus_anharmonic.phase_diagram.diagram import phase_diagram as diagram_of
    from magus_anharmonic.phase_diagram.diagram import sentences
    from magus_anharmonic.phase_diagram.figures import write_diagram
    from magus_anharmonic.phase_diagram.grid import collect_runs, run_locked
    from magus_anharmonic.phase_diagram.points import read_points
    from magus_anharmonic.runs.lock import locked
    from magus_anharmonic.settings.phase_diagram import grid_settings, load_phase_diagram

    top = {"pressures": pressure, "temperatures": temperature, "checkpoint": checkpoint}
    sscha = {"supercell": supercell, "n_configs": n_configs}
    first, kind = sources[0], sources[0].suffix.lower()
    grid = any(value for value in (*top.values(), isotope, *sscha.values()))
    alone = first.is_dir() or kind in (".yaml", ".yml", ".csv")
    if alone and (len(sources) > 1 or grid):
        raise InputError(
            f"{first}: holds everything; give it alone, without --pressure, --temperature,"
            " --checkpoint, --isotope, --supercell and --n-configs"
        )
    for name, number in (("--model-error", model_error), ("--seed", seed)):
        if number is not None and number < 0:
            raise InputError(f"{name}: {number:g}: must not be negative")
    given = {"end_members": end_member, "model_error": model_error, "seed": seed}
    options: dict[str, Any] = {k: value for k, value in given.items() if value is not None}
    with locked(output, "magus-anharmonic phase-diagram"):
        if first.is_dir() or kind == ".csv":
            points = collect_runs(first) if first.is_dir() else read_points(first)
        else:
            settings = (
                load_phase_diagram(first)
                if alone
                else grid_settings(
                    sources, {**top, "device": device}, isotopes=isotope or (), sscha=sscha
                )
            ).model_copy(update=options)
            points = run_locked(settings, output)
            options = settings.model_dump(include={*given, "n_samples"})
        diagram = diagram_of(points, **options)
        pictures = write_diagram(diagram, output)
    for line in sentences(diagram):
        say(f"* {line}")
    hull = f"\nHull: {pictures['hull']}" if "hull" in pictures else ""
    say(f"\nPicture: {pictures['png']}{hull}\nEverything else: {output.resolve()}")


@command()
def errors(
    source: Annotated[
        Path,
        typer.Argument(
            help=(
                "Folder of a finished SSCHA run, prefix of dynamical matrices (.../dyn_pop5_), or a"
                " structure that ASE reads."
            )
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            "-r",
            "--reference",
            help="YAML file with the block labeler: the DFT code and settings to compare with;"
            " left out: that of -i.",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    calculator: Calculator = None,
    input_file: SettingsFile = None,
    n_configs: Annotated[
        int,
        typer.Option(
            "-n", "--n-configs", help="Most configurations to label, in pairs +u, -u: even."
        ),
    ] = 60,
    error: Annotated[
        float,
        measured("eV/atom", "Of the correction of G; from 20 on, no more labels than it takes."),
    ] = 0.001,
    ensemble: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Configurations instead of new ones: population_NNN.npz, or a file that ASE reads,"
                " in pairs."
            )
        ),
    ] = None,
    phase: Annotated[
        str, typer.Option(help="Name of the phase in the tables; left out: its space group.")
    ] = "",
    pressure: Annotated[
        float | None, measured("GPa", "For a structure or dynamical matrices.")
    ] = None,
    temperature: Temperature = None,
    supercell: Supercell = None,
    seed: Seed = None,
    electronic: Annotated[
        bool,
        typer.Option(
            "--electronic",
            help="Label with Fermi-Dirac occupations at the temperature of the state, and add the"
            " electrons' free energy.",
        ),
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Folder for labels, tables and figures; run again there, it goes on.",
        ),
    ] = Path("errors"),
    tables: Annotated[
        Path | None, typer.Option(help="campaign/tables of a campaign, to add the results to.")
    ] = None,
    device: Device = None,
) -> None:
    """Errors of forces and of free-energy gradients against DFT, and G by DFT."""
    from magus_anharmonic.evaluator import as_evaluator
    from magus_anharmonic.labelers import at_electronic_temperature, get_labeler
    from magus_anharmonic.paper.ensemble_errors import (
        add_to_tables,
        draw_report,
        find_source,
        given_displacements,
        load_labeler_settings,
        measure_locked,
    )
    from magus_anharmonic.paper.ensemble_labels import WHAT, check_number
    from magus_anharmonic.ranking.evaluators import ranking_evaluator
    from magus_anharmonic.ranking.jobs import free_energy_on
    from magus_anharmonic.runs.lock import locked

    check_number(n_configs)
    file = reference or input_file
    if file is None:
        raise InputError("--reference: give a YAML file with the block labeler, or one with -i")
    labels = load_labeler_settings(file)
    settings = settings_of(
        input_file,
        pressure,
        seed,
        (calculator, checkpoint, device),
        temperature=temperature,
        supercell=supercell,
    )
    if electronic and settings.sscha and not source.is_dir():  # before the run of a structure
        at_electronic_temperature(labels, settings.sscha.temperatures[0])
    files = SearchFolder(output)
    place = files.labeling, settings if input_file else None
    with locked(output, WHAT), contextlib.ExitStack() as opened:
        # a wrong one ends here, not after the SSCHA run
        labeler = opened.enter_context(contextlib.closing(get_labeler(labels, *place)))
        model = ranking_evaluator(settings)
        found = find_source(
            source, model, files.sscha, settings, phase=phase, run=free_energy_on(settings)
        )
        displacements = (
            None if ensemble is None else given_displacements(found.state, ensemble)[:n_configs]
        )
        if electronic:
            warm = at_electronic_temperature(labels, found.state.temperature)
            labeler = opened.enter_context(contextlib.closing(get_labeler(warm, *place)))
        report = measure_locked(
            found,
            as_evaluator(model, [found.state.atoms]),
            labeler,
            output,
            n_configs=n_configs,
            seed=settings.seed or 0,
            wanted=error,
            displacements=displacements,
            electronic=electronic,
        )
        draw_report(report)
    if tables is not None:
        add_to_tables(report, tables)
    _show(report)


def _show(report: Any) -> None:
    """Print what averaging leaves of the errors, and the corrected free energy."""
    from rich.table import Table

    from magus_anharmonic.units import ev_to_mev

    found = report.errors
    shown = Table(
        title=(
            f"{report.source.phase} at {report.source.pressure:g} GPa: model against reference,"
            f" {found.n_configs} configurations"
        )
    )
    for name in (
        "quantity",
        "unit",
        "one configuration",
        "average",
        "systematic",
        "statistical",
        "floor",
    ):
        shown.add_column(name, justify="left" if name in ("quantity", "unit") else "right")
    shown.add_row("force", "meV/A", f"{ev_to_mev(found.force):.1f}", "", "", "", "")
    for name, unit, parts in (
        ("gradient by centroids", "meV/A", found.centroid),
        ("  averaged by symmetry", "meV/A", found.symmetric_centroid),
        ("gradient by force constants", "meV/A^2", found.force_constants),
        ("  averaged by symmetry", "meV/A^2", found.symmetric_force_constants),
    ):
        systematic = f"{ev_to_mev(parts.systematic):.2f} +- {ev_to_mev(parts.systematic_error):.2f}"
        numbers = (f"{ev_to_mev(value):.2f}" for value in (parts.statistical, parts.floor))
        shown.add_row(
            name,
            unit,
            f"{ev_to_mev(parts.single):.1f}",
            f"{ev_to_mev(parts.mean):.2f}",
            systematic,
            *numbers,
        )
    if found.bo_centroid is not None:
        shown.add_row(
            "force at the centroids", "meV/A", f"{ev_to_mev(found.bo_centroid):.2f}", "", "", "", ""
        )
    screen = console()
    screen.print(shown)
    first, error, second = (
        ev_to_mev(value)
        for value in (
            report.correction.first_order,
            report.correction.first_order_error,
            report.correction.second_order,
        )
    )
    screen.print(
        f"* G by the reference minus G by the model: {first:.2f} +- {error:.2f} meV/atom (first"
        " order, an upper bound),"
    )
    screen.print(f"  {second:.2f} meV/atom more when the state follows (second order).")
    if report.correction.electronic is not None:
        electrons = ev_to_mev(report.correction.electronic)
        margin = ev_to_mev(report.correction.electronic_error)
        screen.print(
            f"* Free energy of the electrons minus their energy: {electrons:.2f} +- {margin:.2f}"
            " meV/atom."
        )
    if report.corrected_gibbs is not None:
        value, spread = report.corrected_gibbs
        screen.print(f"* G by the reference: {value:.5f} +- {spread:.5f} eV/atom.", highlight=False)
    if report.n_failed:
        screen.print(
            f"* {report.n_failed} configurations have no label (failures.jsonl says why); their"
            " pairs are left out."
        )
    screen.print(f"\nEverything else: {report.folder.resolve()}", highlight=False, soft_wrap=True)
