"""Writes the JSON schemas of the YAML files from the settings models, for editors that complete and
check: ``python docs/make_schemas.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import magus_anharmonic
from magus_anharmonic.potential.train import TrainRecipe
from magus_anharmonic.search.keys import (
    MAGUS_ONLY,
    PUBLIC,
    WITHOUT_EFFECT,
    HostKeys,
    Operators,
    camel,
)
from magus_anharmonic.settings import (
    CalculatorSettings,
    LearningSettings,
    Section,
    Settings,
    SschaSettings,
    snake_case,
)
from magus_anharmonic.settings.campaign import OWNED_BY_THE_CAMPAIGN, CampaignSettings
from magus_anharmonic.settings.phase_diagram import PhaseDiagramSettings

FOLDER = Path(magus_anharmonic.__file__).parent / "data" / "schemas"
Schema = dict[str, Any]


def aliases(name: str) -> list[str]:
    """The other spellings of a key: camelCase, and what MAGUS calls it."""
    return [other for other in {camel(name): 0, PUBLIC.get(name, name): 0} if other != name]


def with_aliases(schema: Schema, model: type[Section], where: str) -> Schema:
    """Every spelling of every key that a block takes; editors suggest one of them."""
    properties = schema.get("properties", {})
    old: dict[str, list[str]] = {}
    for before, now in model.old_names.items():
        old.setdefault(now, []).append(before)
    for name in list(properties):
        same = {"$ref": f"#{where}/properties/{name}"}
        for other in aliases(name) + old.get(name, []):
            quiet = {} if other == PUBLIC.get(name) else {"doNotSuggest": True}
            properties.setdefault(other, {"allOf": [same], **quiet})
    required = schema.pop("required", [])
    if required:
        spelt = ([name, *aliases(name), *old.get(name, [])] for name in required)
        schema["allOf"] = [{"anyOf": [{"required": [one]} for one in names]} for names in spelt]
    return schema


def draft_7(value: Any) -> Any:
    """Tuples as the drafts write them that every editor knows."""
    if isinstance(value, list):
        return [draft_7(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: draft_7(item) for key, item in value.items() if key != "title"}
    if "prefixItems" in found:
        found["items"] = found.pop("prefixItems")
    return found


def models() -> dict[str, type[Section]]:
    """Every block of settings by its name; two that share one are the same to nobody here."""
    found: dict[str, type[Section]] = {}
    queue: list[type[Section]] = [Section]
    while queue:
        below = queue.pop().__subclasses__()
        queue += below
        found |= {
            model.__name__: model for model in below if model.__module__.startswith("magus_anh")
        }
    return found


def schema_of(model: type[Section], definitions: Schema) -> Schema:
    """The schema of a block, whose own blocks go into ``definitions``."""
    found = draft_7(model.model_json_schema(ref_template="#/$defs/{model}"))
    known = models()
    for name, inner in found.pop("$defs", {}).items():
        definitions[name] = with_aliases(inner, known[name.rpartition("__")[2]], f"/$defs/{name}")
    return found


def described(schema: Schema) -> Schema:
    """The description alone: MAGUS takes more than the embedded host."""
    return {"description": schema.get("description", "")}


def magus_keys(definitions: Schema) -> Schema:
    """Properties of MAGUS's own keys at the top level; what the embedded host takes a part of is
    not checked."""
    properties = schema_of(HostKeys, definitions)["properties"]
    for name in ("structure_type", "choice_func", "spacegroup", "formula"):
        properties[name] = described(properties[name])
    properties["offspring_creator"] = {
        **described(properties["offspring_creator"]),
        "properties": {name: {} for name in Operators.model_fields},
    }
    for name in sorted(sorted({*MAGUS_ONLY, *WITHOUT_EFFECT}), key=str.lower):
        properties.setdefault(name, {"description": "known to MAGUS alone", "doNotSuggest": True})
    return properties


def calculator(definitions: Schema) -> Schema:
    """``MainCalculator``: checked where it is ours."""
    ours = {"properties": {"calculator": {"const": "mattersim"}}, "required": ["calculator"]}
    definitions["CalculatorSettings"] = with_aliases(
        schema_of(CalculatorSettings, definitions), CalculatorSettings, "/$defs/CalculatorSettings"
    )
    return {"type": "object", "if": ours, "then": {"$ref": "#/$defs/CalculatorSettings"}}


def input_schema() -> Schema:
    """Of ``input.yaml``: our keys, and MAGUS's."""
    definitions: Schema = {}
    found = schema_of(Settings, definitions)
    properties = found["properties"]
    del properties["host"]
    for name in ("main_calculator", "ml_calculator"):
        properties[name] = {**described(properties[name]), **calculator(definitions)}
    properties["workers"] = {"anyOf": [properties["workers"], {"type": "null"}]}
    found["properties"] = properties | {
        name: item for name, item in magus_keys(definitions).items() if name not in properties
    }
    return finished(found, Settings, definitions)


def campaign_schema() -> Schema:
    """Of ``campaign.yaml``: the blocks that are those of ``input.yaml`` are checked as there."""
    definitions: Schema = {}
    found = schema_of(CampaignSettings, definitions)
    shared = {
        name: item
        for name, item in {
            **schema_of(Settings, definitions)["properties"],
            **magus_keys(definitions),
        }.items()
        if snake_case(name) not in (*OWNED_BY_THE_CAMPAIGN, "host", "workers")
    }
    magus = {"type": "object", "properties": shared, "additionalProperties": False}
    definitions["Search"] = with_aliases(magus, Section, "/$defs/Search")
    found["properties"]["search"] |= {"$ref": "#/$defs/Search"}
    for block, model in (("CampaignLearning", LearningSettings), ("CampaignSscha", SschaSettings)):
        name = model.__name__
        inner = schema_of(model, definitions)
        inner.pop("required", None)
        definitions[name] = with_aliases(inner, model, f"/$defs/{name}")
        definitions[block]["properties"]["settings"] = {"$ref": f"#/$defs/{name}"}
    for block in ("CampaignLearning", "ProduceSettings"):
        definitions[block]["properties"]["search"] = {"$ref": "#/$defs/Search"}
    calculator(definitions)
    found["properties"]["calculator"] = {"$ref": "#/$defs/CalculatorSettings"}
    return finished(found, CampaignSettings, definitions)


def phase_diagram_schema() -> Schema:
    """Of ``phase-diagram.yaml``."""
    definitions: Schema = {}
    found = schema_of(PhaseDiagramSettings, definitions)
    for name, short in (("phases", "string"), ("isotopes", "null")):
        inner = found["properties"][name]
        inner["additionalProperties"] = {"anyOf": [{"type": short}, inner["additionalProperties"]]}
    return finished(found, PhaseDiagramSettings, definitions)


def recipe_schema() -> Schema:
    """Of a recipe of ``train``."""
    definitions: Schema = {}
    return finished(schema_of(TrainRecipe, definitions), TrainRecipe, definitions)


def finished(schema: Schema, model: type[Section], definitions: Schema) -> Schema:
    """The whole document."""
    clock = {"type": "string", "pattern": r"^\d+:\d+(:\d+)?$"}
    if "WorkerSettings" in definitions:
        definitions["WorkerSettings"]["properties"]["walltime"]["anyOf"].append(clock)
    if "LabelerSettings" in definitions:
        codes = {"enum": ["gpaw", "vasp", "espresso", "main"]}
        known = definitions["LabelerSettings"]["properties"]["calculator"]
        known["anyOf"] = [codes, {"type": known.pop("type")}]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **with_aliases(schema, model, ""),
        "$defs": definitions,
    }


def render() -> dict[str, str]:
    """Name of the file -> its text."""
    made = {
        "input": input_schema(),
        "campaign": campaign_schema(),
        "phase-diagram": phase_diagram_schema(),
        "recipe": recipe_schema(),
    }
    return {f"{name}.json": json.dumps(found, indent=1) + "\n" for name, found in made.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
