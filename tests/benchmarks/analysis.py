"""Time and memory of every figure of a campaign with 10,000 structures per table (synthetic).

Usage: python analysis.py [N]
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaign_tables import ranking, write_campaign

from magus_anharmonic.paper import script, tables
from magus_anharmonic.ranking.candidate import Candidate

LIMIT_SECONDS, LIMIT_GIB = 60.0, 2.0


def main(n: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        campaign = write_campaign(Path(scratch), n_structures=n)
        folder = campaign / tables.TABLES_FOLDER
        rows = [
            replace(row, id=f"{row.id}-{k}") for k in range(max(1, n // 20)) for row in ranking()
        ]
        tables.write(Candidate, folder / tables.ranking_file(100), rows)
        pairs = tables.read(tables.Parity, folder / "parity.csv")
        tables.write(
            tables.Parity, folder / "parity.csv", (pairs * (20_000 // len(pairs) + 1))[:20_000]
        )
        wall, processor = time.perf_counter(), time.process_time()
        made, missing = script("figures").make_figures(campaign)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        size = sum(path.stat().st_size for path in (campaign / "figures").iterdir())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(made)} figures ({len(missing)} missing) from {n} structures: {wall:.1f} s wall,"
        f" {processor:.1f} s processor"
    )
    print(f"largest memory {memory:.2f} GiB, files {size / 2**20:.1f} MiB")
    print(
        f"part of the limits ({LIMIT_SECONDS:g} s, {LIMIT_GIB:g} GiB):"
        f" {processor / LIMIT_SECONDS:.2f}, {memory / LIMIT_GIB:.2f}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
