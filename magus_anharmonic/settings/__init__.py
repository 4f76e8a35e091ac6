"""Every key of ``input.yaml`` and ``campaign.yaml``: the one place that knows names, units, defaults and limits."""

from __future__ import annotations

from magus_anharmonic.settings.search import (
    QUEUES,
    CalculatorSettings,
    LabelerSettings,
    LearningSettings,
    Settings,
    SschaSettings,
    WorkerSettings,
    load_settings,
    parse_settings,
)
from magus_anharmonic.settings.section import (
    Count,
    NonNegative,
    Positive,
    PressureGPa,
    Section,
    check_pressure,
    fields_at,
    load_yaml,
    nearest,
    parse,
    snake_case,
)

__all__ = [
    "QUEUES",
    "CalculatorSettings",
    "Count",
    "LabelerSettings",
    "LearningSettings",
    "NonNegative",
    "Positive",
    "PressureGPa",
    "Section",
    "Settings",
    "SschaSettings",
    "WorkerSettings",
    "check_pressure",
    "fields_at",
    "load_settings",
    "load_yaml",
    "nearest",
    "parse",
    "parse_settings",
    "snake_case",
]
