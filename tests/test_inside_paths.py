"""Relative paths of input files stay below the project folder; absolute ones are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ase.build import bulk
from ase.io import write

from magus_anharmonic.errors import InputError
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.potential.train import load_recipe
from magus_anharmonic.settings import LabelerSettings, absolute_file, parse_settings
from magus_anharmonic.settings.campaign import load_campaign
from magus_anharmonic.settings.phase_diagram import load_phase_diagram

CAMPAIGN = {"search": {"symbols": ["Cu"], "formula": [1]}}
DIAGRAM = {"phases": {"fcc": "cu.vasp"}, "pressures": [1]}
READERS = {"campaign": load_campaign, "phase-diagram": load_phase_diagram, "train": load_recipe}


@pytest.fixture
def project(tmp_path):
    """A folder two levels below the files that an input may not name by a relative path."""
    folder = tmp_path / "group" / "project"
    folder.mkdir(parents=True)
    for place in (tmp_path, folder):
        write(place / "cu.vasp", bulk("Cu"))
        (place / "cu.xyz").write_text("")
        (place / "model.pth").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("kind", "given", "key"),
    [
        ("campaign", {**CAMPAIGN, "foundation": "FILE.pth"}, "foundation"),
        (
            "campaign",
            {**CAMPAIGN, "phases": [{"name": "fcc", "structure": "FILE.vasp"}]},
            "phases.0.structure",
        ),
        ("campaign", {**CAMPAIGN, "merge": {"dataset": "FILE.xyz"}}, "merge.dataset"),
        ("phase-diagram", {**DIAGRAM, "phases": {"fcc": "FILE.vasp"}}, "phases.fcc.structure"),
        (
            "phase-diagram",
            {**DIAGRAM, "phases": {"fcc": {"structure": "FILE.vasp"}}},
            "phases.fcc.structure",
        ),
        ("phase-diagram", {**DIAGRAM, "checkpoint": "FILE.pth"}, "checkpoint"),
        ("train", {"checkpoint": "FILE.pth"}, "checkpoint"),
        ("train", {"validation": "FILE.xyz"}, "validation"),
        ("train", {"test": "FILE.xyz"}, "test"),
    ],
)
def test_a_file_that_an_input_names_is_below_its_folder_or_absolute(project, kind, given, key):
    def read(place):
        text = yaml.safe_dump(given)
        for ending, name in ((".pth", "model.pth"), (".vasp", "cu.vasp"), (".xyz", "cu.xyz")):
            text = text.replace(f"FILE{ending}", f"{place}{name}")
        (project / "input.yaml").write_text(text)
        return READERS[kind](project / "input.yaml")

    for outside in ("../../", "here/../../../"):
        with pytest.raises(
            InputError, match="leaves the project folder; give an absolute path"
        ) as caught:
            read(outside)
        assert key in str(caught.value)
    for inside in ("", "./", f"{project.parent.parent}/"):
        assert read(inside)


@pytest.mark.parametrize("key", ["logs", "scratch", "python"])
def test_a_path_of_the_workers_is_below_the_folder_or_absolute(key):
    with pytest.raises(
        InputError, match=rf"workers\.{key}: '\.\./\.\./x': leaves the project folder"
    ):
        parse_settings({"workers": {key: "../../x"}})
    assert getattr(parse_settings({"workers": {key: "/srv/x"}}).workers, key) == "/srv/x"


@pytest.mark.parametrize(
    ("calculator", "arguments", "key"),
    [
        ("espresso", {"pseudopotentials": {"Cu": "Cu.upf"}, "pseudo_dir": "../../p"}, "pseudo_dir"),
        ("espresso", {"pseudopotentials": {"Cu": "../Cu.upf"}}, "pseudopotentials.Cu"),
        (
            "espresso",
            {
                "pseudopotentials": {"Cu": "Cu.upf"},
                "input_data": {"control": {"outdir": "a/../../b"}},
            },
            "input_data.control.outdir",
        ),
        ("vasp", {"command": "mpirun ../bin/vasp"}, "command"),
        ("ase.calculators.emt.EMT", {"files": ["a", "../b"]}, "files.1"),
    ],
)
def test_an_argument_of_a_labeler_does_not_leave_the_folder(
    tmp_path: Path, calculator: str, arguments: dict[str, Any], key: str
) -> None:
    with pytest.raises(
        InputError, match=rf"learning\.labeler\.arguments\.{key}: .*leaves the project folder"
    ):
        get_labeler(
            LabelerSettings(calculator=calculator, arguments=arguments), tmp_path / "scratch"
        )
    assert not (tmp_path / "scratch").exists()


def test_what_is_typed_on_the_command_line_may_lie_anywhere(project, monkeypatch):
    monkeypatch.chdir(project)
    assert absolute_file("../../model.pth") == str(project.parent.parent / "model.pth")
    assert absolute_file("mattersim-v1.0.0-1M") == "mattersim-v1.0.0-1M"
