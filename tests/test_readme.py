"""README.md promises nothing that is not there: commands are parsed by what they would call, links are followed."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import recipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OUTSIDE = {"git", "cd", ".", "source", "export", "curl", "docker"}
"""What a shell knows without the lab."""


def text() -> str:
    return README.read_text("utf-8")


def prose() -> str:
    """README without its code blocks."""
    return re.sub(r"^```.*?^```", "", text(), flags=re.MULTILINE | re.DOTALL)


def block_commands(markdown: str) -> list[str]:
    """Every command of every shell block; in a console block, the lines after a prompt."""
    found = []
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL):
        if kind not in ("bash", "sh", "shell", "console"):
            continue
        lines = block.replace("\\\n", " ").splitlines()
        if kind == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        words = [shlex.split(line, comments=True) for line in lines]
        found += [shlex.join(line) for line in words if line]
    return found


def inline_commands() -> list[str]:
    """Commands between backticks in running text: those that begin as one and name something."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose())
    return [span for span in spans if re.match(r"(make|papermill|pip|python -m|python app\.py) ?\S", span)]


def commands() -> list[str]:
    return list(dict.fromkeys([*block_commands(text()), *inline_commands()])) if README.is_file() else []


# --- what each kind of command has to name ----------------------------------------------------------------------------


def check(command: str) -> None:
    """Fail unless everything that `command` names exists."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)  # MODEL_URI=... before a command
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


def _recipe(recipe: str | None, overrides: dict) -> None:
    from pipelines import recipe as recipes

    if recipe is None or (recipe.endswith(".toml") and not recipe.startswith(("tests/", "pipelines/"))):
        recipe = "tour"  # a file of the reader's own: the settings must exist all the same
    recipes.load(ROOT / recipe if recipe.endswith(".toml") else recipe, overrides)


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


# --- the tests --------------------------------------------------------------------------------------------------------


def test_there_is_a_readme_with_commands():
    assert README.is_file()
    found = commands()
    for begins in ("make ", "python -m pipelines ", "python app.py", "papermill ", "pip "):
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
    )
    assert block_commands(markdown) == ["make run", "A=1 python app.py --port 1", "make app"]


def test_every_link_and_picture_exists():
    targets = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose())
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", prose())
    headings = re.findall(r"^#+ (.+)$", prose(), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert local
    for target in local:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), f"there is no {path}"
        assert path or anchor in anchors, f"there is no heading #{anchor}"


def test_every_recipe_in_it_loads():
    blocks = re.findall(r"^```toml\n(.*?)^```", text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        recipe.resolve(tomllib.loads(block), {})


def test_nothing_is_left_to_be_filled_in():
    assert re.findall(r"@@\w*|\bTODO\b|\bTBD\b|\bFIXME\b", text()) == []
