"""DFT labels: GPAW, VASP, Quantum ESPRESSO, any ASE calculator.

A code is one `Code` in `codes`, and one line in its `REGISTRY`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magus_anharmonic.errors import InputError, LabelerError, LabelerNotInstalled
from magus_anharmonic.labelers.base import Code, Failure, Label, Labeler, Recipe
from magus_anharmonic.labelers.codes import REGISTRY, code_of
from magus_anharmonic.labelers.pool import CallableLabeler, ScheduledLabeler, WorkerLabeler
from magus_anharmonic.scheduler import Scheduling, available_cores, is_remote
from magus_anharmonic.settings import LabelerSettings
from magus_anharmonic.units import KELVIN


def available(name: str, execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
    """Whether labels of ``name`` can be made here, and one sentence that says why or what to
    install."""
    if name == "main":
        return True, "MAGUS's MainCalculator makes the labels (magus search -m)"
    try:
        return code_of(name).available(execution)
    except InputError as error:
        return False, str(error)


def at_electronic_temperature(settings: LabelerSettings, temperature: float) -> LabelerSettings:
    """The same labeler with Fermi-Dirac occupations at ``temperature`` (K), so that the free energy
    of a label is that of its electrons there. Raises ``InputError`` at 0 K, where there is nothing
    to add to the energy, and for a code whose words for it are not known."""
    if temperature <= 0:
        raise InputError("--electronic: at 0 K the free energy of the electrons is their energy")
    try:
        code = code_of(settings.calculator)
        arguments = code.fermi_dirac(settings.arguments, KELVIN * temperature)
    except LabelerError as error:
        raise InputError(f"--electronic: {error}; take gpaw, vasp or espresso") from None
    return settings.model_copy(update={"arguments": arguments})


def get_labeler(
    settings: LabelerSettings,
    directory: str | Path,
    scheduling: Scheduling | None = None,
    key: str = "learning.labeler",
) -> Labeler:
    """The labeler of the block ``key``; its scratch files and logs go below ``directory``.

    ``scheduling``: what has the keys ``scheduler`` and ``workers`` (a `Settings`); None labels on
    this machine. Whether the DFT code is there is not asked where the labels are made on workers
    elsewhere: they have their own environment.

    Raises ``InputError`` when its settings contradict each other, ``LabelerNotInstalled`` (also an
    ``InputError``) when it is not here.
    """
    name = settings.calculator
    if name == "main":
        raise InputError(
            f"{key}.calculator: main: MAGUS's MainCalculator makes labels only under"
            " `magus search -m`; give gpaw, vasp, espresso or the import path of an ASE calculator"
        )
    code = code_of(name)
    try:
        recipe = code.recipe(settings)
    except LabelerError as error:
        raise InputError(str(error)) from None
    if scheduling is not None and is_remote(scheduling.scheduler):
        return ScheduledLabeler(recipe, Path(directory), scheduling, timeout=settings.timeout)
    usable, message = code.available(recipe.execution)
    if not usable:
        raise LabelerNotInstalled(f"{key}.calculator: {name}: labeler not installed: {message}")
    if scheduling is not None and scheduling.scheduler == "serial":
        return WorkerLabeler(recipe, Path(directory), n_workers=1, timeout=settings.timeout)
    count = None if scheduling is None else scheduling.workers.count
    n_workers = settings.n_workers or count or code.default_workers(available_cores())
    return WorkerLabeler(recipe, Path(directory), n_workers=n_workers, timeout=settings.timeout)
