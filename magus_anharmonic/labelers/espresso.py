"""Labels from Quantum ESPRESSO's pw.x through ASE. Program and pseudopotentials are the user's.

``arguments`` needs ``pseudopotentials`` (symbol -> UPF file); ``command`` (default ``pw.x``) and
``pseudo_dir`` may stand there or in ASE's configuration; ``input_data`` holds pw.x's own keys.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase import Atoms

from magus_anharmonic.errors import LabelerError
from magus_anharmonic.labelers.base import (
    Code,
    Recipe,
    file_digest,
    k_points,
    make_readable,
    program_of,
    read_command,
)
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
        pseudopotentials = settings.arguments.get("pseudopotentials")
        if not isinstance(pseudopotentials, Mapping):
            raise LabelerError(
                "learning.labeler.arguments.pseudopotentials: is missing; give a UPF file per"
                " element, e.g. {H: H.upf, S: S.upf}"
            )
        made = super().recipe(settings)
        if made.execution.get("command") is not None:
            try:
                _command(made.execution)
            except LabelerError as error:
                raise LabelerError(f"learning.labeler.arguments.command: {error}") from None
        data = _input_data(made.arguments.get("input_data", {}))
        folder = Path(made.execution.get("pseudo_dir") or _configured("pseudo_dir") or ".")
        files = {
            name: file_digest(folder / name)
            for name in sorted({str(name) for name in pseudopotentials.values()})
            if (folder / name).is_file()
        }
        return replace(
            made, arguments={**made.arguments, "input_data": data}, files={**made.files, **files}
        )

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
                super().run(directory, inputfile, outputfile, *rest, **more)
                make_readable(Path(directory) / outputfile)

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
        if recipe.k_spacing is not None:
            arguments["kpts"] = k_points(atoms, recipe.k_spacing)
        profile = LenientProfile(
            command=_command(recipe.execution, os.environ),
            pseudo_dir=recipe.execution.get("pseudo_dir") or _configured("pseudo_dir") or ".",
        )
        return ExtrapolatedEspresso(profile=profile, directory=str(directory), **arguments)

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


def _configured(name: str) -> str | None:
    from ase.config import cfg

    return (
        cfg.parser.get("espresso", name, fallback=None)
        if cfg.parser.has_section("espresso")
        else None
    )


def _input_data(given: Any) -> dict[str, Any]:
    from ase.io.espresso import Namelist

    if not isinstance(given, Mapping):
        raise LabelerError(
            f"learning.labeler.arguments.input_data: {given!r}: must be pw.x's keys, e.g. {{system:"
            " {ecutwfc: 80}}"
        )
    nested = Namelist(dict(given))
    nested.to_nested("pw")
    data = {section: dict(keys) for section, keys in nested.items() if keys}
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
    cutoffs = {
        key: SYSTEM[key] for key in (() if "ecutwfc" in given_system else ("ecutwfc", "ecutrho"))
    }
    data["system"] = {**cutoffs, **smearing, **given_system}
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
    if "convergence NOT achieved" in output:
        raise LabelerError("SCF did not converge: pw.x says 'convergence NOT achieved'")
    if "convergence has been achieved" not in output:
        raise LabelerError("pw.x did not finish: its output has no 'convergence has been achieved'")
