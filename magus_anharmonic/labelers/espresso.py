"""Labels from Quantum ESPRESSO's pw.x through ASE. Program and pseudopotentials are the user's.

``arguments`` needs ``pseudopotentials``: symbol -> UPF file, or a list of symbols, whose files (and
cutoffs) are then those of the family in ``pseudo_dir`` (`family`). ``command`` (default ``pw.x``)
and ``pseudo_dir`` may stand there or in ASE's configuration; ``input_data`` holds pw.x's own keys.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.errors import LabelerError
from magus_anharmonic.io.files import read_json
from magus_anharmonic.labelers.base import (
    Code,
    Recipe,
    file_digest,
    k_points,
    make_readable,
    program_of,
    read_command,
)
from magus_anharmonic.processes import failed_program
from magus_anharmonic.settings import LabelerSettings
from magus_anharmonic.units import RYDBERG

SYSTEM: Mapping[str, Any] = {
    "ecutwfc": 60,
    "ecutrho": 480,
    "occupations": "smearing",
    "smearing": "gaussian",
    "degauss": 0.01,
}
ELECTRONS: Mapping[str, Any] = {"conv_thr": 1e-8}
NOT_ACHIEVED = "convergence NOT achieved"
_KEY = "learning.labeler.arguments.pseudopotentials"

# Where the energy at zero smearing lies between F and E = F + TS: E0 = F + fraction * TS
# (Methfessel-Paxton of order 1).
_TOWARDS_ZERO = {
    "gaussian": 0.5, "gauss": 0.5, "fermi-dirac": 0.5, "f-d": 0.5, "fd": 0.5,
    "methfessel-paxton": 1.0 / 3.0, "m-p": 1.0 / 3.0, "mp": 1.0 / 3.0,
    "marzari-vanderbilt": 0.0, "cold": 0.0, "m-v": 0.0, "mv": 0.0,
}  # fmt: skip


class Espresso(Code):
    """Labels from Quantum ESPRESSO's pw.x through ASE."""

    k_spacing = 0.03
    fixes_kpoints = ("kpts", "kspacing")
    execution_keys = frozenset({"command", "pseudo_dir"})

    def available(self, execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
        """Whether the command (``execution``, ASE's configuration, or pw.x) is found."""
        try:
            command = _command(execution or {})
        except LabelerError as error:
            return False, f"the command {error}"
        if shutil.which(program_of(command)) is None:
            return False, (
                f"{command} is not found: install Quantum ESPRESSO, or give arguments.command (e.g."
                " mpirun -n 8 /path/to/pw.x)"
            )
        return True, f"{command} is found"

    def recipe(self, settings: LabelerSettings) -> Recipe:
        """See `Code`; raises ``LabelerError`` also without pseudopotentials (the files), or for
        what pw.x does not take."""
        made = super().recipe(settings)
        folder = _folder(made)
        given, cutoffs = made.arguments.get("pseudopotentials"), {}
        if isinstance(given, list) and given:
            given, cutoffs = family(folder, given)
        if not isinstance(given, Mapping) or not given:
            raise LabelerError(
                f"{_KEY}: is missing; give a UPF file per element, e.g. {{H: H.upf, S: S.upf}}, or"
                " a list of elements, e.g. [H, S], whose files are then looked for in pseudo_dir"
            )
        pseudopotentials = {str(symbol): str(name) for symbol, name in given.items()}
        if made.execution.get("command") is not None:
            try:
                _command(made.execution)
            except LabelerError as error:
                raise LabelerError(f"learning.labeler.arguments.command: {error}") from None
        files = {
            name: file_digest(folder / name)
            for name in sorted(set(pseudopotentials.values()))
            if (folder / name).is_file()
        }
        arguments = {
            **made.arguments,
            "pseudopotentials": pseudopotentials,
            "input_data": _input_data(made.arguments.get("input_data", {}), cutoffs),
        }
        _check_files(folder, pseudopotentials)
        if "input_dft" not in arguments["input_data"]["system"]:
            _check_functionals(folder, pseudopotentials)
        return replace(made, arguments=arguments, files={**made.files, **files})

    def fermi_dirac(self, arguments: Mapping[str, Any], width: float) -> dict[str, Any]:
        """See `Code`."""
        data = _nested(arguments.get("input_data", {}))
        electrons = {"smearing": "fermi-dirac", "degauss": width / RYDBERG}
        system = {**data.get("system", {}), "occupations": "smearing", **electrons}
        return {**arguments, "input_data": {**data, "system": system}}

    def calculator(self, recipe: Recipe, atoms: Atoms, directory: Path) -> Any:
        """ASE's Espresso, whose output may have bytes that are no UTF-8, and whose ``energy`` is
        extrapolated to zero smearing (ASE returns the free energy under both names)."""
        from ase.calculators import espresso

        class LenientProfile(espresso.EspressoProfile):
            def run(
                self,
                directory: Path,
                inputfile: str | None,
                outputfile: str,
                *rest: Any,
                **more: Any,
            ) -> None:
                output = Path(directory) / outputfile
                try:
                    super().run(directory, inputfile, outputfile, *rest, **more)
                except subprocess.CalledProcessError as error:
                    raise failed_program(error, _words(output)) from None
                finally:
                    make_readable(output)

        class ExtrapolatedEspresso(espresso.Espresso):
            def calculate(self, atoms: Atoms, properties: Any, system_changes: Any) -> None:
                super().calculate(atoms, properties, system_changes)
                text = (self.directory / self.template.outputname).read_text(errors="replace")
                require_converged(text)
                system = self.parameters["input_data"].get("system", {})
                self.results["energy"] = zero_smearing_energy(
                    self.results["free_energy"], text, str(system.get("smearing", "gaussian"))
                )

        arguments = dict(recipe.arguments)
        if lacking := sorted(set(atoms.symbols) - set(arguments["pseudopotentials"])):
            raise LabelerError(f"{_KEY}: has no file for {', '.join(lacking)}")
        if recipe.k_spacing is not None:
            arguments["kpts"] = k_points(atoms, recipe.k_spacing)
        profile = LenientProfile(
            command=_command(recipe.execution, os.environ), pseudo_dir=_folder(recipe)
        )
        return ExtrapolatedEspresso(profile=profile, directory=str(directory), **arguments)

    def writes_to(self, recipe: Recipe) -> list[Path]:
        """pw.x's own folder for wave functions, where one is given."""
        outdir = recipe.arguments["input_data"]["control"].get("outdir")
        return [Path(outdir)] if outdir else []

    def default_workers(self, cores: int) -> int:
        """pw.x is usually started with MPI on all cores."""
        return 1


def _command(execution: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> str:
    text = execution.get("command") or _configured("command") or "pw.x"
    command = read_command(text, environment)
    if command.redirected:
        raise LabelerError(
            f"{text!r}: redirects what pw.x reads or prints, which goes through espresso.pwi and"
            " .pwo; leave that out"
        )
    return shlex.join(command.words)


def _folder(recipe: Recipe) -> Path:
    """Of the pseudopotentials."""
    return Path(recipe.execution.get("pseudo_dir") or _configured("pseudo_dir") or ".")


def _configured(name: str) -> str | None:
    from ase.config import cfg

    return (
        cfg.parser.get("espresso", name, fallback=None)
        if cfg.parser.has_section("espresso")
        else None
    )


def family(folder: Path, elements: Sequence[Any]) -> tuple[dict[str, str], dict[str, float]]:
    """Files of the elements in a folder of pseudopotentials, and the cutoffs (Ry) that they ask
    for, empty where the folder does not say.

    A family in the format of the SSSP library (a JSON file beside the UPF files: symbol ->
    ``filename``, ``cutoff_wfc``, ``cutoff_rho``; doi:10.1038/s41524-018-0127-2) names both; without
    one it is the only UPF file whose header has the element, or the only one of the functional that
    all elements have. Raises ``LabelerError``.
    """
    elements = [str(symbol) for symbol in elements]
    listed = _listed(folder)
    unlisted = [symbol for symbol in elements if symbol not in listed]
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() == ".upf")
    headers = {file.name: _element(file) for file in files} if unlisted else {}
    found = {symbol: str(listed[symbol]["filename"]) for symbol in elements if symbol in listed}
    shared = by_functional(folder, elements) if unlisted and not found else {}
    for symbol in unlisted:
        names = [name for name, element in headers.items() if element == symbol]
        if len(names) > 1 and len(shared) == 1:
            ((names, *_),) = ([of[symbol]] for of in shared.values())
        if not names:
            raise LabelerError(
                f"{_KEY}: {folder} has no file for {symbol}; set pseudo_dir, or name the file"
            )
        if len(names) > 1:
            raise LabelerError(
                f"{_KEY}: {folder} has {len(names)} files for {symbol} ({', '.join(names)}); name"
                f" the one to take, e.g. {{{symbol}: {names[0]}}}"
            )
        found[symbol] = names[0]
    cutoffs = {
        key: max(float(listed[symbol][name]) for symbol in found)
        for key, name in (("ecutwfc", "cutoff_wfc"), ("ecutrho", "cutoff_rho"))
        if all(name in listed.get(symbol, {}) for symbol in found)
    }
    return found, cutoffs


def by_functional(folder: Path, elements: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Functional -> element -> names of its UPF files in ``folder``: the functionals in which all
    elements have one; pw.x takes no others together. Bare nuclei (1/r) are left out."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted(folder.glob("*")):
        if file.suffix.lower() != ".upf":
            continue
        element, functional = _element(file), _functional(file)
        if element in elements and functional and '"1/r"' not in _header(file):
            found.setdefault(functional, {}).setdefault(element, []).append(file.name)
    return {name: of for name, of in found.items() if set(of) == set(elements)}


def _listed(folder: Path) -> dict[str, Any]:
    """Symbol -> entry of the family that a JSON file of the folder describes; empty without one."""
    listed: dict[str, Any] = {}
    for file in sorted(folder.glob("*.json")):
        entries = {
            symbol: entry
            for symbol, entry in read_json(file).items()
            if isinstance(entry, dict) and "filename" in entry
        }
        if entries and listed:
            raise LabelerError(
                f"{_KEY}: {folder} has more than one family in JSON ({file.name} and another);"
                " name the files one by one"
            )
        listed |= entries
    return listed


def _check_files(folder: Path, pseudopotentials: Mapping[str, str]) -> None:
    """Raise ``LabelerError`` for a file that the folder (where it is on this machine) has not, or
    that is another element's: pw.x would take it without a word."""
    for symbol, name in pseudopotentials.items():
        file = folder / name
        if folder.is_dir() and not file.is_file():
            raise LabelerError(
                f"{_KEY}.{symbol}: there is no file {name} in {folder}; set pseudo_dir"
            )
        element = _element(file)
        if element not in ("", symbol):
            raise LabelerError(f"{_KEY}.{symbol}: {file} is a pseudopotential of {element}")


def _check_functionals(folder: Path, pseudopotentials: Mapping[str, str]) -> None:
    """Raise ``LabelerError`` for files of two functionals: pw.x would stop at every label."""
    found = {name: _functional(folder / name) for name in pseudopotentials.values()}
    if len(set(found.values()) - {""}) > 1:
        shown = ", ".join(
            f"{name} ({functional or 'unknown'})" for name, functional in found.items()
        )
        raise LabelerError(
            f"{_KEY}: files of different functionals: {shown}; take files of one, or set"
            " input_data.system.input_dft"
        )


_FUNCTIONALS = {
    "SLA PZ NOGX NOGC": "LDA (PZ)", "PZ": "LDA (PZ)", "LDA": "LDA (PZ)",
    "SLA PW PBX PBC": "PBE", "SLA PW PBE PBE": "PBE", "PBE": "PBE",
    "SLA PW PSX PSC": "PBEsol", "PBESOL": "PBEsol",
    "SLA LYP B88 BLYP": "BLYP", "BLYP": "BLYP", "SLA PW TPSS TPSS": "TPSS", "TPSS": "TPSS",
}  # fmt: skip
"""As UPF files write them -> one name for those that pw.x takes together."""


def _functional(file: Path) -> str:
    """The functional that a UPF file was made for; empty where it names none that is known."""
    found = re.search(
        r"""functional\s*=\s*["']([^"']*)|^(.*)Exchange-Correlation functional""",
        _header(file),
        re.M,
    )
    words = (found[1] or found[2]).upper().split() if found else []
    return _FUNCTIONALS.get(" ".join(words[:4]), "")


def _header(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8", errors="replace") as lines:
        return lines.read(200_000).partition("<PP_HEADER")[2].partition("<PP_MESH")[0]


def _element(file: Path) -> str:
    """The element that a UPF file (version 1 or 2) names; empty where it names none."""
    header = _header(file)
    found = re.search(r"""element\s*=\s*["']\s*(\w+)|^\s*(\w+)\s+Element\b""", header, re.M)
    return (found[1] or found[2]).strip() if found else ""


def _words(output: Path) -> str:
    """What pw.x itself says in its output about why it ended."""
    text = output.read_text(errors="replace") if output.is_file() else ""
    if NOT_ACHIEVED in text:
        return f"SCF did not converge ({NOT_ACHIEVED})"
    found = re.search(r"Error in routine([^(]+)\(-?\d+\):\s*(.*?)\s*%%", text, re.S)
    return f"{found[1].strip()}: {found[2]}" if found else ""


def _nested(given: Any) -> dict[str, dict[str, Any]]:
    from ase.io.espresso import Namelist

    if not isinstance(given, Mapping):
        raise LabelerError(
            f"learning.labeler.arguments.input_data: {given!r}: must be pw.x's keys, e.g. {{system:"
            " {ecutwfc: 80}}"
        )
    nested = Namelist(dict(given))
    nested.to_nested("pw")
    return {section: dict(keys) for section, keys in nested.items() if keys}


def _input_data(given: Any, cutoffs: Mapping[str, float] | None = None) -> dict[str, Any]:
    data = _nested(given)
    control = data.get("control", {})
    if control.get("calculation", "scf") != "scf":
        raise LabelerError(
            "learning.labeler.arguments.input_data.control.calculation: labels are single points"
            " (scf); leave it out"
        )
    data["control"] = {
        "disk_io": "none",
        **control,
        "calculation": "scf",
        "tprnfor": True,
        "tstress": True,
    }
    given_system = data.get("system", {})
    smearing = (
        {}
        if "occupations" in given_system
        else {key: SYSTEM[key] for key in ("occupations", "smearing", "degauss")}
    )
    default = cutoffs or {key: SYSTEM[key] for key in ("ecutwfc", "ecutrho")}
    data["system"] = {**({} if "ecutwfc" in given_system else default), **smearing, **given_system}
    data["electrons"] = {**ELECTRONS, **data.get("electrons", {})}
    name = str(data["system"].get("smearing", "gaussian")).lower()
    if data["system"].get("occupations") == "smearing" and name not in _TOWARDS_ZERO:
        raise LabelerError(
            f"learning.labeler.arguments.input_data.system.smearing: {name!r}: allowed:"
            f" {', '.join(sorted(_TOWARDS_ZERO))}"
        )
    return data


def zero_smearing_energy(free_energy: float, output: str, smearing: str) -> float:
    """Energy (eV) at zero smearing from the free energy F (eV) and the line ``smearing contrib.
    (-TS)`` (Ry) of pw.x's output."""
    found = re.findall(r"smearing contrib\. \(-TS\)\s*=\s*([-+\d.Ee]+)\s*Ry", output)
    if not found:
        return free_energy
    return free_energy - _TOWARDS_ZERO[smearing.lower()] * float(found[-1]) * RYDBERG


def require_converged(output: str) -> None:
    """Raise ``LabelerError`` when pw.x says that its SCF did not converge, or did not finish."""
    if NOT_ACHIEVED in output:
        raise LabelerError(f"SCF did not converge: pw.x says {NOT_ACHIEVED!r}")
    if "convergence has been achieved" not in output:
        raise LabelerError("pw.x did not finish: its output has no 'convergence has been achieved'")
