"""From stored numbers to sentences, tables, pictures and one self-contained page."""

from __future__ import annotations

from pathlib import Path


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` for a campaign, a search or a ranking: see `magus_anharmonic.report.page.write_report`."""
    from magus_anharmonic.report.page import write_report as write

    return write(folder)
