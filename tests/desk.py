"""A copy of the lab whose recipes end in seconds, and a shell in it: what the pages name exists, every command runs.

The commands are run as they stand, by the copy's own code. Small are the numbers in its recipes, and the model: a toy
lies on a Hub on loopback under the names of OpenAI's models. A process that has imported everything forks one for each
command of Python's, because the imports take longer than all else.
"""

from __future__ import annotations

import io
import json
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
from servers import forks
from servers.hub import Hub, Repo
from servers.loopback import free_port
from servers.mozilla import SECRET, Collective

from pipelines import recipes
from pipelines.recipes import settings

PATIENCE_S = 240.0
SMALL = {
    "source.train": 24,
    "source.validation": 8,
    "source.test": 8,
    "training.steps": 4,
    "training.eval_every": 20,
    "training.batch_size": 4,
    "evaluation.max_new_tokens": 3,
    "evaluation.bootstrap_samples": 100,
}
"""Of every recipe of the copy. Thresholds that a model which writes nonsense would never pass are wide open."""
FORKS = f"""
import sys
sys.path.insert(1, {str(pages.ROOT / "tests")!r})
from servers import forks
sys.path.pop(1)
forks.serve()
"""
IMPORTED = (
    "torch", "transformers.trainer_seq2seq", "transformers.models.whisper.modeling_whisper", "gradio", "uvicorn",
    "pandas", "matplotlib.pyplot", "papermill.cli", "torch.distributed.run", "ipykernel.kernelapp",
    "pipelines.features.pipeline",
    "servers.tokenizers",
)  # fmt: skip
"""What most commands import."""


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- standard output\n{self.out[-3000:]}\n--- standard error\n{self.err[-3000:]}"


class Process:
    """A command that runs."""

    def __init__(self, text: str, folder: Path, variables: dict[str, str], number: int):
        self.text = text
        self.out, self.err = (folder / "tmp" / f"{number}.{name}" for name in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.popen = subprocess.Popen(
                ["bash", "-c", text], cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def wait(self) -> Done:
        try:
            self.popen.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        return Done(self.popen.returncode, self.out.read_text("utf-8"), self.err.read_text("utf-8"))

    def told(self, pattern: str) -> str:
        """The first group of `pattern`, once the command has printed it."""
        ends = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self.out.read_text("utf-8"))):
            alive = self.popen.poll() is None and time.monotonic() < ends
            assert alive, f"{self.text}\nhas not printed {pattern}\n{self.end()}"
            time.sleep(0.02)
        return found[1]

    def end(self) -> Done:
        """Ctrl-C."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGINT)
        return self.wait()


@dataclass
class Desk:
    """The folder of the copy, and who runs commands there."""

    folder: Path
    variables: dict[str, str]
    """The environment of every command."""
    account: dict[str, str]
    """What those have besides that may use an account."""
    tiny: Path
    """The real whisper-tiny."""
    tour: str = ""
    """The model of the recipe `tour`, once it is trained."""
    furniture: frozenset[str] = frozenset()
    """The names of what lies in the folder before any page is followed."""
    _started: int = 0

    def __post_init__(self):
        self._forks = subprocess.Popen(
            [sys.executable, "-c", FORKS, "tmp/forks", *IMPORTED],
            cwd=self.folder,
            env=self.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._forks.stdout.readline() == "ready\n"

    def close(self) -> None:
        self._forks.stdin.close()
        self._forks.wait(30)

    def begin(self) -> None:
        """Let only that be done which everybody has done, and the series of experiments, which takes longest."""
        made = [path for path in self.folder.iterdir() if path.name not in self.furniture]
        runs = [*self.folder.glob("runs/*"), *self.folder.glob("runs/features/*")]
        for path in made + [path for path in runs if not path.name.startswith(("planted", "mix", "features"))]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.folder / "runs as begun", self.folder / "runs", dirs_exist_ok=True)

    def start(self, text: str, variables: dict[str, str] | None = None) -> Process:
        """A line for the shell, in the folder of the copy."""
        self._started += 1
        return Process(text, self.folder, self.variables | (variables or {}), self._started)


# --- the copy ---------------------------------------------------------------------------------------------------------

COPIED = (
    "pipelines", "notebooks", "docs", "app.py", "Makefile", "requirements.txt", "constraints.txt",
    "tests/requirements.txt", "tests/constraints-colab.txt", "log_base.csv", "LICENSE",
)  # fmt: skip


def copy_lab(folder: Path) -> None:
    """The lab in `folder`, its recipes small, its environment said to be ready."""
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (pages.ROOT / name).is_dir() else shutil.copy2
        copy(pages.ROOT / name, folder / name)
    for path in (folder / "pipelines" / "recipes").glob("*.toml"):
        path.write_text(recipes.as_toml(small(path)), "utf-8")
    (folder / "tmp").mkdir()
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in {"python": "", "papermill": "-m papermill", "torchrun": "-m torch.distributed.run"}.items():
        told = (sys.executable, "-SE", forks.__file__, folder / "tmp/forks", programs / "python", sys.executable)
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(map(str, told))} {words} "$@"\n', "utf-8")
        (programs / name).chmod(0o755)
    (folder / ".venv" / "ready").touch()


def small(path: Path) -> settings.Recipe:
    whole, less = recipes.load(path), dict(SMALL)
    if whole.source.parts:
        sizes = {name.removeprefix("source."): size for name, size in SMALL.items() if name.startswith("source.")}
        less["source.parts"] = [part.model_dump(mode="json") | sizes for part in whole.source.parts]
    if whole.curation.max_label_cer:
        less["curation.max_label_cer"] = 1e6
    if whole.distillation.teacher:
        less["distillation.max_label_wer"] = 0
    if whole.search.space:
        less |= {"search.trials": 2, "search.min_steps": 2, "training.eval_every": 2}
    return recipes.load(path, less)


# --- a reader who follows a page --------------------------------------------------------------------------------------

DISTIL = "python -m pipelines distill --recipe tour-distil"
TELLS = {
    "features": r"^cache \S+\ndigest \w{12}, ",
    "train": r"^model \S+/model\nbest at step ",
    "distill": r"^model \S+/model\nbest at step ",
    "evaluate": r" on (test|validation)\n  normalised  .*\n  as written  .*\nreport \S+\n",
    "export": r"^(test|validation), 8 clips; ",
    "production": r"^served by ctranslate2 .* in a fresh process, without torch and transformers: ",
    "sweep": r"^best: trial \d+, validation WER ",
    "transcribe": r"^model ",
    "compare": r"^Next: ",
    "leaderboard": r"^Next: ",
    "run": r"^model    \S+/model$",
    "experiments": r"^24 finished, 0 failed$|^tables in docs/experiments$",
    "publish": r"^published as ",
    "fetch": r"^(/.+/fetched|my_backup)/whisper-sv\S*$",
    "publish-space": r"^space me/swedish @ \w{40}$",
    "recipe": r"^training\.steps = 4$",
    "doctor": r"^ready\. ",
}
"""What each sub-command prints at the least, dry runs and JSON aside."""
SERVERS = {
    "serve": r" at (http://\S+), told",
    "worker": r" at (http://\S+) \(data",
    "app.py": r"page: (http://\S+?)/?\n",
}
"""What runs until it is stopped, and where it says its address."""
BESIDES = {
    "serve": " --port 0",
    "worker": " --port 0",
    "doctor": " --model {tiny}",
    "ray": " --block --node-ip-address=127.0.0.2 --num-cpus=1 --object-store-memory=80000000",
}
"""Options that are added: any free port; weights that hear something; no Ray that others reach or that stays."""


class Reader:
    """Runs the commands of a page one after another, and fails with what a command that failed has told."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.variables: dict[str, str] = {}
        self.server: Process | None = None
        self.address = ""
        self.made: dict[str, str] = {}
        """Command to the model that it made."""
        self.port = free_port()
        """Of Ray's head."""
        self.nodes: list[Process] = []

    def run(self, command: pages.Command) -> None:
        text = self.instead(command.text)
        words = shlex.split(text)
        given = (self.desk.account if command.account else {}) | self.variables
        while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
            words.pop(0)
        if not words or words[0] == "export":
            self.variables |= dict(word.split("=", 1) for word in shlex.split(text.removeprefix("export ")))
            return
        run = getattr(self, f"_{Path(words[0]).name}", None)
        assert run, f"nobody knows how to run {words[0]}"
        began = time.monotonic()
        run(words[1:], given, text)
        print(f"{time.monotonic() - began:.1f} s: {text}")

    def close(self) -> None:
        """Stop the server that runs."""
        if self.server:
            server, self.server = self.server, None
            self.accept(server.end(), server.text)
        for node in self.nodes:
            node.popen.terminate()
        for node in self.nodes:
            node.wait()

    def done(self, text: str, given: dict[str, str]) -> Done:
        return self.accept(self.desk.start(text, given).wait(), text)

    def accept(self, done: Done, text: str, codes: tuple[int, ...] = (0,)) -> Done:
        assert done.code in codes, f"{text}\n{done}"
        assert "Traceback" not in done.out + done.err, f"{text}\n{done}"
        return done

    def instead(self, text: str) -> str:
        """The command with what its reader puts in the place of examples."""
        tour = Path(self.desk.tour or self.desk.folder / "runs/tour/none/model")
        run = tour.parent.relative_to(self.desk.folder)
        saved = sorted((self.desk.folder / "runs/worker/saved").glob("tour-*"))
        for example, here in {
            r"MDC_API_KEY=\.\.\.": f"MDC_API_KEY={self.desk.account['MDC_API_KEY']}",
            r"runs/tour/train-1a2b3c4d5e6f\b": str(run),
            r"runs/worker/saved/tour-1a2b3c4d5e6f\b": str(saved[-1]) if saved else "",
            r"\b(MODEL|TEACHER) ": f"{run}/model ",
            r"\bSTUDENT-2 ": f"{self.made.get(DISTIL)} ",
            r"\bSTUDENT-1 ": f"{self.made.get(f'{DISTIL} --set distillation.decoder_layers=1')} ",
            r"http://127\.0\.0\.1:800\d": self.address,
            r"--host 0\.0\.0\.0": "--host 127.0.0.1",
            r"--port=6379": f"--port={self.port}",
            r"192\.168\.1\.10:6379": f"127.0.0.2:{self.port}",
            r"--port 7860": f"--port {free_port()}",
            r"--devices 4": "--devices 2",
            r"max_label_cer=0\.6": "max_label_cer=1",  # a toy hears nothing
            r"--nproc-per-node gpu": f"--nproc-per-node {n_gpus() or 1}",
        }.items():
            text = re.sub(example, here, text)
        return text

    # --- programs

    def _python(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        name = arguments[2] if arguments[:2] == ["-m", "pipelines"] else arguments[0]
        asked = text + BESIDES.get(name, "").format(tiny=self.desk.tiny)
        if name in SERVERS and "--dry-run" not in arguments:
            return self._serve(name, asked, given)
        done = self.done(asked, given)
        if "--json" in arguments:
            assert done.out.count("\n") == 1 and isinstance(json.loads(done.out), dict), done
        elif "--dry-run" in arguments:
            assert done.out.endswith("nothing was done\n"), done
        else:
            assert re.search(TELLS[name], done.out, re.MULTILINE), f"{text}\nhas not told {TELLS[name]}\n{done}"
        if made := re.search(r"^model (\S+/model)$", done.out, re.MULTILINE):
            self.made[text] = made[1]
        return None

    def _serve(self, name: str, text: str, given: dict[str, str]) -> None:
        """Started, and asked for its page; it runs until the next one, or until the end of the page."""
        import httpx

        self.close()
        self.server = self.desk.start(text, given)
        self.address = self.server.told(SERVERS[name])
        answer = httpx.get(self.address + ("/health" if name == "serve" else ""), timeout=PATIENCE_S)
        assert answer.status_code == 200, answer

    def _papermill(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        done = self.done(f"{text} --no-progress-bar", given)
        assert "unknown parameter" not in done.err, done  # papermill itself only warns

    def _torchrun(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        done = self.done(text, given)
        assert re.search(TELLS["train"], done.out, re.MULTILINE), done

    def _make(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        """What make would call is run, without the notebooks (tests/cli/test_notebooks.py) and without tests."""
        makefile = (self.desk.folder / "Makefile").read_text("utf-8")
        for name in (word.partition("=")[0] for word in arguments if "=" in word):
            assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"the Makefile has no {name}"
        dry = self.done(f"{text} --dry-run --no-print-directory", given)
        lines = [line for line in dry.out.splitlines() if re.match(r"\.venv/bin/python (-m pipelines|app\.py)", line)]
        assert lines or arguments[0].startswith("test"), dry
        for line in lines:
            self.run(pages.Command(line + (" --dry-run" if "pipelines run" in line else "")))

    def _pip(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        """Nothing is installed: what it would install is what requirements.txt names, and is here."""
        from importlib.metadata import version

        from packaging.requirements import Requirement

        named = (pages.ROOT / "requirements.txt").read_text("utf-8")
        assert arguments[0] == "install", text
        for word in arguments[1:]:
            wanted = Requirement(word)
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w.])", named), f"requirements.txt does not name {word}"
            assert version(wanted.name) in wanted.specifier, word

    def _curl(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        """A stream without an end is listened to for a second; a worker is asked when it has done what came before."""
        while (state := self.state()).startswith("Busy"):
            time.sleep(0.05)
        assert state in ("Ready", ""), state
        endless = "-N" in arguments
        options = "-sS --fail-with-body" + (" --max-time 1" if endless else "")
        done = self.desk.start(text.replace("curl", f"curl {options}", 1), given).wait()
        self.accept(done, text, (0, 28 * endless))
        assert "data: " in done.out if endless else json.loads(done.out), done

    def _ray(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        """A node, until the end of the page; anything else at once."""
        if arguments[0] != "start":
            self.done(text, given)
            return
        self.nodes.append(self.desk.start(text + BESIDES["ray"], given))
        self.nodes[-1].told(r"(Ray runtime started)")

    def state(self) -> str:
        """Of the worker; of other servers nothing."""
        import httpx

        told = httpx.get(f"{self.address}/status", timeout=PATIENCE_S)
        return told.json()["internal_state"] if told.status_code == 200 else ""


def n_gpus() -> int:
    import torch

    return torch.cuda.device_count()


# --- what the pages name ----------------------------------------------------------------------------------------------

MOZILLA = recipes.load("base").source.dataset
BEGUN = (
    "python -m pipelines features --recipe tour",
    "python -m pipelines train --recipe tour",
    "python -m pipelines evaluate --recipe tour",
    "python -m pipelines publish MODEL hub://me/whisper-sv",
)
"""What everybody has done who reads on after README.md, and who has an account."""
RELEASE = "cv-corpus-26.0-sv-SE.tar.gz"
OPENAI = ("openai/whisper-tiny", "openai/whisper-small")


def furnish(folder: Path, encoded, speech) -> None:
    """The recordings, tables and recipes that commands of the pages take from the current folder."""

    def sound(seed: int, format: str = "WAV") -> bytes:
        return encoded(speech(12_000 + 100 * (seed % 40), seed=seed), format=format)

    (folder / "talk.wav").write_bytes(sound(0))
    (folder / "talks.csv").write_text("audio,text\ntalk.wav,Hej då.\n", "utf-8")
    recordings = folder / "my_recordings"
    recordings.mkdir()
    lines = ["path,text,speaker"]
    for i in range(40):
        (recordings / f"{i}.wav").write_bytes(sound(100 + i))
        lines.append(f"{i}.wav,Mening nummer {i}.,talare {i}")
    (recordings / "transcripts.csv").write_text("\n".join(lines) + "\n", "utf-8")
    for place in ("my_parquet", "fleurs"):
        (folder / place).mkdir()
    for n, split in enumerate(("train", "validation", "test")):
        sounds = [sound(200 + 10 * n + i) for i in range(8)]
        for place, columns in (("my_parquet", ["text"]), ("fleurs", ["transcription", "raw_transcription"])):
            (folder / place / f"{split}.parquet").write_bytes(parquet(sounds, split, columns))
    common_voice(folder / RELEASE, lambda i: sound(i, "MP3"))
    mine = (folder / "pipelines/recipes/tour-distil.toml").read_text("utf-8")
    (folder / "mine.toml").write_text(mine.replace('name = "tour-distil"', 'name = "mine"'), "utf-8")


def parquet(sounds: list[bytes], split: str, columns: list[str]) -> bytes:
    """Such a file, with these columns of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"Mening {i} i {split}." for i, _ in enumerate(sounds)]
    audio = pa.array(
        [{"bytes": sound, "path": f"{i}.wav"} for i, sound in enumerate(sounds)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    file = io.BytesIO()
    pq.write_table(pa.table({"audio": audio, **dict.fromkeys(columns, texts)}), file)
    return file.getvalue()


def common_voice(path: Path, sound: Callable[[int], bytes]) -> None:
    """A release of Common Voice: 32 clips to train on and to select by, 3 to test."""
    from features.sources.test_common_voice import pack, toy

    files = toy()
    clips = [name for name in files if name.startswith("clips/")]
    pack(path, files | {name: sound(i) for i, name in enumerate(clips)})


@pytest.fixture(scope="session")
def desk(tmp_path_factory, tiny_folder, toy_model, encoded, speech) -> Iterator[Desk]:
    """The copy of the lab, with the tour trained and published, as whoever has followed the README has it."""
    folder = tmp_path_factory.mktemp("desk")
    copy_lab(folder)
    furnish(folder, encoded, speech)
    hub, mozilla = Hub(), Collective((folder / RELEASE).read_bytes(), MOZILLA, RELEASE)
    for name in OPENAI:
        hub.add("model", name, toy_model)
    fleurs = {f"sv_se/{path.stem}/0000.parquet": path.read_bytes() for path in (folder / "fleurs").glob("*.parquet")}
    hub.repos["dataset", "google/fleurs"] = Repo(False, {"c0ffee" * 6 + "abcd": fleurs})
    somebodys = ("LAB_", "HF_", "MDC_", "MODEL_URI", "VSCODE")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(somebodys)}
    account = {"HF_TOKEN": hub.token, "MDC_API_KEY": SECRET, "LAB_CACHE": str(folder / "cache of an account")}
    told = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "MDC_API_URL": f"{mozilla.address}/api"}
    told |= {"LAB_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    told |= {"PATH": f"{folder / '.venv/bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    told |= {"TOY": str(toy_model), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_PROXY": "*"}
    made = Desk(folder, variables | told, account, tiny_folder)
    try:
        reader = Reader(made)
        for text in BEGUN:
            reader.run(pages.Command(text, account=True))
            made.tour = made.tour or reader.made.get(text, "")
        shutil.copytree(folder / "runs", folder / "runs as begun")
        made.furniture = frozenset(path.name for path in folder.iterdir()) | {"cache", "cache of an account"}
        yield made
    finally:
        made.close()
        hub.close()
        mozilla.close()
