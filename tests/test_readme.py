"""Check README.md, CONTRIBUTING.md and the pages below docs/: links, paths, settings, options and figures exist.

tests/cli/test_commands.py runs their commands.
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
from pipelines.recipes import base_settings, settings

BENCHMARKS = ROOT / "docs" / "benchmarks.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_spans(page: Path) -> list[str]:
    return pages.spans(page.read_text("utf-8"))


def anchors(markdown: str) -> set[str]:
    """Return the names of headings in links, as GitHub creates them."""
    headings = re.findall(r"^#+ (.+)$", prose(markdown), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_exists(page: Path, target: str) -> bool:
    """Return whether a local link of `page` names a file or folder of the repository, and a heading in it."""
    path, _, anchor = target.partition("#")
    linked = (page.parent / path).resolve() if path else page
    if not linked.exists() or not linked.is_relative_to(ROOT):
        return False
    return not anchor or anchor in anchors(linked.read_text("utf-8"))


def local_links(markdown: str) -> list[str]:
    """Return the targets of links and pictures that are no URLs."""
    targets = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose(markdown))
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", prose(markdown))
    return [target for target in targets if "://" not in target and not target.startswith("mailto:")]


def repository_paths(markdown: str) -> list[str]:
    """Return every path below pipelines/, tests/ and the other folders that a text names, code blocks included."""
    paths = re.findall(r"(?<![\w/.:-])(?:pipelines|notebooks|tests|benchmarks|docs)/[\w./-]*", markdown)
    return [path.rstrip(".") for path in paths]


def section(markdown: str, heading: str) -> str:
    """Return the text below a heading of the second level."""
    return re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", markdown, re.MULTILINE | re.DOTALL)[1]


# --- settings and options ---------------------------------------------------------------------------------------------


@cache
def options_in(file: Path) -> frozenset[str]:
    """Return the long options that a one-file program adds to its parser."""
    return frozenset(re.findall(r"\"(--[\w-]+)\"", file.read_text("utf-8")))


@cache
def options() -> frozenset[str]:
    """Return every long option of every command of the lab."""
    import typer

    app = importlib.import_module("pipelines.__main__").app
    groups = typer.main.get_command(app).commands.values()
    commands = [command for group in groups for command in getattr(group, "commands", {"": group}).values()]
    names = {option for command in commands for parameter in command.params for option in parameter.opts}
    programs = [ROOT / "pipelines/inference/app/launch.py", *(ROOT / "benchmarks").glob("*.py")]
    return frozenset(names | {"--help"}).union(*map(options_in, programs))


def is_setting(name: str) -> bool:
    """Return whether recipes have a setting of this dotted name. Below a table with free names any name is one."""
    group: type = settings.Recipe
    for part in name.split("."):
        if not (isinstance(group, type) and issubclass(group, base_settings.Settings)):
            return True
        if part not in group.model_fields:
            return False
        group = group.model_fields[part].annotation
    return True


def setting_names(page: Path) -> list[str]:
    """Return the dotted names in code spans that start with a group of settings, with or without a value."""
    groups = [
        name
        for name, field in settings.Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, base_settings.Settings)
    ]
    pattern = rf"((?:{'|'.join(groups)})(?:\.[a-z_]+)+)(=.*| = .*)?"
    matches = [re.fullmatch(pattern, span) for span in code_spans(page)]
    return [match[1] for match in matches if match and not match[1].endswith(".py")]


# --- the readers ------------------------------------------------------------------------------------------------------


def test_pages_contain_commands_of_every_kind():
    assert len(PAGES) > 10
    texts = [command.text for page in PAGES for command in pages.commands(page)]
    for start in ("make ", "python -m pipelines ", "python app.py", "python benchmarks/", "papermill ", "pip "):
        assert [text for text in texts if text.startswith(start)], f"no command starts with {start}"


def test_block_commands_returns_every_command():
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


def test_inline_commands_need_an_argument():
    markdown = "`make log-base`, `make`, `python -m pipelines run`, `pipelines run`, `a make b`\n```bash\nmake x\n```\n"
    assert [command.text for command in pages.inline_commands(markdown)] == ["make log-base", "python -m pipelines run"]


@pytest.mark.parametrize(
    ("target", "exists"),
    [
        ("batch.md", True),
        ("batch.md#recipes", True),
        ("../README.md#results", True),
        ("../pipelines", True),
        ("batch.md#recepies", False),
        ("nothing.md", False),
        ("README.md", False),
        ("../../elsewhere", False),
    ],
)
def test_link_exists_checks_file_and_heading(target: str, exists: bool):
    assert link_exists(ROOT / "docs" / "training.md", target) == exists


def test_repository_paths_ignores_urls_and_other_folders():
    markdown = "`pipelines/infra/errors.py`, [x](../tests/a.py), see docs/training.md.\n```\nruns/pipelines/x\n```\n"
    assert repository_paths(markdown) == ["pipelines/infra/errors.py", "docs/training.md"]


def test_setting_names_keeps_unknown_settings(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "`training.steps=3`, `source.splits.train`, `training.stepz`, `source.kind = x`, `features.py`, `a.b`"
    )
    assert setting_names(page) == ["training.steps", "source.splits.train", "training.stepz", "source.kind"]
    assert [name for name in setting_names(page) if not is_setting(name)] == ["training.stepz"]


# --- every page -------------------------------------------------------------------------------------------------------


@every_page
def test_links_and_pictures_exist(page: Path):
    assert [target for target in local_links(page.read_text("utf-8")) if not link_exists(page, target)] == []


@every_page
def test_named_paths_exist(page: Path):
    missing = [path for path in repository_paths(page.read_text("utf-8")) if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "pipelines" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_paths_in_recipe_comments_exist(recipe: Path):
    missing = [path for path in repository_paths(recipe.read_text("utf-8")) if not (ROOT / path).exists()]
    assert missing == []


@every_page
def test_named_settings_exist(page: Path):
    assert [name for name in setting_names(page) if not is_setting(name)] == []


@every_page
def test_named_options_exist(page: Path):
    names = {option for span in code_spans(page) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    elsewhere = {"--keep-id"}  # nbstripout's
    assert names - options() - elsewhere == set()


@every_page
def test_named_variables_are_read_by_the_code(page: Path):
    code = "".join(path.read_text("utf-8") for path in (ROOT / "pipelines").rglob("*.py"))
    names = set(re.findall(r"\bLAB_[A-Z_]+\b", page.read_text("utf-8")))
    assert [name for name in names if f'"{name}"' not in code] == []


@every_page
def test_python_blocks_import_existing_names(page: Path):
    for block in blocks(page.read_text("utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "pipelines":
                for alias in node.names:
                    module = importlib.import_module(node.module)
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@every_page
def test_no_placeholder_is_left(page: Path):
    assert re.findall(r"@@\w*|\bTODO\b|\bTBD\b|\bFIXME\b", page.read_text("utf-8")) == []


def test_toml_blocks_are_valid_recipes():
    found = [block for page in PAGES for block in blocks(page.read_text("utf-8"), "toml")]
    assert found
    for block in found:
        recipes.resolve(tomllib.loads(block), {})


# --- the README and the map of the code -------------------------------------------------------------------------------


def test_readme_is_at_most_150_lines():
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_readme_links_to_every_page():
    linked = {target.partition("#")[0] for target in local_links(README.read_text("utf-8"))}
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} <= linked


def test_readme_tree_lists_every_folder_of_pipelines():
    (tree,) = blocks(README.read_text("utf-8"), "text")
    lines = re.findall(r"^  (\w+)/ +(.*)$", tree, flags=re.MULTILINE)
    folders = [path for path in (ROOT / "pipelines").iterdir() if (path / "__init__.py").exists()]
    assert sorted(name for name, _ in lines) == sorted(folder.name for folder in folders)
    for name, text in lines:
        for part in re.findall(r"\b(\w+/|\w+\.py)(?!\w)", text):
            assert (ROOT / "pipelines" / name / part).exists(), f"{name}/{part}"


def test_architecture_lists_folders_in_the_same_order():
    (tree,) = blocks(README.read_text("utf-8"), "text")
    table = section(ARCHITECTURE.read_text("utf-8"), "The import rule")
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == re.findall(r"^  (\w+)/", tree, re.MULTILINE)


def test_readme_speed_figures_are_in_the_benchmarks():
    rows = re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", section(README.read_text("utf-8"), "Results"), re.MULTILINE)
    speeds = [(ours, other) for what, ours, other in rows[2:] if "WER" not in what]
    assert len(speeds) >= 4
    figures = set(re.findall(r"\d[\d.,]*\d|\d", BENCHMARKS.read_text("utf-8")))
    for cell in (cell for row in speeds for cell in row):
        assert set(re.findall(r"\d[\d.]*\d|\d", re.sub(r"at 30 s", "", cell))) <= figures, cell


def test_readme_scores_are_those_of_the_recipe():
    row = re.search(r"^\| word error rate .*$", README.read_text("utf-8"), re.MULTILINE)[0]
    recipe = (ROOT / "pipelines" / "recipes" / "tour.toml").read_text("utf-8")
    wer, interval, before = re.search(r"(0\.\d+) \((95 % [\d.]+ to [\d.]+)\) \| (\d\.\d+)", row).groups()
    assert f"WER {wer} ({interval}), from {before} before" in recipe
