"""``magus-anharmonic``: parse, call, print. Every library is imported inside the command that needs it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from magus_anharmonic.errors import InputError, MagusAnharmonicError

app = typer.Typer(
    name="magus-anharmonic",
    help="Crystal structure prediction with moving ions: MAGUS, MatterSim and the SSCHA in one loop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

INPUT_ERROR = 2


class Host(StrEnum):
    """Who runs the search."""

    auto = "auto"
    magus = "magus"
    embedded = "embedded"


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors meant for the user into one clear message and an exit code (2 = the input is wrong)."""
    try:
        yield
    except InputError as error:
        for problem in error.problems:
            typer.echo(f"input error: {problem}", err=True)
        raise typer.Exit(INPUT_ERROR) from None
    except MagusAnharmonicError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped; finished work is kept, run the same command with -r to go on", err=True)
        raise typer.Exit(130) from None


def configure_logging(verbose: bool) -> None:
    """Log lines to standard error: coloured on a terminal, plain with a time stamp when redirected."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    handler.set_name("magus-anharmonic")
    root = logging.getLogger()
    for earlier in [known for known in root.handlers if known.get_name() == handler.get_name()]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    logging.getLogger("magus_anharmonic").setLevel(logging.DEBUG if verbose else logging.INFO)


InputFile = Annotated[Path, typer.Option("-i", "--input-file", help="The input file in YAML, MAGUS's keys and ours.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show debugging lines too.")]


@app.command()
def search(
    input_file: InputFile = Path("input.yaml"),
    host: Annotated[Host, typer.Option(help="Stock MAGUS, the embedded host, or MAGUS when it is installed.")] = Host.auto,
    restart: Annotated[bool, typer.Option("-r", "--restart", help="Go on with the search in this folder.")] = False,
    use_ml: Annotated[bool, typer.Option("-m", "--use-ml", help="MAGUS's own learning loop (host magus only).")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List MAGUS's keys that the embedded host knows, and stop.")] = False,
    verbose: Verbose = False,
) -> None:
    """Search for structures and rank them by the SSCHA free energy.

    Runs in the current folder and leaves MAGUS's [bold]results/[/bold] there, with ours in
    [bold]results/anharmonic/[/bold]. The same input.yaml works with stock [bold]magus search[/bold].
    """
    configure_logging(verbose)
    with user_errors():
        if keys:
            from magus_anharmonic.host_keys import keys_table

            typer.echo(keys_table())
            return
        from magus_anharmonic.doctor import magus_version

        found = magus_version()
        if host is Host.magus and found is None:
            raise InputError("--host magus: MAGUS is not installed (pip install git+https://gitlab.com/bigd4/magus.git)")
        if found is not None and host is not Host.embedded:
            from magus_anharmonic.plugins.run import run_stock_magus

            run_stock_magus(input_file, restart=restart, use_ml=use_ml)
        else:
            if use_ml:
                raise InputError("-m: MAGUS's own learning loop needs MAGUS; the embedded host learns with the block learning:")
            _embedded(input_file, restart)
        _show(Path("results/anharmonic"))


def _embedded(input_file: Path, restart: bool) -> None:
    from magus_anharmonic.search import run
    from magus_anharmonic.settings import load_settings

    run(load_settings(input_file), Path.cwd(), restart=restart)


def _show(folder: Path) -> None:
    """Print what a finished run found: table, plain words, picture and folder."""
    from rich.console import Console

    from magus_anharmonic.report.summary import picture, read_ranking, sentences, table

    ranking = folder / "ranking.csv"
    if not ranking.exists():
        return
    rows = read_ranking(ranking)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print()
    console.print(table(rows))
    for line in sentences(rows):
        console.print(f"* {line}", highlight=False)
    drawn = picture(rows, folder / "ranking.png")
    console.print(f"\nPicture: {drawn}\nEverything else: {folder.resolve()}", highlight=False, soft_wrap=True)


@app.command()
def rank(
    structures: Annotated[Path | None, typer.Argument(help="Any file that ASE reads, one structure or many.")] = None,
    pressure: Annotated[float, typer.Option(help="GPa.")] = 0.0,
    temperature: Annotated[list[float] | None, typer.Option(help="K; may be given more than once. [default: 0]")] = None,
    checkpoint: Annotated[str, typer.Option(help="A MatterSim name, a path, or a shipped checkpoint.")] = "mattersim-v1.0.0-1M",
    start_dyn: Annotated[
        str | None, typer.Option(help="Instead of structures: prefix of Quantum ESPRESSO dynamical matrices; their supercell is taken.")
    ] = None,
    load_ensemble: Annotated[
        Path | None,
        typer.Option(help="Instead of structures: python-sscha's ensemble (save_bin or data_dir); the start is minimised on it."),
    ] = None,
    supercell: Annotated[tuple[int, int, int], typer.Option(help="Repetitions of the primitive cell.")] = (2, 2, 2),
    min_length: Annotated[float | None, typer.Option(help="Angstrom between images, instead of --supercell.")] = None,
    n_configs: Annotated[int, typer.Option(help="Configurations per population, even.")] = 1000,
    max_populations: Annotated[int, typer.Option(help="Most populations per structure.")] = 30,
    max_candidates: Annotated[int, typer.Option(help="Only this many of the lowest distinct structures.")] = 100,
    window: Annotated[float | None, typer.Option(help="eV/atom above the lowest enthalpy.")] = None,
    confidence: Annotated[float, typer.Option(help="That nobody who belongs to the best is stopped early.")] = 0.95,
    keep_best: Annotated[int, typer.Option(help="So many of the lowest are run to the end and put in order.")] = 3,
    budget: Annotated[int | None, typer.Option(help="Most force evaluations of all structures together.")] = None,
    check_hessian: Annotated[int, typer.Option("--hessian", help="So many of the lowest are checked for saddle points; 0: none.")] = 3,
    everybody: Annotated[bool, typer.Option("--everybody", help="Nobody is stopped early.")] = False,
    fixed_cell: Annotated[bool, typer.Option("--fixed-cell", help="Keep the cells as relaxed statically.")] = False,
    seed: Annotated[int, typer.Option(help="Same input and seed, same result.")] = 0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for all results.")] = Path("ranking"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    verbose: Verbose = False,
) -> None:
    """Rank structures by their SSCHA free energy at a pressure and temperature."""
    configure_logging(verbose)
    with user_errors():
        from magus_anharmonic.ranking import rank_file
        from magus_anharmonic.ranking.given_start import check_sources, rank_start
        from magus_anharmonic.settings import parse_settings

        check_sources(structures, start_dyn, load_ensemble)
        settings = parse_settings(
            {
                "pressure": pressure,
                "seed": seed,
                "Fitness": ["SSCHA"],
                "MainCalculator": {"calculator": "mattersim", "checkpoint": checkpoint, "device": device},
                "sscha": {
                    "temperature": temperature or [0.0],
                    "supercell": {"min_length": min_length} if min_length is not None else list(supercell),
                    "cell": "fixed" if fixed_cell else "variable",
                    "n_configs": n_configs,
                    "max_populations": max_populations,
                    "max_candidates": max_candidates,
                    "window": window,
                    "allocation": "fixed" if everybody else "elimination",
                    "confidence": confidence,
                    "keep_best": keep_best,
                    "budget": budget,
                    "hessian": check_hessian,
                },
            }
        )
        if structures is None:
            rank_start(start_dyn, load_ensemble, settings, output)
        else:
            rank_file(structures, settings, output)
        _show(output)


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
    from rich.console import Console
    from rich.table import Table

    from magus_anharmonic.sscha.hessian_command import table_rows

    shown = Table(title="Softest modes (cm^-1; imaginary as negative)")
    for name in ("q", "modes x q points", "SSCHA auxiliary", "free-energy Hessian"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in table_rows(report.hessian):
        shown.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(shown)
    for line in report.sentences():
        console.print(f"* {line}", highlight=False)
    console.print(
        f"\nPicture: {report.folder / 'dispersion.png'}\nEverything else: {report.folder.resolve()}", highlight=False, soft_wrap=True
    )


@app.command()
def train(
    labels: Annotated[list[Path], typer.Argument(help="Labelled structures: extxyz with energy, forces and stress.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint to write, in MatterSim's format.")] = Path("finetuned.pth"),
    checkpoint: Annotated[str | None, typer.Option(help="What to start from; left out: what the recipe says.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with architecture, stages, split and loss.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's, one stage.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the recipe's, one stage.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same labels, recipe and seed, same checkpoint.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    verbose: Verbose = False,
) -> None:
    """Finetune a MatterSim model on labels, or train a small one from nothing; report errors per kind of structure."""
    configure_logging(verbose)
    with user_errors():
        from magus_anharmonic.potential.train import train_command

        typer.echo(
            train_command(
                labels,
                output,
                checkpoint=checkpoint,
                recipe=recipe,
                epochs=epochs,
                learning_rate=learning_rate,
                seed=seed,
                device=device,
            )
        )


@app.command()
def doctor(
    input_file: Annotated[Path | None, typer.Option("-i", "--input-file", help="Check what this input needs.")] = None,
) -> None:
    """Say what is installed, what is registered, and what is missing; exit code 1 when the input needs it."""
    with user_errors():
        from rich.console import Console
        from rich.table import Table

        from magus_anharmonic.doctor import collect
        from magus_anharmonic.settings import load_settings

        checks = collect(load_settings(input_file) if input_file else None)
        shown = Table("", "what", "found", "what to do", box=None, pad_edge=False)
        for check in checks:
            mark = {True: "[green]ok[/green]", False: "[red]missing[/red]" if check.needed else "absent", None: "-"}[check.ok]
            shown.add_row(mark, check.name, check.detail, "" if check.ok else check.fix)
        Console(width=None if sys.stdout.isatty() else 160).print(shown)
        if any(check.needed and check.ok is False for check in checks):
            raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
