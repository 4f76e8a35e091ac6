"""The Python face: typed, documented, on its page; results that show themselves; what a notebook
sees of a long call."""

import dataclasses
import inspect
import logging
import pickle
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase.build import bulk
from ranking_fakes import Emt, h3s
from records import a_candidate
from two_phases import HIGH, LOW, data

import magus_anharmonic
from magus_anharmonic.errors import NotConverged
from magus_anharmonic.evaluator import Relaxation
from magus_anharmonic.notebook import says_in_notebooks
from magus_anharmonic.phase_diagram.diagram import phase_diagram
from magus_anharmonic.ranking.candidate import RankingTable
from magus_anharmonic.sscha import SschaResult

MAKE = Path(__file__).parents[1] / "docs" / "make_api.py"
API = runpy.run_path(str(MAKE))


def a_result(**changes):
    values = {one.name: None for one in dataclasses.fields(SschaResult)} | {
        "status": "converged", "reason": "", "gibbs": -1.25, "gibbs_error": 2e-4,
        "space_group_start": "R3m (160)", "space_group": "Im-3m (229)", "target_pressure": 150.0,
        "temperature": 300.0, "centroids": h3s(), "stress": np.zeros((3, 3)), "stress_error": np.zeros((3, 3)),
    }  # fmt: skip
    return SschaResult(**{**values, **changes})


def test_the_page_is_that_of_the_code_and_has_every_public_name():
    assert MAKE.with_name("api.md").read_text() == API["render"](), "run docs/make_api.py"
    paths = {path for path, _ in API["public"]()}
    missing = set(magus_anharmonic.__all__) - {path.rsplit(".", 1)[1] for path in paths}
    assert missing == {"__version__"}


@pytest.mark.parametrize("path", [path for path, _ in API["public"]()])
def test_public_functions_have_real_types_and_docstrings(path):
    what = dict(API["public"]())[path]
    assert inspect.getdoc(what)
    functions = [what] if inspect.isfunction(what) else [value for _, value in API["members"](what)]
    for one in functions:
        function = getattr(one, "__func__", one)
        if inspect.isfunction(function) and function.__name__ != "as_dict":
            found = inspect.signature(function)
            for parameter in found.parameters.values():
                assert "Any" not in str(parameter.annotation), f"{function}: {parameter}"
                assert parameter.kind is not parameter.VAR_KEYWORD, f"{function}: {parameter}"
            assert found.return_annotation not in (found.empty, "Any"), function


def test_g_of_a_run_that_has_not_converged_is_no_plain_number():
    result = a_result()
    assert result.gibbs == result.numbers.gibbs == -1.25
    assert pickle.loads(pickle.dumps(result)).gibbs == -1.25
    for status, words in (("unconverged", "upper bound"), ("failed", "is not known")):
        short = a_result(status=status, reason="one population", gibbs=-1.25)
        with pytest.raises(NotConverged, match=f"(?s){words}.*result.converged"):
            assert short.gibbs
        assert short.numbers.gibbs == short.as_dict()["gibbs"] == -1.25
        assert pickle.loads(pickle.dumps(short)).status == status


def test_results_show_themselves_in_a_line_and_as_a_table():
    ranking = RankingTable([a_candidate("0123", name="<b>.cif", gibbs=-1.25, gibbs_error=2e-4)])
    diagram = phase_diagram(data({"low": LOW, "high": HIGH}, 0), n_samples=20)
    for result, words in (
        (a_result(), "G = -1.25000 +- 0.00020 eV/atom, status = converged"),
        (a_result(status="unconverged"), "G = below -1.25000"),
        (Relaxation.without_result(bulk("Cu"), "too close"), "failed (too close)"),
        (diagram, "GPa at"),
        (Emt().evaluate([bulk("Cu")] * 50), "structures = 50, energies = -0.00"),
        (ranking[0], "G (eV/atom) = -1.25000, +- = 0.2"),
    ):
        line, html = repr(result), result._repr_html_()
        assert words in line and len(line) < 300 and "\n" not in line
        assert html.startswith("<table>") and html.count("<td>") == 2 * len(result.described())
    assert "-1.25000" in repr(ranking) and "&lt;b&gt;.cif" in ranking._repr_html_()
    assert len(repr(ranking).splitlines()) == 2
    unconverged = a_candidate("4567", status="unconverged", gibbs=-1.25, gibbs_error=2e-4)
    assert "below -1.25000" in repr(RankingTable([unconverged]))


@pytest.mark.parametrize(
    ("kernel", "level", "said"),
    [(None, "NOTSET", ""), ("ipykernel", "NOTSET", "population 1\n"), ("ipykernel", "WARNING", "")],
)
def test_a_long_call_says_what_it_does_below_the_cell_of_a_notebook(
    kernel, level, said, monkeypatch, capsys
):
    shell = SimpleNamespace(kernel=kernel)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    log = logging.getLogger("magus_anharmonic")
    monkeypatch.setattr(log, "level", getattr(logging, level))
    monkeypatch.setattr(log, "hasHandlers", lambda: False)

    @says_in_notebooks
    def inner():
        logging.getLogger("magus_anharmonic.sscha.run").info("population 1")
        return 1

    assert says_in_notebooks(inner)() == 1
    out = capsys.readouterr().out
    assert out.partition(" ")[2] == said and log.level == getattr(logging, level)
    assert not log.handlers
