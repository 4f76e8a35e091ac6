"""``python -m magus_anharmonic``."""

from __future__ import annotations

from magus_anharmonic.cli import main

main()
