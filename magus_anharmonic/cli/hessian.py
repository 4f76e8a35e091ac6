"""``hessian``: the free-energy Hessian of a structure or of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from magus_anharmonic.cli.common import Verbose, app, configure_logging, console, user_errors


@app.command()
def hessian(
    source: Annotated[
        Path, typer.Argument(help="A structure that ASE reads, or the folder of a finished SSCHA run (with its result.json).")
    ],
    pressure: Annotated[float, typer.Option(help="GPa; for a structure.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="K; for a structure.")] = 0.0,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A MatterSim name, a path, or a shipped checkpoint; a folder needs none unless it lacks configurations."),
    ] = None,
    supercell: Annotated[tuple[int, int, int], typer.Option(help="Repetitions of the primitive cell; for a structure.")] = (2, 2, 2),
    n_configs: Annotated[int | None, typer.Option(help="Configurations, even. [default: 1000, or what the folder holds]")] = None,
    max_populations: Annotated[int, typer.Option(help="Most populations; for a structure.")] = 30,
    fixed_cell: Annotated[bool, typer.Option("--fixed-cell", help="Keep the cell; for a structure.")] = False,
    v4: Annotated[bool, typer.Option("--v4", help="Add the fourth-order term.")] = False,
    seed: Annotated[int, typer.Option(help="Same input and seed, same result.")] = 0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for all results.")] = Path("hessian"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    verbose: Verbose = False,
) -> None:
    """Physical phonons from the free-energy Hessian: is the structure a minimum of the free energy or a saddle point?"""
    configure_logging(verbose)
    with user_errors():
        from magus_anharmonic.sscha.hessian_command import check_source, hessian_of_run, hessian_of_structure

        is_run = check_source(source, checkpoint, n_configs)
        evaluator = None
        if checkpoint is not None:
            from magus_anharmonic.potential import load

            evaluator = load(checkpoint, device=device)
        if is_run:
            report = hessian_of_run(source, output, evaluator=evaluator, n_configs=n_configs, include_v4=v4, seed=seed)
        else:
            report = hessian_of_structure(
                source,
                output,
                evaluator,
                pressure=pressure,
                temperature=temperature,
                supercell=supercell,
                n_configs=n_configs or 1000,
                max_populations=max_populations,
                fixed_cell=fixed_cell,
                include_v4=v4,
                seed=seed,
            )
        _show_hessian(report)


def _show_hessian(report: Any) -> None:
    """Print the softest modes, the verdict in words, and where everything is."""
    from rich.table import Table

    from magus_anharmonic.sscha.hessian_command import table_rows

    shown = Table(title="Softest modes (cm^-1; imaginary as negative)")
    for name in ("q", "modes x q points", "SSCHA auxiliary", "free-energy Hessian"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in table_rows(report.hessian):
        shown.add_row(*row)
    screen = console()
    screen.print(shown)
    for line in report.sentences():
        screen.print(f"* {line}", highlight=False)
    screen.print(
        f"\nPicture: {report.folder / 'dispersion.png'}\nEverything else: {report.folder.resolve()}", highlight=False, soft_wrap=True
    )
