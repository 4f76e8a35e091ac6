"""Settings of a ranking without a search: keys of a file, and what was said beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings.calculators import as_magus_reads, import_path
from magus_anharmonic.settings.search import Settings, parse_settings
from magus_anharmonic.settings.section import absolute_file, load_yaml, snake_case


def rank_settings(
    file: str | Path | None,
    given: Mapping[str, Any],
    *,
    calculator: Mapping[str, Any],
    sscha: Mapping[str, Any],
) -> Settings:
    """Settings of a ranking: what was ``given`` for the top level, for the block of the calculator
    and for the block ``sscha`` (None: not given), else the keys of ``file``, else the defaults.

    Raises ``InputError``.
    """
    data = {
        name if (name := snake_case(str(key))) in Settings.model_fields else str(key): value
        for key, value in (load_yaml(file) if file else {}).items()
    }
    block = as_magus_reads(data.get("main_calculator")) or {}
    wanted = {key: value for key, value in calculator.items() if value is not None}
    if "checkpoint" in wanted:
        wanted["checkpoint"] = absolute_file(wanted["checkpoint"])
        if wanted.setdefault("calculator", "mattersim") != "mattersim":
            raise InputError("--calculator, --checkpoint: give one of the two")
    asked, there = (str(one.get("calculator", "")) for one in (wanted, block))
    same = not (asked and there) or (import_path(asked) or asked) == (import_path(there) or there)
    return parse_settings(
        {
            "seed": 0,
            **data,
            **{key: value for key, value in given.items() if value is not None},
            "fitness": ["SSCHA"],
            "main_calculator": {"calculator": "mattersim", **(block if same else {}), **wanted},
            "sscha": {
                **(data.get("sscha") or {}),
                **({"evaluator": None} if asked else {}),
                **{key: value for key, value in sscha.items() if value is not None},
            },
        }
    )
