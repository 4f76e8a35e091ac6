"""The documentation is built without a warning, reads without a network, and its examples are
inputs that the settings accept."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from magus_anharmonic.settings import parse_settings

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))

needs_mkdocs = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "latex2mathml")),
    reason="the documentation's packages are not installed (pip install '.[docs]')",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(ROOT / ".ci" / "mkdocs.yml"),
        "-d",
        str(folder),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr
    return folder


@needs_mkdocs
@pytest.mark.slow
def test_every_page_is_built_and_can_be_reached_from_the_first(site):
    first = (site / "index.html").read_text(encoding="utf-8")
    for page in PAGES:
        assert (site / f"{page.stem}.html").is_file()
        assert f'href="{page.stem}.html"' in first, f"{page.name} is not in the navigation"


@needs_mkdocs
@pytest.mark.slow
def test_equations_are_mathml_and_nothing_is_loaded_from_elsewhere(site):
    theory = (site / "theory.html").read_text(encoding="utf-8")
    assert theory.count("<math") > 30 and "arithmatex" not in theory and "$$" not in theory
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(https?:[^\" >]+)", text)
        loaded += [
            link
            for link in re.findall(r"<link[^>]*>", text)
            if "http" in link and "canonical" not in link
        ]
        assert not loaded, f"{page.name} loads {loaded}"


def examples():
    found = []
    for page in PAGES:
        for text in re.findall(
            r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            found.append((page.name, text))
    return found


@pytest.mark.parametrize(
    ("page", "text"), [case for case in examples() if case[0] in ("tutorial.md", "recipes.md")]
)
def test_inputs_in_the_documentation_are_accepted(page, text):
    parse_settings(
        {"symbols": ["H", "S"], "pressure": 150, "formulaType": "fix", **yaml.safe_load(text)}
    )


def test_every_command_in_the_documentation_exists():
    from magus_anharmonic.cli import COMMANDS, app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {"search", "rank", "report"} <= names and COMMANDS
    for page in PAGES:
        for name in re.findall(
            r"magus-anharmonic ([a-z][a-z-]+)(?= |`|$)",
            page.read_text(encoding="utf-8"),
            re.MULTILINE,
        ):
            assert name in names, f"{page.name}: magus-anharmonic {name}"
