"""Stock MAGUS finds the plug-ins by itself, and nobody else notices them."""

import compileall
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

ENTRY_POINTS = """\
[ase.ioformats]
magus-anharmonic = magus_anharmonic.autoload:ase_format

[magus.plugins]
{plugins}
"""

RECORDER = """\
import pathlib
def register():
    import magus.calculators
    with pathlib.Path("registered.txt").open("a") as file:
        file.write("calculators are complete: %s\\n" % hasattr(magus.calculators, "READY"))
def broken():
    raise RuntimeError("a broken plug-in")
"""


def site(folder, plugins="recorder = recorder:register", magus=True, entrypoints=True):
    """A folder for PYTHONPATH with our metadata and a package called magus."""
    info = folder / "magus_anharmonic-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: magus-anharmonic\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS.format(plugins=plugins))
    (folder / "recorder.py").write_text(RECORDER)
    if magus:
        for package in (
            "magus",
            "magus/calculators",
            *(["magus/entrypoints"] if entrypoints else []),
        ):
            (folder / package).mkdir()
            (folder / package / "__init__.py").write_text("")
        (folder / "magus/calculators/__init__.py").write_text("READY = True\n")
    return folder


def python(code, path, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(REPOSITORY)])}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result


def registered(folder):
    file = folder / "registered.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_importing_magus_after_ase_calls_every_plugin_once_the_calculators_are_complete(tmp_path):
    python("import ase.io, magus.calculators", site(tmp_path / "site"), tmp_path)
    assert registered(tmp_path) == ["calculators are complete: True"]


def test_a_process_that_only_uses_ase_reads_files_as_before_and_imports_nothing_heavy(tmp_path):
    code = """
        import sys, warnings
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            import ase, ase.io
        assert not [one for one in said if "magus" in str(one.message)]
        assert "magus_anharmonic.autoload" in sys.modules
        from ase.io.formats import ioformats
        assert "magus-anharmonic" not in ioformats, "nobody can read or write it"
        from ase.cli.main import main
        main(args=["info", "--formats"])
        ase.io.write("cell.extxyz", ase.Atoms("H", cell=[3, 3, 3], pbc=True))
        assert len(ase.io.read("cell.extxyz")) == 1
        heavy = {"torch", "mattersim", "pydantic", "magus", "magus_anharmonic.settings", "magus_anharmonic.plugins", "sscha"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    result = python(code, site(tmp_path / "site"), tmp_path)
    assert "extxyz" in result.stdout and "magus" not in result.stdout
    assert registered(tmp_path) == []


def test_the_hook_costs_less_than_a_millisecond(tmp_path):
    code = """
        import logging, sys, time, ase.utils.plugins, importlib.util
        def once():
            for name in [name for name in sys.modules if name.startswith("magus_anharmonic")]:
                del sys.modules[name]
            start = time.process_time()
            import magus_anharmonic.autoload
            magus_anharmonic.autoload.ase_format
            return time.process_time() - start
        once()
        print(min(once() for _ in range(50)))
    """
    folder = site(tmp_path / "site")
    # An installed package has its byte code; the checkout may have none, so the two modules are
    # compiled here.
    for name in ("__init__.py", "autoload.py"):
        target = folder / "magus_anharmonic" / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((REPOSITORY / "magus_anharmonic" / name).read_bytes())
    compileall.compile_dir(folder / "magus_anharmonic", quiet=1)
    result = python(code, folder, tmp_path)
    assert float(result.stdout) < 1e-3


def test_another_package_called_magus_is_left_alone(tmp_path):
    python("import ase.io, magus.calculators", site(tmp_path / "site", entrypoints=False), tmp_path)
    assert registered(tmp_path) == []


def test_a_single_module_called_magus_is_not_taken_for_magus(tmp_path):
    folder = site(tmp_path / "site", magus=False)
    (folder / "magus.py").write_text("")
    code = (
        "import ase.io, magus; from magus_anharmonic import autoload as a; assert not a.is_magus()"
        " and not a.load_plugins()"
    )
    python(code, folder, tmp_path)


def test_calculators_imported_before_ase_are_served_at_once(tmp_path):
    python("import magus.calculators; import ase.io", site(tmp_path / "site"), tmp_path)
    assert registered(tmp_path) == ["calculators are complete: True"]


def magus_as_it_is(folder):
    """``magus.calculators`` imports ASE itself, its calculators import ``base``, and each is the
    program of a cluster job."""
    (folder / "magus/calculators/__init__.py").write_text("import ase.io\nREADY = True\n")
    (folder / "magus/calculators/base.py").write_text("")
    job = "import sys, magus.calculators.base\nprint('magus_anharmonic.autoload' in sys.modules)\n"
    (folder / "magus/calculators/vasp.py").write_text(job)
    return folder


def test_calculators_that_import_ase_themselves_are_served_when_the_first_of_them_is_loaded(
    tmp_path,
):
    """The fault: the plug-ins were called while the package was half loaded, failed in a traceback,
    and were never called again."""
    python(
        "import magus.calculators; import magus.calculators.vasp",
        magus_as_it_is(site(tmp_path / "site")),
        tmp_path,
    )
    assert registered(tmp_path) == ["calculators are complete: True"]


@pytest.mark.parametrize("before", ["", "import ase.io"])
def test_a_cluster_job_calls_no_plugin(tmp_path, before):
    folder = magus_as_it_is(site(tmp_path / "site"))
    (folder / "sitecustomize.py").write_text(before)
    plain = [sys.executable, "-m", "magus.calculators.vasp"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}
    result = subprocess.run(
        plain, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "True", "")
    assert registered(tmp_path) == []


def test_a_broken_plugin_is_logged_and_the_others_still_load(tmp_path):
    plugins = "bad = recorder:broken\ngood = recorder:register"
    code = (
        "import logging; logging.basicConfig(); import ase.io, magus.calculators;"
        " print(magus.calculators.READY)"
    )
    result = python(code, site(tmp_path / "site", plugins), tmp_path)
    assert result.stdout.strip() == "True"
    assert "a broken plug-in" in result.stderr and "bad" in result.stderr
    assert registered(tmp_path) == ["calculators are complete: True"]


def test_two_hooks_that_ask_each_other_do_not_recurse(tmp_path):
    code = """
        import ase.io, sys, importlib.util
        class Other:
            busy = False
            def find_spec(self, name, path=None, target=None):
                if self.busy or not name.startswith("magus"):
                    return None
                self.busy = True
                try:
                    return importlib.util.find_spec(name)
                finally:
                    self.busy = False
        sys.meta_path.insert(0, Other())
        import magus.calculators
        assert type(magus.calculators.__loader__).__name__ == "SourceFileLoader"
    """
    python(code, site(tmp_path / "site"), tmp_path)
    assert registered(tmp_path) == ["calculators are complete: True"]


def test_a_missing_submodule_of_magus_is_still_a_plain_import_error(tmp_path):
    folder = site(tmp_path / "site")
    (folder / "magus/calculators/__init__.py").unlink()
    (folder / "magus/calculators").rmdir()
    code = (
        "import ase.io\ntry:\n    import magus.calculators\nexcept ModuleNotFoundError:\n   "
        " print('as ever')"
    )
    result = python(code, folder, tmp_path)
    assert result.stdout.strip() == "as ever"


def test_only_the_format_is_a_lazy_attribute():
    from magus_anharmonic import autoload

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = autoload.nothing
