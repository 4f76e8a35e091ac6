"""The stored numbers of `test_golden.py`: ``python -m golden.make [CASE ...]`` in tests/ writes them anew, by hand and with a reason.

Numbers are read from the files that a user reads, or from what the public functions return. Left out is what depends on the time, the
host, paths and versions, and prose.
"""

import csv
import json
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from campaign_tables import write_campaign
from crystal_models import Crystals, crystal
from crystals import PAIR
from kill_harness import INPUT, Server
from ranking_fakes import Emt, h3s
from saddle_model import HydrogenBond
from sscha_models import QuarticPair
from synthetic_campaign import synthetic_campaign
from two_phases import HIGH, LOW, Phase, data
from typer.testing import CliRunner

from magus_anharmonic import free_energy, load
from magus_anharmonic.cli import app
from magus_anharmonic.paper import script
from magus_anharmonic.phase_diagram.points import write_points
from magus_anharmonic.potential.finetune import finetune
from magus_anharmonic.potential.relax import relax
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.settings import FinetuneSettings, parse_settings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEFT_OUT = {
    "could_explain", "directory", "line", "packages", "path", "reason", "seconds", "seconds_labels", "seconds_training", "sentences", "settings_hash",
    "sha256", "sscha_folder", "started", "version", "wall_s",
}  # fmt: skip
"""Columns and keys that are no numbers of the physics."""

Numbers = dict[str, Any]
"""File or quantity -> columns or keys -> values."""


# --- reading files --------------------------------------------------------------------------------


def read(path):
    """Columns of a CSV file, keys of a JSON file, records of a JSONL file, and of arrays the
    shape, norm and a weighed sum.
    """
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {
            name: [word(row[name]) for row in rows]
            for name in (rows[0] if rows else {})
            if name not in LEFT_OUT
        }
    if path.suffix == ".jsonl":
        return [plain(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {
                name: moments(arrays[name])
                for name in arrays.files
                if arrays[name].dtype.kind in "fi"
            }
    return plain(json.loads(path.read_text(encoding="utf-8")))


def word(text):
    """A number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def plain(value):
    """JSON without what is left out."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if name not in LEFT_OUT}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def moments(array):
    """An array in few numbers; the last one weighs each element by its place, so that none may
    change places.
    """
    flat = np.asarray(array, dtype=float).ravel()
    weights = np.cos(np.arange(flat.size))
    return {
        "shape": list(array.shape),
        "norm": float(np.linalg.norm(flat)),
        "by_place": float(flat @ weights),
    }


def tables(folder, *patterns):
    """Every file of the patterns by its path in the folder."""
    found = {
        str(path.relative_to(folder)): read(path)
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
    }
    assert found, f"{folder}: no file {' '.join(patterns)}"
    return found


def command(*words, codes=(0,)):
    """``magus-anharmonic WORDS``."""
    result = CliRunner().invoke(app, [str(one) for one in words])
    assert result.exit_code in codes, result.output


# --- the cases ------------------------------------------------------------------------------------


def rankings(folder):
    """EMT; a race in which four of five are eliminated; a saddle that is followed; two starts
    that end in one phase and are pooled.
    """
    metals = [
        bulk("Al", "fcc", a=4.0),
        bulk("Al", "fcc", a=4.02, cubic=True),
        bulk("Al", "hcp", a=2.85, c=4.66),
        bulk("Al", "bcc", a=3.2),
    ]
    plain_crystal = crystal((3.0,) * 3, 1.0, 0.2, -0.3, 1.0)
    rivals = [
        plain_crystal,
        *(
            crystal((3.0 * 0.94**k,) * 3, 1.0, 0.2, -0.3, 1.0, depth=0.1 + 0.02 * k)
            for k in range(1, 5)
        ),
    ]
    well = crystal((3.0, 3.0, 3.3), 1.0, 0.2, -0.3, 1.0, well=5.5, wall=3.0, shift=(0.0, 0.0, 0.25))
    centred = crystal((3.0, 3.0, 3.3), 1.0, 0.2, -0.3, 1.0, well=5.5, wall=3.0)
    small = {"reference_spacing": 0.1, "hessian": 0}
    fixed = {"allocation": "fixed", "cell": "fixed"}
    cases = {
        "emt": (Emt(), metals, {"pressure": 5.0}, {"temperature": 300, "supercell": [2, 2, 2], "n_configs": 30, "max_populations": 3,
                                                   "keep_best": 1}),
        "race": (Crystals(rivals), [one.atoms for one in rivals], {}, {"n_configs": 100, "keep_best": 1, **small}),
        "saddle": (HydrogenBond(-4.0, 10.0, 14.0), [HydrogenBond.crystal()], {}, {"supercell": [1, 1, 1], "n_configs": 2000,
                                                                                 "max_populations": 12, **fixed}),
        "pooled": (Crystals([well]), [centred.atoms, well.atoms], {}, {"n_configs": 200, **small, **fixed}),
    }  # fmt: skip
    found = {}
    for name, (evaluator, structures, keys, block) in cases.items():
        settings = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": block, **keys})
        rank_structures(
            structures, evaluator, settings, folder / name, relax=name == "emt", workers=1
        )
        found |= tables(folder, f"{name}/*.csv")
    return found


def sscha(folder):
    """One run at fixed volume, one at fixed pressure."""
    free_energy(
        PAIR,
        QuarticPair(),
        0.0,
        100.0,
        (1, 1, 1),
        "fixed",
        n_configs=60,
        max_populations=6,
        directory=folder / "fixed",
    )
    free_energy(
        bulk("Al", "fcc", a=4.0),
        EMT(),
        20.0,
        300.0,
        n_configs=40,
        max_populations=2,
        seed=1,
        directory=folder / "variable",
    )
    return tables(folder, "*/result.json", "*/convergence.csv", "*/*.npz")


def end_of(one):
    """The atoms by their volume."""
    names = ("energy", "enthalpy", "converged", "failed", "n_steps")
    return {name: getattr(one, name) for name in names} | {
        "volume": one.atoms.get_volume(),
        "why": one.reason,
    }


def relaxations(folder):
    """Thirteen on EMT: by each optimiser, with the symmetry kept, with a short budget, and one
    that fails.
    """
    rng = np.random.default_rng(5)

    def strained(symbol, repeat):
        atoms = bulk(symbol).repeat(repeat)
        atoms.set_cell(
            atoms.cell.array @ (np.eye(3) + rng.normal(0, 0.05, (3, 3))), scale_atoms=True
        )
        atoms.rattle(0.1, rng=rng)
        return atoms

    metals = [strained(symbol, (2, 1, 1)) for symbol in ("Cu", "Al", "Au")]
    apart = Atoms("Cu2", positions=[[0, 0, 0], [0.3, 0, 0]], cell=[6.0] * 3, pbc=True)
    ends = [
        *relax(Emt(), metals, 10.0, optimizer="ase", stress_tolerance=0.02),
        *relax(Emt(), metals, 10.0, optimizer="bfgs", stress_tolerance=0.02),
        *relax(Emt(), metals, 10.0, optimizer="fire", stress_tolerance=0.02),
        *relax(Emt(), [bulk("Ni", a=3.7, cubic=True), bulk("Pd", a=4.0)], 30.0, fix_symmetry=True, force_tolerance=1e-3),
        *relax(Emt(), [metals[0], apart], 0.0, max_steps=4),
    ]  # fmt: skip
    return {"ends": [end_of(one) for one in ends]}


def model_relaxations(folder):
    """Three on the shipped model, in single precision."""
    structures = [h3s(3.1), h3s(3.0, 0.05), h3s(2.9, 0.1)]
    return {
        "ends": [
            end_of(one)
            for one in relax(load("h3s-gpaw-small", "cpu"), structures, 150.0, force_tolerance=0.02)
        ]
    }


def finetuning(folder):
    """Three epochs of the shipped model on labels that are nearly its own."""
    rng = np.random.default_rng(3)
    model = load("h3s-gpaw-small", "cpu")
    structures = [h3s(rng.uniform(2.95, 3.15)) for _ in range(8)]
    for index, atoms in enumerate(structures):
        atoms.positions += 0.05 * rng.normal(size=(4, 3))
        found = model.evaluate([atoms])
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=found.energy[0] + 0.4,
            forces=1.2 * found.forces[0],
            stress=found.stress[0],
        )
        atoms.info.update(id=f"s{index}", parent=f"p{index}")
    settings = FinetuneSettings(epochs=3, learning_rate=3e-4, batch_size=3)
    result = finetune(
        "h3s-gpaw-small",
        structures[:6],
        structures[6:],
        settings,
        out=folder / "new.pth",
        seed=0,
        device="cpu",
    )
    return {
        "result": plain(result.as_dict()),
        "history": plain([asdict(epoch) for epoch in result.history]),
    }


def phase_diagram(folder):
    """Two phases of H3S with noise, and three compositions."""
    sulphur, hydrogen, compound = (
        Phase(0.0, 5.0, 400.0),
        Phase(0.0, 1.5, 1500.0),
        Phase(-0.02, 2.2, 1100.0),
    )
    elements = [("S", sulphur, "S"), ("H2", hydrogen, "H2"), ("Im-3m", compound, "H3S")]
    points = {
        "two": data({"low": LOW, "high": HIGH}, 7),
        "hull": [
            point
            for i, (name, phase, formula) in enumerate(elements)
            for point in data({name: phase}, i, formula=formula)
        ],
    }
    found = {}
    for name, values in points.items():
        (folder / name).mkdir()
        write_points(folder / f"{name}.csv", values)
        command("phase-diagram", folder / f"{name}.csv", "-o", folder / name, "--seed", 1)
        found |= tables(folder, f"{name}/*.csv", f"{name}/summary.json")
        del found[f"{name}/gibbs.csv"]
    return found


def campaign(folder):
    """Two made-up campaigns, which have every figure between them: the figures' numbers, and
    validation against the paper's values.
    """
    synthetic_campaign(folder / "large", n_structures=20)
    write_campaign(folder / "known" / "campaign", n_structures=20)
    for name in ("large", "known"):
        script("figures").make_figures(folder / name)
        command(
            "validate", folder / name, ROOT / "inputs" / "h3s-paper" / "expected.yaml", codes=(0, 1)
        )
    return tables(folder, "*/campaign/figures/*.csv", "*/campaign/validation.csv")


CASES = {
    "rankings": rankings,
    "sscha": sscha,
    "relaxations": relaxations,
    "model_relaxations": model_relaxations,
    "finetuning": finetuning,
    "phase_diagram": phase_diagram,
    "campaign": campaign,
}


def demonstration():
    """The quick start with fewer structures and configurations, and without DFT."""
    keys = yaml.safe_load(
        (ROOT / "inputs" / "h3s-quickstart" / "input.yaml").read_text(encoding="utf-8")
    )
    del keys["learning"]
    keys |= {"popSize": 3, "initSize": 4, "saveGood": 2}
    keys["sscha"] |= {
        "max_candidates": 2,
        "supercell": [1, 1, 1],
        "n_configs": 20,
        "max_populations": 3,
    }
    return keys


SEARCHES = {"demonstration": demonstration, "learning": lambda: INPUT}
"""By the command line, in processes of their own; ``learning`` is the search that test_kill.py
kills.
"""


def searched(folder):
    """The tables of a search."""
    return tables(folder / "results" / "anharmonic", "*.csv", "metrics.jsonl")


def search(name, folder, server):
    folder.mkdir()
    (folder / "input.yaml").write_text(yaml.safe_dump(SEARCHES[name]()), encoding="utf-8")
    ended = server.search(folder)
    assert ended.code == 0, ended.text[-3000:]
    return searched(folder)


# --- the stored numbers ---------------------------------------------------------------------------


def machine():
    """What the last bits depend on: the processor and the libraries of linear algebra."""
    import torch

    path = Path("/proc/cpuinfo")
    told = (
        dict(
            line.split("\t", 1)
            for line in path.read_text().split("\n\n")[0].splitlines()
            if "\t" in line
        )
        if path.exists()
        else {}
    )
    model = (
        " ".join(
            told.get(name, "").strip("\t: ") for name in ("model name", "cpu family", "model")
        ).strip()
        or platform.processor()
    )
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, numpy {np.__version__}, torch {torch.__version__}"


def stored(name):
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def write(name, numbers):
    text = json.dumps(
        {"machine": machine(), "numbers": numbers}, indent=0, sort_keys=True, ensure_ascii=False
    )
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main(wanted):
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in CASES.items():
            if not wanted or name in wanted:
                (Path(scratch) / name).mkdir()
                write(name, case(Path(scratch) / name))
        names = [name for name in SEARCHES if not wanted or name in wanted]
        if names:
            with Server() as server:
                for name in names:
                    write(name, search(name, Path(scratch) / name, server))


if __name__ == "__main__":
    main(sys.argv[1:])
