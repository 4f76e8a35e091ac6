"""A campaign folder of any size with made-up numbers, by the contract of its tables: for tests of
the report and its benchmark."""

import csv
import json

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import write

PRESSURES = (50, 75, 100, 125, 150)
PHASES = {"Cccm": 0.0, "R3m": 0.006, "Im-3m": 0.010}
"""Name -> enthalpy (eV/atom) above the lowest at 50 GPa; the order turns round with pressure."""

GROUPS = {"Cccm": "Cccm (66)", "R3m": "R3m (160)", "Im-3m": "Im-3m (229)"}


def synthetic_campaign(folder, n_structures=40, *, seed=0, pressures=PRESSURES):
    """Write ``folder/campaign`` with ``n_structures`` structures, all tables and no figures;
    returns ``folder``."""
    rng = np.random.default_rng(seed)
    tables = folder / "campaign" / "tables"
    tables.mkdir(parents=True)
    ids = [f"{value:012x}" for value in rng.integers(16**11, 16**12, n_structures)]
    names = [list(PHASES)[i] if i < len(PHASES) else "" for i in range(n_structures)]
    groups = [GROUPS.get(name, f"P{i % 7 + 2} ({i % 7 + 16})") for i, name in enumerate(names)]
    base = np.array([PHASES[name] if name else 0.02 + 0.3 * rng.random() for name in names])
    _enthalpies(tables, ids, names, groups, base, pressures)
    for pressure in pressures:
        _ranking(tables, ids, groups, base, pressure, rng)
    _small_tables(tables, ids, groups)
    _parity(tables, min(20_000, 40 * n_structures), rng)
    _structures(tables, ids, pressures)
    _state(folder / "campaign", n_structures, pressures)
    return folder


def table(path, header, rows):
    """A CSV file with the columns of ``header``."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split())
        writer.writerows(rows)


def _enthalpies(tables, ids, names, groups, base, pressures):
    table(
        tables / "enthalpies.csv",
        "id phase formula natoms space_group pressure_GPa volume_A3_per_atom enthalpy_eV_per_atom"
        " model_id source",
        (
            (
                ids[i],
                names[i],
                "H3S",
                4,
                groups[i],
                p,
                f"{6 - p / 70:.4f}",
                f"{_enthalpy(base[i], p):.6f}",
                "0123456789ab",
                "produce",
            )
            for p in pressures
            for i in range(len(ids))
        ),
    )


def _enthalpy(base, pressure):
    return 0.01 * pressure + base * (1 - pressure / 110) if base < 0.015 else 0.01 * pressure + base


def _ranking(tables, ids, groups, base, pressure, rng):
    order = np.argsort([_enthalpy(value, pressure) for value in base])
    rows = []
    for place, i in enumerate(order):
        enthalpy = _enthalpy(base[i], pressure)
        common = (ids[i], "H3S", 4, pressure, 0, groups[i])
        if place < 100:
            quantum = "Im-3m (229)" if place % 8 == 1 else groups[i]
            gibbs = enthalpy + 0.2 + 0.004 * rng.standard_normal()
            status = "unconverged" if place % 11 == 5 else "sscha"
            rows.append(
                (
                    *common,
                    quantum,
                    f"{enthalpy:.6f}",
                    f"{gibbs:.6f}",
                    "0.0006",
                    1200,
                    "0123456789ab",
                    status,
                    "",
                    "",
                    "",
                )
            )
        elif place < 103:
            rows.append(
                (
                    *common,
                    "",
                    f"{enthalpy:.6f}",
                    "",
                    "",
                    300,
                    "0123456789ab",
                    "failed",
                    "the SSCHA cell fell apart",
                    "",
                    "",
                )
            )
        else:
            gibbs = f"{enthalpy + 0.21:.6f}"
            rows.append(
                (
                    *common,
                    "",
                    f"{enthalpy:.6f}",
                    gibbs,
                    "0.004",
                    0,
                    "0123456789ab",
                    "estimated",
                    "from 100 SSCHA results",
                    "",
                    "",
                )
            )
    table(
        tables / f"ranking-{pressure:g}GPa.csv",
        "id formula natoms pressure_GPa temperature_K spg_static spg_quantum enthalpy_eV_per_atom"
        " gibbs_eV_per_atom gibbs_error_eV_per_atom n_evaluations model status reason same_as"
        " sscha_folder",
        rows,
    )


def _small_tables(tables, ids, groups):
    errors = [
        ("foundation", "ffffffffffff", 41, 350, 5.1),
        ("finetuned", "0123456789ab", 8.4, 128, 1.2),
    ]
    table(
        tables / "model_errors.csv",
        "model model_id set n energy_rmse_eV_per_atom force_rmse_eV_per_A stress_rmse_GPa",
        (
            (m, i, s, 400, e / 1000, f / 1000, p)
            for m, i, e, f, p in errors
            for s in ("training", "validation", "test")
        ),
    )
    table(
        tables / "space_groups.csv",
        "id pressure_GPa spg_static spg_dft spg_quantum enthalpy_dft_eV_per_atom reason",
        (
            (name, 100, group, group if i else "Im-3m (229)", "Im-3m (229)", 0.91, "")
            for i, (name, group) in enumerate(zip(ids[:13], groups, strict=False))
        ),
    )  # fmt: skip
    table(
        tables / "modes.csv",
        "phase space_group irrep pressure_GPa method energies_by frequency_squared_cm2 error_cm2"
        " model_id",
        (
            ("Im-3m", 229, "T1u", p, method, "model", slope * (p - zero), 9000, "0123456789ab")
            for method, slope, zero in (("harmonic", 12000, 173), ("sscha-hessian", 9000, 101))
            for p in (50, 75, 100, 125, 150, 175, 200)
        ),
    )
    table(
        tables / "gradient_errors.csv",
        "phase pressure_GPa n_configs quantity unit rmse systematic statistical floor",
        [
            ("Im-3m", 100, 500, "force", "eV/A", 0.128, 0.02, 0.126, 0.0057),
            ("Im-3m", 100, 500, "gradient_centroid", "eV/A", 0.0045, 0.001, 0.0044, 0.0057),
        ],
    )
    table(
        tables / "gibbs_correction.csv",
        "phase pressure_GPa n_labels correction_eV_per_atom correction_error_eV_per_atom"
        " second_order_eV_per_atom",
        [("Im-3m", 150, 30, 0.0123, 0.0004, -0.0001)],
    )
    table(
        tables / "learning.csv",
        "step generation model_id set energy_rmse_eV_per_atom force_rmse_eV_per_A stress_rmse_GPa"
        " n_labels",
        (
            (
                f"learn-{p:03d}GPa",
                g,
                "0123456789ab",
                s,
                (40 / g + 6) / 1000,
                (300 / g + 90) / 1000,
                5 / g,
                100 * g,
            )
            for p in (75, 125)
            for g in range(1, 11)
            for s in ("training", "validation", "test")
        ),
    )
    table(
        tables / "failures.csv",
        "step id reason",
        [
            ("learn-075GPa", ids[-1], "GPAW: did not converge in 333 iterations"),
            ("relax", ids[-2], "not converged after 300 steps"),
        ],
    )


def _parity(tables, n, rng):
    values = rng.normal(0, 2, (n, 2)) @ np.array([[1, 1], [0, 0.05]])
    kinds = [("energy", "eV/atom"), ("force", "eV/A"), ("stress", "GPa")]
    table(
        tables / "parity.csv",
        "model set quantity unit reference predicted",
        (
            ("finetuned", "test", *kinds[i % 3], f"{r:.5f}", f"{p:.5f}")
            for i, (r, p) in enumerate(values)
        ),
    )


def _structures(tables, ids, pressures):
    crystal = bulk("S", "bcc", a=3.1, cubic=True)
    middle = Atoms(
        "H6",
        scaled_positions=[
            (0.5, 0, 0),
            (0, 0.5, 0),
            (0, 0, 0.5),
            (0.5, 0.5, 0),
            (0.5, 0, 0.5),
            (0, 0.5, 0.5),
        ],
        cell=crystal.cell,
    )
    crystal += middle
    frames = []
    for place, pressure in enumerate(pressures):
        for index, name in enumerate(ids):
            if index % len(pressures) != place and index > 60:
                continue
            for kind in ("static", "centroids") if index < 60 else ("static",):
                atoms = crystal.copy()
                if kind == "static":
                    atoms.positions[0] += 0.05
                # a string that reads as a number would come back as one: quotes keep it, and the
                # report reads the text
                atoms.info = {
                    "id": name,
                    "pressure_GPa": float(pressure),
                    "kind": kind,
                    "space_group": "R3m (160)",
                }
                frames.append(atoms)
    write(tables / "structures.extxyz", frames, format="extxyz")


def _state(folder, n, pressures):
    counts = {"wall_s": 8000.0, "n_structures": n, "n_evaluations": 90 * n, "n_labels": 0}
    steps = {
        f"produce-{p:03g}GPa": {"status": "done", "kind": "produce", "pressure_GPa": p, **counts}
        for p in pressures
    }
    (folder / "steps.json").write_text(json.dumps(steps))
    record = {
        "version": "0.1.0",
        "started": "2026-11-25T00:08:32+00:00",
        "seed": 7,
        "model": "ffffffffffff",
        "settings_hash": "109f774e40bc",
        "settings": {"pressures": list(pressures), "symbols": ["H", "S"]},
        "packages": {"ase": "3.29.0", "magus": None},
        "python": "3.11.7",
        "platform": "Linux",
        "cpus": 2,
        "earlier_starts": [],
    }
    (folder / "run.json").write_text(json.dumps(record))
    table(
        folder / "tables" / "cost.csv",
        "step n_structures n_evaluations n_labels wall_s",
        [("dft", 13, 0, 400, 86000)],
    )
