"""search, rank and train.

``search`` and ``rank``: structures in, a table ranked by free energy out.

``train``: finetune a model, or make a small one, from labelled structures.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.cli.common import (
    SETTINGS,
    Calculator,
    Checkpoint,
    Device,
    InputFile,
    Results,
    Seed,
    SettingsFile,
    command,
    key,
    measured,
    say,
    settings_of,
)
from magus_anharmonic.errors import InputError
from magus_anharmonic.report.screen import require_free_energy, show_ranking


class Host(StrEnum):
    """Who runs the search."""

    auto = "auto"
    magus = "magus"
    embedded = "embedded"


@command(go_on="run the same command with -r")
def search(
    input_file: InputFile = Path("input.yaml"),
    host: Annotated[
        Host, typer.Option(help="Stock MAGUS, the embedded host, or MAGUS when it is installed.")
    ] = Host.auto,
    restart: Annotated[
        bool, typer.Option("-r", "--restart", help="Go on with the search in this folder.")
    ] = False,
    use_ml: Annotated[
        bool, typer.Option("-m", "--use-ml", help="MAGUS's own learning loop (host magus only).")
    ] = False,
    keys: Annotated[
        bool,
        typer.Option("--keys", help="List MAGUS's keys that the embedded host knows, and stop."),
    ] = False,
) -> None:
    """Search for structures and rank them by the SSCHA free energy.

    Runs in the current folder and leaves MAGUS's [bold]results/[/bold] there, with ours in
    [bold]results/anharmonic/[/bold]. The same input.yaml works with stock [bold]magus
    search[/bold].
    """
    if keys:
        from magus_anharmonic.search.keys import keys_table

        say(keys_table())
        return
    from magus_anharmonic.doctor import uses_magus

    if uses_magus(host.value, "--host magus"):
        from magus_anharmonic.plugins.parameters import run_stock_magus

        run_stock_magus(input_file, restart=restart, use_ml=use_ml)
    else:
        if use_ml:
            raise InputError(
                "-m: MAGUS's own learning loop needs MAGUS; the embedded host learns with the"
                " block learning:"
            )
        _embedded(input_file, restart)
        show_ranking(Path("results/anharmonic"))
        require_free_energy(Path("results/anharmonic"))


def _embedded(input_file: Path, restart: bool) -> None:
    from magus_anharmonic.search.host import run
    from magus_anharmonic.settings import load_settings

    run(load_settings(input_file), Path.cwd(), restart=restart)


@command()
def rank(
    structures: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files that ASE reads (also all.extxyz@0:3, found.db@energy<0), or folders."
        ),
    ] = None,
    pressure: Annotated[float | None, measured("GPa", show_default=SETTINGS)] = None,
    temperature: Annotated[
        list[float] | None, measured("K", "May be given more than once.", show_default=SETTINGS)
    ] = None,
    checkpoint: Checkpoint = None,
    calculator: Calculator = None,
    input_file: SettingsFile = None,
    start_dyn: Annotated[
        str | None,
        typer.Option(
            help=(
                "Instead of structures: prefix of Quantum ESPRESSO dynamical matrices; their"
                " supercell is taken."
            )
        ),
    ] = None,
    load_ensemble: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Instead of structures: python-sscha's ensemble (save_bin or data_dir); the start"
                " is minimised on it."
            )
        ),
    ] = None,
    supercell: Annotated[
        tuple[int, int, int] | None, key("Repetitions of the primitive cell.")
    ] = None,
    min_length: Annotated[
        float | None, measured("A", "Between images, instead of --supercell.")
    ] = None,
    n_configs: Annotated[int | None, key("Configurations per population, even.")] = None,
    max_populations: Annotated[int | None, key("Most populations per structure.")] = None,
    max_candidates: Annotated[
        int | None, key("Only so many of the lowest distinct structures.")
    ] = None,
    window: Annotated[float | None, measured("eV/atom", "Above the lowest enthalpy.")] = None,
    confidence: Annotated[
        float | None, key("That nobody who belongs to the best is stopped early.")
    ] = None,
    keep_best: Annotated[
        int | None, key("So many of the lowest phases are run to the end and put in order.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Most force evaluations of all structures together.")
    ] = None,
    hessian: Annotated[
        int | None, key("So many of the lowest are checked for saddle points; 0: none.")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with the block labeler: G of the lowest phases by this DFT code, from"
            " labels of their ensembles."
        ),
    ] = None,
    truth_error: Annotated[
        float | None,
        measured("eV/atom", "Of --truth: labels are added until then.", show_default=SETTINGS),
    ] = None,
    everybody: Annotated[
        bool, typer.Option("--everybody", help="Nobody is stopped early.")
    ] = False,
    fixed_cell: Annotated[
        bool, typer.Option("--fixed-cell", help="Keep the cells as relaxed statically.")
    ] = False,
    seed: Seed = None,
    output: Results = Path("ranking"),
    device: Device = None,
) -> None:
    """Rank structures by their SSCHA free energy at a pressure and temperature.

    Several compositions are ranked each by itself, and placed above the hull that their free
    energies make.
    """
    from magus_anharmonic.paper.ensemble_errors import load_labeler_settings
    from magus_anharmonic.paper.truth import labels_of
    from magus_anharmonic.ranking.structures import check_sources, rank_file, rank_start
    from magus_anharmonic.report import report_at_end

    check_sources(structures or (), start_dyn, load_ensemble)
    settings = settings_of(
        input_file,
        pressure,
        seed,
        (calculator, checkpoint, device),
        temperature=temperature,
        supercell=supercell if min_length is None else {"min_length": min_length},
        cell="fixed" if fixed_cell else None,
        n_configs=n_configs,
        max_populations=max_populations,
        max_candidates=max_candidates,
        window=window,
        allocation="fixed" if everybody else None,
        confidence=confidence,
        keep_best=keep_best,
        budget=budget,
        hessian=hessian,
        truth=None if truth is None else load_labeler_settings(truth).model_dump(),
        truth_error=truth_error,
    )
    labels = labels_of(settings, output)
    if structures:
        rank_file(structures, settings, output, truth=labels)
    else:
        rank_start(start_dyn, load_ensemble, settings, output, truth=labels)
    report_at_end(output)
    show_ranking(output)
    require_free_energy(output)


@command()
def train(
    labels: Annotated[
        list[Path],
        typer.Argument(help="Labelled structures: extxyz with energy, forces and stress."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The checkpoint to write, in MatterSim's format.")
    ] = Path("finetuned.pth"),
    checkpoint: Annotated[
        str | None,
        typer.Option(help="What to start from; left out: what the recipe says, or the file of -i."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML with architecture, stages, split and loss.")
    ] = None,
    input_file: SettingsFile = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's, one stage.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Instead of the recipe's, one stage.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Finetune a MatterSim model on labels, or train a small one from nothing; report errors per
    kind of structure.

    Of the file of -i it takes seed, checkpoint, device, and the keys of learning that are those of
    a training stage. It trains in this process, as a search does.
    """
    from magus_anharmonic.potential.train import train_command

    say(
        train_command(
            labels,
            output,
            checkpoint=checkpoint,
            recipe=recipe,
            input_file=input_file,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
        )
    )
