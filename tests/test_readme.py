"""README.md and the pages below docs/ promise nothing that is not there.

Commands are parsed by what they would call, links are followed, and settings, options, files and variables that the
text names are looked up. What needs an account cannot be run by everybody: its block says `# needs an account`.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import textwrap
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pipelines import recipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OUTSIDE = {"git", "cd", ".", "source", "export", "curl", "docker"}
"""What a shell knows without the lab."""
ACCOUNT = re.compile(
    r"_API_KEY=|HF_TOKEN=|\bpublish-space\b|(?<!--teacher )(?<!=)\b(hub://me|hopsworks:)/"
    r"|\b(run|features|train) --recipe base\b(?!.*source\.path)"
)
"""Keys, repositories of one's own, and the recipe whose recordings come from Mozilla. Not `--teacher hub://me/…` and
`--store name=hub://me/…`: the one may be anybody's public model, the other is used when a client asks for it."""
MARK = re.compile(r"^# needs an account\b", flags=re.MULTILINE)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(markdown: str, *kinds: str) -> list[str]:
    """The fenced blocks of these kinds, also those inside a list."""
    fenced = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", markdown, flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for kind, block in fenced if kind in kinds]


def prose(markdown: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands between backticks in running text."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page.read_text("utf-8")))


def block_commands(markdown: str) -> list[str]:
    """Every command of every shell block; in a console block, the lines after a prompt."""
    scripts = blocks(markdown, "bash", "sh", "shell")
    for block in blocks(markdown, "console"):
        scripts.append("\n".join(line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")))
    words = [
        shlex.split(line, comments=True) for script in scripts for line in script.replace("\\\n", " ").splitlines()
    ]
    return [shlex.join(line) for line in words if line]


def inline_commands(page: Path) -> list[str]:
    """Commands between backticks in running text: those that begin as one and name something."""
    begins = r"(make|papermill|pip|python -m|python app\.py|python benchmarks/) ?\S"
    return [span for span in spans(page) if re.match(begins, span)]


def commands() -> list[str]:
    """Those of all pages, each once."""
    return list(
        dict.fromkeys(c for page in PAGES for c in (*block_commands(page.read_text("utf-8")), *inline_commands(page)))
    )


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


# --- what each kind of command has to name ----------------------------------------------------------------------------


def check(command: str) -> None:
    """Fail unless everything that `command` names exists."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)  # MODEL_URI=... before a command
    if not words:
        return  # a variable of the shell
    program, *arguments = words
    program = program.rsplit("/", 1)[-1]
    if program in OUTSIDE:
        return
    kinds: dict[str, Callable[[list[str]], None]] = {
        "make": _make, "python": _python, "python3": _python, "papermill": _papermill, "pip": _pip, "ray": _ray,
        "torchrun": _torchrun,
    }  # fmt: skip
    assert program in kinds, f"nobody knows whether {program} works"
    kinds[program](arguments)


def _make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^([\w.-]+)\s*:(?!=)", makefile, flags=re.MULTILINE)
    variables = re.findall(r"^(\w+)\s*[?:]?=", makefile, flags=re.MULTILINE)
    for word in arguments:
        name, equals, _ = word.partition("=")
        assert name in (variables if equals else targets), f"the Makefile has no {name}"


def _python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "pipelines"]:
        return _pipelines(arguments[2:])
    if arguments[:2] == ["-m", "pip"]:
        return _pip(arguments[2:])
    assert arguments[0] != "-m", f"unknown module {arguments[1]}"
    assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
    if arguments[0] == "app.py":
        import app

        app._options(arguments[1:])
    elif arguments[0].startswith("benchmarks/"):
        unknown = {word for word in arguments if word.startswith("--")} - options_in(ROOT / arguments[0])
        assert not unknown, f"{arguments[0]} has no {unknown}"
    return None


def _pipelines(arguments: list[str]) -> None:
    import typer

    from pipelines import __main__ as cli

    name, *rest = arguments
    known = typer.main.get_command(cli.app).commands
    assert name in known, f"there is no command {name}"
    if rest == ["--help"]:
        return
    given = known[name].make_context(name, rest).params
    _recipe(given.get("recipe"), dict(map(cli._assignment, given.get("set_") or ())))


def _recipe(name: str | None, overrides: dict) -> None:
    if name is None or (name.endswith(".toml") and not name.startswith(("tests/", "pipelines/"))):
        name = "tour"  # a file of the reader's own: the settings must exist all the same
    recipe.load(ROOT / name if name.endswith(".toml") else name, overrides)


def _papermill(arguments: list[str]) -> None:
    import nbformat
    import papermill.cli
    import yaml

    given = papermill.cli.papermill.make_context("papermill", list(arguments)).params
    notebook = nbformat.read(ROOT / given["notebook_path"], as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    takes = re.findall(r"^(\w+) = ", cell.source, flags=re.MULTILINE)
    values = dict(given["parameters"])
    for more in given["parameters_yaml"]:
        values |= yaml.safe_load(more)
    assert values.keys() <= set(takes), f"{given['notebook_path']} takes {takes}"
    _recipe(values.get("recipe"), values.get("overrides") or {})


def _pip(arguments: list[str]) -> None:
    required = (ROOT / "requirements.txt").read_text("utf-8")
    command, *words = arguments
    assert command == "install"
    while words:
        word = words.pop(0)
        if word in ("-r", "-c"):
            assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
            words.pop(0)
        elif not word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w.])", required), (
                f"requirements.txt does not name {word}"
            )


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import parse_args

    told = parse_args(arguments)
    assert told.module
    _python(["-m", told.training_script, *told.training_script_args])


def _ray(arguments: list[str]) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    name, *rest = arguments
    assert name in scripts.cli.commands, f"ray has no command {name}"
    scripts.cli.commands[name].make_context(name, rest)


# --- what else a page may name ----------------------------------------------------------------------------------------


@cache
def options_in(file: Path) -> frozenset[str]:
    """The long options that a program of one file adds to its parser."""
    return frozenset(re.findall(r"\"(--[\w-]+)\"", file.read_text("utf-8")))


@cache
def options() -> frozenset[str]:
    """Every long option of any command of the lab."""
    import typer

    from pipelines import __main__ as cli

    known = typer.main.get_command(cli.app).commands.values()
    named = {option for command in known for parameter in command.params for option in parameter.opts}
    return frozenset(named | {"--help"}).union(*map(options_in, [ROOT / "app.py", *(ROOT / "benchmarks").glob("*.py")]))


def is_setting(name: str) -> bool:
    """Whether recipes have a setting of this dotted name; below a table of free names anything may stand."""
    group: type = recipe.Recipe
    for part in name.split("."):
        if not (isinstance(group, type) and issubclass(group, recipe.Settings)):
            return True
        if part not in group.model_fields:
            return False
        group = group.model_fields[part].annotation
    return True


def named_settings(page: Path) -> list[str]:
    """Dotted names in running text whose first part is a group of settings, with a value or without."""
    groups = [
        name
        for name, field in recipe.Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, recipe.Settings)
    ]
    found = [re.fullmatch(rf"((?:{'|'.join(groups)})(?:\.[a-z_]+)+)(=.*| = .*)?", span) for span in spans(page)]
    return [match[1] for match in found if match and not match[1].endswith(".py")]


# --- the tests --------------------------------------------------------------------------------------------------------


def test_there_are_pages_with_commands():
    assert len(PAGES) > 10
    found = commands()
    for begins in ("make ", "python -m pipelines ", "python app.py", "python benchmarks/", "papermill ", "pip "):
        assert [command for command in found if command.startswith(begins)], f"no command begins with {begins}"


@pytest.mark.parametrize("command", commands())
def test_a_command_names_what_exists(command: str):
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make rnu",
        "make run RECPIE=tour",
        "python -m pipelines trian",
        "python -m pipelines train --recipee tour",
        "python -m pipelines train --recipe tuor",
        "python -m pipelines train --set training.stepz=3",
        "python -m pipelines transcribe",
        "python app.py --prot 7860",
        "python nothing.py",
        "python benchmarks/inference.py --ronds 2",
        "papermill notebooks/04_nothing.ipynb out.ipynb",
        "papermill notebooks/01_feature_pipeline.ipynb out.ipynb -p recpie tour",
        "papermill notebooks/01_feature_pipeline.ipynb out.ipynb -y 'overrides: {source.trian: 2}'",
        "papermill notebooks/01_feature_pipeline.ipynb out.ipynb --parametres x",
        "pip install -r requirement.txt",
        "pip install 'onnx>=99'",
        "ray start --haed",
        "torchrun --nproc-per-node gpu -m pipelines trian",
        "frobnicate",
    ],
)
def test_a_command_that_names_what_does_not_exist_is_found(command: str):
    with pytest.raises((Exception, SystemExit)):
        check(command)


def test_the_reader_of_blocks_sees_every_command():
    markdown = (
        "```bash\nmake run   # it runs\n\nA=1 python app.py \\\n  --port 1\n```\n```console\n$ make app\nopen\n```\n"
        "- in a list:\n\n  ```bash\n  make test\n  ```\n"
    )
    assert block_commands(markdown) == ["make run", "A=1 python app.py --port 1", "make test", "make app"]


@every_page
def test_what_needs_an_account_says_so_in_its_block(page: Path):
    for block in blocks(page.read_text("utf-8"), "bash", "sh", "shell", "console"):
        wants = [command for command in block_commands(f"```bash\n{block}```\n") if ACCOUNT.search(command)]
        assert not wants or MARK.search(block), f"a line '# needs an account: where' is missing above {wants}"


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("MDC_API_KEY=... python -m pipelines features --recipe base", True),
        ("python -m pipelines features --recipe base --cluster auto", True),
        ("python -m pipelines features --recipe base --set source.path=cv.tar.gz", False),
        ("python -m pipelines features --recipe tour --publish hub://me/cache", True),
        ("python -m pipelines fetch hopsworks://project/path", True),
        ("python -m pipelines publish-space me/swedish", True),
        ("python -m pipelines publish runs/model backup", False),
    ],
)
def test_the_reader_of_accounts(command: str, needs: bool):
    assert bool(ACCOUNT.search(command)) == needs


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
        recipe.resolve(tomllib.loads(block), {})


@every_page
def test_nothing_is_left_to_be_filled_in(page: Path):
    assert re.findall(r"@@\w*|\bTODO\b|\bTBD\b|\bFIXME\b", page.read_text("utf-8")) == []
