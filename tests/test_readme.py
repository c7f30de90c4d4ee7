"""README.md and the pages below docs/ promise nothing that is not there.

Links are followed, and settings, options, files and variables that the text names are looked up. Commands are run, by
tests/test_commands.py.
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from functools import cache
from pathlib import Path

import pages
import pytest
from pages import PAGES, README, ROOT, Command, blocks, prose

from pipelines import recipes
from pipelines.recipes import settings

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def spans(page: Path) -> list[str]:
    """What stands between backticks in running text."""
    return pages.spans(page.read_text("utf-8"))


def anchors(markdown: str) -> set[str]:
    """The names that headings have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(markdown), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(page: Path, target: str) -> bool:
    """Whether a local link of `page` leads to a file or folder of the repository, and to a heading that it has."""
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    if not there.exists() or not there.is_relative_to(ROOT):
        return False
    return not anchor or anchor in anchors(there.read_text("utf-8"))


# --- what else a page may name ----------------------------------------------------------------------------------------


@cache
def options_in(file: Path) -> frozenset[str]:
    """The long options that a program of one file adds to its parser."""
    return frozenset(re.findall(r"\"(--[\w-]+)\"", file.read_text("utf-8")))


@cache
def options() -> frozenset[str]:
    """Every long option of any command of the lab."""
    import typer

    import pipelines.__main__  # it adds every command to the app
    from pipelines.cli import options as cli_options

    known = typer.main.get_command(cli_options.app).commands.values()
    named = {option for command in known for parameter in command.params for option in parameter.opts}
    return frozenset(named | {"--help"}).union(*map(options_in, [ROOT / "app.py", *(ROOT / "benchmarks").glob("*.py")]))


def is_setting(name: str) -> bool:
    """Whether recipes have a setting of this dotted name; below a table of free names anything may stand."""
    group: type = settings.Recipe
    for part in name.split("."):
        if not (isinstance(group, type) and issubclass(group, settings.Settings)):
            return True
        if part not in group.model_fields:
            return False
        group = group.model_fields[part].annotation
    return True


def named_settings(page: Path) -> list[str]:
    """Dotted names in running text whose first part is a group of settings, with a value or without."""
    groups = [
        name
        for name, field in settings.Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, settings.Settings)
    ]
    found = [re.fullmatch(rf"((?:{'|'.join(groups)})(?:\.[a-z_]+)+)(=.*| = .*)?", span) for span in spans(page)]
    return [match[1] for match in found if match and not match[1].endswith(".py")]


# --- the tests --------------------------------------------------------------------------------------------------------


def test_there_are_pages_with_commands():
    assert len(PAGES) > 10
    found = [command.text for page in PAGES for command in pages.commands(page)]
    for begins in ("make ", "python -m pipelines ", "python app.py", "python benchmarks/", "papermill ", "pip "):
        assert [text for text in found if text.startswith(begins)], f"no command begins with {begins}"


def test_the_reader_of_blocks_sees_every_command():
    markdown = (
        "```bash\nmake run   # it runs\n\nA=1 python app.py \\\n  --port 1\n```\n```console\n$ make app\nopen\n```\n"
        "- in a list:\n\n  ```bash\n  # needs an account: at the Hub\n  curl -d '# 1' $url # so\n  ```\n"
    )
    assert pages.block_commands(markdown) == [
        Command("make run"),
        Command("A=1 python app.py    --port 1"),
        Command("make app"),
        Command("curl -d '# 1' $url", account=True),
    ]


def test_the_reader_of_running_text_sees_what_names_something():
    markdown = "`make log-base`, `make`, `python -m pipelines run`, `pipelines run`, `a make b`\n```bash\nmake x\n```\n"
    assert [command.text for command in pages.inline_commands(markdown)] == ["make log-base", "python -m pipelines run"]


@pytest.mark.parametrize(
    ("target", "leads"),
    [
        ("batch.md", True),
        ("batch.md#recipes", True),
        ("../README.md#map", True),
        ("../pipelines", True),
        ("batch.md#recepies", False),
        ("nothing.md", False),
        ("README.md", False),
        ("../../elsewhere", False),
    ],
)
def test_the_reader_of_links(target: str, leads: bool):
    assert leads_somewhere(ROOT / "docs" / "training.md", target) == leads


@every_page
def test_every_link_and_picture_exists(page: Path):
    markdown = page.read_text("utf-8")
    targets = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose(markdown))
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", prose(markdown))
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not leads_somewhere(page, target)] == []


def test_every_page_is_in_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", README.read_text("utf-8")))
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} <= linked


@every_page
def test_every_setting_that_is_named_exists(page: Path):
    assert [name for name in named_settings(page) if not is_setting(name)] == []


def test_the_reader_of_settings(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "`training.steps=3`, `source.splits.train`, `training.stepz`, `source.kind = x`, `features.py`, `a.b`"
    )
    assert named_settings(page) == ["training.steps", "source.splits.train", "training.stepz", "source.kind"]
    assert [name for name in named_settings(page) if not is_setting(name)] == ["training.stepz"]


@every_page
def test_every_option_that_is_named_exists(page: Path):
    named = {option for span in spans(page) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert named - options() == set()


@every_page
def test_every_file_of_the_lab_that_is_named_exists(page: Path):
    named = [
        span for span in spans(page) if re.fullmatch(r"(pipelines|notebooks|tests|benchmarks|docs)/[\w./-]*", span)
    ]
    assert [name for name in named if not (ROOT / name).exists()] == []


@every_page
def test_every_variable_of_the_lab_that_is_named_is_read(page: Path):
    code = "".join(path.read_text("utf-8") for path in (ROOT / "pipelines").rglob("*.py"))
    named = set(re.findall(r"\bLAB_[A-Z_]+\b", page.read_text("utf-8")))
    assert [name for name in named if f'"{name}"' not in code] == []


@every_page
def test_python_in_it_is_python_and_imports_what_exists(page: Path):
    for block in blocks(page.read_text("utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "pipelines":
                for alias in node.names:
                    module = importlib.import_module(node.module)
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def test_every_recipe_in_it_loads():
    found = [block for page in PAGES for block in blocks(page.read_text("utf-8"), "toml")]
    assert found
    for block in found:
        recipes.resolve(tomllib.loads(block), {})


@every_page
def test_nothing_is_left_to_be_filled_in(page: Path):
    assert re.findall(r"@@\w*|\bTODO\b|\bTBD\b|\bFIXME\b", page.read_text("utf-8")) == []
