"""Writes docs/api.md from signatures and docstrings, so that the page cannot drift from the code:
``python docs/make_api.py``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate
from typing import Any

PAGE = Path(__file__).with_name("api.md")

EXAMPLE = """\
```python
from magus_anharmonic import free_energy, hessian_of_run, load

potential = load("mattersim-v1.0.0-1M")
(relaxed,) = potential.relax([atoms], pressure=150.0)  # atoms: ase.Atoms; GPa
result = free_energy(relaxed.atoms, potential, pressure=150.0, directory="Im-3m")
if result.converged:
    print(result.gibbs, result.gibbs_error, result.space_group)  # eV/atom
    print(hessian_of_run("Im-3m", "Im-3m-phonons"))  # minimum or saddle point?
```"""

SECTIONS: list[tuple[str, str, list[str]]] = [
    (
        "Functions",
        "Import them from `magus_anharmonic`. In a notebook, long calls show their log below the"
        ' cell; `logging.getLogger("magus_anharmonic").setLevel("WARNING")` turns that off.',
        [
            "magus_anharmonic.load",
            "magus_anharmonic.free_energy",
            "magus_anharmonic.hessian_of_run",
            "magus_anharmonic.rank_structures",
            "magus_anharmonic.parse_settings",
        ],
    ),
    (
        "Potentials",
        "Both are imported from `magus_anharmonic`.",
        ["magus_anharmonic.Potential", "magus_anharmonic.MatterSim"],
    ),
    (
        "Results",
        "Every result has a short `repr`, and a table in notebooks.",
        [
            "magus_anharmonic.evaluator.Evaluation",
            "magus_anharmonic.evaluator.Relaxation",
            "magus_anharmonic.sscha.SschaResult",
            "magus_anharmonic.sscha.report.HessianReport",
            "magus_anharmonic.sscha.hessian.Hessian",
            "magus_anharmonic.ranking.candidate.RankingTable",
            "magus_anharmonic.ranking.candidate.Candidate",
        ],
    ),
    (
        "Phase diagrams",
        "Points come from finished runs or from a table; see [phase diagrams](phase-diagram.md).",
        [
            "magus_anharmonic.phase_diagram.grid.collect_runs",
            "magus_anharmonic.phase_diagram.diagram.phase_diagram",
            "magus_anharmonic.phase_diagram.diagram.PhaseDiagram",
        ],
    ),
    (
        "Energies from elsewhere",
        "`free_energy` and `rank_structures` take any ASE calculator, or an object of this shape.",
        ["magus_anharmonic.evaluator.Evaluator", "magus_anharmonic.evaluator.LabelSource"],
    ),
    (
        "Errors",
        "All are a `MagusAnharmonicError`.",
        [
            "magus_anharmonic.errors.InputError",
            "magus_anharmonic.errors.SschaError",
            "magus_anharmonic.errors.NotConverged",
            "magus_anharmonic.errors.MachineError",
        ],
    ),
]

FIELDS_ON_THE_PAGE_OF_COLUMNS = {"magus_anharmonic.ranking.candidate.Candidate"}


def public() -> Iterator[tuple[str, Any]]:
    """Path and object of every entry."""
    for _, _, paths in SECTIONS:
        for path in paths:
            yield path, locate(path)


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class adds to its bases, those with a docstring."""
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    for name, value in vars(cls).items():
        if name[0] != "_" and name not in inherited and inspect.getdoc(value):
            function = getattr(value, "fget", None) or getattr(value, "func", None) or value
            if inspect.isfunction(getattr(function, "__func__", function)):
                yield name, value


def signature(function: Any, *, of_class: bool = False) -> str:
    """``(a: int, b: str = "x") -> bool``, a parameter a line where it is long."""
    found = inspect.signature(function)
    shown: list[str] = []
    for parameter in list(found.parameters.values())[of_class:]:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        shown.append(f"{parameter.name}: {parameter.annotation}{default}")
    line = f"({', '.join(shown)}) -> {found.return_annotation}"
    if len(line) < 80:
        return line
    return "(\n    " + ",\n    ".join(shown) + f",\n) -> {found.return_annotation}"


def prose(docstring: str | None) -> str:
    """Markdown of a docstring: names as code, ``name`` above an indented text as a list."""
    lines: list[str] = []
    for line in inspect.cleandoc(docstring or "").splitlines():
        if set(line) == {"-"} and lines:
            lines[-1] = f"**{lines[-1]}**"
            lines.append("")
            continue
        lines.append(line)
    text = re.sub(r"``([^`]+)``", r"`\1`", "\n".join(lines))
    text = re.sub(r"(`[^`]+`)|<(?=\w)", lambda found: found[1] or "&lt;", text)
    return re.sub(
        r"^([\w, ]+)\n((?:    +.*(?:\n|$))+)",
        lambda found: f"* `{found[1]}`: {' '.join(found[2].split())}\n",
        text,
        flags=re.MULTILINE,
    )


def fields_of(cls: type) -> list[str]:
    """A table of the fields that say what they are (`io.tables.column`)."""
    told = [one for one in dataclasses.fields(cls) if one.metadata.get("meaning")]
    rows = [
        f"| `{one.name}` | {one.metadata['unit']} | {one.metadata['meaning']} |" for one in told
    ]
    return ["| field | unit | meaning |", "|---|---|---|", *rows, ""] if rows else []


def entry(path: str, what: Any) -> str:
    """Heading, signature, docstring, fields and members of one object."""
    name = path.rsplit(".", 1)[1]
    parts = [f"### {name}", ""]
    if inspect.isfunction(what):
        if path != f"magus_anharmonic.{name}":
            parts += [f"`{path}`", ""]
        parts += ["```python", f"{name}{signature(what)}", "```", "", prose(what.__doc__)]
        return "\n".join(parts)
    parts += [f"`{path}`", "", prose(what.__doc__), ""]
    if dataclasses.is_dataclass(what) and path not in FIELDS_ON_THE_PAGE_OF_COLUMNS:
        parts += fields_of(what)
    for member, value in members(what):
        method = getattr(value, "__func__", value)
        call = signature(method, of_class=True) if inspect.isfunction(method) else ""
        text = prose(inspect.getdoc(value)).split("\n\n")[0].replace("\n", " ")
        parts.append(f"* `{member}{' '.join(call.split())}`: {text}")
    return "\n".join(parts)


def render() -> str:
    """The whole page."""
    head = (
        "# Python\n\n<!-- Made by docs/make_api.py from the docstrings; do not edit. -->\n\n"
        f"{EXAMPLE}\n\n`result.gibbs` of a run that has not converged raises `NotConverged`: it is"
        " an upper bound, no free energy. `result.numbers` holds all numbers as they are."
    )
    parts = [head]
    for title, text, paths in SECTIONS:
        parts.append(f"## {title}\n\n{text}")
        parts += [entry(path, locate(path)) for path in paths]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
