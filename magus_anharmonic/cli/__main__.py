"""``python -m magus_anharmonic.cli``."""

from __future__ import annotations

from magus_anharmonic.cli import main

main()
