"""What every labeler is and returns, what identifies an energy surface, and commands without a
shell: split here, the calculators' own ``shell=True`` taken away.

A command is a program, its arguments in quotes or not, variables of the environment, and plain
redirections. Nothing else is understood, and nothing is carried out of what only a shell
understands.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from ase import Atoms

from magus_anharmonic.energy_surface import FreeEnergySurface
from magus_anharmonic.errors import LabelerError
from magus_anharmonic.evaluator import Relaxation
from magus_anharmonic.io.digests import digest, to_json
from magus_anharmonic.settings import LabelerSettings
from magus_anharmonic.settings.section import check_path
from magus_anharmonic.units import GPa

ALLOWED = (
    "a program, its arguments, quotes, $NAME and the redirections > >> < 2> 2>> 2>&1; what needs a"
    " shell goes into a script of your own"
)

_VARIABLE = r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})"

_TOKEN = re.compile(
    rf"""[ \t]*(?:
        (?P<sign> 2>&1(?![^\s]) | [12]?>>(?![>&|]) | [12]?>(?![>&|]) | 0?<(?![<&>]) )
      | (?P<word> (?![#~]) (?: [^\s'"\\<>;&|`$()*?] | '[^']*'
                              | "(?:[^"\\$`]|\\[^$`]|{_VARIABLE})*" | \\. | {_VARIABLE} )+ )
    )""",
    re.VERBOSE,
)
_PIECE = re.compile(rf"""'[^']*'|"(?:[^"\\]|\\.)*"|\\.|{_VARIABLE}|[^'"\\$]+""")


@dataclass(frozen=True)
class Command:
    """``words``: program and arguments; files (None: not redirected) as name and mode, ``2>&1`` as
    ``joined``."""

    words: tuple[str, ...]
    stdin: tuple[str, str] | None = None
    stdout: tuple[str, str] | None = None
    stderr: tuple[str, str] | None = None
    joined: bool = False

    @property
    def redirected(self) -> bool:
        """Whether any stream goes elsewhere."""
        return bool(self.stdin or self.stdout or self.stderr or self.joined)


def read_command(text: Any, environment: Mapping[str, str] | None = None) -> Command:
    """Split a command as a shell would, a variable being one word or a part of one; None leaves
    ``$NAME`` as it is.

    Raises ``LabelerError`` for what is empty, no text, or more than `ALLOWED`, and for a variable
    that is not set.
    """
    if not isinstance(text, str):
        raise LabelerError(f"{text!r}: must be text, e.g. 'mpirun -n 16 vasp_std'")
    words: list[str] = []
    files: dict[str, Any] = {}
    tokens = [(sign, _expanded(word, environment)) for sign, word in _tokens(text)]
    while tokens:
        sign, word = tokens.pop(0)
        if not sign:
            words.append(word)
            continue
        stream = "stdin" if sign.endswith("<") else "stderr" if sign.startswith("2") else "stdout"
        if stream in files or (stream == "stdout" and files.get("joined")):
            raise LabelerError(
                f"{text!r}: {sign}: redirects what is redirected already; give each once, 2>&1 at"
                " the end"
            )
        if sign == "2>&1":
            files |= {"stderr": None, "joined": True}
            continue
        if not tokens or tokens[0][0]:
            raise LabelerError(f"{text!r}: {sign}: a file name is missing after it")
        files[stream] = (tokens.pop(0)[1], {"<": "rb", ">>": "ab", ">": "wb"}[sign.lstrip("012")])
    if not words or not words[0]:
        raise LabelerError(f"{text!r}: must name a program, e.g. 'mpirun -n 16 vasp_std'")
    if re.match(r"\w+=", words[0]):
        raise LabelerError(
            f"{text!r}: {words[0]}: variables are set by the program env: env {words[0]} ..."
        )
    return Command(tuple(words), **files)


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Pairs (sign of a redirection or "", word as it is written)."""
    position, end = 0, len(text.rstrip())
    while position < end:
        found = _TOKEN.match(text, position, end)
        if found is None:
            rest = text[position:end].lstrip(" \t")
            raise LabelerError(f"{text!r}: {_why(rest)}; allowed: {ALLOWED}")
        yield found["sign"] or "", found["word"] or ""
        position = found.end()


def _expanded(word: str, environment: Mapping[str, str] | None) -> str:
    """A word without its quotes, its variables replaced."""
    parts = []
    for piece in _PIECE.findall(word):
        inner = re.split(f"({_VARIABLE})", piece[1:-1]) if piece.startswith('"') else [piece]
        for part in inner:
            if re.fullmatch(_VARIABLE, part):
                parts.append(_value(part, environment))
            else:
                parts += shlex.split(f'"{part}"' if piece.startswith('"') else part)
    return "".join(parts)


def _value(variable: str, environment: Mapping[str, str] | None) -> str:
    name = variable.strip("${}")
    if environment is None:
        return variable
    if name not in environment:
        raise LabelerError(f"the variable {name} of its command is not set where it runs")
    return environment[name]


def _why(rest: str) -> str:
    try:
        shlex.split(rest)
    except ValueError:
        return f"the quote or backslash in {rest[:30]!r} has no end"
    return f"only a shell understands {rest[:30]!r}"


def program_of(text: Any) -> str:
    """The program of a command, variables that are set here replaced; raises ``LabelerError`` as
    `read_command` does."""
    return os.path.expandvars(read_command(text).words[0])


@contextlib.contextmanager
def no_shell() -> Iterator[None]:
    """Within it this process starts no shell: the text of ``shell=True`` and of ``os.system`` is
    read by `read_command`.

    ASE's calculators start their programs with ``shell=True``. What is refused raises
    ``LabelerError`` where the program would start.
    """
    start, system = subprocess.Popen.__init__, os.system
    signature = inspect.signature(start)

    def start_directly(self: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        if given.get("shell"):
            _start(start, given)
        else:
            start(self, *args, **kwargs)

    subprocess.Popen.__init__ = start_directly  # type: ignore[method-assign]
    os.system = lambda command: subprocess.call(command, shell=True) << 8  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess.Popen.__init__ = start  # type: ignore[method-assign]
        os.system = system


def _start(start: Any, given: dict[str, Any]) -> None:
    process = given["self"]
    command = read_command(given["args"], given.get("env") or os.environ)
    asked = {name: given.get(name) for name in ("stdout", "stderr")}
    given |= {"args": list(command.words), "shell": False, "executable": None}
    if given.get("text") or given.get("universal_newlines"):
        given["errors"] = given.get("errors") or "replace"
    with contextlib.ExitStack() as files:
        for name in ("stdin", "stdout", "stderr"):
            if target := getattr(command, name):
                given[name] = files.enter_context(
                    open(Path(given.get("cwd") or ".") / target[0], target[1])
                )
        if command.joined:
            given["stderr"] = subprocess.STDOUT
        start(**given)
    for name, stream in asked.items():
        # Who asked for a pipe reads it: as from a shell, whose redirected program writes nothing
        # into it.
        if stream == subprocess.PIPE and getattr(process, name) is None:
            setattr(process, name, open(os.devnull, "r" if given.get("errors") else "rb"))


ENERGY_CONVENTION = "extrapolated to zero smearing"


@dataclass(frozen=True)
class Label:
    """One DFT single point.

    energy : eV, extrapolated to zero smearing; free_energy : eV, with the electronic entropy, None
    when the code gives none; forces : (N, 3) eV/A; stress : (3, 3) eV/A^3, ASE's sign; seconds :
    wall time of this label; info : what else the calculator says of it (its ``label_info``).
    """

    structure: Atoms
    energy: float
    free_energy: float | None
    forces: np.ndarray
    stress: np.ndarray
    settings_hash: str
    seconds: float
    ok: bool = True
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A structure that has no label, and why."""

    structure: Atoms
    reason: str
    settings_hash: str
    ok: bool = False


OnResult = Callable[[int, "Label | Failure"], None]


class Labeler:
    """DFT single points and relaxations; ``settings_hash`` (12 hex digits) names the energy
    surface, and ``surface`` describes it where it is a free energy."""

    settings_hash: str
    description: str
    surface: FreeEnergySurface | None = None

    def label(
        self, structures: Sequence[Atoms], on_result: OnResult | None = None
    ) -> list[Label | Failure]:
        """Single points in the order of the input; ``on_result(index, result)`` is called here as
        each one finishes."""
        raise NotImplementedError

    def relax(
        self,
        structures: Sequence[Atoms],
        pressure: GPa = 0.0,
        *,
        force_tolerance: float = 0.05,
        max_steps: int = 300,
    ) -> list[Relaxation]:
        """Relax positions and cell at ``pressure`` (GPa) by BFGS until forces are below
        ``force_tolerance`` (eV/A).

        A structure that fails comes back as it was given, with ``failed=True`` and the reason.
        Raises ``LabelerError`` where single points are all that is made.
        """
        raise LabelerError(f"{self.description}: makes single points only")

    def found(self, folder: Path, known: Set[str] = frozenset()) -> Iterator[tuple[Atoms, Label]]:
        """Structures (none with an id that is ``known``) and labels that runs below ``folder`` hold
        already; most know of none."""
        yield from ()

    def close(self) -> None:
        """End what the labeler has started; it cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Recipe:
    """Everything that a worker needs to make a calculator, as plain data.

    code : name in the registry; arguments : keyword arguments that define the energy surface;
    k_spacing : Gamma-centred k-point spacing in 2 pi / A, None when ``arguments`` say it; execution
    : arguments that only say how the code is run (command, parallelisation); not hashed; files :
    digest of every file that defines the energy surface (pseudopotentials, ...), as far as they lie
    on this machine.
    """

    code: str
    arguments: Mapping[str, Any]
    k_spacing: float | None
    execution: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings_hash(self) -> str:
        """Twelve hex digits of code, arguments, k-point rule, energy convention, and the content of
        files."""
        return settings_hash(self.code, self.arguments, self.k_spacing, self.files)


def settings_hash(
    code: str,
    arguments: Mapping[str, Any],
    k_spacing: float | None,
    files: Mapping[str, str] | None = None,
) -> str:
    """Hash of what defines the energy surface; independent of the order of keys and of 500 or
    500.0."""
    content = {
        "code": code,
        "arguments": canonical(arguments),
        "k_spacing": canonical(k_spacing),
        "energy": ENERGY_CONVENTION,
        **({"files": dict(files)} if files else {}),
    }
    text = to_json(content, ordered=True)
    found = digest(text)
    # Extended XYZ would read 123456789012 or 12e456789012 back as a number.
    while re.fullmatch(r"\d+(e\d+)?", found):
        text += " "
        found = digest(text)
    return found


def canonical(value: Any) -> Any:
    """Plain data in one spelling: numbers as floats, tuples as lists, keys as strings."""
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float | np.number):
        return float(value)
    return str(value)


def yaml_numbers(value: Any) -> Any:
    """Turn strings like ``2e-5`` into numbers: YAML 1.1 reads them as text unless written
    ``2.0e-5``."""
    if isinstance(value, Mapping):
        return {key: yaml_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [yaml_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


class Code:
    """A DFT code: which settings it has, and how one of its single points is set up.

    name : in ``learning.labeler.calculator``. Keys of ``execution_keys`` only say how the code is
    run; one of ``fixes_kpoints`` says the k-points instead of ``k_spacing`` (2 pi / A).
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    k_spacing: ClassVar[float | None] = None
    execution_keys: ClassVar[frozenset[str]] = frozenset()
    fixes_kpoints: ClassVar[tuple[str, ...]] = ("kpts",)

    def __init__(self, name: str) -> None:
        self.name = name

    def available(self, execution: Mapping[str, Any] | None = None) -> tuple[bool, str]:
        """Whether the code is here, and one sentence that says why or what to do if not."""
        raise NotImplementedError

    def recipe(self, settings: LabelerSettings) -> Recipe:
        """Merge the user's arguments over the defaults and separate what only says how the code
        runs.

        Raises ``LabelerError`` when k-points are given in two ways, an argument belongs to the
        labeler itself or leaves the project folder, or the command cannot be started without a
        shell.
        """
        try:
            given = yaml_numbers(settings.arguments)
        except RecursionError:
            raise LabelerError("learning.labeler.arguments: holds itself, or is too deep") from None
        _check_texts(given, self.execution_keys)
        reserved = sorted({"directory", "atoms", "restart", "label", "txt"} & set(given))
        if reserved:
            raise LabelerError(
                f"learning.labeler.arguments.{reserved[0]}: is set by the labeler itself; leave it"
                " out"
            )
        named = [key for key in self.fixes_kpoints if key in given]
        if named and settings.k_spacing is not None:
            raise LabelerError(
                f"learning.labeler: both k_spacing and arguments.{named[0]} are given; keep one"
            )
        execution = {key: given.pop(key) for key in list(given) if key in self.execution_keys}
        arguments = {**self.defaults, **given}
        files = {
            where: file_digest(Path(text))
            for where, text in _texts(arguments, "arguments")
            if re.search(r"[./]", text) and Path(text).is_file()
        }
        spacing = None if named else settings.k_spacing or self.k_spacing
        return Recipe(self.name, arguments, spacing, execution, files)

    def fermi_dirac(self, arguments: Mapping[str, Any], width: float) -> dict[str, Any]:
        """The same ``arguments`` with Fermi-Dirac occupations of ``width`` kT (eV). Raises
        ``LabelerError`` where the code's words for that are not known."""
        raise LabelerError(f"{self.name}: how to set an electronic temperature is not known")

    def calculator(self, recipe: Recipe, atoms: Atoms, directory: Path) -> Any:
        """An ASE calculator for one single point; its files go to ``directory``."""
        raise NotImplementedError

    def writes_to(self, recipe: Recipe) -> list[Path]:
        """Folders outside of the label's own into which the code writes."""
        return []

    def check(self, calculator: Any) -> None:
        """Raise ``LabelerError`` where the calculator has results that are none."""

    def surface(self, recipe: Recipe) -> FreeEnergySurface | None:
        """What the labels are of; None: static energies."""
        return None

    def found(self, recipe: Recipe, folder: Path, known: Set[str]) -> Iterator[tuple[Atoms, Label]]:
        """See `Labeler`."""
        yield from ()

    def default_workers(self, cores: int) -> int:
        """Labels at the same time: one per core, unless the code takes all cores itself."""
        return cores


def file_digest(*paths: Path) -> str:
    """Twelve hex digits of the content of files, in this order; the same wherever they lie."""
    states = [(str(path), path.stat()) for path in paths]
    return digest(*(_file_digest(path, state.st_size, state.st_mtime_ns) for path, state in states))


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, changed: int) -> bytes:
    return bytes.fromhex(digest(Path(path), length=None))


def folder_digest(files: Mapping[str, Path]) -> str:
    """Twelve hex digits of names and contents of ``files`` (name -> path)."""
    return digest({name: file_digest(path) for name, path in files.items()})


def _check_texts(given: Mapping[str, Any], execution_keys: frozenset[str]) -> None:
    texts = list(_texts(given, "learning.labeler.arguments"))
    command = given.get("command")
    if "command" in execution_keys and command is not None:
        where = "learning.labeler.arguments.command"
        try:
            texts += [(where, word) for word in read_command(command).words]
        except LabelerError as error:
            raise LabelerError(f"{where}: {error}") from None
    for where, text in texts:
        try:
            check_path(text)
        except ValueError as error:
            raise LabelerError(f"{where}: {text!r}: {error}") from None


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text of an argument, with its key path."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(item, f"{where}.{key}")


def make_readable(file: Path) -> None:
    """Replace bytes that are no UTF-8 in the output of a code, which ASE reads strictly; nothing
    where the file is not there."""
    if file.is_file():
        content = file.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:
            file.write_text(content.decode(errors="replace"), encoding="utf-8")


def k_points(atoms: Atoms, spacing: float) -> list[int]:
    """Gamma-centred grid with at most ``spacing`` (2 pi / A) between points along each reciprocal
    axis."""
    return [
        max(1, math.ceil(np.linalg.norm(vector) / spacing)) for vector in atoms.cell.reciprocal()
    ]
