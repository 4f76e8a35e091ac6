"""What is installed, what is missing, and what to do about it: ``magus-anharmonic doctor``, as
data."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterable
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import magus_anharmonic
from magus_anharmonic import third_party
from magus_anharmonic.errors import InputError
from magus_anharmonic.io.digests import from_json
from magus_anharmonic.processes import run_bounded
from magus_anharmonic.settings import Settings

MAGUS_INSTALL = "pip install git+https://gitlab.com/bigd4/magus.git"

_ASK_MAGUS = """
import json, ase.io, magus.calculators, magus.fitness
from magus.utils import CALCULATOR_PLUGIN
print("\\n" + json.dumps([sorted(CALCULATOR_PLUGIN.keys()), sorted(magus.fitness.fit_dict)]))
"""


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    ok : True, False, or None for "worth knowing, nothing wrong"; fix : what to do, empty when
    nothing is to be done; needed : whether the given input cannot run without it.
    """

    name: str
    ok: bool | None
    detail: str
    fix: str = ""
    needed: bool = False


def collect(settings: Settings | None = None) -> list[Check]:
    """Every check; ``needed`` is set by what ``settings`` asks for (without settings: what any run
    needs)."""
    torch_check, cuda = _torch()
    return [
        Check(
            "magus-anharmonic",
            True,
            f"{magus_anharmonic.__version__}, Python {platform.python_version()}, {os.cpu_count()}"
            " cores",
        ),
        *_magus(),
        _plugins(),
        torch_check,
        _device(settings, cuda),
        _module(
            "MatterSim",
            "mattersim.forcefield.potential",
            "mattersim",
            "pip install mattersim",
            needed=True,
        ),
        *_checkpoint(settings),
        *_labelers(settings),
        *_third_party(settings),
        *_sscha(settings),
        _embedded_host(),
        _scheduler(settings),
        *_system_libraries(),
    ]


def exit_code(checks: Iterable[Check]) -> int:
    """1 when something needed is missing, else 0."""
    return int(any(check.needed and check.ok is False for check in checks))


def magus_version() -> str | None:
    """Version of the installed MAGUS, None when it is not there."""
    return find_magus()[0]


def uses_magus(host: str, named: str) -> bool:
    """Whether stock MAGUS searches for the ``host`` that is ``named`` so (a key, an option); raises
    ``InputError`` where it is asked for and not installed."""
    installed = magus_version() is not None
    if host == "magus" and not installed:
        raise InputError(f"{named}: MAGUS is not installed ({MAGUS_INSTALL})")
    return installed and host != "embedded"


def find_magus() -> tuple[str | None, str]:
    """Version of MAGUS (None when it is not there) and a sentence; looks at files only, imports
    nothing.

    Other packages are called ``magus`` too: the real one has ``magus.entrypoints``.
    """
    try:
        spec = find_spec("magus")
    except (ImportError, ValueError):
        spec = None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    if spec is None:
        return None, "not found: the embedded host runs the search"
    if not any((folder / "entrypoints").is_dir() for folder in folders):
        return (
            None,
            (
                f"a package called magus is at {spec.origin or folders}, but it is not MAGUS (no"
                " magus.entrypoints)"
            ),
        )
    file = folders[0] / "__init__.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    version = match.group(1) if match else "of unknown version"
    return version, f"MAGUS {version} at {folders[0]}"


def _magus() -> list[Check]:
    version, text = find_magus()
    if version is None:
        return [Check("MAGUS", None, text, f"optional: {MAGUS_INSTALL}")]
    checks = [Check("MAGUS", True, text)]
    problem = ""
    try:
        run = run_bounded([sys.executable, "-c", _ASK_MAGUS], timeout=120)
        if run.returncode:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            problem = f"MAGUS does not import: {last}"
    except subprocess.TimeoutExpired:
        problem = "importing MAGUS took more than 120 s"
    if problem:
        fix = "call `magus checkpack calculators`"
        return [*checks, Check("MAGUS sees", False, problem, fix, needed=True)]
    calculators, fitnesses = from_json(run.stdout.strip().splitlines()[-1])
    wanted = {
        "calculator mattersim": "mattersim" in calculators,
        "fitness SSCHA": "SSCHA" in fitnesses,
    }
    detail = (
        ", ".join(name for name, there in wanted.items() if there)
        or "neither the calculator mattersim nor the fitness SSCHA"
    )
    fix = (
        "reinstall magus-anharmonic in the environment of MAGUS; `magus-anharmonic search` works"
        " all the same"
    )
    both = all(wanted.values())
    return [*checks, Check("MAGUS sees", both, detail, "" if both else fix)]


def _plugins() -> Check:
    ours = [
        point.name
        for point in metadata.entry_points(group="ase.ioformats")
        if point.value.startswith("magus_anharmonic.")
    ]
    if not ours:
        fix = "pip install . (stock `magus search` needs it)"
        return Check("autoload", False, "not registered: this copy is not installed", fix)
    plugins = ", ".join(sorted(metadata.entry_points(group="magus.plugins").names)) or "none"
    detail = f"entry point {ours[0]} in ase.ioformats; plugins for MAGUS: {plugins}"
    return Check("autoload", True, detail)


def _torch() -> tuple[Check, str | None]:
    """The check, and the name of the CUDA device, if there is one."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return (
            Check("torch", False, f"does not import: {error}", "pip install torch", needed=True),
            None,
        )
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return Check("torch", True, f"{torch.__version__}, threads: {torch.get_num_threads()}"), cuda


def _device(settings: Settings | None, cuda: str | None) -> Check:
    asked = settings.calculator.device if settings and settings.calculator else None
    if cuda:
        return Check(
            "device",
            True,
            cuda if asked != "cpu" else f"cpu as the input asks, although there is a {cuda}",
        )
    if asked == "cuda":
        return Check(
            "device",
            False,
            "the input asks for cuda; torch sees none",
            "run on a GPU node, or leave out `device`",
            needed=True,
        )
    return Check(
        "device",
        None,
        "cpu: torch sees no CUDA device",
        "fine for small searches; a search with thousands of structures wants a GPU",
    )


def _module(name: str, module: str, distribution: str, fix: str, *, needed: bool) -> Check:
    """Import ``module`` for real: a compiled part may be broken although its files are there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return Check(name, False, f"{module} does not import: {error}", fix, needed)
    return Check(name, True, _version(distribution), needed=needed)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "found, version unknown"


def _checkpoint(settings: Settings | None) -> list[Check]:
    from magus_anharmonic.potential import checkpoint

    if settings is None or settings.calculator is None:
        shipped = ", ".join(checkpoint.shipped()) or "none"
        there = [
            name
            for name in checkpoint.MATTERSIM_FILES.values()
            if (checkpoint.mattersim_folder() / name).is_file()
        ]
        return [
            Check(
                "checkpoints",
                None,
                f"shipped: {shipped}; of MatterSim's own, downloaded: {', '.join(there) or 'none'}",
            )
        ]
    name = settings.calculator.checkpoint
    if settings.from_scratch and settings.learning is not None:
        first = settings.learning.scratch
        n_first = first.n_structures * first.batches
        text = (
            f"scratch: new weights, trained on up to {n_first} labels before the first generation"
        )
        return [Check("checkpoint", None, text)]
    file_name = checkpoint.MATTERSIM_FILES.get(name.lower().removesuffix(".pth"))
    folder = checkpoint.mattersim_folder()
    if file_name and not Path(name).is_file() and not (folder / file_name).is_file():
        fix = (
            "it is fetched at the first use; without a network: put"
            f" {checkpoint.MATTERSIM_URL}{file_name} into {folder}"
        )
        return [Check("checkpoint", False, f"{name} is not in {folder}", fix, needed=True)]
    try:
        model = checkpoint.describe(checkpoint.resolve(name))
    except (InputError, ImportError) as error:
        return [
            Check(
                "checkpoint",
                False,
                str(error),
                "correct `checkpoint`: a name MatterSim knows, a shipped name, or a path",
                needed=True,
            )
        ]
    checks = [
        Check("checkpoint", True, f"{name}: model {model.model_id}, {model.path}", needed=True)
    ]
    unseen = _unseen(settings.symbols, model.species)
    if unseen:
        text = f"the data of {name} never held {', '.join(unseen)}"
        checks.append(
            Check(
                "elements", None, text, "label and finetune (learning:), or take another checkpoint"
            )
        )
    return checks


def _unseen(symbols: Iterable[str], species: frozenset[int] | None) -> list[str]:
    from ase.data import atomic_numbers

    return [
        symbol
        for symbol in symbols
        if species is not None and atomic_numbers[symbol] not in species
    ]


def _labelers(settings: Settings | None) -> list[Check]:
    from magus_anharmonic.labelers import available
    from magus_anharmonic.labelers.codes import ALLOW, REGISTRY, allowed_modules
    from magus_anharmonic.scheduler import is_remote

    asked = {one.calculator: one for one in settings.labelers.values()} if settings else {}
    checks = []
    if allowed := allowed_modules():
        checks.append(
            Check(
                "modules that an input may call",
                None,
                f"{', '.join(allowed)} ({ALLOW}, or installed packages)",
            )
        )
    for name in dict.fromkeys([*asked, *REGISTRY]):
        # Workers elsewhere have an environment of their own, which cannot be looked at from here.
        needed = name in asked and not (settings and is_remote(settings.scheduler))
        if name == "main":
            checks.append(
                Check(
                    "labeler main",
                    None,
                    "MAGUS's MainCalculator, under `magus search -m`",
                    needed=needed,
                )
            )
            continue
        ok, text = available(name, asked[name].arguments if name in asked else {})
        fix = (
            ""
            if ok
            else {"gpaw": "pip install 'magus-anharmonic[gpaw]'"}.get(name, "see docs/labelers.md")
        )
        checks.append(Check(f"labeler {name}", ok if ok or needed else None, text, fix, needed))
    return checks


def _third_party(settings: Settings | None) -> list[Check]:
    """What other packages declare, each loaded: a broken one is missing only to who asks for it."""
    asked: set[object] = set()
    if settings is not None:
        asked = {*settings.fitness, settings.main_calculator.get("calculator")}
        asked |= {labeler.calculator for labeler in settings.labelers.values()}
        asked |= {settings.evaluator.calculator} if settings.evaluator else set()
    checks = []
    words: dict[third_party.Kind, str] = {
        "labelers": "labeler",
        "evaluators": "evaluator",
        "fitness": "fitness",
    }
    for kind, word in words.items():
        for name, points in third_party.declared(kind).items():
            whose = " and ".join(third_party.origin(point) for point in points)
            needed, what = name in asked, f"{word} {name} of another package"
            try:
                third_party.load(kind, name)
                checks.append(Check(what, True, whose, needed=needed))
            except InputError as error:
                fix = "mend or uninstall it"
                checks.append(Check(what, False if needed else None, str(error), fix, needed))
    return checks


def _sscha(settings: Settings | None) -> list[Check]:
    needed = settings is not None and settings.sscha is not None
    fix = (
        "pip install six cellconstructor python-sscha (they compile: gcc, gfortran, pkg-config and"
        " OpenBLAS)"
    )
    return [
        _module("SSCHA engine python-sscha", "sscha.Ensemble", "python-sscha", fix, needed=needed)
    ]


def _embedded_host() -> Check:
    missing = [name for name in ("pyxtal", "ase_ga") if find_spec(name) is None]
    needed = magus_version() is None
    if missing:
        names = " ".join(name.replace("_", "-") for name in missing)
        return Check(
            "embedded host", False, f"{names} missing", f"pip install {names}", needed=needed
        )
    return Check(
        "embedded host",
        True,
        f"pyxtal {_version('pyxtal')}, ase-ga {_version('ase-ga')}",
        needed=needed,
    )


def _scheduler(settings: Settings | None) -> Check:
    """Which scheduler is set, and whether its packages, its commands or its address are there."""
    from magus_anharmonic.scheduler import available_cores, is_remote
    from magus_anharmonic.scheduler.queues import COMMANDS, missing

    if settings is None:
        found = [
            name
            for name, commands in COMMANDS.items()
            if all(shutil.which(command) for command in commands)
        ]
        parts = [name for name in ("distributed", "dask_jobqueue", "dask_cuda") if find_spec(name)]
        detail = (
            f"Dask: {', '.join(parts) or 'not installed'}; queue systems with commands here:"
            f" {', '.join(found) or 'none'}"
        )
        return Check(
            "scheduler",
            None,
            detail,
            "scheduler: local needs neither; for the others pip install"
            " 'magus-anharmonic[cluster]'",
        )
    name, workers = settings.scheduler, settings.workers
    if not is_remote(name):
        count = 1 if name == "serial" else workers.count or available_cores()
        return Check(
            "scheduler",
            True,
            f"{name}: {count} process{'es' if count > 1 else ''} on this machine",
            needed=True,
        )
    problem = missing(name, workers) if name in COMMANDS else _no_answer(name, workers.timeout)
    if problem:
        return Check("scheduler", False, f"{name}: {problem}", "see docs/clusters.md", needed=True)
    detail = (
        f"{name}: {workers.count or 1} jobs by {COMMANDS[name][0]}"
        if name in COMMANDS
        else f"{name} answers"
    )
    return Check("scheduler", True, detail, needed=True)


def _no_answer(address: str, timeout: float) -> str:
    """Why nothing can be sent to a Dask scheduler at ``address``; empty when somebody listens
    there."""
    if find_spec("distributed") is None:
        return (
            "the Python package distributed is not installed; pip install 'magus-anharmonic[dask]'"
        )
    host, _, port = address.partition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=min(timeout, 10.0)).close()
    except (OSError, OverflowError) as error:
        return f"nobody answers there ({error}); start `dask scheduler` on that machine"
    return ""


def _system_libraries() -> list[Check]:
    """Shared libraries that the compiled packages load; the packages' own checks say whether that
    works."""
    wanted = {"OpenBLAS": "openblas", "libxc": "xc", "FFTW": "fftw3", "Fortran runtime": "gfortran"}
    files = {label: find_library(name) for label, name in wanted.items()}
    detail = ", ".join(f"{label} ({file})" for label, file in files.items() if file) or "none found"
    missing = ", ".join(label for label, file in files.items() if not file)
    if not missing:
        return [Check("system libraries", True, detail)]
    fix = (
        "needed to compile GPAW and python-sscha: apt-get install -y gfortran libopenblas-dev"
        " libxc-dev libfftw3-dev"
    )
    return [Check("system libraries", None, f"{detail}; not found: {missing}", fix)]
