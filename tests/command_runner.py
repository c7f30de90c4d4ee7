"""Run the commands of a page in a copy of the lab, and check what each of them prints."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

import pages
from lab_copy import TIMEOUT_S, LabCopy, Result, RunningCommand
from servers.loopback import free_port

DISTIL = "python -m pipelines distill --recipe tour-distil"
OUTPUT = {
    "features": r"^cache \S+\ndigest \w{12}, ",
    "train": r"^model \S+/model\nbest at step ",
    "distill": r"^model \S+/model\nbest at step ",
    "merge": r"^validation WER .*\n(  .*\n)+(warning: .*\n)?model \S+/model\nNext: ",
    "evaluate": r" on (test|validation)\n  normalised  .*\n  as written  .*\ndecoded by .*\n(stock pipeline .*\n)?"
    r"(note: .*\n)*report \S+\n",
    "export": r"^(test|validation), \d+ clips; ",
    "production": r"^served by ctranslate2 .*without torch and transformers: ",
    "sweep": r"^best: trial \d+, validation WER ",
    "transcribe": r"^model ",
    "archive": r"^archive \S+: \d+ recordings, ",
    "compare": r"^Next: ",
    "leaderboard": r"^Next: ",
    "run": r"^model    \S+/model$",
    "notebooks": r"^9 notebooks in \S+/notebooks/sv\n",
    "experiments": r"^(12|7) finished, 0 failed$|^tables in docs/experiments(/ablation)?$",
    "publish": r"^published as ",
    "fetch": r"^(/.+/fetched|my_backup)/whisper-sv\S*$",
    "publish-space": r"^space me/swedish @ \w{40}$",
    "recipe": r"^training\.steps = 4$",
    "doctor": r"^ready\. |^  total .* fits into ",
    "project": r"^Next: ",
}
"""A pattern that each command prints, except with --dry-run or --json."""
SERVERS = {
    "serve": r" at (http://[\w.:]+)",
    "worker": r" at (http://[\w.:]+)",
    "record": r"page: (http://\S+?)/?\n",
    "review": r"page: (http://\S+?)/?\n",
    "app.py": r"page: (http://\S+?)/?\n",
}
"""Commands that run until they are stopped, and the pattern with their address."""
ADDED_OPTIONS = {
    "serve": " --port 0",
    "worker": " --port 0",
    "review": " --clips 4",
    "doctor": " --model {tiny}",
    "experiments": " --seeds 42",
    "ray": " --block --node-ip-address=127.0.0.2 --num-cpus=1 --object-store-memory=80000000",
}
"""Any free port; weights that transcribe speech; one seed instead of two; a Ray node on loopback that ends with us."""
NO_EFFECT = re.compile(r"make (app|run|test|lint)\b|.* --dry-run$")
"""Commands that change no file here: they are run on the first page only."""


class CommandRunner:
    """Run commands one after another; a command that fails raises AssertionError with its output."""

    def __init__(self, lab: LabCopy):
        self.lab = lab
        self.variables: dict[str, str] = {}
        self.server: RunningCommand | None = None
        self.address = ""
        self.models: dict[str, str] = {}
        """Command to the model that it trained."""
        self.ray_port = free_port()
        self.ray_nodes: list[RunningCommand] = []

    def run(self, command: pages.Command) -> None:
        """Run a command; variables of the shell are kept for the next ones."""
        text = self.substitute(command.text)
        words = shlex.split(text)
        variables = (self.lab.account if command.account else {}) | self.variables
        while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
            words.pop(0)
        if not words or words[0] == "export":
            self.variables |= dict(word.split("=", 1) for word in shlex.split(text.removeprefix("export ")))
            return
        method = getattr(self, f"_{Path(words[0]).name}", None)
        assert method, f"no method runs {words[0]}"
        started = time.monotonic()
        method(words[1:], variables, text)
        print(f"{time.monotonic() - started:.1f} s: {text}")

    def close(self) -> None:
        """Stop the server and the Ray nodes."""
        if self.server:
            server, self.server = self.server, None
            self.check(server.interrupt(), server.text)
        for node in self.ray_nodes:
            node.process.terminate()
        for node in self.ray_nodes:
            node.wait()

    def finish(self, text: str, variables: dict[str, str]) -> Result:
        """Run a command to its end."""
        return self.check(self.lab.start(text, variables).wait(), text)

    def check(self, result: Result, text: str, codes: tuple[int, ...] = (0,)) -> Result:
        """Return the result. Raise AssertionError for another exit code or a traceback."""
        assert result.code in codes, f"{text}\n{result}"
        assert "Traceback" not in result.out + result.err, f"{text}\n{result}"
        return result

    def substitute(self, text: str) -> str:
        """Return the command with real values in place of its examples."""
        tour = Path(self.lab.tour or self.lab.folder / "runs/tour/none/model")
        run = tour.parent.relative_to(self.lab.folder)
        saved = sorted((self.lab.folder / "runs/worker/saved").glob("tour-*"))
        for example, value in {
            r"MDC_API_KEY=\.\.\.": f"MDC_API_KEY={self.lab.account['MDC_API_KEY']}",
            r"runs/tour/train-1a2b3c4d5e6f\b": str(run),
            r"runs/worker/saved/tour-1a2b3c4d5e6f\b": str(saved[-1]) if saved else "",
            r"\b(MODEL|TEACHER) ": f"{run}/model ",
            r"\bSTUDENT-2 ": f"{self.models.get(DISTIL)} ",
            r"\bSTUDENT-1 ": f"{self.models.get(f'{DISTIL} --set distillation.decoder_layers=1')} ",
            r"http://127\.0\.0\.1:800\d": self.address,
            r"--host 0\.0\.0\.0": "--host 127.0.0.1",
            r"--port=6379": f"--port={self.ray_port}",
            r"192\.168\.1\.10:6379": f"127.0.0.2:{self.ray_port}",
            r"--port 7860": f"--port {free_port()}",
            r"--devices 4": "--devices 2",
            r"max_label_cer=0\.6": "max_label_cer=1",  # the toy transcribes nothing correctly
            r"search\.trials=12": "search.trials=3",
            r"source\.validation=750": "source.validation=9",
            r"training\.steps=400": "training.steps=40",
            r"--nproc-per-node gpu": f"--nproc-per-node {gpu_count() or 1}",
        }.items():
            text = re.sub(example, value, text)
        return text

    # --- one method per program

    def _python(self, arguments: list[str], variables: dict[str, str], text: str) -> None:
        name = arguments[2] if arguments[:2] == ["-m", "pipelines"] else arguments[0]
        started = text + ADDED_OPTIONS.get(name, "").format(tiny=self.lab.tiny)
        if name in SERVERS and "--dry-run" not in arguments:
            return self._start_server(name, started, variables)
        result = self.finish(started, variables)
        if "--json" in arguments:
            assert result.out.count("\n") == 1 and isinstance(json.loads(result.out), dict), result
        elif "--dry-run" in arguments:
            assert result.out.endswith("nothing was done\n"), result
        else:
            assert re.search(OUTPUT[name], result.out, re.MULTILINE), f"{text}\nexpected {OUTPUT[name]}\n{result}"
        if model := re.search(r"^model (\S+/model)$", result.out, re.MULTILINE):
            self.models[text] = model[1]
        return None

    def _start_server(self, name: str, text: str, variables: dict[str, str]) -> None:
        """Start a server and request its page; it runs until the next server starts or the page ends."""
        import httpx

        self.close()
        self.server = self.lab.start(text, variables)
        self.address = self.server.wait_for(SERVERS[name])
        answer = httpx.get(self.address + ("/health" if name == "serve" else ""), timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer

    def _papermill(self, arguments: list[str], variables: dict[str, str], text: str) -> None:
        result = self.finish(f"{text} --no-progress-bar", variables)
        assert "unknown parameter" not in result.err, result  # papermill itself only warns

    def _torchrun(self, arguments: list[str], variables: dict[str, str], text: str) -> None:
        result = self.finish(text, variables)
        assert re.search(OUTPUT["train"], result.out, re.MULTILINE), result

    def _make(self, arguments: list[str], variables: dict[str, str], text: str) -> None:
        """Run what make would run, without the notebooks (test_notebooks.py runs them), tests and linters."""
        makefile = (self.lab.folder / "Makefile").read_text("utf-8")
        for name in (word.partition("=")[0] for word in arguments if "=" in word):
            assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"the Makefile has no {name}"
        plan = self.finish(f"{text} --dry-run --no-print-directory", variables)
        lines = [line for line in plan.out.splitlines() if re.match(r"\.venv/bin/python (-m pipelines|app\.py)", line)]
        assert lines or arguments[0].startswith(("test", "lint", "solutions", "pages")), plan
        for line in lines:
            self.run(pages.Command(line + (" --dry-run" if "pipelines run" in line else "")))

    def _pip(self, arguments: list[str], variables: dict[str, str], text: str) -> None:
        """Check instead of installing: requirements.txt names the package, and a matching version is installed."""
        from importlib.metadata import version

        from packaging.requirements import Requirement

        listed = (pages.ROOT / "requirements.txt").read_text("utf-8")
        assert arguments[0] == "install", text
        for word in arguments[1:]:
            requirement = Requirement(word)
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w.])", listed), f"requirements.txt does not name {word}"
            assert version(requirement.name) in requirement.specifier, word

    def _curl(self, arguments: list[str], variables: dict[str, str], text: str) -> None:
        """Wait until a worker has finished its job, then send the request; read an endless stream for one second."""
        while (state := self.worker_state()).startswith("Busy"):
            time.sleep(0.05)
        assert state in ("Ready", ""), state
        is_stream, endless = "-N" in arguments, arguments[-1].endswith("/events")
        options = "-sS --fail-with-body" + (" --max-time 1" if endless else "")
        result = self.lab.start(text.replace("curl", f"curl {options}", 1), variables).wait()
        self.check(result, text, (0, 28 * endless))
        assert "data: " in result.out if is_stream else json.loads(result.out), result

    def _ray(self, arguments: list[str], variables: dict[str, str], text: str) -> None:
        """Start a node that runs until the end of the page; run any other command to its end."""
        if arguments[0] != "start":
            self.finish(text, variables)
            return
        self.ray_nodes.append(self.lab.start(text + ADDED_OPTIONS["ray"], variables))
        self.ray_nodes[-1].wait_for(r"(Ray runtime started)")

    def worker_state(self) -> str:
        """Return the state of the worker; empty for other servers."""
        import httpx

        answer = httpx.get(f"{self.address}/status", timeout=TIMEOUT_S)
        return answer.json()["internal_state"] if answer.status_code == 200 else ""


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
