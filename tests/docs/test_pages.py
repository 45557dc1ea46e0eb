"""The pages of the documentation: their links lead somewhere, and their commands are commands."""

import argparse
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from data_pipelines.errors import UserError
from tests.conftest import REPO
from worldmodel.commands.compare import split_lists
from worldmodel.commands.main import COMMANDS
from worldmodel.config import load_config

DOCS = REPO / "docs"
PAGES = [*sorted(REPO.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LAUNCHER = re.compile(r"^accelerate launch .*?(?:-m worldmodel|scripts/(train)\.py) ")


def page_name(page: Path) -> str:
    return str(page.relative_to(REPO))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        target = match[1] or match[2]
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page_name(page)}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page_name(page)}: {target}"


@pytest.mark.parametrize("page", [*PAGES, *sorted((REPO / "configs").rglob("*.yaml"))], ids=page_name)
def test_no_page_holds_the_marks_of_an_unsolved_merge(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith(("<<<<<<<", ">>>>>>>")) or line == "======="]


def test_every_page_is_in_the_navigation() -> None:
    def pages_of(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict | list):
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from pages_of(part)

    listed = list(pages_of(yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_readme_is_short() -> None:
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_have_arguments_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in commands_in(re.findall(r"^ {4}(.+)$", text, re.MULTILINE)):
        name, *arguments = shlex.split(line, comments=True)[1:]
        parser = parser_of(name, page)
        try:
            args = parser.parse_intermixed_args(arguments)
            if name == "compare":
                split_lists(args)
        except (argparse.ArgumentError, SystemExit, UserError) as error:
            pytest.fail(f"{page_name(page)}: {line}: {error}")
        if name in ("train", "compare") and args.config:
            check_config(args.config, args.overrides)
    for line in commands_in(re.findall(r"`([^`\n]+)`", FENCE.sub("", text))):  # these need not be complete
        name, *arguments = line.split()[1:]
        if not name.startswith("-") and name.isalpha() and name.islower():
            options = parser_of(name, page).format_help()
            assert all(word in options for word in arguments if word.startswith("--")), f"{page_name(page)}: {line}"


def parser_of(name: str, page: Path) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    assert name in COMMANDS, f"{page_name(page)}: worldmodel {name}"
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(f"worldmodel.commands.{name.replace('-', '_')}").add_arguments(parser)
    return parser


def check_config(name: str, overrides: list[str]) -> None:
    """Read a config as a command does. Raises UserError for a key or value that does not exist."""
    load_config(name, [override for override in overrides if ":" not in override])


def commands_in(lines: list[str]) -> Iterator[str]:
    """Yield the lines that call `worldmodel`, without launchers."""
    for line in lines:
        command = LAUNCHER.sub(lambda match: f"worldmodel {match[1] or ''} ", line.strip())
        if command.startswith("worldmodel ") and "..." not in command:
            yield command


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as mkdocs and GitHub name those in use."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}
