"""Searches and the final model.

Steps that search: learning (first stage) and production (second stage), by stock MAGUS or the
embedded host.

Step ``final``: the foundation model finetuned on the merged labels in stages, and the errors of
both (Table I, Fig. 3).
"""

from __future__ import annotations

import copy
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase import Atoms
from ase.io import write

from magus_anharmonic.campaign.steps import (
    FINAL,
    Context,
    Outcome,
    Step,
    file_digest,
    foundation_digest,
    structure_file,
    write_part,
)
from magus_anharmonic.campaign.structures import (
    LABELS,
    enthalpy_row,
    labels_on_side,
    n_relaxed,
    phases_of,
    populations,
    relaxed_structures,
)
from magus_anharmonic.doctor import uses_magus
from magus_anharmonic.errors import DamagedFile, MagusAnharmonicError
from magus_anharmonic.io.digests import as_stored
from magus_anharmonic.io.files import (
    read_json,
    read_jsonl,
    read_whole,
    replacing,
    write_json,
    write_text,
)
from magus_anharmonic.learning.dataset import LabelStore
from magus_anharmonic.paper.tables import (
    UNITS,
    Enthalpy,
    LearningPoint,
    ModelError,
    Parity,
    learning_points,
)
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.settings.section import load_yaml

log = logging.getLogger(__name__)

IDENTITY = "identity.json"
"""In the folder of a search: what it was started with, and whether it came to its end."""


def learn(context: Context, step: Step) -> Outcome:
    """A search that learns at one pressure; its labels and models stay in
    ``results/anharmonic``."""
    folder = context.folder(step)
    start, earlier = _beginning(context, step)
    data = context.settings.learning_search(step.pressure or 0.0, start, step.cycle)
    if earlier is not None:
        data["learning"].setdefault("dataset", str(earlier))
    search(context, folder, data)
    files = SearchFolder.below(folder)
    metrics = read_jsonl(files.metrics)
    if not metrics:
        raise MagusAnharmonicError(
            f"{folder}: the search ended without a round of learning; see its log"
        )
    latest = {record["generation"]: record for record in metrics}
    rows = (row for record in latest.values() for row in learning_points(step.id, record))
    write_part(folder, LearningPoint, rows)
    failed = [record for record in read_jsonl(files.failures) if record.get("stage") == "label"]
    structures, evaluations = n_relaxed(folder)
    return Outcome(
        n_structures=structures,
        n_evaluations=evaluations,
        n_labels=sum(record["n_labels"] + record["n_failures"] for record in latest.values()),
        output=str(latest[max(latest)]["new_model"]),
        failures=[(str(record["id"]), str(record["reason"])) for record in failed],
    )


def _beginning(context: Context, step: Step) -> tuple[str, Path | None]:
    """The checkpoint that a search begins with, and a file of earlier labels for its replay: those
    of the search before, where one from new weights is continued at another pressure."""
    if not step.needs:
        return context.settings.foundation, None
    (before,) = step.needs
    if step.cycle > 1:
        return str(context.folder(before) / f"cycle{step.cycle - 1}.pth"), None
    files = SearchFolder.below(context.folder(before))
    newest = files.checkpoint(max(record["generation"] for record in read_jsonl(files.metrics)))
    target = context.root / f"labels-{before}.xyz"
    with replacing(target) as temporary:
        write(temporary, LabelStore(files.labels).labels(), format="extxyz")
    return str(newest), target


def produce(context: Context, step: Step) -> Outcome:
    """A search with the final model at one pressure; all its distinct structures go into
    ``enthalpies.csv``."""
    folder, pressure = context.folder(step), step.pressure or 0.0
    search(context, folder, context.settings.production_search(pressure, context.final_checkpoint))
    model, phases = context.final_model.model_id, phases_of(context.settings.phases)
    digest = 0
    with structure_file(folder) as file:

        def rows() -> Iterator[Enthalpy]:
            nonlocal digest
            for found in relaxed_structures(folder, step.id):
                row = enthalpy_row(found, phases, pressure, model, "produce")
                file.add(found.atoms, found.id, row.space_group, pressure, "static")
                digest ^= int(found.id, 16)
                yield row

        write_part(folder, Enthalpy, rows())
    structures, evaluations = n_relaxed(folder)
    log.info("%s: %d structures relaxed, %d distinct ones kept", step.id, structures, file.n)
    return Outcome(structures, evaluations, output=f"{digest:012x}")


def search(context: Context, folder: Path, data: dict[str, Any]) -> None:
    """Run (or go on with) the search of ``data`` (an ``input.yaml``) in ``folder``; nothing when it
    is finished there.

    A folder of another input or model is moved to ``superseded/``: what was labelled is never
    deleted. Raises ``InputError`` where both its ``identity.json`` and its ``input.yaml`` are
    damaged.
    """
    model = content_digest(data["MainCalculator"]["checkpoint"])
    identity = as_stored({"input": data, "model": model})
    mark = folder / IDENTITY
    stored = read_whole(mark, read_identity) or _begun(folder, identity)
    finished = stored.pop("finished")
    if stored == identity and finished:
        log.info("%s: the search is finished", folder.name)
        return
    if stored != identity:
        log.warning("%s: its input or model has changed: it starts anew", folder.name)
        context.move_away(folder)
    write_text(folder / "input.yaml", yaml.safe_dump(data, sort_keys=False))
    write_json(mark, {**identity, "finished": False})
    if uses_magus(context.settings.host, "host: magus"):
        _stock_magus(folder)
    else:
        from magus_anharmonic.search.host import run

        run(parse_settings(data), folder, restart=SearchFolder.below(folder).record.is_file())
    write_json(mark, {**identity, "finished": True})


def progress(step: Step, root: Path) -> str:
    """How far a running search is, from its files; an empty string for other steps."""
    if step.kind not in ("learn", "produce"):
        return ""
    folder = root / step.id
    generations = step.settings["input"].get("numGen", step.settings["input"].get("num_gen"))
    done = max([0, *(number for number, _ in populations(folder))])
    labels = SearchFolder.below(folder).labels
    waiting = len(list(labels.glob("pending/*/*.xyz")))
    shown = f", {waiting} labels of this one" if waiting else ""
    return f"generation {done} of {generations} reached{shown}"


def read_identity(file: Path) -> dict[str, Any]:
    """What a search was started with; raises ``DamagedFile``."""
    stored = read_json(file)
    if (
        not isinstance(stored.get("input"), dict)
        or "model" not in stored
        or not isinstance(stored.get("finished"), bool)
    ):
        raise DamagedFile(f"{file}: does not say what the search was started with")
    return stored


def _begun(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The identity of an unfinished search that has no whole one: its input is in ``input.yaml``,
    and it knows its model itself."""
    file = folder / "input.yaml"
    begun = {"input": as_stored(load_yaml(file))} if file.is_file() else {}
    return {**identity, **begun, "finished": False}


def content_digest(checkpoint: str) -> str | None:
    """Of the checkpoint as it is now."""
    return (
        foundation_digest(checkpoint)
        if not Path(checkpoint).is_file()
        else file_digest.__wrapped__(checkpoint)
    )


def _stock_magus(folder: Path) -> None:
    """``magus-anharmonic search`` in a process of its own: MAGUS takes the current folder and the
    root logger."""
    command = [
        sys.executable,
        "-m",
        "magus_anharmonic",
        "search",
        "-i",
        "input.yaml",
        "--host",
        "magus",
    ]
    # MAGUS can restart from its second round on
    if populations(folder) and (folder / "log.txt").is_file():
        command.append("-r")
    log.info("stock MAGUS in %s; its log: log.txt", folder)
    with (folder / "magus.out").open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent,
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        raise MagusAnharmonicError(
            f"{folder}: MAGUS ended with exit code {code}; see {folder / 'magus.out'}"
        )


def _end_with_parent() -> None:
    """Linux: this process gets SIGTERM when the campaign is killed, so that no second search starts
    beside it."""
    import ctypes
    import signal

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


SIDES = {"training": "train", "validation": "validation", "test": "test"}
PARITY_ROWS = 20_000


def final(context: Context, step: Step) -> Outcome:
    """Finetune from the foundation; leaves ``final/cycle<N>.pth``, ``final/final.pth`` and
    ``final/errors.json``."""
    from magus_anharmonic.potential import load
    from magus_anharmonic.potential.labelled import Scores

    folder, merged = context.folder(step), context.folder(step.needs[0]) / LABELS
    sets = {public: labels_on_side(merged, side) for public, side in SIDES.items()}
    if not sets["training"]:
        raise MagusAnharmonicError(
            "final: no label is on the training side; more structures are needed"
            " (learning.settings.n_sample)"
        )
    stages = _train(context, step, sets["training"], sets["validation"])
    out = folder / f"cycle{step.cycle}.pth"
    with replacing(out) as temporary:
        shutil.copyfile(stages[-1].path, temporary)
    finetuned = load(out, device=context.settings.device)
    foundation = context.foundation
    before = {} if foundation is None else {"foundation": foundation}
    models = {**before, "finetuned": finetuned}
    scores = write_errors(folder, models, sets, context.settings.seed)
    write_json(folder / f"errors-cycle{step.cycle}.json", scores)
    with replacing(context.root / FINAL) as temporary:
        shutil.copyfile(out, temporary)
    found = scores["finetuned"].get("validation")
    kept = (
        ""
        if any(stage.improved for stage in stages)
        else "no stage lowered the validation loss: the model is the foundation with new shifts"
    )
    if found is not None:
        log.info(
            "final model %s: validation RMSE %s on %d labels",
            finetuned.model_id,
            Scores(**found),
            found["n"],
        )
    return Outcome(
        n_structures=sum(map(len, sets.values())), output=finetuned.model_id, reason=kept
    )


def validation_rmse(file: Path) -> float | None:
    """Energy RMSE (eV/atom) of the finetuned model on the validation set; None when there was none.
    Raises ``DamagedFile``."""
    if not file.is_file():
        return None
    scores = read_json(file)
    try:
        found = scores["finetuned"].get("validation")
        return None if not found else float(found["energy_rmse"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(
            f"{file}: not the errors of a model ({type(error).__name__}: {error})"
        ) from None


def _train(
    context: Context, step: Step, training: Sequence[Atoms], validation: Sequence[Atoms]
) -> list[Any]:
    """One `FinetuneResult` per stage; a stage that was finished before is read from its file."""
    from magus_anharmonic.potential.finetune import finetune

    folder, module, parent, species = context.folder(step), *_start(context, training)
    stages = []
    for number, stage in enumerate(context.settings.final_stages, start=1):
        log.info(
            "stage %d of %d: %d epochs on %d labels",
            number,
            len(context.settings.final_stages),
            stage.epochs,
            len(training),
        )
        result = finetune(
            module,
            training,
            validation,
            stage,
            out=folder / f"cycle{step.cycle}.stage{number}.pth",
            seed=context.settings.seed + number,
            parent_id=parent,
            species=species,
        )
        stages.append(result)
        module = result.module
    return stages


def _start(context: Context, training: Sequence[Atoms]) -> tuple[Any, str, Iterable[int] | None]:
    """What the final model is trained from, the id of that, and the elements that it knows."""
    from magus_anharmonic.potential import checkpoint
    from magus_anharmonic.potential.resources import chosen_device
    from magus_anharmonic.potential.trainer import from_scratch, refit_shift

    settings, foundation = context.settings, context.foundation
    if foundation is None:
        device, shape = chosen_device(settings.device), settings.scratch.architecture
        module = from_scratch(training, shape, seed=settings.seed, device=device)
        known = {int(number) for atoms in training for number in atoms.numbers}
        return module, checkpoint.model_id(module), known
    module = copy.deepcopy(foundation.module)
    if settings.final.refit_shift:
        refit_shift(module, training)
    return module, foundation.model_id, foundation.species_seen


def write_errors(
    folder: Path, models: dict[str, Any], sets: dict[str, list[Atoms]], seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """``model_errors.csv`` and ``parity.csv``; returns the scores by model and set (sets without
    labels are left out)."""
    from magus_anharmonic.potential.labelled import score

    scores = {
        name: {public: score(model, labels).as_dict() for public, labels in sets.items() if labels}
        for name, model in models.items()
    }
    errors = (
        ModelError(
            name,  # type: ignore[arg-type]
            models[name].model_id,
            public,  # type: ignore[arg-type]
            found["n"],
            found["energy_rmse"],
            found["force_rmse"],
            found["stress_rmse"],
        )
        for name, by_set in scores.items()
        for public, found in by_set.items()
    )
    write_part(folder, ModelError, errors)
    rows = [
        row
        for name, model in models.items()
        for public, labels in sets.items()
        for row in parity_rows(name, model, public, labels)
    ]
    if len(rows) > PARITY_ROWS:
        rows = [
            rows[i]
            for i in sorted(
                np.random.default_rng(seed).choice(len(rows), PARITY_ROWS, replace=False)
            )
        ]
    write_part(folder, Parity, rows)
    return scores


def parity_rows(name: str, model: Any, public: str, labels: Sequence[Atoms]) -> Iterator[Parity]:
    """Energy per atom, every component of forces and stress of every label, by DFT and by the
    model: what the errors of Table I are over."""
    from magus_anharmonic.potential.labelled import labels_of
    from magus_anharmonic.units import ev_per_a3_to_gpa

    if not labels:
        return
    found = model.evaluate(list(labels))
    for index, atoms in enumerate(labels):
        energy, forces, stress = labels_of(atoms)
        pairs = {
            "energy": (energy / len(atoms), float(found.energy[index]) / len(atoms)),
            "force": (forces, found.forces[index]),
            "stress": (
                ev_per_a3_to_gpa(stress),
                ev_per_a3_to_gpa(np.asarray(found.stress[index], dtype=float)),
            ),
        }
        for quantity, values in pairs.items():
            for reference, predicted in zip(*map(np.ravel, values), strict=True):
                numbers = float(reference), float(predicted)
                yield Parity(name, public, quantity, UNITS[quantity], *numbers)  # type: ignore[arg-type]
