"""Time and memory of a report on a large campaign with made-up numbers, in a process of its own:
python tests/benchmarks/report.py [n]

Twice, with n and 4 n structures, to show what grows with their number. The issue's bounds: 10,000
structures in 60 s and 2 GiB.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

SECONDS, BYTES = 60.0, 2 * 1024**3


def measure(folder):
    """In the child: figures where the analysis is there, then the page."""
    begun = time.perf_counter()
    from magus_anharmonic.report.page import write_report

    page = write_report(folder)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = time.process_time()
    print(
        f"{seconds:.1f} s ({own:.1f} s of processor time), peak {peak / 1024**2:.0f} MiB, page"
        f" {page.stat().st_size / 1024**2:.2f} MiB"
    )
    bounds = "within" if own < SECONDS and peak < BYTES else "OUTSIDE"
    print(
        f"  {bounds} the bounds of {SECONDS:.0f} s and {BYTES / 1024**3:.0f} GiB for 10,000"
        " structures"
    )


def main(n):
    from synthetic_campaign import synthetic_campaign

    for size in (n, 4 * n):
        with tempfile.TemporaryDirectory() as folder:
            synthetic_campaign(Path(folder) / "large", size)
            print(f"{size} structures at 5 pressures:", flush=True)
            subprocess.run(
                [sys.executable, __file__, "--measure", str(Path(folder) / "large")], check=True
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
