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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pages
import pytest
from servers.hub import Hub, Repo
from servers.loopback import free_port
from servers.mozilla import SECRET, Collective

from pipelines import recipe as recipes

PATIENCE_S = 240.0
SMALL = {
    "source.train": 24,
    "source.validation": 8,
    "source.test": 8,
    "training.steps": 4,
    "training.eval_every": 2,
    "training.batch_size": 4,
    "evaluation.max_new_tokens": 3,
    "evaluation.bootstrap_samples": 100,
}
"""Of every recipe of the copy. Thresholds that a model which writes nonsense would never pass are wide open."""
STARTER = """
import gc, json, os, runpy, signal, sys

for name in sys.argv[1:]:
    __import__(name)
gc.collect()
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "ended" in job:
        child, status = os.waitpid(job["ended"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if child else None), flush=True)
        continue
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
else:
    sys.exit()
os.setpgid(0, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
for number, name in enumerate((os.devnull, job["out"], job["err"])):
    os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
os.environ.update(job["variables"])
program, *sys.argv = job["words"]
if program == "-m":
    module = sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
else:
    sys.argv.insert(0, program)
    runpy.run_path(program, run_name="__main__")
"""
IMPORTED = (
    "torch", "transformers.trainer_seq2seq", "transformers.models.whisper.modeling_whisper", "gradio", "uvicorn",
    "pandas", "matplotlib.pyplot", "papermill.cli", "torch.distributed.run", "pipelines.lab",
)  # fmt: skip


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

    def __init__(self, desk: Desk, words: list[str], variables: dict[str, str]):
        self._desk, self.out, self.err = desk, desk.fresh("out"), desk.fresh("err")
        told = {"words": words, "variables": variables, "out": str(self.out), "err": str(self.err)}
        self.pid = desk.ask(told)
        self.code: int | None = None

    def ended(self) -> bool:
        if self.code is None:
            self.code = self._desk.ask({"ended": self.pid})
        return self.code is not None

    def wait(self) -> Done:
        ends = time.monotonic() + PATIENCE_S
        while not self.ended():
            if time.monotonic() > ends:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        return self.done()

    def done(self) -> Done:
        return Done(self.code or 0, self.out.read_text("utf-8"), self.err.read_text("utf-8"))

    def told(self, pattern: str) -> str:
        """The first group of `pattern`, once the command has printed it."""
        ends = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self.out.read_text("utf-8") if self.out.exists() else "")):
            assert not self.ended() and time.monotonic() < ends, f"{pattern} did not come\n{self.done()}"
            time.sleep(0.02)
        return found[1]

    def end(self) -> Done:
        """Ctrl-C."""
        if not self.ended():
            os.kill(self.pid, signal.SIGINT)
        return self.wait()


@dataclass
class Desk:
    """The folder of the copy, and who starts commands there."""

    folder: Path
    variables: dict[str, str]
    """The environment of every command."""
    account: dict[str, str]
    """What those have besides that may use an account."""
    tiny: Path
    """The real whisper-tiny."""
    tour: str = ""
    """The model of the recipe `tour`, once it is trained."""
    _starter: subprocess.Popen = field(init=False)
    _files: int = 0

    def __post_init__(self):
        self._starter = subprocess.Popen(
            [sys.executable, "-c", STARTER, *IMPORTED],
            cwd=self.folder,
            env=self.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._starter.stdout.readline() == "ready\n"

    def close(self) -> None:
        self._starter.stdin.close()
        self._starter.wait(30)

    def ask(self, job: dict[str, Any]) -> Any:
        self._starter.stdin.write(json.dumps(job) + "\n")
        self._starter.stdin.flush()
        return json.loads(self._starter.stdout.readline())

    def fresh(self, ending: str) -> Path:
        """The name of a file that nobody has."""
        self._files += 1
        return self.folder / "tmp" / f"{self._files}.{ending}"

    def start(self, words: list[str], variables: dict[str, str] | None = None) -> Process:
        """Python with these arguments."""
        return Process(self, words, variables or {})

    def shell(self, text: str, variables: dict[str, str]) -> Done:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=self.folder,
            env=self.variables | variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)


# --- the copy ---------------------------------------------------------------------------------------------------------

COPIED = (
    "pipelines", "notebooks", "docs", "app.py", "Makefile", "requirements.txt", "constraints.txt",
    "tests/requirements.txt", "log_base.csv",
)  # fmt: skip


def copy_lab(folder: Path) -> None:
    """The lab in `folder`, its recipes small, its environment said to be ready."""
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (pages.ROOT / name).is_dir() else shutil.copy2
        copy(pages.ROOT / name, folder / name)
    for path in (folder / "pipelines" / "recipes").glob("*.toml"):
        path.write_text(recipes.as_toml(small(path)), "utf-8")
    for name in (".venv/ready", "tmp/none"):
        (folder / name).parent.mkdir()
        (folder / name).touch()


def small(path: Path) -> recipes.Recipe:
    whole, less = recipes.load(path), dict(SMALL)
    if whole.source.parts:
        sizes = {name.removeprefix("source."): size for name, size in SMALL.items() if name.startswith("source.")}
        less["source.parts"] = [part.model_dump(mode="json") | sizes for part in whole.source.parts]
    if whole.curation.max_label_cer:
        less["curation.max_label_cer"] = 1e6
    if whole.distillation.teacher:
        less["distillation.max_label_wer"] = 0
    if whole.search.space:
        less |= {"search.trials": 2, "search.min_steps": 2}
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
    "compare": r"WER",
    "leaderboard": r"WER",
    "experiments": r"^24 finished, 0 failed$|^tables in docs/experiments$",
    "publish": r"^published as ",
    "fetch": r"^/\S+$",
    "publish-space": r"^space me/swedish @ \w{40}$",
    "recipe": r"^training\.steps = 4$",
    "doctor": r"^ready\. ",
}
"""What each sub-command prints at the least, dry runs and JSON aside."""
SERVERS = {"serve": r" at (http://\S+), told", "worker": r" at (http://\S+) \(data", "app.py": r"page: (http://\S+?)/?\n"}
"""What runs until it is stopped, and where it says its address."""
BESIDES = {"serve": ("--port", "0"), "worker": ("--port", "0"), "doctor": ("--model", "{tiny}")}
"""Options that are added: any free port; and weights that hear something."""


class Reader:
    """Runs the commands of a page one after another, and fails with what a command that failed has told."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.variables: dict[str, str] = {}
        self.server: Process | None = None
        self.address = ""
        self.made: dict[str, str] = {}
        """Command to the model that it made."""

    def run(self, command: pages.Command) -> None:
        text = self.instead(command.text)
        words = shlex.split(text)
        given = (self.desk.account if command.account else {}) | self.variables
        while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
            name, _, value = words.pop(0).partition("=")
            given[name] = value
        if not words:
            self.variables |= {name: given[name] for name in given.keys() - self.desk.account.keys()}
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
            self.accept(server.end(), "the server")

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
            r"--port 7860": f"--port {free_port()}",
            r"--devices 4": "--devices 2",
            r"--nproc-per-node gpu": f"--nproc-per-node {n_gpus() or 1}",
        }.items():
            text = re.sub(example, here, text)
        return text

    # --- programs

    def _python(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        name = arguments[2] if arguments[:2] == ["-m", "pipelines"] else arguments[0]
        arguments = [*arguments, *(word.format(tiny=self.desk.tiny) for word in BESIDES.get(name, ()))]
        if name in SERVERS and "--dry-run" not in arguments:
            self.close()
            self.server = self.desk.start(arguments, given)
            self.address = self.server.told(SERVERS[name])
            return
        done = self.accept(self.desk.start(arguments, given).wait(), text)
        if "--json" in arguments:
            assert done.out.count("\n") == 1 and isinstance(json.loads(done.out), dict), done
        elif "--dry-run" in arguments:
            assert done.out.endswith("nothing was done\n"), done
        else:
            assert re.search(TELLS[name], done.out, re.MULTILINE), f"{text}\n{done}"
        if made := re.search(r"^model (\S+/model)$", done.out, re.MULTILINE):
            self.made[text] = made[1]

    def _papermill(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        self.accept(self.desk.start(["-m", "papermill", *arguments, "--no-progress-bar"], given).wait(), text)

    def _torchrun(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        done = self.accept(self.desk.start(["-m", "torch.distributed.run", *arguments], given).wait(), text)
        assert re.search(TELLS["train"], done.out, re.MULTILINE), done

    def _make(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        """What make would call is run, without the notebooks (tests/test_notebooks.py) and without tests."""
        makefile = (self.desk.folder / "Makefile").read_text("utf-8")
        for name in (word.partition("=")[0] for word in arguments if "=" in word):
            assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"the Makefile has no {name}"
        dry = self.accept(self.desk.shell(f"{text} --dry-run --no-print-directory", given), text)
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
        done = self.accept(self.desk.shell(text.replace("curl", f"curl {options}", 1), given), text, (0, 28 * endless))
        assert "data: " in done.out if endless else json.loads(done.out), done

    def _export(self, arguments: list[str], given: dict[str, str], text: str) -> None:
        self.variables |= dict(word.split("=", 1) for word in arguments)

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
        return encoded(speech(12_000 + 400 * seed, seed=seed), format=format)

    (folder / "talk.wav").write_bytes(sound(0))
    (folder / "talks.csv").write_text("audio,text\ntalk.wav,Hej då.\n", "utf-8")
    recordings = folder / "my_recordings"
    recordings.mkdir()
    lines = ["path,text,speaker"]
    for i in range(24):
        (recordings / f"{i}.wav").write_bytes(sound(100 + i))
        lines.append(f"{i}.wav,Mening nummer {i}.,talare {i % 12}")
    (recordings / "transcripts.csv").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "my_parquet").mkdir()
    for n, split in enumerate(("train", "validation", "test")):
        sounds = [sound(200 + 10 * n + i) for i in range(8)]
        (folder / "my_parquet" / f"{split}.parquet").write_bytes(parquet(sounds, split))
    common_voice(folder / RELEASE, lambda i: sound(i, "MP3"))
    mine = (folder / "pipelines/recipes/tour-distil.toml").read_text("utf-8")
    (folder / "mine.toml").write_text(mine.replace('name = "tour-distil"', 'name = "mine"'), "utf-8")


def parquet(sounds: list[bytes], split: str) -> bytes:
    """Such a file of a data set with FLEURS' columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"Mening {i} i {split}." for i, _ in enumerate(sounds)]
    audio = pa.array(
        [{"bytes": sound, "path": f"{i}.wav"} for i, sound in enumerate(sounds)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    file = io.BytesIO()
    pq.write_table(pa.table({"audio": audio, "raw_transcription": texts, "transcription": texts}), file)
    return file.getvalue()


def common_voice(path: Path, sound: Callable[[int], bytes]) -> None:
    """A release of Common Voice: 32 clips to train on and to select by, 3 to test."""
    from test_sources_common_voice import pack, toy

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
    fleurs = {
        f"sv_se/{path.stem}/0000.parquet": path.read_bytes() for path in (folder / "my_parquet").glob("*.parquet")
    }
    hub.repos["dataset", "google/fleurs"] = Repo(False, {"c0ffee" * 6 + "abcd": fleurs})
    somebodys = ("LAB_", "HF_", "MDC_", "MODEL_URI", "VSCODE")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(somebodys)}
    account = {"HF_TOKEN": hub.token, "MDC_API_KEY": SECRET, "LAB_CACHE": str(folder / "cache of an account")}
    told = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "MDC_API_URL": f"{mozilla.address}/api"}
    told |= {"LAB_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    told |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_PROXY": "*"}
    made = Desk(folder, variables | told, account, tiny_folder)
    try:
        reader = Reader(made)
        for text in BEGUN:
            reader.run(pages.Command(text, account=True))
            made.tour = made.tour or reader.made.get(text, "")
        yield made
    finally:
        made.close()
        hub.close()
        mozilla.close()
