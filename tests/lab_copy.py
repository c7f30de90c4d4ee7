"""Create a copy of the lab whose recipes take seconds, with a trained tour: documented commands run there.

The copy's own code runs the commands unchanged. Its recipes have small numbers, and its model is a toy on a loopback
Hub under the names of OpenAI's models. Python programs are forked from one process that has imported everything,
because the imports take longer than most commands.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pages
import pytest
from servers import fork_server
from servers.hub import Hub, Repo
from servers.mozilla import SECRET, Collective

from pipelines import recipes
from pipelines.recipes import settings

TIMEOUT_S = 240.0
SMALL = {
    "source.train": 24,
    "source.validation": 8,
    "source.test": 8,
    "training.steps": 4,
    "training.eval_every": 20,
    "training.batch_size": 4,
    "evaluation.max_new_tokens": 3,
    "evaluation.bootstrap_samples": 100,
    "evaluation.stock_pipeline": 1,
}
"""Settings of every recipe of the copy."""
FORK_SERVER = f"""
import sys
sys.path.insert(1, {str(pages.ROOT / "tests")!r})
from servers import fork_server
sys.path.pop(1)
fork_server.serve()
"""
SOCKET = "tmp/fork_server"
PROGRAMS = {"python": "", "papermill": "-m papermill", "torchrun": "-m torch.distributed.run"}
"""Programs of the copy's environment, and what Python runs for them."""
IMPORTED = (
    "torch", "transformers.trainer_seq2seq", "transformers.models.whisper.modeling_whisper", "gradio", "uvicorn",
    "pandas", "matplotlib.pyplot", "papermill.cli", "torch.distributed.run", "ipykernel.kernelapp",
    "pipelines.features.pipeline",
    "servers.tokenizer_cache",
)  # fmt: skip
"""Modules that most commands import."""
TOUR = {
    "features": "python -m pipelines features --recipe tour",
    "train": "python -m pipelines train --recipe tour",
    "evaluate": "python -m pipelines evaluate --recipe tour",
    "publish": "python -m pipelines publish MODEL hub://me/whisper-sv",
}
"""What a reader of any page has done before: the steps of the README, and publishing the model."""
RELEASE = "cv-corpus-26.0-sv-SE.tar.gz"
OPENAI_MODELS = ("openai/whisper-tiny", "openai/whisper-small")


# --- running programs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- standard output\n{self.out[-3000:]}\n--- standard error\n{self.err[-3000:]}"


class RunningCommand:
    """A command that was started in the copy: forked if it is a Python program, else run by bash."""

    def __init__(self, text: str, folder: Path, variables: dict[str, str], number: int):
        self.text = text
        self.out, self.err = (folder / "tmp" / f"{number}.{name}" for name in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err, open(os.devnull, "rb") as null:
            if words := python_words(text):
                files = [file.fileno() for file in (null, out, err)]
                python = str(folder / ".venv/bin/python")
                address = str(folder / SOCKET)
                self.process = fork_server.ForkedProgram(address, python, words, str(folder), variables, files)
            else:
                self.process = subprocess.Popen(
                    ["bash", "-c", text], cwd=folder, env=variables, stdin=null, stdout=out, stderr=err
                )

    def wait(self) -> Result:
        """Return the result; kill the command after TIMEOUT_S."""
        try:
            self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return Result(self.process.returncode, self.out.read_text("utf-8"), self.err.read_text("utf-8"))

    def wait_for(self, pattern: str) -> str:
        """Return the first group of `pattern`, once the command has printed it."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (match := re.search(pattern, self.out.read_text("utf-8"))):
            running = self.process.poll() is None and time.monotonic() < deadline
            assert running, f"{self.text}\nhas not printed {pattern}\n{self.interrupt()}"
            time.sleep(0.02)
        return match[1]

    def interrupt(self) -> Result:
        """Send Ctrl-C and return the result."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.wait()


def python_words(text: str) -> list[str] | None:
    """Return the arguments of `python` for a command that is a Python program; None for any other command."""
    if set(text) & set("|&;<>$`~*\n"):
        return None
    program, *words = shlex.split(text)
    if program.removeprefix(".venv/bin/") not in PROGRAMS:
        return None
    words = [*PROGRAMS[program.removeprefix(".venv/bin/")].split(), *words]
    return words if fork_server.can_fork(words) else None


@dataclass
class LabCopy:
    """The folder of the copy, and the process that runs commands there."""

    folder: Path
    variables: dict[str, str]
    """The environment of every command."""
    account: dict[str, str]
    """Additional variables of commands that may use an account."""
    tiny: Path
    """The real whisper-tiny."""
    tour: str = ""
    """The model of the recipe `tour`, once it is trained."""
    initial_files: frozenset[str] = frozenset()
    """Names of the files in the folder before a page is followed."""
    _started: int = 0

    def __post_init__(self):
        self._server = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER, SOCKET, *IMPORTED],
            cwd=self.folder,
            env=self.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout.readline() == "ready\n"

    def close(self) -> None:
        """Stop the fork server and everything that it forked."""
        self._server.stdin.close()
        self._server.wait(30)

    def save_initial_state(self) -> None:
        """Remember the folder's files and runs as the state that `reset` restores."""
        shutil.copytree(self.folder / "runs", self.folder / "initial runs")
        self.initial_files = frozenset(path.name for path in self.folder.iterdir()) | {"cache", "cache of an account"}

    def reset(self) -> None:
        """Restore the initial state: only the tour is trained and published."""
        for path in self.folder.iterdir():
            if path.name == "runs" or path.name not in self.initial_files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.folder / "initial runs", self.folder / "runs")

    def start(self, text: str, variables: dict[str, str] | None = None) -> RunningCommand:
        """Start a shell command in the folder of the copy."""
        self._started += 1
        return RunningCommand(text, self.folder, self.variables | (variables or {}), self._started)


# --- the copy ---------------------------------------------------------------------------------------------------------

COPIED = (
    "pipelines", "notebooks", "docs", "app.py", "Makefile", "requirements.txt", "constraints.txt",
    "tests/requirements.txt", "tests/constraints-colab.txt", "log_base.csv", "LICENSE",
)  # fmt: skip


def copy_lab(folder: Path) -> None:
    """Copy the lab to `folder`, with small recipes and an environment that counts as complete."""
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (pages.ROOT / name).is_dir() else shutil.copy2
        copy(pages.ROOT / name, folder / name)
    for path in [*folder.glob("pipelines/recipes/*.toml"), *folder.glob("docs/experiments/*/*.toml")]:
        path.write_text(recipes.as_toml(small_recipe(path)), "utf-8")
    (folder / "tmp").mkdir()
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name, words in PROGRAMS.items():
        client = (sys.executable, "-SE", fork_server.__file__, folder / SOCKET, bin_folder / "python", sys.executable)
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(map(str, client))} {words} "$@"\n', "utf-8")
        (bin_folder / name).chmod(0o755)
    (folder / ".venv" / "ready").touch()


def small_recipe(path: Path) -> settings.Recipe:
    """Return the recipe with small numbers, and without thresholds that a toy model cannot pass."""
    recipe, overrides = recipes.load(path), dict(SMALL)
    if recipe.source.parts:
        sizes = {name.removeprefix("source."): size for name, size in SMALL.items() if name.startswith("source.")}
        overrides["source.parts"] = [part.model_dump(mode="json") | sizes for part in recipe.source.parts]
    if recipe.curation.max_label_cer:
        overrides["curation.max_label_cer"] = 1e6
    if recipe.distillation.teacher:
        overrides["distillation.max_label_wer"] = 0
    if recipe.search.space:
        overrides |= {"search.trials": 2, "search.min_steps": 2, "training.eval_every": 2}
    return recipes.load(path, overrides)


# --- the files that pages name ----------------------------------------------------------------------------------------


def write_inputs(folder: Path, encoded, speech) -> None:
    """Write the recordings, tables and recipes that commands of the pages read from the current folder."""

    def sound(seed: int, format: str = "WAV") -> bytes:
        return encoded(speech(12_000 + 100 * (seed % 40), seed=seed), format=format)

    (folder / "talk.wav").write_bytes(sound(0))
    (folder / "talks.csv").write_text("audio,text\ntalk.wav,Hej då.\n", "utf-8")
    (folder / "list.txt").write_text("Båten går klockan sju.\nVi ses i morgon.\n", "utf-8")
    (folder / "names.txt").write_text("Ågesta\nElfwing\n", "utf-8")
    (folder / "interviews").mkdir()
    (folder / "interviews/anna.wav").write_bytes(sound(1))
    recordings = folder / "my_recordings"
    recordings.mkdir()
    lines = ["path,text,speaker"]
    for i in range(40):
        (recordings / f"{i}.wav").write_bytes(sound(100 + i))
        lines.append(f"{i}.wav,Mening nummer {i}.,talare {i}")
    (recordings / "transcripts.csv").write_text("\n".join(lines) + "\n", "utf-8")
    for name in ("my_parquet", "fleurs"):
        (folder / name).mkdir()
    for n, split in enumerate(("train", "validation", "test")):
        sounds = [sound(200 + 10 * n + i) for i in range(8)]
        for name, columns in (("my_parquet", ["text"]), ("fleurs", ["transcription", "raw_transcription"])):
            (folder / name / f"{split}.parquet").write_bytes(parquet_file(sounds, split, columns))
    write_common_voice(folder / RELEASE, lambda i: sound(i, "MP3"))
    mine = (folder / "pipelines/recipes/tour-distil.toml").read_text("utf-8")
    (folder / "mine.toml").write_text(mine.replace('name = "tour-distil"', 'name = "mine"'), "utf-8")


def parquet_file(sounds: list[bytes], split: str, text_columns: list[str]) -> bytes:
    """Return a Parquet file with a column of audio and these columns of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"Mening {i} i {split}." for i, _ in enumerate(sounds)]
    audio = pa.array(
        [{"bytes": sound, "path": f"{i}.wav"} for i, sound in enumerate(sounds)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    file = io.BytesIO()
    pq.write_table(pa.table({"audio": audio, **dict.fromkeys(text_columns, texts)}), file)
    return file.getvalue()


def write_common_voice(path: Path, sound: Callable[[int], bytes]) -> None:
    """Write a Common Voice archive: 32 clips for training and validation, 3 for test."""
    from features.sources.test_common_voice import pack, toy

    files = toy()
    clips = [name for name in files if name.startswith("clips/")]
    pack(path, files | {name: sound(i) for i, name in enumerate(clips)})


# --- the fixture ------------------------------------------------------------------------------------------------------


def command_variables(folder: Path, hub: Hub, mozilla: Collective, toy_model: Path) -> dict[str, str]:
    """Return the environment of commands: this process's, without personal settings, and with loopback servers."""
    personal = ("LAB_", "HF_", "MDC_", "MODEL_URI", "VSCODE")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(personal)}
    return inherited | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "LAB_CACHE": str(folder / "cache"),
        "MDC_API_URL": f"{mozilla.address}/api",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{folder / '.venv/bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TMPDIR": str(folder / "tmp"),
        "TOKENIZERS_PARALLELISM": "false",
        "TOY": str(toy_model),
    }


@pytest.fixture(scope="session")
def lab_copy(tmp_path_factory, tiny_folder, toy_model, encoded, speech) -> Iterator[LabCopy]:
    """Return the copy of the lab with the tour trained, scored and published."""
    from command_runner import CommandRunner

    folder = tmp_path_factory.mktemp("lab")
    copy_lab(folder)
    write_inputs(folder, encoded, speech)
    dataset = recipes.load("base").source.dataset
    hub, mozilla = Hub(), Collective((folder / RELEASE).read_bytes(), dataset, RELEASE)
    for name in OPENAI_MODELS:
        hub.add("model", name, toy_model)
    fleurs = {f"sv_se/{path.stem}/0000.parquet": path.read_bytes() for path in (folder / "fleurs").glob("*.parquet")}
    hub.repos["dataset", "google/fleurs"] = Repo(False, {"c0ffee" * 6 + "abcd": fleurs})
    account = {"HF_TOKEN": hub.token, "MDC_API_KEY": SECRET, "LAB_CACHE": str(folder / "cache of an account")}
    copy = LabCopy(folder, command_variables(folder, hub, mozilla, toy_model), account, tiny_folder)
    try:
        runner = CommandRunner(copy)
        for step, text in TOUR.items():
            runner.run(pages.Command(text, account=True))
            if step == "train":
                copy.tour = runner.models[text]
        copy.save_initial_state()
        yield copy
    finally:
        copy.close()
        hub.close()
        mozilla.close()
