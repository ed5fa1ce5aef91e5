"""Text of somebody else's on its way out: what it is as text, and one hostile name through all commands."""

import re
import shutil

import pytest
import yaml

from spmconvert.cli import console
from spmconvert.escaping import code, markdown, visible

NAME = "a\x1b[2J<b>`x`|[y](z)\u202e\x07&"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü", "plain ü"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\u202e", "\\u202e"),
        ("\udcff", "\\udcff"),
        ("a\nb\r", "a\nb\\r"),
    ],
)
def test_what_shows_nothing_is_shown(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


def test_markdown_has_no_markup_of_others():
    assert markdown("a|b\n<c> [d](e) `f` *g*") == r"a\|b\\n\<c\> \[d\](e) \`f\` \*g\*"


@pytest.mark.parametrize(
    ("text", "shown"), [("a.b", "`a.b`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("a\nb", "`a\\nb`")]
)
def test_code_ends_where_it_should(text, shown):
    assert code(text) == shown


def test_a_bar_divides_no_cell():
    assert code("a|b", cell=True) == r"`a\|b`"


def test_a_console_shows_control_characters(capsys):
    console.note("a\x1b[2Jb")
    console.error("a\x1b[2J\nb \udcff")
    console.show("a\x1b[2Jb")
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert captured.out == "a\\x1b[2Jb\n"
    assert captured.err == "a\\x1b[2Jb\nerror: a\\x1b[2J b \\udcff\n"


def test_a_hostile_name_through_all_commands(run, checkpoints, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense, own = tmp_path / NAME, tmp_path / f"{NAME}.txt"
    shutil.copytree(checkpoints["llama"], dense)
    shutil.copy(text, own)
    (dense / "README.md").write_text("---\nlicense: 'x\\y'\ntags: [\"a\\e[2J\", '<b>']\n---\n")
    options = ("--calib", own, "--stages", "2", "--layers", "0", "--refine", "0")
    quick = ("--set", "fit.iterations=1", "--set", "calibration.rows=8")
    spm = tmp_path / f"{NAME}-spm"
    commands = [
        ("convert", dense, *options, "--dry-run"),
        ("convert", dense, *options, *quick),
        ("verify", spm),
        ("finetune", spm, "--data", own, "--steps", "1", "--batch-size", "2", "--set", "evaluation_rows=2"),
        ("report", spm, "--data", own, "--rows", "2", "--seconds", "0"),
        ("report", spm, tmp_path / f"{NAME}-spm-ft", "--data", own, "--rows", "2", "--seconds", "0"),
        ("export", spm),
        ("convert", tmp_path / f"{NAME}-none", "-o", "x"),
    ]
    for command in commands:
        status, out, err = run(*command)
        assert status == (0 if command is not commands[-1] else 4), err
        assert "\x1b" not in out + err
        assert "\x07" not in out + err
    written = [file for file in tmp_path.rglob("*") if file.suffix in (".md", ".html") and dense != file.parent]
    assert {file.suffix for file in written} == {".md", ".html"}
    for file in written:
        content = file.read_text()
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", content), file
        if file.suffix == ".html":
            assert "<b>`x`" not in content
        if file.suffix == ".md":
            outside = re.sub(r"(`+).*?\1", "", content.partition("\n---\n")[2] or content)
            assert not re.search(r"(?<!\\)[<\[]b?", outside.replace("<!--", "")), (file, outside)
    card = (spm / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["tags"][:2] == ["a\x1b[2J", "<b>"]
