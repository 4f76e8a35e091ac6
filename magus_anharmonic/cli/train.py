"""``train``: finetune a model, or make a small one, from labelled structures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magus_anharmonic.cli.common import Verbose, app, configure_logging, say, user_errors


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

        say(
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
