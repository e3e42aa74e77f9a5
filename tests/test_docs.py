"""What the documents say can be typed and imported: every command parses, every name of the API reference exists."""

from __future__ import annotations

import pydoc
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest

from labelpenet import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")],
    key=lambda path: path.name,
)
RUN_ELSEWHERE = {"reproduce.md"}  # with its variables and loops, by test_reproduce.py


def fences(text: str) -> list[str]:
    """The lines of the code fences of a shell, in order, continued ones joined."""
    found = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", text, flags=re.M | re.S)
    return [line for fence in found for line in fence.replace("\\\n", " ").splitlines() if line.strip()]


def commands(text: str) -> list[list[str]]:
    """The arguments of every ``labelpenet`` in code fences, in order; comments and a last ``...`` are left out."""
    found = []
    for line in fences(text):
        if re.search(r"(^|[\s/])labelpenet\s", line):
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if "labelpenet" in words:
                found.append(words[words.index("labelpenet") + 1 : -1 if words[-1] == "..." else None])
    return found


def test_every_command_of_the_documents_is_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    monkeypatch.setattr(cli, "RUN", dict.fromkeys(cli.RUN, ran.append))
    for page in (page for page in PAGES if page.name not in RUN_ELSEWHERE):
        text = page.read_text(encoding="utf-8")
        for arguments in commands(text):
            first = len(ran)
            try:
                cli.main(arguments)
            except SystemExit:
                pytest.fail(f"{page.name}: labelpenet {shlex.join(arguments)}\n{capsys.readouterr().err}")
            assert [type(one) for one in ran[first:]] == [cli.COMMANDS[arguments[0]][0]]
        assert len(commands(text)) >= len(re.findall("^labelpenet ", text, flags=re.M)), page.name
    assert {type(command) for command in ran} > {cli.Train, cli.Predict, cli.Export, cli.Measure, cli.Distill}


def test_the_examples_of_the_help_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(cli, "RUN", defaultdict(lambda: lambda command: ran.append(type(command))))
    for kind in list(vars(cli).values()):
        examples = (getattr(kind, "__doc__", None) or "").partition("Try:\n")[2]
        first = len(ran)
        for arguments in commands(f"```\n{examples}\n```"):
            cli.main(arguments)
        assert not examples or ran[first] is kind
    assert len(ran) > 15


def test_commands_are_found_in_fences_alone_and_unknown_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "labelpenet no\n```\nA=1 labelpenet report runs/a \\\n  --images 2  # why\npip install labelpenet\n```\n"
    assert commands(text) == [["report", "runs/a", "--images", "2"]]
    monkeypatch.setattr(cli, "RUN", defaultdict(lambda: lambda command: None))
    with pytest.raises(SystemExit):
        cli.main(["report", "runs/a", "--no-such-option", "2"])


def test_every_name_of_the_api_reference_exists_and_has_a_docstring() -> None:
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(names) > 10
    for name in names:
        thing = pydoc.locate(name)
        assert thing is not None and thing.__doc__, name


def test_links_between_the_documents_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
