"""Every key of ``input.yaml`` and ``campaign.yaml``: the one place that knows names, units, defaults and limits."""

from __future__ import annotations

from magus_anharmonic.settings.search import (
    OPTIMIZER_DESCRIPTION,
    QUEUES,
    CalculatorSettings,
    LabelerSettings,
    LearningSettings,
    Optimizers,
    Settings,
    SschaSettings,
    WorkerSettings,
    load_settings,
    parse_settings,
)
from magus_anharmonic.settings.section import (
    Count,
    Loss,
    NonNegative,
    Positive,
    PressureGPa,
    Schedule,
    Section,
    check_pressure,
    fields_at,
    load_yaml,
    nearest,
    parse,
    snake_case,
)

__all__ = [
    "OPTIMIZER_DESCRIPTION",
    "QUEUES",
    "CalculatorSettings",
    "Count",
    "LabelerSettings",
    "LearningSettings",
    "Loss",
    "NonNegative",
    "Optimizers",
    "Positive",
    "PressureGPa",
    "Schedule",
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
