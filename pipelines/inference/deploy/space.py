"""The page as a Space of the Hugging Face Hub: app.py, the modules that it imports, and nothing else of the lab.

    app.py, pipelines/…   as they are here; which modules, their own imports tell, and the page's examples
    space.json            the model at its commit: what app.py serves where nobody names another
    requirements.txt      what those modules import of other people's, with the floors of the lab's own
    README.md             front matter: SDK, versions, model, what the build fetches beforehand
    LICENSE

The Space is private; it is brought up to date in one commit, and read back.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference import pipeline as inference_pipeline
from pipelines.infra import environment, manifest, stores
from pipelines.infra.errors import LabError
from pipelines.infra.stores import hub
from pipelines.whisper import model as whisper_model

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


HARDWARE = {"cpu": "cpu-basic", "zerogpu": "zero-a10g"}
"""What is asked for, and the Hub's name of it."""
PYTHON = "3.12"
APP = Path("pipelines", "inference", "app")
DATA_FOLDERS = (APP / "examples", APP / "static")
"""Files that the app reads: example recordings, style and scripts."""
_NEVER_CALLED = {"hopsworks", "pyarrow", "tqdm", "ray"}
"""Imported by functions that a page with a model of the Hub never calls."""
_ZEROGPU_TORCH = "torch>=2.8,<2.12"
"""What ZeroGPU runs."""
_REQUIREMENT = re.compile(r"(?:^|')([A-Za-z][\w.-]*)(\[[\w,]+\])?([<>=!~][^'\s]*)?", re.MULTILINE)
_FOUND_NOT_IMPORTED = {"silero_vad"}
"""Packages whose files are read."""


@dataclass(frozen=True)
class Model:
    """A model on the Hub at one commit."""

    name: str
    """owner/name"""
    commit: str
    private: bool
    files: tuple[str, ...]
    """What `models.resolve` fetches of it."""

    @property
    def uri(self) -> str:
        return f"hub://{self.name}@{self.commit}"


def find_model(uri: str) -> Model:
    """The model `hub://owner/name[@revision]` (or a Hub id), its revision resolved to a commit."""
    if stores.is_folder(uri) or "://" in uri.removeprefix("hub://"):
        raise LabError(
            f"a Space takes its model from the Hub, got {uri}: publish it first (python -m pipelines publish), "
            "then name hub://owner/name[@revision]"
        )
    uri = uri if uri.startswith("hub://") else f"hub://{uri}"
    owner, name, path, revision = hub.parts(uri)
    if not name or path:
        raise LabError(f"a Space takes a model that has a repository of its own, hub://owner/name, got {uri}")
    with hub.one_line(uri):
        told = hub.client().model_info(f"{owner}/{name}", revision=revision or None)
    names = [file.rfilename for file in told.siblings or ()]
    wanted = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in whisper_model.HUB_FILES)]
    if "config.json" not in names or not fnmatch.filter(wanted, "*.safetensors"):
        raise LabError(f"{uri} is no model that app.py can load: expected config.json and model.safetensors in it")
    return Model(f"{owner}/{name}", told.sha, bool(told.private), tuple(sorted(wanted)))


def write(folder: Path, name: str, model: Model, hardware: str = "cpu") -> list[str]:
    """Write the files of the Space `owner/name` to `folder`, which is absent or empty. Returns their names, sorted."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise LabError(f"a Space is called owner/name, got {name!r}")
    if hardware not in HARDWARE:
        raise LabError(f"--hardware takes {' or '.join(HARDWARE)}, got {hardware!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} is not empty: name an empty folder")
    sources = modules()
    for path in (*sources, *data_files(), Path("LICENSE")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(environment.ROOT / path, folder / path)
    manifest.write_json(folder / inference_pipeline.SPACE_FILE, {"model": model.uri})
    texts = {"requirements.txt": requirements(sources, hardware), "README.md": _readme(name, model, hardware)}
    for path, content in texts.items():
        (folder / path).write_text(content, encoding="utf-8")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def publish(name: str, model: Model, hardware: str = "cpu") -> dict[str, str]:
    """Make the Space `owner/name`, private, or bring it up to date. Returns its name, commit and address."""
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "space"
        files = write(folder, name, model, hardware)
        with hub.one_line(f"the Space {name}"):
            api, flavour = hub.client(), HARDWARE[hardware]
            api.create_repo(
                name, repo_type="space", space_sdk="gradio", space_hardware=flavour, private=True, exist_ok=True
            )
            if hardware == "zerogpu" and api.get_space_runtime(name).requested_hardware != flavour:
                api.request_space_hardware(name, flavour)  # the Space was there; whatever else it runs on stays
            commit = _commit(api, name, folder, files)
    return {"space": name, "commit": commit, "url": f"{environment.hub_endpoint()}/spaces/{name}"}


def data_files() -> list[Path]:
    """Return the files of the app that are not modules, relative to the root."""
    paths = [path for folder in DATA_FOLDERS for path in (environment.ROOT / folder).iterdir()]
    return sorted(path.relative_to(environment.ROOT) for path in paths)


def modules() -> list[Path]:
    """app.py and every module of the package that it needs, seen from the root; packages with their __init__.py.

    Imports inside functions count, those for type checkers do not.
    """
    found, todo = {Path("app.py")}, [Path("app.py")]
    while todo:
        for name in _imports(todo.pop()):
            for path in _files_of(name):
                if path not in found:
                    found.add(path)
                    todo.append(path)
    return sorted(found)


def requirements(sources: list[Path], hardware: str) -> str:
    """requirements.txt of a Space that holds `sources`."""
    listed = (environment.ROOT / "requirements.txt").read_text("utf-8")
    floors = {_module(found[1]): "".join(found.groups("")) for found in _REQUIREMENT.finditer(listed)}
    needed = {name.partition(".")[0] for path in sources for name in _imports(path)} - _NEVER_CALLED
    needed |= _FOUND_NOT_IMPORTED
    if hardware == "zerogpu":  # a GPU is there: transformers decodes on it
        floors |= {"torch": _ZEROGPU_TORCH, "spaces": "spaces"}
        needed -= {"ctranslate2", "onnx"}
    return "".join(f"{line}\n" for name, line in sorted(floors.items()) if name in needed)


def _module(distribution: str) -> str:
    """The name under which a distribution is imported, where both agree but for their dashes."""
    return distribution.lower().replace("-", "_")


def _imports(path: Path) -> set[str]:
    """Dotted names of all that a source file imports at run time, the names in `from x import name` among them."""
    found = set()
    for node in _at_run_time(ast.parse((environment.ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for child in node.orelse if typing_only else ast.iter_child_nodes(node):
        yield from _at_run_time(child)


def _files_of(name: str) -> Iterator[Path]:
    """The files of this package that are run when `name` is imported; none for other people's."""
    parts = name.split(".")
    if parts[0] != "pipelines":
        return
    for n in range(1, len(parts) + 1):
        stem = Path(*parts[:n])
        yield from (path for path in (stem / "__init__.py", stem.with_suffix(".py")) if _is_here(path))


def _is_here(path: Path) -> bool:
    return (environment.ROOT / path).is_file()


def _commit(api: HfApi, name: str, folder: Path, files: list[str]) -> str:
    """Send what differs and remove modules that are needed no more, in one commit; read it back. Returns the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    place = hub.HubPlace(api, name, "space", "main")
    changed = _unlike(place, folder, files)
    stale = [path for path in place.sizes() if path.startswith("pipelines/") and path not in files]
    if not changed and not stale:
        logger.info(f"the Space {name} is there already, whole and the same")
        return api.repo_info(name, repo_type="space").sha
    logger.info(f"sending {len(changed)} of {len(files)} files to the Space {name}")
    operations: list[Any] = [CommitOperationAdd(path, folder / path) for path in changed]
    operations += [CommitOperationDelete(path) for path in stale]
    commit = api.create_commit(name, operations, commit_message="Publish the page", repo_type="space").oid
    if wrong := _unlike(hub.HubPlace(api, name, "space", commit), folder, files):
        raise LabError(f"the Space {name} does not read back as it was published ({wrong[0]} differs). Run this again")
    return commit


def _unlike(place: hub.HubPlace, folder: Path, files: list[str]) -> list[str]:
    """The files that the Space lacks, or has with another content."""
    sizes = place.sizes()
    entries = {name: {"sha256": manifest.sha256(folder / name)} for name in files}
    return [
        name
        for name in files
        if sizes.get(name) != (folder / name).stat().st_size or not place.holds(name, folder / name, entries[name])
    ]


def _readme(name: str, model: Model, hardware: str) -> str:
    title = name.rpartition("/")[2]
    front = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "python_version": PYTHON,
        "app_file": "app.py",
        "short_description": "Spoken Swedish to text",
        "license": "apache-2.0",  # of the code
        "models": [model.name],
    }
    if not model.private:  # the build has no token; a private model is fetched when the page starts
        front["preload_from_hub"] = [f"{model.name} {','.join(model.files)} {model.commit}"]
    # JSON is YAML, and nothing in a name can break out of it
    lines = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items())
    token = "\nThe model is private: the Space needs a secret `HF_TOKEN` that may read it.\n" if model.private else ""
    where = "on ZeroGPU" if hardware == "zerogpu" else "on a CPU"
    return f"""---
{lines}
---

# {title}

Speak Swedish, or choose a file, and read what was heard. The model is `{model.name}` at commit `{model.commit}`;
it runs {where}. `space.json` names it; a variable `MODEL_URI` of the Space goes before that.

What listeners say goes to `log.csv` beside `app.py`, which the next restart removes, as the page tells them. Where the
Space has storage that stays, a variable `LAB_LOG` names a file there, `/data/log.csv` for example.
{token}
The code is licensed under the Apache License 2.0; the model has a licence of its own, see its card.
"""
