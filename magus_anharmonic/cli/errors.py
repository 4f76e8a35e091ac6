"""``errors``: a model against DFT in an SSCHA ensemble, and what its free energy is worth."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from magus_anharmonic.cli.common import Verbose, app, configure_logging, console, user_errors


@app.command()
def errors(
    source: Annotated[
        Path,
        typer.Argument(help="Folder of a finished SSCHA run, prefix of dynamical matrices (.../dyn_pop5_), or a structure that ASE reads."),
    ],
    reference: Annotated[
        Path, typer.Option("-r", "--reference", help="YAML file with the block labeler: the DFT code and settings to compare with.")
    ],
    checkpoint: Annotated[str, typer.Option(help="The model: a MatterSim name, a path, or a shipped checkpoint.")],
    n_configs: Annotated[int, typer.Option("-n", "--n-configs", help="Configurations to label, in pairs +u, -u: even.")] = 60,
    ensemble: Annotated[
        Path | None, typer.Option(help="Configurations instead of new ones: population_NNN.npz, or a file that ASE reads, in pairs.")
    ] = None,
    phase: Annotated[str, typer.Option(help="Name of the phase in the tables. [default: its space group]")] = "",
    pressure: Annotated[float | None, typer.Option(help="GPa; for a structure or dynamical matrices.")] = None,
    temperature: Annotated[float, typer.Option(help="K; for a structure or dynamical matrices.")] = 0.0,
    supercell: Annotated[tuple[int, int, int], typer.Option(help="Repetitions of the primitive cell; for a structure.")] = (2, 2, 2),
    seed: Annotated[int, typer.Option(help="Same input and seed, same configurations.")] = 0,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for labels, tables and figures; run again there, it goes on.")
    ] = Path("errors"),
    tables: Annotated[Path | None, typer.Option(help="campaign/tables of a campaign, to add the results to.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    verbose: Verbose = False,
) -> None:
    """Errors of forces and of free-energy gradients against DFT, and the correction of G by first-order perturbation."""
    configure_logging(verbose)
    with user_errors():
        from magus_anharmonic.analysis.errors_run import add_to_tables, draw_report, load_labeler_settings, measure_held
        from magus_anharmonic.analysis.errors_source import find_source, given_displacements
        from magus_anharmonic.analysis.labelled_ensemble import WHAT, check_number
        from magus_anharmonic.labelers import get_labeler
        from magus_anharmonic.lock import locked
        from magus_anharmonic.potential import load

        check_number(n_configs)
        settings = load_labeler_settings(reference)
        with locked(output, WHAT), contextlib.closing(get_labeler(settings, output / "labeling")) as labeler:
            model = load(checkpoint, device=device)
            found = find_source(
                source, model, output / "sscha", phase=phase, pressure=pressure, temperature=temperature, supercell=supercell, seed=seed
            )
            displacements = None if ensemble is None else given_displacements(found.state, ensemble)[:n_configs]
            report = measure_held(found, model, labeler, output, n_configs=n_configs, seed=seed, displacements=displacements)
            draw_report(report)
        if tables is not None:
            add_to_tables(report, tables)
        _show(report)


def _show(report: Any) -> None:
    """Print what averaging leaves of the errors, and the corrected free energy."""
    from rich.table import Table

    found = report.errors
    shown = Table(
        title=f"{report.source.phase} at {report.source.pressure:g} GPa: model against reference, {found.n_configs} configurations"
    )
    for name in ("quantity", "unit", "one configuration", "average", "systematic", "statistical", "floor"):
        shown.add_column(name, justify="left" if name in ("quantity", "unit") else "right")
    shown.add_row("force", "meV/A", f"{1e3 * found.force:.1f}", "", "", "", "")
    for name, unit, parts in (
        ("gradient by centroids", "meV/A", found.centroid),
        ("  averaged by symmetry", "meV/A", found.symmetric_centroid),
        ("gradient by force constants", "meV/A^2", found.force_constants),
        ("  averaged by symmetry", "meV/A^2", found.symmetric_force_constants),
    ):
        systematic = f"{1e3 * parts.systematic:.2f} +- {1e3 * parts.systematic_error:.2f}"
        numbers = (f"{1e3 * value:.2f}" for value in (parts.statistical, parts.floor))
        shown.add_row(name, unit, f"{1e3 * parts.single:.1f}", f"{1e3 * parts.mean:.2f}", systematic, *numbers)
    if found.bo_centroid is not None:
        shown.add_row("force at the centroids", "meV/A", f"{1e3 * found.bo_centroid:.2f}", "", "", "", "")
    screen = console()
    screen.print(shown)
    first, error, second = (
        1e3 * value for value in (report.correction.first_order, report.correction.first_order_error, report.correction.second_order)
    )
    screen.print(f"* G by the reference minus G by the model: {first:.2f} +- {error:.2f} meV/atom (first order, an upper bound),")
    screen.print(f"  {second:.2f} meV/atom more when the state follows (second order).")
    if report.corrected_gibbs is not None:
        value, spread = report.corrected_gibbs
        screen.print(f"* G by the reference to first order: {value:.5f} +- {spread:.5f} eV/atom.", highlight=False)
    if report.n_failed:
        screen.print(f"* {report.n_failed} configurations have no label (failures.jsonl says why); their pairs are left out.")
    screen.print(f"\nEverything else: {report.folder.resolve()}", highlight=False, soft_wrap=True)
