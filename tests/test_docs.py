"""The documentation is built without a warning, reads without a network, and its examples are
inputs that the settings accept."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from browser import Browser, find_browser

from magus_anharmonic.settings import parse_settings

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))

needs_mkdocs = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "latex2mathml")),
    reason="the documentation's packages are not installed (pip install '.[docs]')",
)


needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium here")


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


@pytest.fixture(scope="module")
def browser():
    with Browser(str(find_browser())) as one:
        yield one


@needs_mkdocs
@needs_browser
@pytest.mark.slow
def test_the_site_searches_when_it_is_opened_as_a_file(site, browser):
    browser.open(site / "index.html")
    browser.evaluate("document.querySelector('[data-md-toggle=search]').click()")
    found = browser.evaluate(
        """new Promise((done, failed) => {
            const box = document.querySelector('[data-md-component=search-query]');
            box.focus();
            box.value = 'isotopes';
            box.dispatchEvent(new KeyboardEvent('keyup', { bubbles: true }));
            setTimeout(() => failed(new Error('nothing found')), 60000);
            setInterval(() => {
                const hits = [...document.querySelectorAll('.md-search-result__item a')];
                if (hits.length) done(hits.map(hit => hit.href));
            }, 100);
        })"""
    )
    assert any("phase-diagram.html" in hit for hit in found)
    assert browser.complaints() == []
    assert all(url.startswith(site.as_uri()) for url in browser.requests())


def axe():
    """The rules of axe-core, for accessibility (pip install axe-core-python); None without them."""
    found = importlib.util.find_spec("axe_core_python")
    place = os.environ.get("AXE_FOR_TESTS") or (
        found and Path(str(found.origin)).with_name("axe.min.js")
    )
    return Path(place) if place else None


@needs_mkdocs
@needs_browser
@pytest.mark.slow
@pytest.mark.skipif(axe() is None, reason="axe is not installed (pip install axe-core-python)")
def test_every_page_passes_axe(site, browser):
    """Every rule in the light scheme; in the dark one the only rule that asks for colours."""
    rules = str(axe().read_text(encoding="utf-8"))
    # the theme's script puts each copy button into an unnamed landmark
    every, colours = "rules: { 'landmark-unique': { enabled: false } }", "runOnly: 'color-contrast'"
    found = {}
    for page in PAGES:
        browser.open(site / f"{page.stem}.html")
        browser.evaluate(
            "document.head.insertAdjacentHTML('beforeend',"
            f" '<style>* {{ transition: none !important; }}</style>');{rules}; 1"
        )
        for scheme, asked in (("default", every), ("slate", colours)):
            found[page.stem, scheme] = browser.evaluate(
                f"""document.body.dataset.mdColorScheme = '{scheme}';
                axe.run(document, {{ {asked} }}).then(
                    result => result.violations.map(one => [one.id, one.nodes[0].html.slice(0, 200)]))"""
            )
    assert not any(found.values()), {page: what for page, what in found.items() if what}


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


@pytest.mark.full
def test_the_tutorial_runs_as_written_from_a_fresh_clone(tmp_path):
    """Its commands and Python, one after the other; the set-up is that of this environment."""
    clone, prefix = tmp_path / "clone", Path(sys.prefix)
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    files = ("pyproject.toml", ".ci/constraints.txt", ".ci/setup", ".ci/system.sh")
    parts = [(clone / name).read_bytes() for name in (*files, "magus_anharmonic/__init__.py")]
    ready = hashlib.sha256(b"".join(parts)).hexdigest()[:12]
    venv = clone / ".venv"
    venv.mkdir()
    (venv / f".ready-{ready}-{sys.version_info[0]}.{sys.version_info[1]}").touch()
    for name in ("lib", "pyvenv.cfg"):
        (venv / name).symlink_to(prefix / name)
    (venv / "bin").mkdir()
    for path in (prefix / "bin").iterdir():
        if path.name.startswith(("python", "activate")):
            (venv / "bin" / path.name).symlink_to(path)
    command = venv / "bin" / "magus-anharmonic"
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH={clone} exec {venv}/bin/python -m magus_anharmonic "$@"\n'
    )
    command.chmod(0o755)
    page = (clone / "docs" / "tutorial.md").read_text(encoding="utf-8")
    script = []
    for language, text in re.findall(r"^```(bash|python)\n(.*?)^```", page, re.M | re.S):
        script.append(text if language == "bash" else f"python - <<'END'\n{text}END\n")
    run = subprocess.run(
        ["bash", "-eu", "-c", f"set -o pipefail\nexport PATH={venv}/bin:$PATH\n" + "".join(script)],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "SschaResult(" in run.stdout and (clone / "phonons" / "hessian.json").is_file()
    assert (clone / "ranking" / "report.html").is_file() and (clone / "yh6.yaml").is_file()
