"""Names of files that stand for any text; texts of any origin as one line; full disks, and the
rights of a new file."""

import itertools
import os
import re
import resource
import shutil
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magus_anharmonic.campaign.steps import phase_folder
from magus_anharmonic.errors import one_line, reason_of, typed_line
from magus_anharmonic.io import pictures as style
from magus_anharmonic.io.digests import digest, safe_name
from magus_anharmonic.io.files import append_jsonl, replacing, write_json, write_text
from magus_anharmonic.paper import tables
from magus_anharmonic.phase_diagram.grid import point_folder
from magus_anharmonic.units import time_left

NASTY = [
    "α",
    "β",
    "C2/c",
    "C2_c",
    "..",
    ".",
    "",
    " ",
    "$\\frac$",
    "a" * 300,
    "a" * 301,
    "alpha",
    "Alpha",
    "ALPHA",
    "im-3m",
    "Im-3m",
    "IM-3M",
    "é",
    "e\u0301",
    "ı",
    "i",
    "I",
    "con",
    "CON",
    "nul.csv",
    "/etc/passwd",
    "..\\x",
    "a\nb",
    "a\x00b",
    "-rf",
    "~",
    "natural",
    "H=2.014",
    "C2_c-" + "0" * 12,
    "name.",
    "name",
    "K",
    "K",
    "ß",
    "ss",
    "P2_1/c",
    "P2_1_c",
]


def folded(name):
    """What a file system that folds case and Unicode makes of a name."""
    return unicodedata.normalize("NFKC", name).casefold()


def test_names_of_nasty_texts_are_safe_and_differ_on_every_file_system():
    texts = [*NASTY, *(safe_name(text) for text in NASTY if safe_name(text) != text)]
    names = [safe_name(text) for text in texts]
    for name in names:
        assert (
            re.fullmatch(r"[A-Za-z0-9_.+-]{1,64}", name) and name[0] not in ".-" and name[-1] != "."
        )
    assert len({folded(name) for name in names}) == len(set(texts))
    assert [
        safe_name(text)
        for text in ("Im-3m", "R3m", "Cmcm", "T1u", "natural", "foundation", "0a1b2c3d4e5f")
    ] == ["Im-3m", "R3m", "Cmcm", "T1u", "natural", "foundation", "0a1b2c3d4e5f"]


def test_several_texts_have_one_name_for_each_way_to_share_out_the_dashes():
    parts = ["A", "B", "A-B", "B-A", "C2/c", "", "A-" + "0" * 12, "0" * 12]
    pairs = list(itertools.product(parts, repeat=2))
    assert len({folded(safe_name(*pair)) for pair in pairs}) == len(pairs)
    assert safe_name("Im-3m", "T1u") == "Im-3m-T1u"


@given(st.text(max_size=80), st.text(max_size=80))
def test_two_texts_have_two_names(one, other):
    assert (folded(safe_name(one)) == folded(safe_name(other))) == (one == other)


def test_folders_and_tables_of_two_phases_are_two_and_inside(tmp_path):
    for make in (
        lambda name: tmp_path / phase_folder(name, 100.0),
        lambda name: tmp_path / tables.dispersion_file(name, 100.0),
        lambda name: point_folder(tmp_path, name, "natural", 100.0, 0.0),
        lambda name: point_folder(tmp_path, "Im-3m", name, 100.0, 0.0),
    ):
        paths = [make(name) for name in NASTY]
        assert len({folded(str(path)) for path in paths}) == len(set(NASTY))
        assert all(
            path.resolve().is_relative_to(tmp_path.resolve()) and path.resolve() != tmp_path
            for path in paths
        )


@pytest.mark.parametrize("name", ["$\\frac$", "$x", "a$b$c", "100 % {x}", "\\"])
def test_a_figure_shows_any_name_as_it_is(tmp_path, name):
    with style.figure(title=name) as (made, (axes,)):
        style.points(axes, [0.0, 1.0], [0.0, 1.0], label=name)
        axes.set_xlabel(name)
        style.legend(axes)
        for path in style.save(made, tmp_path, safe_name(name)):
            assert path.stat().st_size > 0


@pytest.mark.parametrize(
    ("error", "said", "with_type"),
    [
        (ValueError("a\n  b\x1b[31m"), "a b [31m", "ValueError: a b [31m"),
        (KeyError("energy"), "'energy'", "KeyError: 'energy'"),
        (AssertionError(), "AssertionError", "AssertionError"),
        (RuntimeError(" \n"), "RuntimeError", "RuntimeError"),
        (RuntimeError("x" * 500), "x" * 297 + "...", "RuntimeError: " + "x" * 297 + "..."),
    ],
)
def test_what_an_error_says_is_one_line_and_never_empty(error, said, with_type):
    assert (one_line(error), typed_line(error)) == (said, with_type)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((60, 2, 3), "about 2 min left"),
        ((30, 3, 1), "about 10 s left"),
        ((3600, 1, 2), "about 2.0 h left"),
        ((60, 0, 5), ""),
        ((60, 5, 0), ""),
    ],
)
def test_the_time_left_is_that_of_the_pace_so_far(arguments, text):
    assert time_left(*arguments) == text


@pytest.fixture
def small_files():
    """No file may grow above a kilobyte: the system says so when bytes are written, without a name,
    as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _copied(file):
    source = file.with_name("source")
    with replacing(file) as temporary:
        shutil.copyfile(source, temporary)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_text(file, "x" * 5000),
        lambda file: write_json(file, {"x": "x" * 5000}),
        lambda file: append_jsonl(file, {"x": "x" * 5000}),
        _copied,
    ],
)
def test_a_disk_without_room_is_told_with_the_file_that_was_written(tmp_path, write, request):
    (tmp_path / "source").write_text("x" * 5000)
    request.getfixturevalue("small_files")
    with pytest.raises(OSError) as caught:
        write(tmp_path / "file.json")
    assert reason_of(caught.value).startswith(f"{tmp_path / 'file.json'}: File too large")
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_what_fails_for_another_reason_keeps_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "file"):
        (tmp_path / "input").read_text()
    assert caught.value.filename == str(tmp_path / "input")
    with pytest.raises(OSError, match="not a checkpoint"), replacing(tmp_path / "file"):
        raise OSError("not a checkpoint")  # as libraries do, without a number


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_the_umask_says_who_may_read_a_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "ours", "x")
        (tmp_path / "any").write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_twelve_digits_of_a_text_its_bytes_and_a_file_that_holds_them_are_those_of_sha_256(
    tmp_path,
):
    (tmp_path / "file").write_text("abc")
    assert (
        digest("abc") == digest(b"abc") == digest(tmp_path / "file") == "ba7816bf8f01"
    )  # FIPS 180-2, appendix B.1
