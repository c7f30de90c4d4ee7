"""Publish the app as a Space of the Hugging Face Hub: app.py, the modules that it imports, and nothing else.

    app.py, pipelines/…   unchanged: the modules that app.py imports, directly or not, and the app's data files
    space.json            the model at a commit, which app.py serves by default
    requirements.txt      the packages that those modules import, with the lab's minimum versions
    README.md             metadata: SDK, versions, model, files that the build downloads
    LICENSE

The Space is private. It is updated in one commit, whose digests on the Hub are verified.
"""

from __future__ import annotations

import ast
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
from pipelines.infra.stores import hub, hub_client
from pipelines.whisper import hub_models

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HARDWARE = {"cpu": "cpu-basic", "zerogpu": "zero-a10g"}
"""Value of --hardware to the Hub's name."""
PYTHON = "3.12"
APP = Path("pipelines", "inference", "app")
DATA_FOLDERS = (APP / "examples", APP / "static")
"""Files that the app reads: example recordings, style and scripts."""
_NEVER_CALLED = {"hopsworks", "pandas", "pyarrow", "tqdm", "ray"}
"""Packages imported only by functions that the app does not call with a model of the Hub."""
_ZEROGPU_TORCH = "torch>=2.8,<2.12"
"""Versions that ZeroGPU supports."""
_REQUIREMENT = re.compile(r"(?:^|')([A-Za-z][\w.-]*)(\[[\w,]+\])?([<>=!~][^'\s]*)?", re.MULTILINE)
_DATA_PACKAGES = {"silero_vad"}
"""Packages whose files are read without importing them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model on the Hub at one commit."""

    name: str
    """owner/name"""
    commit: str
    private: bool
    files: tuple[str, ...]
    """Files that whisper.model.resolve downloads."""

    @property
    def uri(self) -> str:
        """URI with the commit."""
        return f"hub://{self.name}@{self.commit}"


def find_model(uri: str) -> Model:
    """Return the model `hub://owner/name[@revision]` (or a Hub id) with its revision resolved to a commit.

    Raises LabError if it is not on the Hub or cannot be loaded by app.py.
    """
    if stores.is_local_path(uri) or "://" in uri.removeprefix("hub://"):
        raise LabError(
            f"a Space takes its model from the Hub, got {uri}: publish it first (python -m pipelines publish), "
            "then name hub://owner/name[@revision]"
        )
    uri = uri if uri.startswith("hub://") else f"hub://{uri}"
    owner, name, path, revision = hub_client.parse_uri(uri)
    if not name or path:
        raise LabError(f"a Space takes a model with its own repository, hub://owner/name, got {uri}")
    with hub_client.explained_errors(uri):
        info = hub_client.client().model_info(f"{owner}/{name}", revision=revision or None)
    names = [file.rfilename for file in info.siblings or ()]
    files = hub_models.required_files(names, uri)
    return Model(f"{owner}/{name}", info.sha, bool(info.private), tuple(files))


def write(folder: Path, name: str, model: Model, hardware: str = "cpu") -> list[str]:
    """Write the files of the Space `owner/name` to `folder`, which is absent or empty; return their names, sorted."""
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
    """Create or update the private Space `owner/name`; return its name, commit and URL."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "space"
        files = write(folder, name, model, hardware)
        with hub_client.explained_errors(f"the Space {name}"):
            api, flavour = hub_client.client(), HARDWARE[hardware]
            api.create_repo(
                name, repo_type="space", space_sdk="gradio", space_hardware=flavour, private=True, exist_ok=True
            )
            if hardware == "zerogpu" and api.get_space_runtime(name).requested_hardware != flavour:
                api.request_space_hardware(name, flavour)  # an existing Space; other hardware is not changed
            commit = _commit(api, name, folder, files)
    return {"space": name, "commit": commit, "url": f"{environment.hub_endpoint()}/spaces/{name}"}


def data_files() -> list[Path]:
    """Return the files of the app that are not modules, relative to the root."""
    paths = [path for folder in DATA_FOLDERS for path in (environment.ROOT / folder).iterdir()]
    return sorted(path.relative_to(environment.ROOT) for path in paths)


def modules() -> list[Path]:
    """Return app.py and every module that it imports, directly or not, relative to the root.

    Imports inside functions count; imports for type checkers do not.
    """
    modules, unread = {Path("app.py")}, [Path("app.py")]
    while unread:
        for name in _imports(unread.pop()):
            new = set(_module_files(name)) - modules
            modules |= new
            unread += new
    return sorted(modules)


def requirements(sources: list[Path], hardware: str) -> str:
    """Return the requirements.txt of a Space with these `sources`."""
    text = (environment.ROOT / "requirements.txt").read_text("utf-8")
    lines = {_import_name(match[1]): "".join(match.groups("")) for match in _REQUIREMENT.finditer(text)}
    needed = {name.partition(".")[0] for path in sources for name in _imports(path)} - _NEVER_CALLED
    needed |= _DATA_PACKAGES
    if hardware == "zerogpu":  # transformers decodes on the GPU
        lines |= {"torch": _ZEROGPU_TORCH, "spaces": "spaces"}
        needed -= {"ctranslate2", "onnx"}
    return "".join(f"{line}\n" for name, line in sorted(lines.items()) if name in needed)


def _import_name(distribution: str) -> str:
    """Return the import name of a distribution whose names differ at most in dashes and case."""
    return distribution.lower().replace("-", "_")


def _imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports at run time, including the names in `from x import name`."""
    names = set()
    for node in _run_time_nodes(ast.parse((environment.ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes below `node` except those under `if TYPE_CHECKING`."""
    yield node
    is_for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for child in node.orelse if is_for_types else ast.iter_child_nodes(node):
        yield from _run_time_nodes(child)


def _module_files(name: str) -> Iterator[Path]:
    """Yield the files of this package that run when `name` is imported, relative to the root."""
    parts = name.split(".")
    if parts[0] != "pipelines":
        return
    for n in range(1, len(parts) + 1):
        stem = Path(*parts[:n])
        candidates = (stem / "__init__.py", stem.with_suffix(".py"))
        yield from (path for path in candidates if (environment.ROOT / path).is_file())


def _commit(api: HfApi, name: str, folder: Path, files: list[str]) -> str:
    """Upload changed files and delete unneeded modules in one commit, and read it back; return the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    remote = hub.HubFolder(api, name, "space", "main")
    changed = _differing(remote, folder, files)
    stale = [path for path in remote.sizes() if path.startswith("pipelines/") and path not in files]
    if not changed and not stale:
        logger.info(f"the Space {name} is up to date")
        return api.repo_info(name, repo_type="space").sha
    logger.info(f"sending {len(changed)} of {len(files)} files to the Space {name}")
    operations: list[Any] = [CommitOperationAdd(path, folder / path) for path in changed]
    operations += [CommitOperationDelete(path) for path in stale]
    commit = api.create_commit(name, operations, commit_message="Publish the page", repo_type="space").oid
    if wrong := _differing(hub.HubFolder(api, name, "space", commit), folder, files):
        raise LabError(f"the Space {name} does not read back as it was published ({wrong[0]} differs). Run this again")
    return commit


def _differing(remote: hub.HubFolder, folder: Path, files: list[str]) -> list[str]:
    """Return the files that are missing in the Space or have another content there."""
    sizes = remote.sizes()
    entries = {name: {"sha256": manifest.sha256(folder / name)} for name in files}
    return [
        name
        for name in files
        if sizes.get(name) != (folder / name).stat().st_size or not remote.holds(name, folder / name, entries[name])
    ]


def _readme(name: str, model: Model, hardware: str) -> str:
    title = name.rpartition("/")[2]
    front = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "python_version": PYTHON,
        "app_file": "app.py",
        "short_description": "Speech to text",
        "license": "apache-2.0",  # of the code
        "models": [model.name],
    }
    if not model.private:  # the build has no token; a private model is fetched when the page starts
        front["preload_from_hub"] = [f"{model.name} {','.join(model.files)} {model.commit}"]
    # JSON is valid YAML and escapes the names
    lines = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items())
    token = "\nThe model is private: the Space needs a secret `HF_TOKEN` that may read it.\n" if model.private else ""
    where = "on ZeroGPU" if hardware == "zerogpu" else "on a CPU"
    return f"""---
{lines}
---

# {title}

Record or upload speech and read the transcript. The model is `{model.name}` at commit `{model.commit}`,
running {where}. It is named in `space.json`; the variable `MODEL_URI` of the Space overrides it.

Feedback goes to `log.csv` beside `app.py`, which the next restart deletes, as the page says. If the Space has
persistent storage, set the variable `LAB_LOG` to a file there, for example `/data/log.csv`.
{token}
The code is licensed under the Apache License 2.0; for the licence of the model, see its card.
"""
