"""A synthetic campaign whose tables have known answers."""

import numpy as np
from records import a_candidate

from magus_anharmonic.io.tables import table_rows
from magus_anharmonic.paper import tables as t
from magus_anharmonic.ranking.candidate import Candidate


def write_campaign(folder, *, n_structures=60, seed=0):
    """All tables of a campaign below ``folder``; returns ``folder``. Its answers: see the tests
    that use it."""
    rng = np.random.default_rng(seed)
    out = folder / "tables"
    errors = [
        t.ModelError(model, f"{model}-id", name, 100, scale * 0.0061, scale * 0.1177, scale * 0.48)  # type: ignore[arg-type]
        for model, scale in (("foundation", 12.0), ("finetuned", 1.0))
        for name in ("training", "validation", "test")
    ]
    t.write(t.ModelError, out / t.ModelError.FILE, errors)
    parity = []
    for quantity, unit in t.UNITS.items():
        for reference in rng.normal(size=200):
            parity.append(
                t.Parity(
                    "finetuned", "test", quantity, unit, reference, reference + 0.1 * rng.normal()
                )
            )  # type: ignore[arg-type]
    t.write(t.Parity, out / t.Parity.FILE, parity)
    t.write(t.Enthalpy, out / t.Enthalpy.FILE, [*foundation(n_structures, rng), *relaxed()])
    t.write(Candidate, out / t.ranking_file(100), ranking())
    changed = [row for row in ranking() if row.spg_static != row.spg_quantum]
    checked = [
        t.SpaceGroups(
            row.id,
            100.0,
            row.spg_static,
            row.spg_static if i else row.spg_quantum,
            row.spg_quantum,
            -3.0,
            "",
        )
        for i, row in enumerate(changed)
    ]
    t.write(t.SpaceGroups, out / t.SpaceGroups.FILE, checked)
    t.write(t.Mode, out / t.Mode.FILE, soft_mode(rng))
    bands = [
        t.Band(
            x,
            label,
            branch,
            500.0 * branch + 300 * np.sin(3 * x) - 200,
            5.0 if label else None,
            "hessian",
        )
        for branch in range(3)
        for x, label in zip(np.linspace(0, 1, 41), ["Γ"] + 39 * [""] + ["H"], strict=True)
    ]
    t.write(t.Band, out / t.dispersion_file("Im-3m", 60), bands)
    t.write(t.GradientError, out / t.GradientError.FILE, gradients())
    learning = [
        t.LearningPoint(
            "learn-075GPa", g, f"m{g}", "validation", 0.05 / g, 0.3 / g, 2.0 / g, 100 * g, 50
        )
        for g in range(1, 5)
    ]
    t.write(t.LearningPoint, out / t.LearningPoint.FILE, learning)
    return folder


def foundation(n, rng):
    """R3m is the 6th of n + 1 distinct structures, 65 meV/atom above the lowest; the lowest was
    found three times."""
    heights = np.concatenate([[0.0, 0.02, 0.03, 0.04, 0.05], 0.08 + 0.3 * rng.random(n - 5)])
    rows = [
        t.Enthalpy(
            f"f{i}",
            "",
            "H3S",
            8,
            f"P1 ({i})",
            150.0,
            4.0 + i * 0.01,
            -1.0 + h,
            "foundation-id",
            "foundation",
        )
        for i, h in enumerate(heights)
    ]
    duplicates = [
        t.Enthalpy(
            f"duplicate{k}",
            "",
            "H3S",
            8,
            "P1 (0)",
            150.0,
            4.0,
            -1.0 + 2e-4 * k,
            "foundation-id",
            "foundation",
        )
        for k in (1, 2)
    ]
    return [
        *rows,
        *duplicates,
        t.Enthalpy(
            "r3m",
            "R3m",
            "H3S",
            4,
            "R3m (160)",
            150.0,
            3.9,
            -1.0 + 0.065,
            "foundation-id",
            "foundation",
        ),
    ]


def relaxed():
    """C2/c below 112 GPa, R3m to 177 GPa, then Im-3m: straight lines."""
    rows = []
    for p in (50.0, 100.0, 150.0, 200.0):
        lines = {
            "Im-3m": 0.0,
            "R3m": 0.0002 * (p - 177.0),
            "C2/c": 0.0002 * (112.0 - 177.0) + 0.0006 * (p - 112.0),
        }
        rows += [
            t.Enthalpy(
                f"{name}-{p:g}", name, "H3S", 4, name, p, 4.0, 0.01 * p + h, "final", "relax"
            )
            for name, h in lines.items()
        ]
    return rows


def ranked(id, group, h, g, **more):
    """H3S at 100 GPa; ``h``, ``g`` : eV/atom."""
    return a_candidate(
        id,
        **{
            "formula": "H3S",
            "natoms": 8,
            "pressure": 100.0,
            "spg_static": "P1 (1)",
            "space_group": group,
            "enthalpy": h,
            "gibbs": g,
            "model": "m",
            "status": "converged",
            **more,
        },
    )


def ranking():
    """Twenty structures: G = H + 0.2 eV/atom, but the first four fall to Im-3m, 30 meV/atom below
    the line's start; one failed."""
    rows = []
    for i in range(20):
        h = 0.012 * i
        fell = 1 <= i <= 4
        g = 0.17 if fell else 0.2 + h + 0.0005 * (-1) ** i
        own = f"C2 ({i + 3})"
        group = "Im-3m (229)" if fell else own
        rows.append(
            ranked(
                f"s{i}",
                group,
                -3.0 + h,
                -3.0 + g,
                spg_static=own,
                gibbs_error=0.001,
                n_evaluations=1000,
            )
        )
    return [*rows, ranked("bad", "", -2.9, None, status="failed", reason="melted")]


def soft_mode(rng):
    """Harmonic zero at 173 GPa, SSCHA Hessian of the model at 100 and of DFT at 105 GPa, with error
    bars."""
    rows = []
    for p in (50.0, 75.0, 100.0, 125.0, 150.0, 175.0, 200.0, 225.0, 250.0):
        rows.append(
            t.Mode(
                "Im-3m",
                "Im-3m (229)",
                "T1u",
                p,
                "harmonic",
                "model",
                8000.0 * (p - 173.0),
                None,
                "m",
            )
        )
        for who, zero in (("model", 100.0), ("dft", 105.0)):
            square = 9000.0 * (p - zero) - 10.0 * (p - zero) ** 2 + 2e4 * rng.normal()
            rows.append(
                t.Mode("Im-3m", "Im-3m (229)", "T1u", p, "sscha-hessian", who, square, 2e4, "m")
            )  # type: ignore[arg-type]
    return rows


def gradients():
    return [
        t.GradientError("Im-3m", 60.0, 500, "force", "eV/A", 0.128, None, None, None),
        t.GradientError(
            "Im-3m",
            60.0,
            500,
            "gradient_centroid",
            "eV/A",
            0.0045,
            0.001,
            0.0044,
            0.0057,
            0.0008,
            0.128,
        ),
        t.GradientError(
            "Im-3m", 60.0, 500, "gradient_force_constants", "eV/A^2", 0.2, 0.1, 0.17, 0.19
        ),
        t.GradientError("Im-3m", 60.0, 500, "bo_force_centroid", "eV/A", 0.0001, None, None, None),
    ]


def read_rows(path):
    """The rows of a CSV file one by one; none when there is no such file."""
    if path.is_file():
        with table_rows(path) as rows:
            yield from rows
