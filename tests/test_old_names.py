"""Files and inputs with the names of earlier versions are read as those of now."""

import numpy as np
import pytest
from crystals import PAIR
from sscha_models import QuarticPair

from magus_anharmonic import free_energy
from magus_anharmonic.errors import InputError
from magus_anharmonic.io.digests import RENAMED
from magus_anharmonic.io.files import read_json, write_json
from magus_anharmonic.io.tables import table_rows
from magus_anharmonic.paper import script
from magus_anharmonic.phase_diagram.points import read_points
from magus_anharmonic.settings import AseCalculatorSettings, CalculatorSettings
from magus_anharmonic.settings.section import parse
from magus_anharmonic.sscha.result import SschaResult, read_population_file, read_progress_file
from magus_anharmonic.sscha.state import Modes

OLD = {new: old for old, new in RENAMED.items()}


def test_kicks_are_perturbations():
    assert parse(CalculatorSettings, {"calculator": "mattersim", "kicks": 3}).perturbations == 3
    assert parse(AseCalculatorSettings, {"calculator": "emt", "kicks": 2}).perturbations == 2
    with pytest.raises(InputError, match="perturbations is given twice"):
        parse(CalculatorSettings, {"calculator": "mattersim", "kicks": 3, "perturbations": 4})


def test_phonon_energies_have_two_names():
    modes = Modes(np.array([0.1, 0.2]), np.zeros((9, 2)))
    assert modes.quantum is modes.hbar_omega


def test_an_expected_value_has_two_names():
    ExpectedValue = script("expected").ExpectedValue  # noqa: N806
    given = {"value": 5, "unit": "1", "source": "x", "space_group": "Im-3m", "pressure_GPa": 100}
    assert ExpectedValue(name="n_became", **given) == ExpectedValue(name="n_transformed", **given)


def test_columns_of_earlier_tables_are_those_of_now(tmp_path):
    (tmp_path / "stability.csv").write_text("odds,hessian_lowest_cm1\n0.25,-40.0\n")
    with table_rows(tmp_path / "stability.csv") as rows:
        assert list(rows) == [{"probability": "0.25", "hessian_deciding_cm1": "-40.0"}]


def test_points_of_earlier_versions_are_read(tmp_path):
    names = "phase,pressure_GPa,temperature_K,gibbs_eV_per_atom,gibbs_error_eV_per_atom"
    (tmp_path / "gibbs.csv").write_text(
        f"{names},decrease_eV_per_atom,status\nR3m,60,0,-3.0,0.001,0.004,became\n"
    )
    (point,) = read_points(tmp_path / "gibbs.csv")
    assert (point.free_energy.predicted_decrease, point.status) == (0.004, "transformed")


def test_the_folder_of_a_run_of_an_earlier_version_is_read(tmp_path):
    result = free_energy(
        PAIR, QuarticPair(), 0.0, 100.0, (1, 1, 1), "fixed",
        n_configs=20, max_populations=2, directory=tmp_path,
    )  # fmt: skip
    progress = read_progress_file(tmp_path / "progress.json")
    state, _ = read_population_file(tmp_path / "population_001.npz")
    for name in ("result.json", "progress.json"):
        content = read_json(tmp_path / name)
        old = {OLD.get(key, key): value for key, value in content.items()}
        assert old.keys() != content.keys()
        write_json(tmp_path / name, old)
    with np.load(tmp_path / "population_001.npz") as stored:
        arrays = {OLD.get(key, key): stored[key] for key in stored.files}
    np.savez(tmp_path / "population_001.npz", **arrays)
    assert SschaResult.read(tmp_path).predicted_decrease == result.predicted_decrease
    assert read_progress_file(tmp_path / "progress.json") == progress
    again, _ = read_population_file(tmp_path / "population_001.npz")
    assert again.supercell_matrix == state.supercell_matrix == (1, 1, 1)
