"""From stored numbers to sentences, tables, pictures and one self-contained page."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` for a campaign, a search or a ranking: see
    `magus_anharmonic.report.page.write_report`."""
    from magus_anharmonic.report.page import write_report as write

    return write(folder)


def report_at_end(folder: str | Path) -> Path | None:
    """`write_report` as the last act of a run: what goes wrong is logged and does not take the
    finished run down with it."""
    try:
        return write_report(folder)
    except Exception as error:
        log.warning(
            "no report was written (%s: %s); magus-anharmonic report %s tries again",
            type(error).__name__,
            error,
            folder,
        )
        log.debug("the report's error", exc_info=True)
        return None
