"""Every key of ``input.yaml`` and ``campaign.yaml``: the one place that knows names, units,
defaults and limits."""

from __future__ import annotations

from magus_anharmonic.settings.calculators import (
    QUEUES,
    Architecture,
    AseCalculatorSettings,
    CalculatorSettings,
    FinetuneSettings,
    LabelerSettings,
    LearningSettings,
    RelaxationSettings,
    ScratchSettings,
    TrainingKeys,
    WorkerSettings,
    as_magus_reads,
    import_path,
    is_evaluator,
    parse_calculator,
    stages,
)
from magus_anharmonic.settings.search import Settings, load_settings, parse_settings, rank_settings
from magus_anharmonic.settings.section import (
    FOUNDATION,
    SCRATCH,
    Count,
    Energy,
    Force,
    In,
    InsidePath,
    Length,
    NonNegative,
    Positive,
    Section,
    Symprec,
    absolute_file,
    check_pressure,
    load_yaml,
    nearest,
    parse,
    snake_case,
)
from magus_anharmonic.settings.sscha import SschaSettings
