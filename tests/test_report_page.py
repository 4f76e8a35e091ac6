"""The page says what the files say, no more, and nothing in the files can break it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import sqlite3
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write
from records import stored_run
from synthetic_campaign import synthetic_campaign, table
from two_phases import HIGH, LOW, data
from typer.testing import CliRunner

from magus_anharmonic.errors import MagusAnharmonicError
from magus_anharmonic.io import pictures
from magus_anharmonic.io.tables import columns
from magus_anharmonic.paper import findings, tables
from magus_anharmonic.paper.quantities import learning_curves
from magus_anharmonic.phase_diagram.diagram import phase_diagram, sentences
from magus_anharmonic.phase_diagram.figures import write_diagram
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.store import FreeEnergyStore, Key, read_records
from magus_anharmonic.report import report_at_end, structures, write_report
from magus_anharmonic.report.figures import stored_picture
from magus_anharmonic.structures import number_of, space_group, with_isotopes

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; fails on elements that are not closed in
    their order."""

    def __init__(self, path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> in {self.open[-3:]}"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data + " "

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign") / "h3s"
    return Page(write_report(synthetic_campaign(folder, 130, pressures=(50, 100))))


RANKED = {
    "formula": "H3S",
    "natoms": "4",
    "pressure_GPa": "150",
    "temperature_K": "0",
    "spg_static": "R3m (160)",
    "spg_quantum": "Im-3m (229)",
    "enthalpy_eV_per_atom": "1.247",
    "gibbs_eV_per_atom": "1.446",
    "gibbs_error_eV_per_atom": "0.0006",
    "status": "stable",
    "model": "639d0585f6b8",
    "n_evaluations": "1200",
    "p_lowest_sampling": "0.97",
    "p_lowest_total": "0.83",
    "model_error_eV_per_atom": "0.0072",
}


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are made and not drawn, which takes most of a page's time."""

    def save(made, folder, name):
        paths = [folder / f"{name}{suffix}" for suffix in (".svg", ".png")]
        folder.mkdir(exist_ok=True)
        for path in paths:
            path.write_text("<svg/>")
        return paths

    monkeypatch.setattr(pictures, "save", save)


@pytest.fixture
def search(tmp_path, h3s):
    """What a search of two generations leaves, with one free energy and one failure."""
    own = tmp_path / "demo" / "results" / "anharmonic"
    own.mkdir(parents=True)
    lines = [
        {**RANKED, "id": "68d68caea394", "sscha_folder": "68d68caea394-47b8ad9a"},
        {
            **RANKED,
            "id": "12345e678901",
            "status": "failed",
            "reason": "dissociated",
            "spg_quantum": "",
            "gibbs_eV_per_atom": "",
        },
    ]
    with (own / "ranking.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(Candidate))
        writer.writeheader()
        writer.writerows(lines)
    record = {
        "version": "0.1.0",
        "seed": 3,
        "settings": {"num_gen": 2, "symbols": ["H", "S"]},
        "packages": {"ase": "3.29.0"},
    }
    (own / "run.json").write_text(json.dumps(record))
    (own / "search.json").write_text(json.dumps({"finished": 2, "volume_ratio": 2.5}))
    metrics = [
        {
            "generation": g,
            "n_labels": 4,
            "seconds_labels": 30.0,
            "test_from": "the dataset",
            "new": {
                "validation": {"energy_rmse": 0.5 * g, "force_rmse": 0.8, "n": 2 * g},
                "test": {"energy_rmse": 0.05 / g, "force_rmse": 0.8, "n": 101},
            },
        }
        for g in (1, 2)
    ]
    (own / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in metrics) + '{"generation": 3, "cut'
    )
    static, centroids = h3s(2.95, 0.05), h3s(2.95)
    static.info["candidate_id"] = "68d68caea394"
    centroids.info["sscha_folder"] = "68d68caea394-47b8ad9a"
    write(own.parent / "good.traj", [static])
    write(own / "quantum.traj", [centroids])
    return tmp_path / "demo"


def test_the_page_of_a_search_holds_ranking_structures_figures_failures_settings_and_provenance(
    search,
):
    page = Page(write_report(search))
    assert "2 of 2 generations are finished" in page.words
    assert "Search demo: H3S, 150 GPa, 0 K" in page.words and "finished. H3S, 150 GPa" in page.words
    assert "68d68cae: R3m (160) static, Im-3m (229) with SSCHA" in page.words
    assert "probability 97 % by sampling, 83 % with all errors" in page.words
    assert "0.6 7.2 83 % 1,200" in page.words, "errors, probability and cost stand in the table"
    assert "8 DFT labels" in page.words and "learning, generation 2" in page.words
    assert (
        "1 × dissociated" in page.words
        and "639d0585f6b8" in page.words
        and "num_gen: 2" in page.words
        and "Seed 3" in page.words
    )
    titles = [image["alt"] for image in page.all("img")]
    assert (
        titles[0] == "By G: 1. Im-3m (229) (2. by enthalpy)."
        and titles[1] == "search, test (101 labels): energy 50 to 25 meV/atom"
    )
    assert len(page.all("option")) == 2, "the static structure and the centroids can be viewed"


def test_a_phase_diagram_has_a_page_too(tmp_path, undrawn):
    diagram = phase_diagram(data({"R3m": LOW, "Im-3m": HIGH}, 1), n_samples=50)
    write_diagram(diagram, tmp_path / "pd")
    page = Page(write_report(tmp_path / "pd"))
    assert "Phase diagram pd: H3S, 60 to 160 GPa, 0 to 600 K" in page.words
    assert all(line in page.words for line in sentences(diagram))
    assert "Boundaries" in page.words and len(page.all("img")) == 1


def test_a_line_of_the_learning_curve_joins_rounds_judged_by_the_same_labels():
    def rounds(name, *sizes):
        return [
            tables.LearningPoint("s", i, "m", name, 0.1, 0.1, None, 4, n, "dataset")
            for i, n in enumerate(sizes)
        ]

    def joined(*rows):
        return [len(points) for points in learning_curves(rows).values()]

    assert joined(*rounds("validation", 2, 109), *rounds("test", 101, 101)) == [2]
    assert joined(*rounds("validation", 2, 109, 109)) == [1, 2]
    assert joined(*rounds("validation", None, None)) == [1, 1], "of old tables nobody knows"


def test_the_same_page_comes_from_the_search_its_results_and_their_own_folder(search):
    own = search / "results" / "anharmonic"
    pages = [write_report(folder) for folder in (search, search / "results", own)]
    assert {page.resolve() for page in pages} == {(own / "report.html").resolve()}


def test_the_page_of_a_campaign_tells_every_table_in_sentences(campaign):
    words = campaign.words
    for said in (
        "All 2 steps of the campaign are done",
        "260 relaxed structures at 2 pressures from 50 to 100 GPa are stored",
        (
            "Finetuning changed the root-mean-square errors on the 400 test labels: energy 41 to"
            " 8.4 meV/atom, forces 350 to 128 meV/Å"
        ),
        "12 of 91 structures changed their space group",
        "Not converged within the budget",
        "11 of 12 candidates that SSCHA brings to another space group keep their static one",
        "The T1u mode of Im-3m (harmonic, by the potential) turns from imaginary to real at",
        "averaging over 500 configurations leaves 4.5 of 128 meV/Å",
        "30 DFT labels of its ensemble change G by 12.3 ± 0.4 meV/atom",
        "23,400 force evaluations, 400 DFT labels",
        "From ranking-50GPa.csv",
    ):
        assert said in words, said


def test_nothing_on_the_page_comes_from_elsewhere(campaign, search):
    for page in (campaign, Page(write_report(search))):
        for tag, attributes in page.elements:
            for name in ("src", "href", "data", "action", "srcset", "poster"):
                value = attributes.get(name, "#")
                assert value.startswith(("#", "data:")), f"<{tag} {name}={value[:80]}>"
        assert not re.search(
            r"url\(|@import",
            page.source[page.source.index("<style>") : page.source.index("</style>")],
        )
        policy = next(
            meta["content"]
            for meta in page.all("meta")
            if meta.get("http-equiv") == "Content-Security-Policy"
        )
        assert (
            policy.startswith("default-src 'none'")
            and "http" not in policy
            and "unsafe-eval" not in policy
        )
        assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
        assert len(page.source) < 5_000_000


def test_links_lead_somewhere_ids_are_unique_and_every_picture_has_a_text(campaign):
    page = campaign
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert page.all("img") and all(len(image["alt"]) > 20 for image in page.all("img"))
    assert all(one.get("aria-label") for one in page.all("svg"))
    assert all(one.get("scope") for one in page.all("th"))


HOSTILE = (
    "<script>alert('x')</script>\"&'><img src=x onerror=alert(1)>{{ 7*7 }}"
    " \u202e\u00e9\u4e2d\U0001f4a3</title>"
)


def test_what_files_say_is_text_and_never_markup(tmp_path):
    folder = synthetic_campaign(tmp_path / "<b>bold", 5, pressures=(100,))
    own = folder / "campaign"
    rows = list(csv.reader((own / "tables" / "ranking-100GPa.csv").open()))
    rows[1][0] = rows[1][1] = rows[1][5] = rows[2][6] = rows[3][12] = rows[3][13] = HOSTILE
    table(own / "tables" / "ranking-100GPa.csv", " ".join(rows[0]), rows[1:])
    table(own / "tables" / "failures.csv", "step id reason", [(HOSTILE, HOSTILE, HOSTILE)])
    table(
        own / "tables" / "modes.csv",
        "phase irrep pressure_GPa method frequency_squared_cm2",
        [(HOSTILE, HOSTILE, 100, HOSTILE, -4)],
    )
    steps = {
        HOSTILE: {"status": HOSTILE, "reason": HOSTILE, "wall_s": HOSTILE},
        "plain": "not an object",
    }
    (own / "steps.json").write_text(json.dumps(steps))
    record = {
        "version": HOSTILE,
        "settings": {HOSTILE: HOSTILE},
        "packages": {HOSTILE: HOSTILE},
        "seed": HOSTILE,
        "model": HOSTILE,
    }
    (own / "run.json").write_text(json.dumps(record))
    crystal = Atoms(
        "H",
        cell=np.eye(3),
        pbc=True,
        info={"id": HOSTILE.replace('"', ""), "pressure_GPa": 100.0, "kind": "static"},
    )
    write(own / "tables" / "structures.extxyz", [crystal], format="extxyz")
    (own / "figures").mkdir()
    (own / "figures" / "<script>x.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    )
    page = Page(write_report(folder))
    assert len(page.all("script")) == len(page.scripts) <= 3
    assert all("alert(" not in script for script in page.scripts)
    assert {image["src"][:26] for image in page.all("img")} == {"data:image/svg+xml;base64,"}, (
        "an SVG in <img> runs no script"
    )
    assert not [
        one for _, attributes in page.elements for one in attributes if one.startswith("on")
    ]
    assert page.words.count("<script>alert('x')</script>") > 8 and "{{ 7*7 }}" in page.words
    assert not page.all("b") or all("bold" not in str(one) for one in page.all("b"))


def test_file_names_come_from_ids_and_stay_in_the_folder():
    for name in ("../../../etc/passwd", "a/b\\c", ".hidden", "-" * 300, "\u4e2d"):
        line = type("L", (), {"id": name, "rank_quantum": None, "formula": "H"})()
        stem = structures.Crystal(line, 100.0, 0.0, "static", "P1", Atoms()).stem
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", stem) and len(stem) < 100


NAMES = (
    "model_errors.csv",
    "enthalpies.csv",
    "ranking-50GPa.csv",
    "modes.csv",
    "structures.extxyz",
    "failures.csv",
    "cost.csv",
    "gradient_errors.csv",
    "learning.csv",
    "space_groups.csv",
    "gibbs_correction.csv",
)
DAMAGE = {
    "empty": b"",
    "binary": b"\xff\xfe\x00binary\x00",
    "other": b"a,b\n1,2\n",
    "torn": b'id,pressure_GPa\n\n,,,,\n"open',
    "absent": None,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    "names",
    [
        # every table and every kind in the fast suite, all pairs in the full one
        pytest.param(NAMES, id="all"),
        *(pytest.param([name], id=name, marks=pytest.mark.full) for name in NAMES),
    ],
)
def test_tables_that_are_absent_or_damaged_cost_their_own_part_of_the_page_only(
    tmp_path, names, kind, undrawn
):
    folder = synthetic_campaign(tmp_path / "c", 6, pressures=(50, 100))
    content = DAMAGE[kind]
    for name in names:
        path = folder / "campaign" / "tables" / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    words = Page(write_report(folder)).words
    assert "Ranking by free energy" in words and "100 GPa, 0 K" in words
    for name in names:
        silent = name.startswith("ranking") or (kind == "absent" and name == "failures.csv")
        if kind in ("absent", "binary") and not silent:
            assert "What is missing" in words and name in words


def test_a_campaign_that_has_just_begun_says_what_is_missing(tmp_path):
    own = tmp_path / "campaign"
    own.mkdir()
    steps = {
        "learn-075GPa": {"status": "failed", "reason": "no GPU"},
        "merge": {"status": "running"},
        "final": {"status": "open"},
    }
    (own / "steps.json").write_text(json.dumps(steps))
    words = Page(write_report(tmp_path)).words
    assert "0 of 3 steps of the campaign are done (1 failed, 1 interrupted, 1 not begun)" in words
    assert "Step learn-075GPa is failed: no GPU." in words and "Step final is not begun." in words
    assert (
        words.count("Not there yet:") == 12
        and "There is no run.json" in words
        and "No failure is on record" in words
    )


def test_the_step_that_writes_the_page_does_not_make_the_campaign_unfinished(tmp_path):
    own = tmp_path / "campaign"
    own.mkdir()
    steps = {
        "merge": {"status": "done"},
        "final": {"status": "done"},
        "report": {"status": "running", "pid": 1},
    }
    (own / "steps.json").write_text(json.dumps(steps))
    words = Page(write_report(tmp_path)).words
    assert "All 2 steps of the campaign are done." in words and "report is running" not in words


def test_a_search_before_its_first_ranking_says_so(tmp_path):
    own = tmp_path / "results" / "anharmonic"
    own.mkdir(parents=True)
    (own / "run.json").write_text(json.dumps({"version": "0.1.0", "settings": {"num_gen": 3}}))
    (own / "search.json").write_text(json.dumps({"finished": 1}))
    words = Page(write_report(tmp_path)).words
    assert "Generations 2 to 3: the search is not finished" in words and "No ranking yet" in words


def test_a_database_that_is_locked_or_damaged_costs_its_structures_only_and_is_left_alone(search):
    for file in search.rglob("*.traj"):
        file.unlink()
    ours = search / "results" / "anharmonic"
    key = Key("model", 10.0, 0.0, "hash")
    FreeEnergyStore(ours / "free_energies.db").put(
        stored_run("abc", key, bulk("Cu"), "converged", gibbs=1.0, centroids=bulk("Cu"))
    )
    assert [record.structure for record in read_records(ours / "free_energies.db")] == ["abc"]
    whole = (ours / "free_energies.db").read_bytes()
    with contextlib.closing(sqlite3.connect(ours / "free_energies.db")) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with pytest.raises(MagusAnharmonicError, match="database is locked"):
            read_records(ours / "free_energies.db")
        assert time.monotonic() - began < 10
        page = write_report(search).read_text()
        assert (
            "free_energies.db: cannot be read now (OperationalError: database is locked)" in page
            and "Im-3m" in page
        )
        writer.rollback()
    for content in (whole[:5000], b"", b"no database"):
        (ours / "free_energies.db").write_bytes(content)
        assert "free_energies.db: cannot be read now" in write_report(search).read_text()
        assert [path.name for path in ours.glob("free*")] == ["free_energies.db"] and (
            ours / "free_energies.db"
        ).read_bytes() == content


def test_a_folder_without_a_run_is_refused_with_exit_code_2(tmp_path):
    from magus_anharmonic.cli import app

    for folder, said in (
        (tmp_path, "neither a campaign"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        result = CliRunner().invoke(app, ["report", str(folder)])
        assert result.exit_code == 2 and said in result.output and not list(tmp_path.iterdir())


def test_the_command_names_the_page(search):
    from magus_anharmonic.cli import app

    result = CliRunner().invoke(app, ["report", str(search)])
    assert result.exit_code == 0 and str(
        search / "results" / "anharmonic" / "report.html"
    ) in result.output.replace("\n", "")


def test_a_report_that_cannot_be_written_does_not_take_the_run_down(tmp_path, caplog):
    assert report_at_end(tmp_path / "nowhere") is None
    assert "no report was written (InputError" in caplog.text


def test_structures_are_written_as_they_were_stored_in_three_formats(search, h3s):
    write_report(search)
    folder = search / "results" / "anharmonic" / "structures"
    names = sorted(path.name for path in folder.iterdir())
    stem = "150GPa-001-68d68caea394-static"
    assert names == [
        *(f"{stem}.{suffix}" for suffix in ("cif", "vasp")),
        *(f"150GPa-0K-001-68d68caea394-centroids.{suffix}" for suffix in ("cif", "vasp")),
        "structures.extxyz",
    ]
    stored = h3s(2.95, 0.05)
    found = read(folder / f"{stem}.vasp")
    ours, theirs = (np.sort(atoms.get_all_distances(mic=True).ravel()) for atoms in (stored, found))
    assert ours == pytest.approx(theirs, abs=1e-3)
    frames = read(folder / "structures.extxyz", ":")
    assert [atoms.info["kind"] for atoms in frames] == ["static", "centroids"]
    assert frames[0].info["gibbs_eV_per_atom"] == 1.446
    assert frames[0].info["status"] == "stable"


def test_a_cif_and_the_picture_have_the_symmetry_that_the_table_names(search, h3s):
    write_report(search)
    folder = search / "results" / "anharmonic" / "structures"
    for kind, group, natoms, symprec in (
        ("001-68d68caea394-static", "R3m (160)", 12, 1e-4),
        ("0K-001-68d68caea394-centroids", "Im-3m (229)", 8, 1e-4),
    ):
        file = folder / f"150GPa-{kind}.cif"
        found = read(file)
        assert (space_group(found, symprec), len(found)) == (group, natoms)
        assert f"_space_group_IT_number {number_of(group)}" in file.read_text()
        assert found.get_volume() / natoms == pytest.approx(h3s(2.95).get_volume() / 4, abs=1e-4)


@pytest.mark.parametrize("group", ["R3m (160) or Im-3m (229): not decided, 0.4 sigma", "Pm (6)"])
def test_a_group_that_a_structure_does_not_have_is_not_made_up(h3s, group):
    line = Candidate(id="a", natoms=4, formula="H3S")
    one = structures.Crystal(line, 150.0, 0.0, "static", group, h3s(2.95, 0.05))
    assert one.conventional is None and "'P1'" in structures.cif(one)
    assert not structures.scene(one).conventional


def test_deuterium_stays_deuterium_in_a_cif(h3s):
    heavy = with_isotopes(h3s(2.95), {"H": 2.014})
    line = Candidate(id="a", natoms=4, formula="D3S")
    text = structures.cif(structures.Crystal(line, 150.0, 0.0, "static", "Im-3m (229)", heavy))
    found = read(io.StringIO(text), format="cif")
    assert "D D" in text and len(found) == 8 and found.get_masses().max() > 30


def test_files_of_an_earlier_report_are_removed_and_those_of_others_kept(search):
    folder = search / "results" / "anharmonic" / "structures"
    folder.mkdir()
    for name in ("150GPa-001-ffffffffffff-static.cif", "notes.cif", "mine.vasp"):
        (folder / name).write_text("x")
    write_report(search)
    names = {path.name for path in folder.iterdir()}
    assert {"notes.cif", "mine.vasp"} <= names and "150GPa-001-ffffffffffff-static.cif" not in names


def test_an_id_that_reads_as_a_number_is_found_among_the_structures(tmp_path, undrawn):
    folder = synthetic_campaign(tmp_path / "c", 4, pressures=(100,))
    tables = folder / "campaign" / "tables"
    rows = list(csv.reader((tables / "ranking-100GPa.csv").open()))
    old, rows[1][0] = rows[1][0], "12345e678901"
    table(tables / "ranking-100GPa.csv", " ".join(rows[0]), rows[1:])
    structures = tables / "structures.extxyz"
    structures.write_text(structures.read_text().replace(old, "12345e678901"))
    write_report(folder)
    assert (folder / "campaign" / "structures" / "100GPa-001-12345e678901-static.cif").is_file()


def test_of_many_structures_only_those_shown_are_parsed(tmp_path, monkeypatch, undrawn):
    folder = synthetic_campaign(tmp_path / "c", 230, pressures=(100,))
    parsed = []
    original = structures._parsed
    monkeypatch.setattr(
        structures, "_parsed", lambda path, text: parsed.append(1) or original(path, text)
    )
    page = Page(write_report(folder))
    assert len(parsed) <= 2 * structures.FILES < 460
    assert "The first 200 of 230; all are in ranking-100GPa.csv." in page.words


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([(50, -4), (100, 9)], "turns from imaginary to real at 65.4 GPa"),
        ([(100, 9), (50, -4)], "turns from imaginary to real at 65.4 GPa"),
        ([(50, -4)], "is imaginary at 50 GPa"),
        ([(50, -4), (100, -3)], "is imaginary at 50 to 100 GPa"),
        ([(50, 4), (100, 5)], "is real at 50 to 100 GPa"),
        ([(50, 4), (100, -5)], "changes its sign"),
    ],
)
def test_a_mode_is_told_stable_only_where_it_is(tmp_path, values, said):
    curve = "Im-3m", "Im-3m (229)", "T1u"
    rows = [tables.Mode(*curve, p, "harmonic", "model", v, None, "m") for p, v in values]
    tables.write(tables.Mode, tmp_path / "modes.csv", rows)
    assert said in findings.modes(tmp_path)[0]


def test_a_figure_is_described_by_its_own_words_else_by_its_numbers(tmp_path):
    from matplotlib.figure import Figure

    for name, metadata in (
        ("parity", {}),
        ("modes-T1u", {"Title": "T1u", "Description": "It softens."}),
    ):
        figure = Figure()
        figure.add_subplot().plot([1, 2])
        figure.savefig(tmp_path / f"{name}.svg", metadata=metadata)
        table(tmp_path / f"{name}.csv", "pressure_GPa value", [(50, -1.5), (200, 2)])
    stripped, own = stored_picture(tmp_path, "parity"), stored_picture(tmp_path, "modes-T1u")
    assert stripped is not None and own is not None
    assert (
        stripped.alt
        == "Model against DFT, 2 points. pressure_GPa from 50 to 200; value from -1.5 to 2."
        and stripped.data == "parity.csv"
    )
    assert (own.title, own.alt) == ("T1u", "It softens.")


def test_a_large_vector_picture_gives_way_to_its_png(tmp_path):
    (tmp_path / "parity.svg").write_text("<svg>" + " " * 500_000 + "</svg>")
    (tmp_path / "parity.png").write_bytes(b"\x89PNG" + b"0" * 100)
    picture = stored_picture(tmp_path, "parity")
    assert picture is not None and picture.uri.startswith("data:image/png")
