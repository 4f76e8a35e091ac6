"""Writes docs/keys.md from the settings models, so that the page cannot drift from the code:
``python docs/make_keys.py``."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from magus_anharmonic.potential.train import TrainRecipe
from magus_anharmonic.search.keys import HostKeys
from magus_anharmonic.settings import (
    Architecture,
    CalculatorSettings,
    FinetuneSettings,
    In,
    LabelerSettings,
    LearningSettings,
    ScratchSettings,
    Settings,
    SschaSettings,
    WorkerSettings,
    calculators,
    campaign,
)
from magus_anharmonic.settings.phase_diagram import PhaseDiagramSettings, PhaseSettings

PAGE = Path(__file__).with_name("keys.md")

SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    (
        "Top level",
        (
            "Keys of MAGUS that this package reads too, and the blocks it adds. Every other key is"
            " MAGUS's own."
        ),
        Settings,
    ),
    (
        "`MainCalculator`, `MLCalculator` with `calculator: mattersim`",
        "The potential and its relaxations.",
        CalculatorSettings,
    ),
    (
        "`learning`",
        "Left out: no learning. The numbers are those of Sec. IV A of the paper.",
        LearningSettings,
    ),
    (
        "`learning.labeler`",
        "Where DFT labels come from: see [labelers.md](labelers.md).",
        LabelerSettings,
    ),
    (
        "`learning.scratch`",
        "The first model of a search with `checkpoint: scratch`: see [recipes.md](recipes.md#no-weights-no-network).",
        ScratchSettings,
    ),
    ("`learning.scratch.architecture`", "Shape of a new model.", Architecture),
    ("`sscha`", "Left out: static enthalpies. `sscha: {}` takes every default.", SschaSettings),
    (
        "`workers`",
        "Who runs labels, relaxations and SSCHA: see [clusters.md](clusters.md).",
        WorkerSettings,
    ),
    (
        "MAGUS's keys that the embedded host knows",
        (
            "For `magus-anharmonic search --host embedded`. A key that only MAGUS knows is named"
            " and refused."
        ),
        HostKeys,
    ),
    (
        "`phase-diagram.yaml`",
        (
            "For `magus-anharmonic phase-diagram`: see [phase-diagram.md](phase-diagram.md)."
            " `sscha` as above, without the keys of a ranking."
        ),
        PhaseDiagramSettings,
    ),
    ("One entry of `phases`", "A path alone is enough.", PhaseSettings),
    ("Recipe of `magus-anharmonic train --recipe`", "A file of its own.", TrainRecipe),
    ("One entry of `stages` in a recipe", "Stages run one after the other.", FinetuneSettings),
    (
        "`campaign.yaml`",
        "A file of its own, for `magus-anharmonic campaign`. Files in it are relative to it.",
        campaign.CampaignSettings,
    ),
    ("`phases` of a campaign", "A list.", campaign.PhaseSettings),
    ("`learning` of a campaign", "The first stage.", campaign.CampaignLearning),
    ("`merge` of a campaign", "", calculators.MergeSettings),
    ("`final` of a campaign", "", calculators.FinalSettings),
    ("One entry of `final.stages` of a campaign", "", calculators.StageSettings),
    ("`produce` of a campaign", "The second stage.", campaign.ProduceSettings),
    ("`foundation_check` of a campaign", "", campaign.FoundationSettings),
    ("`relax` of a campaign", "", campaign.RelaxSettings),
    ("`sscha` of a campaign", "", campaign.CampaignSscha),
    ("`dft` of a campaign", "", campaign.DftSettings),
    ("`hessian` of a campaign", "", campaign.HessianSettings),
    ("One entry of `hessian.phases` of a campaign", "", campaign.HessianPhase),
    ("`errors` of a campaign", "", campaign.ErrorSettings),
    ("`figures` of a campaign", "", campaign.FigureSettings),
]

HEAD = """\
# Keys

<!-- Made by docs/make_keys.py from the settings models; do not edit. -->

Keys are accepted in snake_case and camelCase (`n_sample`, `nSample`). A wrong key, type, unit or combination stops the run
before any work, with the key's path, the value, what is allowed and the nearest valid key (exit code 2).

Where the type names a unit, a bare number is in it, and a text may have another one: `150 GPa`, `300 K`, `5 meV`, `2 h`.
What looks like a pressure in Pa (`150e9`) is refused. MAGUS reads its own keys itself: with stock MAGUS `pressure` and the
keys of the embedded host's table below are bare numbers.

The first line of an input may name its JSON schema, by which editors complete and check (`yaml-language-server`):
`magus-anharmonic init` writes it, and the inputs of the repository have it. The schemas of `input.yaml`, `campaign.yaml`,
`phase-diagram.yaml` and of a recipe of `train` are in `magus_anharmonic/data/schemas` of the installed package.
"""  # noqa: E501

SIMPLE = {
    "int": "whole number",
    "float": "number",
    "str": "text",
    "bool": "true or false",
    "Any": "anything",
    "NoneType": "nothing",
}


def type_text(annotation: Any) -> str:
    """A type in words that need no Python."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        units = [f" in {item.unit}" for item in arguments[1:] if isinstance(item, In)]
        return type_text(arguments[0]) + "".join(units)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(item) for item in arguments if item is not type(None))
    if origin is Literal:
        return " or ".join(f"`{item}`" for item in arguments)
    if origin in (list, tuple):
        inner = [item for item in arguments if item is not Ellipsis]
        return (
            f"{len(inner)} x {type_text(inner[0])}"
            if origin is tuple and len(inner) == len(arguments)
            else f"list of {type_text(inner[0])}"
        )
    if origin is dict:
        return (
            f"`{{{arguments[0].__args__[0]}: number}}`"
            if get_origin(arguments[0]) is Literal
            else "block"
        )
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    return SIMPLE.get(
        getattr(annotation, "__name__", str(annotation)),
        getattr(annotation, "__name__", str(annotation)),
    )


def default_text(field: FieldInfo) -> str:
    """The default as YAML, or what it means to leave the key out."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "left out"
    if isinstance(value, BaseModel) or value == {}:
        return "`{}`"
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return "one stage" if len(value) == 1 else f"{len(value)} stages"
    if isinstance(value, list) and len(value) > 12:
        return f"`[{value[0]}-{value[-1]}]`"
    if isinstance(value, tuple):
        value = list(value)
    return (
        f"`{str(value).lower()}`"
        if isinstance(value, bool)
        else f"`{value}`"
        if value != []
        else "`[]`"
    )


def limits(field: FieldInfo) -> str:
    """``> 0, <= 0.3`` from the constraints of a field."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found: dict[str, Any] = {}
    for item in (*field.metadata, *_inner_metadata(field.annotation)):
        for name in signs:
            value = getattr(item, name, None)
            if value is not None:
                found.setdefault(name, value)
    return ", ".join(f"{signs[name]} {value:g}" for name, value in found.items())


def _inner_metadata(annotation: Any) -> list[Any]:
    collected: list[Any] = []
    for item in (annotation, *get_args(annotation)):
        if get_origin(item) is Annotated:
            for extra in get_args(item)[1:]:
                collected += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    return collected


def section(title: str, text: str, model: type[BaseModel]) -> str:
    """One heading with its table."""
    lines = [
        f"## {title}",
        "",
        text,
        "",
        "| key | type | default | limits | meaning |",
        "|---|---|---|---|---|",
    ]
    hints = typing.get_type_hints(model, include_extras=True)
    for name, field in model.model_fields.items():
        if model is Settings and name == "host":
            continue
        shown = {
            "main_calculator": "MainCalculator",
            "ml_calculator": "MLCalculator",
            "fitness": "Fitness",
        }.get(name, name)
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(
            f"| `{shown}` | {type_text(hints[name])} | {default_text(field)} | {limits(field)} |"
            f" {meaning} |"
        )
    return "\n".join(lines)


def render() -> str:
    """The whole page."""
    return "\n\n".join([HEAD.rstrip(), *(section(*item) for item in SECTIONS)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
