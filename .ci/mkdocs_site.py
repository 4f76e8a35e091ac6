"""MkDocs hooks: equations become MathML while the site is built (no script, no network), and a page
that nav lacks gets its place."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOUND = re.compile(
    r'<(span|div) class="arithmatex">\s*\\(?:\(|\[)(.*?)\\(?:\)|\])\s*</\1>', re.DOTALL
)
REPOSITORY = re.compile(r"\[([^\]]+)\]\(\.\./(?!docs/)([^)#]+)\)")


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Pages of ``docs/`` without a line in nav come last, under "More"."""
    named = set(_pages(config.nav))
    more = sorted(
        path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in named
    )
    if more:
        config.nav = [*config.nav, {"More": more}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The script by which the search box works in pages opened as files, and the style sheet."""
    for path in sorted(Path(__file__).with_name("site").iterdir()):
        files.append(
            File.generated(config, f"assets/{path.name}", content=path.read_text(encoding="utf-8"))
        )
    return files


def on_post_page(output: str, **_: Any) -> str:
    """What a screen reader asks of the theme: a name of the search box, no empty headings."""
    output = output.replace('role="dialog">', 'role="dialog" aria-label="Search">')
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", output)


def _pages(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    return [
        page
        for entry in (entries.values() if isinstance(entries, dict) else entries)
        for page in _pages(entry)
    ]


def on_page_content(text: str, **_: Any) -> str:
    """Every ``\\(...\\)`` and ``\\[...\\]`` that arithmatex has marked."""
    return FOUND.sub(
        lambda found: convert(
            html.unescape(found[2]), display="block" if found[1] == "div" else "inline"
        ),
        text,
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files of the repository outside ``docs/`` become their names: the site does not hold
    them."""
    return REPOSITORY.sub(
        lambda found: (
            f"{found[1]} (`{found[2]}`)" if found[1].strip("`") != found[2] else f"`{found[2]}`"
        ),
        markdown,
    )
