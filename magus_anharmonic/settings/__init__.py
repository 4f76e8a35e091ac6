"""Every key of ``input.yaml`` and ``campaign.yaml``: the one place that knows names, units,
defaults and limits."""

from __future__ import annotations

from magus_anharmonic.settings.calculators import (
    OPTIMIZER_DESCRIPTION,
    QUEUES,
    AseCalculatorSettings,
    CalculatorSettings,
    LabelerSettings,
    Optimizers,
    WorkerSettings,
    as_magus_reads,
    stages,
)
from magus_anharmonic.settings.search import (
    LearningSettings,
    Settings,
    SschaSettings,
    load_settings,
    parse_settings,
    rank_settings,
)
from magus_anharmonic.settings.section import (
    Count,
    InsidePath,
    NonNegative,
    Positive,
    PressureGPa,
    Section,
    absolute_file,
    check_pressure,
    fields_at,
    load_yaml,
    nearest,
    parse,
    snake_case,
)
from magus_anharmonic.settings.training import FinetuneSettings, TrainingKeys

__all__ = [
    "OPTIMIZER_DESCRIPTION",
    "QUEUES",
    "AseCalculatorSettings",
    "CalculatorSettings",
    "Count",
    "FinetuneSettings",
    "InsidePath",
    "LabelerSettings",
    "LearningSettings",
    "NonNegative",
    "Optimizers",
    "Positive",
    "PressureGPa",
    "Section",
    "Settings",
    "SschaSettings",
    "TrainingKeys",
    "WorkerSettings",
    "absolute_file",
    "as_magus_reads",
    "check_pressure",
    "fields_at",
    "load_settings",
    "load_yaml",
    "nearest",
    "parse",
    "parse_settings",
    "rank_settings",
    "snake_case",
    "stages",
]
