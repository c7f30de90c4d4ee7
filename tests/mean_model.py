"""A minimal implementation of the fine-tuning interface: one number that is moved towards the mean of others."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.worker.interface import FineTuningInterface, Ignored, Parameter


class MeanModel(FineTuningInterface):
    """Writes each step to a diary, then a checkpoint `[step, value]`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def dataset(self, params, logs_dict):
        if "numbers" not in params:
            raise LabError(f"numbers are missing in {self.folder}/numbers.json and /srv/secret place/numbers.json")
        manifest.write_json(self.folder / "numbers.json", params["numbers"])
        logs_dict["dataset"] = f"{len(params['numbers'])} numbers"

    def train(self, params, logs_dict):
        logs_dict.pop("value", None)
        checkpoint = self.folder / f"checkpoint-{params['run']}.json"
        step, value = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0.0)
        print(f"from step {step}")
        mean = self._mean()
        while step < params.get("steps", 3):
            time.sleep(params.get("pause_s", 0))
            step, value = step + 1, value + (mean - value) / 2
            with (self.folder / "diary").open("a") as diary:
                diary.write(f"{os.getpid()} {step}\n")
            manifest.write_json(checkpoint, [step, value])
            logs_dict.update(step=step, loss=(mean - value) ** 2)
        logs_dict["value"] = value

    def eval(self, params, logs_dict):
        how = params.get("how")
        print(params.get("say", ""))
        if how == "silent":
            time.sleep(120)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "broken":
            raise ZeroDivisionError(f"in {self.folder}/secret.py")
        if how == "no number":
            logs_dict["loss"] = float("nan")
        elif how == "no json":
            logs_dict["loss"] = {1, 2}
        else:
            logs_dict["loss"] = (self._mean() - logs_dict.get("value", 0.0)) ** 2

    def test(self, params, logs_dict):
        time.sleep(params.get("pause_s", 0))
        if params.get("audio") == b"":
            raise LabError(f"{self.folder}/upload is empty")
        return {"value": logs_dict.get("value", 0.0), "bytes": len(params.get("audio", b""))}

    def save(self, params, logs_dict):
        time.sleep(params.get("pause_s", 0))
        manifest.write_json(self.folder / "saved.json", logs_dict["value"])
        return {"saved": True}

    def status(self, params, logs_dict):
        names = [params["only"]] if "only" in params else ("dataset", "step", "loss", "value")
        return {name: logs_dict.get(name) for name in names}

    def check(self, task, params, logs_dict):
        if task == "save" and "value" not in logs_dict:
            raise Ignored("nothing was tuned yet")
        if not isinstance(params.get("steps", 3), int):
            raise LabError("steps must be a whole number")
        return {**params, "run": time.time_ns()} if task == "train" else params

    def forget(self, task, logs_dict):
        if task == "train":
            logs_dict.pop("step", None)

    def parameters(self):
        return {
            "train": [Parameter("steps", "how many", 3, "number")],
            "eval": [Parameter("say", "what the log is told"), Parameter("how", "", choices=("well", "broken"))],
            "test": [Parameter("audio", "a file", kind="file")],
        }

    def _mean(self) -> float:
        numbers = json.loads((self.folder / "numbers.json").read_text())
        return sum(numbers) / len(numbers)


def serve(folder: str) -> None:
    """Print the address of a worker, then serve; a server process calls this."""
    from pipelines.inference.http import server  # not above: the process of every job imports this module
    from pipelines.worker import api, jobs

    work, listening = jobs.Jobs(MeanModel(Path(folder)), Path(folder)), server.listen("127.0.0.1", 0)
    print(server.address(listening), flush=True)
    server.serve(api.make_app(work), listening)
