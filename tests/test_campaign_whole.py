"""A whole campaign, small, with a toy labeler: every step for real, killed in the middle,
finished."""

import os
import signal
import subprocess
import sys
import time

import pytest
from campaign_inputs import write_campaign
from campaign_tables import read_rows

from magus_anharmonic.campaign.steps import read_records

SMALL = {
    "device": "cpu",
    "search": {
        "popSize": 4,
        "initSize": 6,
        "numGen": 1,
        "saveGood": 2,
        "randRatio": 0.5,
        "pPri": 0.5,
        "d_ratio": 0.6,
        "volume_ratio": 2.7,
        "dE": 0.001,
    },
    "calculator": {"eps": 0.05, "maxStep": 60},
    "labeler": {"arguments": {"sigma": 1.0, "epsilon": 0.1, "rc": 3.0}},
    "phases": [{"name": "Im-3m", "structure": "cubic.vasp"}],
    "learning": {
        "pressures": [75, 125],
        "settings": {"n_sample": 4, "n_perturb": 2, "epochs": 1, "n_replay": 0},
    },
    "final": {
        "stages": [{"epochs": 1}, {"epochs": 1, "force_loss_ratio": 0.1, "stress_loss_ratio": 0.1}]
    },
    "produce": {"pressures": [150]},
    "foundation_check": {"pressure": 150, "max_structures": 2},
    "relax": {"pressures": [100, 150], "max_structures": 2},
    "sscha": {
        "pressures": [150],
        "settings": {
            "max_candidates": 1,
            "supercell": [1, 1, 1],
            "n_configs": 20,
            "max_populations": 1,
            "hessian": 0,
            "keep_best": 1,
        },
    },
    "dft": {"max_structures": 1, "max_steps": 2},
    "hessian": {
        "phases": [{"name": "Im-3m", "irreps": ["T1u"]}],
        "pressures": [150],
        "supercell": [1, 1, 1],
        "n_configs": 20,
        "max_populations": 1,
        "dispersions": [150],
        "dft_harmonic": [150],
    },
}


def start(file):
    command = [sys.executable, "-m", "magus_anharmonic", "campaign", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.full
def test_every_step_for_real_and_killed_in_the_middle(tmp_path):
    file = write_campaign(tmp_path, **SMALL)
    root = tmp_path / "campaign"
    process = start(file)
    deadline = time.monotonic() + 240
    while not (root / "merge" / "labels.xyz").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    labels = {
        path: path.read_bytes() for path in root.glob("learn-*/results/anharmonic/labels/gen*.xyz")
    }
    assert labels

    again = start(file)
    output = again.communicate(timeout=500)[0]
    records = read_records(root)
    other = {
        name: record.reason
        for name, record in records.items()
        if record.status != "done" and name != "report"
    }
    assert not other, output
    assert labels == {path: path.read_bytes() for path in labels}, "no label is made twice"
    assert (root / "final" / "final.pth").is_file()

    def column(table, name):
        return {row[name] for row in read_rows(root / "tables" / f"{table}.csv")}

    assert column("model_errors", "model") == {"foundation", "finetuned"}
    assert {"training", "validation", "test"} == column("model_errors", "set")
    assert column("enthalpies", "source") == {
        "produce",
        "relax",
        "foundation",
    } and "Im-3m" in column("enthalpies", "phase")
    assert {
        (row["method"], row["energies_by"]) for row in read_rows(root / "tables/modes.csv")
    } == {("harmonic", "model"), ("sscha-hessian", "model"), ("harmonic", "dft")}
    assert column("modes", "irrep") == {"T1u"}
    assert column("dispersion-Im-3m-150GPa", "method") == {"harmonic", "sscha-hessian"}
    assert (root / "tables" / "ranking-150GPa.csv").is_file() and (
        root / "tables" / "structures.extxyz"
    ).is_file()
    names = "model_errors parity enthalpies space_groups modes learning cost failures".split()
    assert set(names) <= {path.stem for path in (root / "tables").glob("*.csv")}
    assert records["hessian"].n_labels > 2 and records["produce-150GPa"].n_evaluations > 0
