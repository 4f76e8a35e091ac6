"""The input of ``magus-anharmonic phase-diagram``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings.section import (
    FOUNDATION,
    Ascending,
    Checkpoint,
    Device,
    Element,
    In,
    InsidePath,
    Kelvin,
    NonNegative,
    Positive,
    PressuresGPa,
    Section,
    Seed,
    absolute_file,
    load_yaml,
    parse,
)
from magus_anharmonic.settings.sscha import OF_A_RANKING, SschaSettings


class PhaseSettings(Section):
    """One phase: a structure file, or a frame of one."""

    structure: InsidePath = Field(description="a file that ASE reads; relative to the input file")
    index: int = Field(-1, description="frame of the file, from 0; -1: the last")


class PhaseDiagramSettings(Section):
    """``phase-diagram.yaml``: G of the phases on a grid of pressures and temperatures."""

    phases: dict[str, PhaseSettings] = Field(
        description="name: structure file, or {structure, index}"
    )
    checkpoint: Checkpoint = FOUNDATION
    device: Device = None
    pressures: PressuresGPa = Field(
        description="GPa, rising; the diagram ends at the first and the last"
    )
    temperatures: Annotated[list[Kelvin], Ascending] = Field(
        [0.0], min_length=1, description="K, rising; each point starts from its neighbour"
    )
    isotopes: dict[str, dict[Element, Annotated[Positive, Field(lt=500), In("amu")]]] = Field(
        {"natural": {}},
        description=(
            "name: masses in amu by symbol, e.g. {H3S: {}, D3S: {H: 2.014}}; the first is the"
            " reference"
        ),
    )
    sscha: SschaSettings = Field(
        SschaSettings.model_validate({}),
        description="as in a search; keys of a ranking are refused",
    )
    end_members: list[str] = Field(
        [],
        description=(
            "phases or formulas against which formation energies count, e.g. [H2S, H2]; left out:"
            " the elements"
        ),
    )
    model_error: Annotated[NonNegative, In("eV/atom")] = Field(
        0.0,
        description=(
            "eV/atom, error of the potential in G of a phase, independent between phases; widens"
            " the bands"
        ),
    )
    n_samples: Annotated[int, Field(ge=100, strict=True)] = Field(
        1000, description="samples of the fits behind bands and probabilities"
    )
    seed: Seed = 0

    @field_validator("phases", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value:
            raise ValueError("must name at least one phase, e.g. {Im-3m: im3m.cif}")
        for name in value:
            if not str(name).strip() or "/" in str(name):
                raise ValueError(f"{name!r}: a phase needs a name without slashes")
        return {
            str(name): {"structure": item} if isinstance(item, str) else item
            for name, item in value.items()
        }

    @field_validator("isotopes", mode="before")
    @classmethod
    def _empty_is_natural(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value:
            raise ValueError(
                "must name at least one set of masses, e.g. {H3S: {}, D3S: {H: 2.014}}"
            )
        return {str(name): {} if masses is None else masses for name, masses in value.items()}

    @model_validator(mode="after")
    def _no_ranking_keys(self) -> PhaseDiagramSettings:
        given = [name for name in OF_A_RANKING if name in self.sscha.model_fields_set]
        if given:
            hint = "; give temperatures: beside it" if "temperature" in given else ""
            raise ValueError(f"sscha: {', '.join(given)}: not used for a phase diagram{hint}")
        return self


def load_phase_diagram(path: str | Path) -> PhaseDiagramSettings:
    """Read ``phase-diagram.yaml``; structure files become absolute paths. Raises ``InputError``
    with every problem."""
    file = Path(path)
    settings = parse(PhaseDiagramSettings, load_yaml(file))
    phases = {
        name: phase.model_copy(update={"structure": str((file.parent / phase.structure).resolve())})
        for name, phase in settings.phases.items()
    }
    checkpoint = file.parent / settings.checkpoint
    changed: dict[str, Any] = {"phases": phases}
    if checkpoint.suffix and checkpoint.is_file():
        changed["checkpoint"] = str(checkpoint.resolve())
    return settings.model_copy(update=changed)


def grid_settings(
    structures: Sequence[Path],
    given: Mapping[str, Any],
    *,
    isotopes: Iterable[str] = (),
    sscha: Mapping[str, Any],
) -> PhaseDiagramSettings:
    """Settings of a grid from structure files, one phase each, named as the file; with what was
    ``given`` for the top level and for the block ``sscha`` (None: not given) and ``isotopes`` as in
    ``"D3S:H=2.014"``.

    Raises ``InputError``.
    """
    if not given.get("pressures"):
        raise InputError("--pressure: is missing (GPa; give it more than once for a grid)")
    phases = {path.stem: str(path.resolve()) for path in structures}
    if len(phases) < len(structures):
        raise InputError(
            f"{', '.join(map(str, structures))}: a phase is named as its file, and two have the"
            " same name; use a phase-diagram.yaml"
        )
    data = {key: value for key, value in given.items() if value is not None}
    if "checkpoint" in data:
        data["checkpoint"] = absolute_file(data["checkpoint"])
    return parse(
        PhaseDiagramSettings,
        {
            **data,
            "phases": phases,
            "isotopes": {"natural": {}, **dict(_masses(text) for text in isotopes)},
            "sscha": {key: value for key, value in sscha.items() if value is not None},
        },
    )


def _masses(text: str) -> tuple[str, dict[str, float]]:
    """Name and masses (amu) of ``"D3S:H=2.014"``."""
    name, _, rest = text.partition(":")
    pair = r"\s*([A-Z][a-z]?)=([0-9.]+)\s*"
    if not name or not re.fullmatch(f"{pair}(,{pair})*", rest):
        raise InputError(
            f"--isotope: {text!r}: must be NAME:SYMBOL=MASS, e.g. D3S:H=2.014 (more masses after a"
            " comma)"
        )
    return name, {symbol: float(mass) for symbol, mass in re.findall(pair, rest)}
