"""Commands of DFT codes without a shell: what is split here, and the calculators' own ``shell=True`` taken away.

A command is a program, its arguments in quotes or not, variables of the environment, and plain redirections. Nothing else is understood,
and nothing is carried out of what only a shell understands.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magus_anharmonic.errors import LabelerError

ALLOWED = (
    "a program, its arguments, quotes, $NAME and the redirections > >> < 2> 2>> 2>&1; what needs a shell goes into a script of your own"
)

_VARIABLE = r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})"

_TOKEN = re.compile(
    rf"""[ \t]*(?:
        (?P<sign> 2>&1(?![^\s]) | [12]?>>(?![>&|]) | [12]?>(?![>&|]) | 0?<(?![<&>]) )
      | (?P<word> (?![#~]) (?: [^\s'"\\<>;&|`$()*?] | '[^']*' | "(?:[^"\\$`]|\\[^$`]|{_VARIABLE})*" | \\. | {_VARIABLE} )+ )
    )""",
    re.VERBOSE,
)
_PIECE = re.compile(rf"""'[^']*'|"(?:[^"\\]|\\.)*"|\\.|{_VARIABLE}|[^'"\\$]+""")


@dataclass(frozen=True)
class Command:
    """``words``: program and arguments; files (None: not redirected) as name and mode, ``2>&1`` as ``joined``."""

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
    """Split a command as a shell would, a variable being one word or a part of one; None leaves ``$NAME`` as it is.

    Raises ``LabelerError`` for what is empty, no text, or more than `ALLOWED`, and for a variable that is not set.
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
            raise LabelerError(f"{text!r}: {sign}: redirects what is redirected already; give each once, 2>&1 at the end")
        if sign == "2>&1":
            files |= {"stderr": None, "joined": True}
            continue
        if not tokens or tokens[0][0]:
            raise LabelerError(f"{text!r}: {sign}: a file name is missing after it")
        files[stream] = (tokens.pop(0)[1], {"<": "rb", ">>": "ab", ">": "wb"}[sign.lstrip("012")])
    if not words or not words[0]:
        raise LabelerError(f"{text!r}: must name a program, e.g. 'mpirun -n 16 vasp_std'")
    if re.match(r"\w+=", words[0]):
        raise LabelerError(f"{text!r}: {words[0]}: variables are set by the program env: env {words[0]} ...")
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
    """The program of a command, variables that are set here replaced; raises ``LabelerError`` as `read_command` does."""
    return os.path.expandvars(read_command(text).words[0])


@contextlib.contextmanager
def no_shell() -> Iterator[None]:
    """Within it this process starts no shell: the text of ``shell=True`` and of ``os.system`` is read by `read_command`.

    ASE's calculators start their programs with ``shell=True``. What is refused raises ``LabelerError`` where the program would start.
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
                given[name] = files.enter_context(open(Path(given.get("cwd") or ".") / target[0], target[1]))
        if command.joined:
            given["stderr"] = subprocess.STDOUT
        start(**given)
    for name, stream in asked.items():
        # Who asked for a pipe reads it: as from a shell, whose redirected program writes nothing into it.
        if stream == subprocess.PIPE and getattr(process, name) is None:
            setattr(process, name, open(os.devnull, "r" if given.get("errors") else "rb"))
