"""The page as a Space: what is sent, to whom it is open, and that it runs where nothing else of the lab is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from log_recorder import record_log
from servers.loopback import free_port

from pipelines import __main__ as cli
from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference.deploy import space
from pipelines.inference.transcriber import Transcriber
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.speech.recordings import detection
from pipelines.whisper import model as whisper_model

ROOT = Path(__file__).parents[3]
COMMIT = "c0ffee" + 34 * "0"
NAME = "lab/talk"
BESIDE = {"app.py", "LICENSE", "README.md", "requirements.txt", "space.json"}
BESIDE |= {f"pipelines/inference/app/examples/{name}" for name in ("boat.ogg", "bread.ogg", "snow.ogg")}
BESIDE |= {
    f"pipelines/inference/app/static/{name}"
    for name in ("page.css", "page.js", "player.js", "microphone.js", "microphone_help.js", "worklet.js")
}
"""What a Space holds beside modules."""


@pytest.fixture
def server(hub_server, toy_model):
    """A Hub with the toy as a public model."""
    hub_server.add("model", "lab/toy", toy_model, COMMIT)
    return hub_server


def publish(uri: str = "hub://lab/toy", hardware: str = "cpu") -> dict[str, str]:
    return space.publish(NAME, space.find_model(uri), hardware)


def sent(server) -> dict[str, bytes]:
    return {name: content for name, content in server.files("space", NAME).items() if name != ".gitattributes"}


def front(server) -> dict:
    return yaml.safe_load(sent(server)["README.md"].decode().split("---\n")[1])


def clean(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """A process that sees `folder` and the installed packages, and nothing of the repository."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=_environ(**variables), capture_output=True, text=True, check=False
    )


def _environ(**variables: str) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LAB_", "MODEL_", "PYTHON"))
    }
    return inherited | {"OMP_NUM_THREADS": "1", "NO_PROXY": "*", "no_proxy": "*", **variables}


# ---- what is in it


@pytest.mark.slow
def test_space_contains_exactly_the_imported_modules(tmp_path):
    model = space.Model("lab/toy", COMMIT, False, ("config.json",))
    files = set(space.write(tmp_path / "s", NAME, model))
    assert files == {path.as_posix() for path in space.modules()} | BESIDE
    folders = {Path(name).parts[1] for name in files - BESIDE}
    assert {"inference", "whisper", "speech", "infra"} <= folders
    assert not folders & {"training", "features", "experiments", "worker", "cli", "__main__.py"}
    parts = {Path(name).parts[2].removesuffix(".py") for name in files if name.startswith("pipelines/inference/")}
    assert {"app", "feedback", "transcriber"} <= parts and not parts & {"api", "batch", "deploy", "figures"}
    code = """
import importlib, pathlib, sys
here = pathlib.Path.cwd()
names = [p.with_suffix("").relative_to(here).as_posix().replace("/", ".") for p in here.rglob("*.py")]
for name in names:
    importlib.import_module(name.removesuffix(".__init__"))
mine = [m for n, m in sys.modules.items() if n.split(".")[0] in ("pipelines", "app")]
assert all(pathlib.Path(m.__file__).is_relative_to(here) for m in mine), "found elsewhere"
print(len(mine), len(names))
"""
    done = clean(tmp_path / "s", "-c", code)
    assert done.returncode == 0, done.stderr
    imported, written = map(int, done.stdout.split())
    assert imported == written == len(space.modules())


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def late():\n    from pipelines.speech import audio", {"pipelines.speech.audio"}),
        (
            "if TYPE_CHECKING:\n    from pipelines.features import pipeline\nelse:\n    import pipelines.speech.text",
            {"pipelines.speech.text"},
        ),
        ("if typing.TYPE_CHECKING:\n    import torch", set()),
        ("import json, torch.nn as nn", {"torch.nn"}),
    ],
)
def test_only_run_time_imports_count(source, names, tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(source)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert space._imports(Path("a.py")) == names


def test_requirements_have_the_labs_minimum_versions():
    listed = (ROOT / "requirements.txt").read_text("utf-8")
    on_cpu, on_gpu = (space.requirements(space.modules(), kind).splitlines() for kind in ("cpu", "zerogpu"))
    assert all(line in listed for line in on_cpu)
    assert {"torch>=2.8", "ctranslate2>=4.6", "onnx>=1.16", "gradio>=6.20,<7"} <= set(on_cpu)
    assert {"silero-vad>=6.2.2", "onnxruntime>=1.20"} <= set(on_cpu), "one is read and not imported"
    assert set(on_gpu) - set(on_cpu) == {"spaces", "torch>=2.8,<2.12"}
    never = ("ctranslate2", "onnx>", "hopsworks", "pandas", "matplotlib")
    assert not [line for line in on_gpu if line.startswith(never)]


# ---- publishing


def test_space_is_private_pinned_and_one_commit(server):
    told = publish(hardware="zerogpu")
    repo = server.repos["space", NAME]
    assert (repo.private, repo.hardware) == (True, "zero-a10g")
    assert len(repo.commits) == 2, "the empty Space, and all at once"
    assert told == {"space": NAME, "commit": repo.head, "url": f"{server.endpoint}/spaces/{NAME}"}
    assert sent(server).keys() == {path.as_posix() for path in space.modules()} | BESIDE
    assert sent(server)["app.py"] == (ROOT / "app.py").read_bytes()
    assert json.loads(sent(server)["space.json"]) == {"model": f"hub://lab/toy@{COMMIT}"}
    head = front(server)
    assert (head["sdk"], head["app_file"], head["python_version"]) == ("gradio", "app.py", "3.12")
    assert (head["title"], head["license"], head["models"]) == ("talk", "apache-2.0", ["lab/toy"])
    assert len(head["short_description"]) <= 60
    (preloaded,) = head["preload_from_hub"]
    name, files, commit = preloaded.split(" ")
    assert (name, commit) == ("lab/toy", COMMIT)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files.split(","))


def test_private_model_is_not_preloaded(server, toy_model):
    server.repos["model", "lab/toy"].private = True
    publish()
    assert "preload_from_hub" not in front(server)
    assert "HF_TOKEN" in sent(server)["README.md"].decode()


def test_update_sends_changes_and_removes_old_modules(server):
    publish()
    repo = server.repos["space", NAME]
    said = record_log()
    publish()
    assert (len(repo.commits), said) == (2, [f"the Space {NAME} is up to date"])
    files = server.files("space", NAME)
    files |= {"pipelines/old.py": b"gone by now", "app.py": b"older", "picture.png": b"theirs"}
    publish()
    assert said[-1] == f"sending 1 of {len(space.modules()) + len(BESIDE) - 1} files to the Space {NAME}"
    assert "pipelines/old.py" not in sent(server)
    assert sent(server)["picture.png"] == b"theirs"
    assert sent(server)["app.py"] == (ROOT / "app.py").read_bytes()
    repo.hardware = "t4-small"
    publish()
    assert repo.hardware == "t4-small", "what its owner chose stays"
    publish(hardware="zerogpu")
    assert repo.hardware == "zero-a10g"


def test_space_that_does_not_read_back_is_an_error(server):
    server.corrupt_commits = True
    with pytest.raises(LabError, match=r"the Space lab/talk does not read back as it was published"):
        publish()


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        (str(ROOT), "a Space takes its model from the Hub"),
        ("hopsworks://demo/Models/a", "publish it first"),
        ("hub://lab/toy/folder", "its own repository"),
        ("hub://lab/none", "404"),
        ("hub://lab/toy@nowhere", "404"),
        ("hub://lab/empty", "no model.safetensors in hub://lab/empty"),
    ],
)
def test_model_that_a_space_cannot_load_is_one_line(server, tmp_path, uri, complaint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    server.add("model", "lab/empty", tmp_path / "empty")
    with pytest.raises(LabError, match=complaint) as caught:
        publish(uri)
    assert "\n" not in str(caught.value)
    assert ("space", NAME) not in server.repos


def test_command_with_folder_or_dry_run_publishes_nothing(server, tmp_path, capfd, monkeypatch):
    def call(*arguments: str) -> str:
        argv = ["pipelines", "publish-space", NAME, "--model", "hub://lab/toy", *arguments, "--json"]
        monkeypatch.setattr(sys, "argv", argv)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return json.loads(capfd.readouterr().out)

    dry = call("--dry-run")
    assert (dry["dry_run"], dry["model"]) == (True, f"hub://lab/toy@{COMMIT}")
    written = call("--folder", str(tmp_path / "s"))
    assert written["files"] == dry["files"]
    assert len(dry["files"]) == len(space.modules()) + len(BESIDE) - 1
    assert inference_pipeline.space_model_uri(tmp_path / "s") == dry["model"]
    assert ("space", NAME) not in server.repos
    assert call()["model"] == dry["model"]
    assert ("space", NAME) in server.repos
    with pytest.raises(LabError, match="is not empty"):
        space.write(tmp_path / "s", NAME, space.find_model("lab/toy"))


@pytest.mark.parametrize(("name", "hardware"), [("talk", "cpu"), ("lab/talk", "t4"), ("a/b/c", "cpu")])
def test_invalid_space_name_or_hardware_is_refused(tmp_path, name, hardware):
    with pytest.raises(LabError, match="a Space is called owner/name|--hardware takes cpu or zerogpu"):
        space.write(tmp_path / "s", name, space.Model("lab/toy", COMMIT, False, ()), hardware)
    assert not (tmp_path / "s").exists()


# ---- ZeroGPU


@pytest.mark.slow
def test_zerogpu_imports_spaces_before_torch(tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "spaces.py").write_text(
        "import sys; print('spaces before torch:', 'torch' not in sys.modules)"
    )
    space.write(tmp_path / "s", NAME, space.Model("lab/toy", COMMIT, False, ()), "zerogpu")
    told = {"PYTHONPATH": str(tmp_path / "stub")}
    on = clean(tmp_path / "s", "app.py", "--dry-run", SPACES_ZERO_GPU="true", **told)
    assert on.stdout.splitlines()[:2] == [
        "spaces before torch: True",
        f"model: hub://lab/toy@{COMMIT} (the requested model)",
    ], on.stderr
    assert "spaces" not in clean(tmp_path / "s", "app.py", "--dry-run", **told).stdout


@pytest.mark.usefixtures("one_thread")
def test_zerogpu_decorates_decoding(toy_model, speech, monkeypatch):
    from pipelines.speech.audio import Waveform

    lent = []

    def gpu(task):
        return lambda *told: lent.append(task.__name__) or task(*told)

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=gpu))
    transcriber = Transcriber(whisper_model.resolve(str(toy_model)), engine="transformers", max_new_tokens=4)
    monkeypatch.setattr(detection, "open_detector", detection.AnySound)
    transcriber.transcribe(Waveform(speech(8_000)))
    assert lent[0] == "decode"


# ---- running it


def unpacked(server, folder: Path) -> Path:
    """What the Hub was sent, as a Space's build lays it out; its model is private."""
    server.repos["model", "lab/toy"].private = True
    publish()
    for name, content in sent(server).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def transcribed(python: Path | str, folder: Path, server, spoken: Path) -> tuple[str, list]:
    """The first line that the page in `folder` prints, and what it hears in `spoken`."""
    from gradio_client import Client, handle_file

    places = {"HF_HOME": spoken.parent / "hf", "LAB_CACHE": spoken.parent / "cache", "TMPDIR": spoken.parent}
    environ = _environ(
        HF_ENDPOINT=server.endpoint, HF_TOKEN=server.token, **{name: str(path) for name, path in places.items()}
    )
    port, lines, ready = free_port(), [], threading.Event()
    environ |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [python, "app.py"], cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def listen():
        for line in process.stdout:
            lines.append(line)
            if line.startswith("next: "):
                ready.set()
        ready.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert ready.wait(400) and process.poll() is None, "".join(lines)
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        return lines[0], client.predict(handle_file(spoken), api_name="/transcribe")
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def check(first: str, heard: list, toy_model: Path, spoken: Path) -> None:
    assert first == f"model: hub://lab/toy@{COMMIT} (the requested model)\n"
    ours = Transcriber(whisper_model.resolve(str(toy_model))).transcribe(spoken)
    assert heard[0] == ours.text
    assert "0.8 s" in heard[1]


@pytest.fixture
def spoken(tmp_path, encoded, speech) -> Path:
    path = tmp_path / "spoken.wav"
    path.write_bytes(encoded(speech(12_000)))
    return path


@pytest.mark.slow
def test_uploaded_folder_runs_without_the_lab(server, toy_model, tmp_path, spoken):
    check(*transcribed(sys.executable, unpacked(server, tmp_path / "s"), server, spoken), toy_model, spoken)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LAB_SPACE_VENV"), reason="installs some gigabytes: LAB_SPACE_VENV=1 wants it")
def test_space_requirements_are_sufficient(server, toy_model, tmp_path, spoken):
    """In an environment that holds what the Space's requirements.txt names, and nothing else."""
    folder, python = unpacked(server, tmp_path / "s"), tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", folder / "requirements.txt"], check=True)
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout.split()
    assert "gradio" in listed
    assert "datasets" not in listed, "the lab's own environment"
    check(*transcribed(python, folder, server, spoken), toy_model, spoken)
