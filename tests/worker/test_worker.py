"""The fine-tuning worker: a tiny model that keeps to the interface, hostile requests, and a whole life of Whisper's."""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import huggingface_hub
import psutil
import pytest
from log_recorder import record_log
from mean_model import MeanModel
from servers.hub import Hub

from pipelines import recipes
from pipelines.features import pipeline as feature_pipeline
from pipelines.inference import transcriber
from pipelines.inference.api import queue
from pipelines.inference.http import server as api_server
from pipelines.infra import manifest, stores
from pipelines.infra.errors import LabError
from pipelines.infra.redact import redact_text
from pipelines.training import loop as training_loop
from pipelines.training import pipeline as training_pipeline
from pipelines.training import run as training_run
from pipelines.whisper import model as whisper_model
from pipelines.worker import api, event_log, jobs, whisper_tasks
from pipelines.worker.interface import FineTuningInterface, Ignored

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hemlig-å"
LIMITS = queue.Limits(max_mb=1, timeout_s=20)
NUMBERS = {"numbers": [2.0, 4.0, 9.0]}
PATIENCE_S = 180.0


def until(condition: Callable, within_s: float = PATIENCE_S):
    """What `condition` returns, once that is true."""
    ends = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < ends, "it did not come"
        time.sleep(0.01)
    return found


@dataclass
class Client:
    """What a user of the worker does."""

    url: str
    headers: dict = field(default_factory=dict)

    def post(self, task: str, parameters=None, path: str = "/", **more) -> httpx.Response:
        asked = {"task": task} if parameters is None else {"task": task, "parameters": parameters}
        return httpx.post(self.url + path, json=asked, headers=self.headers, timeout=PATIENCE_S, **more)

    def state(self) -> str:
        return httpx.get(f"{self.url}/status", headers=self.headers, timeout=PATIENCE_S).json()["internal_state"]

    def status(self) -> dict:
        return self.post("status").json()["status"]

    def settled(self) -> str:
        """The state when nothing is running any more."""

        def state() -> str:
            now = self.state()
            return "" if now.startswith("Busy") else now

        return until(state)

    def do(self, task: str, parameters=None) -> str:
        """Begin an asynchronous task, and wait for its end."""
        answer = self.post(task, parameters)
        assert answer.status_code == 202, answer.text
        return self.settled()

    def log(self, after: int = 0) -> list[str]:
        """What the event stream tells at once."""
        lines = []
        asked = {"after": str(after)}
        with httpx.stream("GET", f"{self.url}/events", params=asked, headers=self.headers, timeout=20) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            name = ""
            for row in answer.iter_lines():
                name = row.removeprefix("event: ") if row.startswith("event: ") else name
                if row.startswith("data: ") and name == "status":
                    return lines
                if row.startswith("data: "):
                    lines.append(json.loads(row.removeprefix("data: "))["text"])
        raise AssertionError("the stream ended")


@contextlib.contextmanager
def running(folder: Path, model: FineTuningInterface | None = None, token: str = "", limits=LIMITS, hosts=()):
    """A worker for `model` in a thread of this process."""
    work = jobs.Jobs(model or MeanModel(folder), folder)
    listening = api_server.listen("127.0.0.1", 0)
    server = api_server.create_server(api.make_app(work, limits, token, hosts))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Client(api_server.address(listening), {"Authorization": f"Bearer {token}".encode()} if token else {})
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def client(tmp_path):
    with running(tmp_path) as client:
        yield client


def ignored(answer: httpx.Response, status: int, about: str) -> str:
    """The reason of a request that changed nothing: one line, and no place of this machine in it."""
    told = answer.json()
    assert answer.status_code == status, answer.text
    assert told["ignored"] is True
    assert about in told["reason"], told["reason"]
    assert "\n" not in told["reason"]
    assert not re.search(r"Traceback|\.py|(?<![\w….])/\w", told["reason"]), told["reason"]
    return told["reason"]


# --- the interface, and a second model behind it ----------------------------------------------------------------------


def test_interface_requires_all_six_methods():
    tasks = ("dataset", "train", "eval", "test", "save", "status")
    assert FineTuningInterface.__abstractmethods__ == set(tasks)
    half = type("Half", (FineTuningInterface,), {name: getattr(MeanModel, name) for name in tasks if name != "save"})
    with pytest.raises(TypeError, match="save"):
        half()


def test_all_tasks_of_a_custom_model(client, tmp_path):
    assert client.post("status").json()["internal_state"] == "Ready"
    for task in ("train", "eval"):
        assert "send the task dataset first" in ignored(client.post(task), 409, f"{task} was ignored")
    ignored(client.post("save"), 409, "nothing was tuned yet")

    begun = client.post("dataset", NUMBERS)
    assert begun.status_code == 202
    assert begun.json() == {"internal_state": "Busy processing dataset", "started": "dataset"}
    assert client.settled() == "Ready"
    assert client.do("eval") == "Ready"
    assert client.status() == {"dataset": "3 numbers", "step": None, "loss": 25.0, "value": None}, "the fresh model"
    assert client.post("status", {"only": "loss"}).json()["status"] == {"loss": 25.0}

    assert client.do("train", json.dumps({"steps": 2})) == "Ready", "parameters may be JSON in a string"
    assert client.status()["value"] == 3.75
    assert client.do("train", {"steps": 2}) == "Ready"
    assert client.status()["value"] == 3.75, "a new training begins with a fresh model"
    assert client.do("eval") == "Ready"
    assert client.status()["loss"] == 1.5625, "the tuned one"

    tried = client.post("test", path="/task")
    assert tried.status_code == 200
    assert tried.json() == {"internal_state": "Ready", "result": {"value": 3.75, "bytes": 0}}
    form = {"data": {"task": "test", "parameters": "{}"}, "files": {"audio": b"12345"}}
    assert httpx.post(client.url, **form).json()["result"]["bytes"] == 5
    assert client.post("save").json()["result"] == {"saved": True}
    assert json.loads((tmp_path / "saved.json").read_text()) == 3.75
    log = client.log()
    assert log[:3] == ["dataset began", "dataset is done", "eval began"]
    assert "from step 0" in log and log[-1] == "save is done"
    assert client.log(after=len(log) - 2) == log[-2:]
    assert client.log(after=10**9) == log, "a log that was begun anew is told whole"


def test_busy_worker_ignores_all_tasks_but_status(client):
    client.do("dataset", NUMBERS)
    client.post("train", {"steps": 500, "pause_s": 0.02})
    until(lambda: client.status()["step"])
    for task in ("dataset", "train", "eval", "test", "save"):
        started = time.monotonic()
        answer = client.post(task, NUMBERS)
        assert time.monotonic() - started < 5
        assert "busy training" in ignored(answer, 409, f"{task} was ignored")
        assert answer.json()["internal_state"] == "Busy training"
    first = client.status()["step"]
    assert until(lambda: client.status()["step"] > first)
    assert client.post("cancel").json() == {"internal_state": "Ready", "cancelled": "train"}
    assert client.status()["step"] is None, "of what was cancelled no figure is left"
    ignored(client.post("cancel"), 409, "nothing is running")
    client.do("train", {"steps": 2})
    assert client.status()["value"] == 3.75, "what was cancelled is not gone on with"


def test_synchronous_task_can_be_cancelled_and_times_out(tmp_path):
    with running(tmp_path, limits=queue.Limits(max_mb=1, timeout_s=1)) as client, ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.post, "test", {"pause_s": 60})
        until(lambda: client.state() == "Busy testing")
        assert client.post("cancel").json()["cancelled"] == "test"
        ignored(waiting.result(), 409, "test was cancelled")
        ignored(client.post("test", {"pause_s": 60}), 504, "within 1 s")
        assert client.state() == "Ready"
        client.do("dataset", NUMBERS)
        client.do("train", {"steps": 1})
        assert client.post("save", {"pause_s": 1.5}).json() == {"internal_state": "Busy saving", "started": "save"}
        assert client.settled() == "Ready"
        assert (tmp_path / "saved.json").exists(), "it goes on although nobody waits"


def test_errors_are_states_without_paths_or_tracebacks(client, tmp_path, capfd):
    failed = client.do("dataset")
    assert failed == "Error: numbers are missing in …/numbers.json and …/secret place/numbers.json"
    ignored(client.post("eval"), 409, "dataset first")
    assert client.do("dataset", NUMBERS) == "Ready", "an error does not last"
    assert client.do("dataset").startswith("Error: numbers are missing")
    ignored(client.post("eval"), 409, "dataset first")
    assert client.do("dataset", NUMBERS) == "Ready"
    assert client.do("eval", {"how": "broken"}) == "Error: eval failed unexpectedly; see the worker's output"
    assert "secret.py" in capfd.readouterr().err, "for the operator"
    assert client.do("eval", {"how": "killed"}) == "Error: eval was killed; most often memory is short"
    assert client.do("eval", {"how": "no json"}).startswith("Error: eval failed unexpectedly")
    assert client.do("eval", {"how": "no number"}) == "Ready"
    assert client.status()["loss"] is None, "real JSON knows no NaN"
    wrong = httpx.post(client.url, data={"task": "test"}, files={"audio": b""})
    assert (wrong.status_code, wrong.json()) == (422, {"internal_state": "Ready", "reason": "…/upload is empty"})
    ignored(client.post("train", {"steps": "many"}), 400, "steps must be a whole number")
    assert str(tmp_path) not in json.dumps(client.log())


@pytest.mark.slow
def test_stopped_server_stops_job_and_next_one_resumes(tmp_path):
    with running(tmp_path) as client:
        client.do("dataset", NUMBERS)
        client.post("train", {"steps": 40, "pause_s": 0.05})
        until(lambda: client.status()["step"])
        with pytest.raises(LabError, match="another worker runs in"):
            jobs.Jobs(MeanModel(tmp_path), tmp_path)
    with running(tmp_path) as client:
        assert client.state() == "Busy training"
        assert client.settled() == "Ready"
        assert client.status()["step"] == 40
        steps = [int(line.split()[1]) for line in (tmp_path / "diary").read_text().splitlines()]
        assert sorted(set(steps)) == list(range(1, 41)) and len(steps) <= 41, "at most the step that was cut off twice"
        assert "train goes on: the server was ended while it ran" in client.log()


@contextlib.contextmanager
def process_of(folder: Path):
    """A server of its own process for the other model; killed, if it is still there, at the end."""
    code = "import sys, mean_model; mean_model.serve(sys.argv[1])"
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": places}
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        yield psutil.Process(server.pid), Client(server.stdout.readline().strip())
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.mark.slow
def test_killed_server_ends_job_and_next_one_resumes(tmp_path):
    diary = tmp_path / "diary"

    def steps() -> list[int]:
        return [int(line.split()[1]) for line in diary.read_text().splitlines()] if diary.exists() else []

    for with_children in (False, True):
        known = len(steps())
        with process_of(tmp_path) as (server, client):
            if not known:
                client.do("dataset", NUMBERS)
                client.post("train", {"steps": 40, "pause_s": 0.05})
            assert client.state() == "Busy training"
            until(lambda known=known: len(steps()) > known + 3)
            victims = server.children(recursive=True)
            assert victims
            for victim in [server, *(victims if with_children else [])]:
                victim.kill()
            assert gone(victims), "what works for nobody ends"
        written = steps()
        time.sleep(0.2)
        assert steps() == written
    with process_of(tmp_path) as (_, client):
        assert client.settled() == "Ready"
        assert client.status()["step"] == 40
    assert sorted(set(steps())) == list(range(1, 41)) and len(steps()) <= 42, "but for what was cut off, once each"


@pytest.mark.slow
def test_silent_job_ends_with_its_server(tmp_path):
    with process_of(tmp_path) as (server, client):
        client.do("dataset", NUMBERS)
        client.post("eval", {"how": "silent", "say": "now"})
        until(lambda: "now" in client.log())
        victims = server.children(recursive=True)
        server.kill()
        assert victims and gone(victims)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


class Unsendable(MeanModel):
    """What no other process can be given."""

    def check(self, task, params, logs_dict):
        self.lock = threading.Lock()
        return params


def test_unpicklable_model_is_an_error_state(tmp_path):
    with running(tmp_path, Unsendable(tmp_path)) as client:
        for _ in range(2):
            assert client.do("dataset", NUMBERS).startswith("Error: no process can be started: Unsendable")
        ignored(client.post("cancel"), 409, "nothing is running")


def test_unreadable_state_raises_one_line(tmp_path):
    (tmp_path / "state.json").write_text('{"job": {"task": "rm -rf"}}')
    with pytest.raises(LabError, match="cannot be read as the state of a worker: remove it to start again"):
        jobs.Jobs(MeanModel(tmp_path), tmp_path)


def test_log_is_bounded_and_survives_a_torn_line(tmp_path):
    log = event_log.EventLog(tmp_path / "log.jsonl", max_lines=10)
    for number in range(1, 36):
        log.add(f"line {number} " + "x" * 3_000)
    assert [line["id"] for line in log.after(0)] == list(range(26, 36))
    assert len((tmp_path / "log.jsonl").read_bytes().splitlines()) < 20
    assert len(log.after(34)[0]["text"]) == event_log.MAX_CHARACTERS
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"id": 36, "te')
    again = event_log.EventLog(tmp_path / "log.jsonl", max_lines=10)
    again.add("after the cut")
    assert [line["id"] for line in again.after(33)] == [34, 35, 36]


def test_worker_starts_on_a_full_disk(tmp_path, monkeypatch):
    event_log.EventLog(tmp_path / "log.jsonl").add("before")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "write_bytes", full)
    lines = record_log()
    work = jobs.Jobs(MeanModel(tmp_path), tmp_path)
    work.start("dataset", NUMBERS)
    until(lambda: work.state == "Ready")
    work.close()
    assert [line["text"] for line in work.events.after(0)] == ["before", "dataset began", "dataset is done"]
    assert any("state.json cannot be written (No space left on device): free space" in line for line in lines)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model /srv/runs/tour/train-1/model is there", "model …/model is there"),
        ("in '/srv/a b/c.txt', line 3", "in '…/a b/c.txt', line 3"),
        ("no ~/models/x here", "no …/x here"),
        ("at file:///srv/anna/secret/x now", "at …/x now"),
        ("WER/CER of hub://me/whisper-sv, 3 clips/s, see http://127.0.0.1:80/v1/models", None),
        ("steps 1/2/3 and /tmp", None),
    ],
)
def test_log_lines_have_no_local_paths(line: str, told: str | None):
    assert redact_text(line) == (line if told is None else told)
    assert redact_text(f"{ROOT}/pipelines/x.py") == "…/x.py"


# --- who may ask, and what --------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "about"),
    [
        (b"", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'{"task": "train"', "must be a JSON object"),
        (b'{"task": "\xff"}', "must be a JSON object"),
        (b"[" * 200_000, "must be a JSON object"),
        (b'{"task": "eval", "parameters": {"a": NaN}}', "must be a JSON object"),
        (b'{"task": "eval", "parameters": {"a": 1e999}}', "must be a JSON object"),
        (b'{"task": "eval", "parameters": {"a": "\\ud800"}}', "must be a JSON object"),
        (b'{"task": "eval", "parameters": {"a": ' + b"9" * 5_000 + b"}}", "must be a JSON object"),
        (b'{"task": "eval", "parameters": {"a": ' + b"[" * 40 + b"]" * 40 + b"}}", "at most 32 deep"),
        (b"{}", "task must be one of dataset, train, eval, test, save, status, cancel"),
        (b'{"task": "close"}', "task must be one of"),
        (b'{"task": ["train"]}', "task must be one of"),
        (b'{"task": "__init__"}', "task must be one of"),
        (b'{"task": "train", "parameters": "steps=3"}', "parameters must be a JSON object"),
        (b'{"task": "train", "parameters": [1]}', "parameters must be a JSON object"),
        (b'{"task": "train", "params": {}}', "not 'params'"),
    ],
)
def test_invalid_request_is_refused(client, content: bytes, about: str):
    ignored(httpx.post(client.url, content=content, headers=JSON), 400, about)
    assert client.state() == "Ready"


def test_unknown_routes_and_methods_are_refused(client):
    ignored(httpx.get(f"{client.url}/nowhere"), 404, "Not Found")
    ignored(httpx.get(f"{client.url}/../../etc/passwd"), 404, "Not Found")
    ignored(httpx.put(client.url), 405, "Method Not Allowed")
    ignored(httpx.options(client.url, headers={"Origin": client.url}), 405, "Method Not Allowed")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_requests_without_cors_preflight_are_refused(client, kind: str):
    content = json.dumps({"task": "dataset", "parameters": NUMBERS})
    ignored(httpx.post(client.url, content=content, headers={"Content-Type": kind}), 415, "send application/json")
    form = {"task": "dataset", "parameters": json.dumps(NUMBERS)}
    ignored(httpx.post(client.url, data=form, files={"audio": b"1"}), 415, "test alone")
    assert client.state() == "Ready"


BROWSER = [
    ({"Origin": "https://evil.example"}, "another site"),
    ({"Origin": "null"}, "another site"),
    ({"Sec-Fetch-Site": "cross-site"}, "another site"),
    ({"Sec-Fetch-Site": "same-site"}, "another site"),
    ({"Host": "evil.example", "Origin": "http://evil.example"}, "unknown host"),
    ({"Host": "127.0.0.1.evil.example"}, "unknown host"),
    ({"Host": "localhost@evil.example:80"}, "unknown host"),
    ({"Host": "[::1"}, "unknown host"),
]


@pytest.mark.parametrize(("headers", "about"), BROWSER)
def test_other_site_can_neither_start_nor_read(client, headers: dict, about: str):
    refused = httpx.post(client.url, json={"task": "dataset", "parameters": NUMBERS}, headers=headers)
    ignored(refused, 403, about)
    assert "internal_state" not in refused.json()
    assert httpx.get(f"{client.url}/status", headers=headers).status_code == 403
    assert not [name for name in refused.headers if name.startswith("access-control")]
    assert client.state() == "Ready"


def test_allowed_hosts_and_same_origin_are_accepted(tmp_path):
    with running(tmp_path, hosts=["Lab.example"]) as client:
        for host in ("lab.example", "localhost:1", "[::1]:80", "192.168.1.10:8001"):
            own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
            assert httpx.post(client.url, json={"task": "status"}, headers=own).status_code == 200


def test_only_the_page_is_open_without_the_token(tmp_path):
    with running(tmp_path, token=TOKEN) as client:
        assert client.do("dataset", NUMBERS) == "Ready"
        for wrong in ({}, {"Authorization": "Bearer other"}, {"Authorization": f"Basic {TOKEN}".encode()}):
            answers = [httpx.post(client.url, json={"task": "status"}, headers=wrong)]
            for path in ("status", "tasks", "events", "nowhere"):
                answers.append(httpx.get(f"{client.url}/{path}", headers=wrong))
            for told in answers:
                ignored(told, 401, "requires its token")
                assert told.headers["www-authenticate"] == "Bearer"
                assert told.json().keys() == {"ignored", "reason"}
        assert "numbers" not in httpx.get(client.url).text
        outside = {**client.headers, "Host": "lab.example", "Origin": "https://lab.example"}
        assert httpx.get(f"{client.url}/status", headers=outside).status_code == 200, "behind a proxy"
        cross = {**client.headers, "Sec-Fetch-Site": "cross-site"}
        assert httpx.get(f"{client.url}/status", headers=cross).status_code == 403


def test_large_body_is_refused_despite_its_length_header(client):
    def body():
        for _ in range(400):
            yield b" " * 10_000

    with contextlib.suppress(httpx.WriteError):
        ignored(httpx.post(client.url, content=body(), headers=JSON), 413, "at most 1 MB")
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000001\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")
    ignored(httpx.post(client.url, data={"task": "test"}, files={"audio": bytes(1_000_000)}), 413, "at most 1 MB")


def test_many_slow_requests_leave_status_available(client):
    host, port = client.url.removeprefix("http://").split(":")
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with contextlib.ExitStack() as held:
        for _ in range(16):
            held.enter_context(socket.create_connection((host, int(port)), timeout=20)).sendall(head)
        until(lambda: client.post("status").status_code == 503)
        assert client.state() == "Ready", "which is asked without a body"
    until(lambda: client.post("status").status_code == 200)


def test_open_event_stream_does_not_block_shutdown(tmp_path):
    with ThreadPoolExecutor() as pool, running(tmp_path) as client:

        def listen() -> str:
            with httpx.stream("GET", f"{client.url}/events", timeout=30) as answer:
                return "".join(answer.iter_text())

        told = pool.submit(listen)
        client.do("dataset", NUMBERS)
        ended = time.monotonic()
    assert time.monotonic() - ended < 6
    assert "id: 2\nevent: line\n" in told.result() and "dataset is done" in told.result()


def test_page_policy_allows_only_its_script(client):
    page = httpx.get(client.url)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy
    assert not re.search(r"https?://|<\w[^>]* on\w+=", page.text)
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|eval\(", page.text)
    assert page.text.count("<script>") == page.text.count("<style>") == 1 and " style=" not in page.text
    for name in ("x-frame-options", "x-content-type-options", "cache-control"):
        assert name in page.headers
    offered = {one["task"]: one["parameters"] for one in httpx.get(f"{client.url}/tasks").json()["tasks"]}
    assert list(offered) == ["dataset", "train", "eval", "test", "save"]
    assert offered["train"][0]["default"] == 3


# --- Whisper: what clients may ask for --------------------------------------------------------------------------------


@pytest.fixture
def tuner(toy_settings, tmp_path):
    """Whisper's worker, that offers another data set, another language and two stores."""
    other = toy_settings({"name": "other", "source.seed": 8, "curation.leaks": "drop", "training.steps": 3})
    return whisper_tasks.WhisperFineTuning(
        toy_settings(),
        tmp_path,
        datasets={"other": other},
        languages=("da",),
        stores={"fixed": str(tmp_path / "one"), "many": f"{tmp_path}/many/{{name}}"},
    )


PREPARED = {"dataset": "toy", "language": "sv"}


def test_tuned_model_is_usable_without_its_data_set(tuner):
    gone = {"dataset": "mine", "language": "fi", "model_uri": "x"}
    assert tuner.check("save", {}, dict(gone)) == {"store": "fixed", "name": ""}
    assert tuner.check("test", {"audio": "AAAA"}, dict(gone))["language"] == "sv"
    with pytest.raises(Ignored, match="is mine:fi; send the task dataset"):
        tuner.check("train", {}, dict(gone))
    with pytest.raises(LabError, match="dataset must be one of toy, other"):
        tuner.check("save", {"dataset": "mine"}, dict(gone))


def test_relative_folder_keeps_the_unfinished_run(toy_settings, toy_cache, toy_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuner, recipe = whisper_tasks.WhisperFineTuning(toy_settings(), Path("worker")), toy_settings()
    folder = tuner.folder / "tuned" / "1a2b"
    run = training_pipeline.run_folder(recipe, toy_cache, whisper_model.resolve(str(toy_model)), folder)
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    tuner._remove_other_runs(folder, recipe, toy_cache)
    assert run.exists()
    assert tuner.stores["saved"].startswith(str(tmp_path))


def test_private_paths_with_spaces_are_redacted(toy_settings, tmp_path):
    drive = "/content/drive/My Drive/anna/models"
    given = {"drive": f"{drive}/{{name}}", "near": "models/{name}", "hub": "hub://me/{name}"}
    worker = whisper_tasks.WhisperFineTuning(toy_settings(), tmp_path, stores=given)
    told = redact_text(f"publishing models to {drive}/tour-1", *worker.private_paths())
    assert told == "publishing models to …/tour-1"


@pytest.mark.parametrize(
    "settings", [{"distillation.teacher": "run:tour"}, {"curation.max_label_cer": 0.5, "curation.label_model": "run:a"}]
)
def test_recipe_that_needs_another_run_is_refused(toy_settings, tmp_path, settings):
    with pytest.raises(LabError, match="has no access to other runs.*take another recipe"):
        whisper_tasks.WhisperFineTuning(toy_settings(settings), tmp_path)


def test_parameters_have_documented_defaults(tuner):
    told = tuner.check("train", {}, dict(PREPARED))
    assert told.pop("run")
    assert told == {**PREPARED, "epochs": 1.0, "learning_rate": 1e-5, "warmup_ratio": 0.25}
    assert tuner.check("dataset", {}, {}) == PREPARED
    assert tuner.check("dataset", {"epochs": 3, "language": "Danish", "dataset": "other"}, dict(PREPARED)) == {
        "dataset": "other", "language": "da"
    }  # fmt: skip
    offered = {parameter.name: parameter for parameter in tuner.parameters()["train"]}
    assert [offered[name].default for name in ("epochs", "learning_rate", "warmup_ratio")] == [1.0, 1e-5, 0.25]


@pytest.mark.parametrize(
    ("task", "params", "about"),
    [
        ("dataset", {"dataset": "../../etc"}, "dataset must be one of toy, other: others are not offered"),
        ("dataset", {"dataset": "hub://me/corpus"}, "dataset must be one of"),
        ("dataset", {"dataset": "tour"}, "dataset must be one of"),
        ("dataset", {"dataset": "x.toml"}, "dataset must be one of"),
        ("dataset", {"language": "de"}, "language must be one of sv, da"),
        ("dataset", {"language": "Tysk"}, "language must be one of Whisper's"),
        ("dataset", {"language": "auto"}, "language must be one of Whisper's"),
        ("dataset", {"language": ["sv"]}, "language: "),
        ("dataset", {"dataset": {"path": "/"}}, "dataset: "),
        ("dataset", {"source.path": "/etc"}, "there is no parameter 'source.path'"),
        ("train", {"epoch": 1}, "there is no parameter 'epoch'; there are epochs, learning_rate"),
        ("train", {"run": "../../x"}, "there is no parameter 'run'"),
        ("train", {"epochs": 0}, "epochs: "),
        ("train", {"epochs": 1e9}, "epochs: "),
        ("train", {"epochs": True}, "epochs: "),
        ("train", {"epochs": "1"}, "epochs: "),
        ("train", {"learning_rate": -1}, "learning_rate: "),
        ("train", {"learning_rate": float("inf")}, "learning_rate: "),
        ("train", {"warmup_ratio": 1.1}, "warmup_ratio: "),
        ("eval", {"split": "train"}, "split: "),
        ("save", {"store": "hub://evil/x"}, "store must be one of fixed, many"),
        ("save", {"store": "many", "name": "../up"}, "name: "),
        ("save", {"store": "many", "name": "a/b"}, "name: "),
        ("save", {"store": "many", "name": "a..b"}, "name: "),
        ("save", {"store": "many", "name": "/etc"}, "name: "),
        ("test", {}, "audio is missing"),
        ("test", {"audio": "not base64!"}, "audio must be a file's bytes as base64"),
        ("test", {"audio": "/etc/passwd"}, "audio must be"),
        ("test", {"audio": ["x"]}, "audio"),
    ],
)
def test_only_allowed_parameters_are_accepted(tuner, task: str, params: dict, about: str):
    with pytest.raises(LabError) as refused:
        tuner.check(task, params, {**PREPARED, "model_uri": "there"})
    assert str(refused.value).startswith(about)
    assert not isinstance(refused.value, Ignored)


def test_task_that_cannot_run_now_is_ignored(tuner):
    with pytest.raises(Ignored, match="nothing was tuned yet"):
        tuner.check("save", {}, dict(PREPARED))
    with pytest.raises(Ignored, match="the data set that is prepared is toy:sv; send the task dataset to change it"):
        tuner.check("train", {"dataset": "other"}, dict(PREPARED))


def test_new_training_removes_earlier_results(tuner):
    scores = {"base": {"wer": 0.9}, "tuned": {"wer": 0.5}}
    logs = {**PREPARED, "model_uri": "old", "model": "toy-1", "wer": 0.5, "progress_percent": 100.0, "scores": scores}
    tuner.check("train", {}, logs)
    assert logs == {**PREPARED, "scores": {"base": {"wer": 0.9}}}
    with pytest.raises(Ignored, match="nothing was tuned"):
        tuner.check("save", {}, logs)


def test_dataset_task_reports_percent(tuner, toy_cache, monkeypatch):
    told: list[float] = []

    class Told(dict):
        def __setitem__(self, name, value):
            super().__setitem__(name, value)
            told.append(value)

    def features(recipe, on_clips, **_):
        for n in (10, 20, 10):
            on_clips(n, 40)
        return toy_cache

    monkeypatch.setattr(feature_pipeline, "run", features)
    tuner.dataset(dict(PREPARED), Told())
    assert told == [25.0, 75.0, 100.0]
    told.clear()
    monkeypatch.setattr(feature_pipeline, "run", lambda recipe, on_clips, **_: on_clips(7, 0) or toy_cache)
    logs = Told()
    tuner.dataset(dict(PREPARED), logs)
    assert not told, "of a corpus that does not tell its size there is no share"
    assert logs["progress_percent"] == 100.0


def test_cancelled_training_leaves_no_figures(tuner):
    logs = {**PREPARED, "scores": {"base": {"wer": 0.9}}}
    whisper_tasks._progress(logs, 10).on_start(4, 10)
    whisper_tasks._progress(logs, 10).on_log(
        [{"step": 4, "loss": 2.0, "learning_rate": 1e-5}, {"step": 4, "eval_wer": 0.7}]
    )
    assert tuner.status({}, logs)["wer"] == 0.7
    tuner.forget("train", logs)
    assert logs == {**PREPARED, "scores": {"base": {"wer": 0.9}}}


def test_changed_settings_restart_training_with_a_line(tuner, toy_cache, monkeypatch):
    """The worker was killed, and started again with another recipe's settings."""
    made = training_run.TrainedModel("there", "1a2b", 1, {"eval_wer": 0.5}, [], 1.0)
    monkeypatch.setattr(feature_pipeline, "open_cache", lambda *args, **_: toy_cache)
    monkeypatch.setattr(
        training_pipeline, "run", lambda recipe, cache, *, runs, progress: ran.append((recipe, runs)) or made
    )
    ran, log = [], record_log()
    params = tuner.check("train", {}, dict(PREPARED))

    def trained() -> tuple[Path, str]:
        tuner.train(params, {"cache_uri": "there"})
        recipe, home = ran[-1]
        base = whisper_model.resolve(recipe.model.base)
        run = training_pipeline.run_folder(recipe, toy_cache, base, home)
        run.mkdir(parents=True, exist_ok=True)
        training_run.refuse_other_run(run, training_run.run_identity(recipe, toy_cache, base))
        said = "\n".join(log)
        log.clear()
        return run, said

    first, _ = trained()
    again, said = trained()
    assert again == first and first.is_dir()
    assert "starts again" not in said
    tuner.recipe = tuner.datasets["toy"] = recipes.resolve(
        tuner.recipe.model_dump(mode="json"), {"training.weight_decay": 0.5}
    )
    other, said = trained()
    assert other != first and not first.exists(), "nothing of it is left"
    assert "starts again: the worker's settings have changed (training.weight_decay: wanted 0.5, found 0.0" in said


def test_epochs_and_warmup_ratio_become_steps(toy_settings, toy_cache):
    assert training_loop.steps_per_epoch(toy_settings(), toy_cache) == 12  # 48 clips, 4 to a batch
    accumulated = toy_settings({"training.batch_size": 5, "training.accumulation": 3})
    assert training_loop.steps_per_epoch(accumulated, toy_cache) == 4
    told = whisper_tasks.settings_of({"epochs": 1.5, "learning_rate": 2e-5, "warmup_ratio": 0.25}, 11)
    assert told == {"training.steps": 17, "training.learning_rate": 2e-5, "training.warmup_steps": 5}
    assert whisper_tasks.settings_of({"epochs": 1e-9, "learning_rate": 1, "warmup_ratio": 0}, 11)["training.steps"] == 1


def test_invalid_operator_settings_are_refused(toy_settings, tmp_path):
    with pytest.raises(LabError, match="trains on no held-out speaker.*curation.leaks"):
        whisper_tasks.WhisperFineTuning(toy_settings({"curation.leaks": "ignore"}), tmp_path)
    with pytest.raises(LabError, match="no store for ftp://x"):
        whisper_tasks.WhisperFineTuning(toy_settings(), tmp_path, stores={"ftp": "ftp://x"})
    with pytest.raises(LabError, match="no other braces"):
        whisper_tasks.WhisperFineTuning(toy_settings(), tmp_path, stores={"odd": "hub://me/{model}"})


def test_other_data_set_drops_the_tuned_model(tuner, toy_cache, monkeypatch):
    lines = record_log()
    logs = {**PREPARED, "cache_digest": "1", "model_uri": "old", "model": "toy-1", "wer": 0.5, "scores": {"tuned": {}}}
    monkeypatch.setattr(feature_pipeline, "run", lambda recipe, **_: toy_cache)
    tuner.dataset({"dataset": "other", "language": "sv"}, logs)
    assert not {"model_uri", "model", "wer", "scores"} & logs.keys()
    assert any("no longer used" in line for line in lines)
    logs |= {"model_uri": "new", "wer": 0.4}
    tuner.dataset({"dataset": "other", "language": "sv"}, logs)
    assert (logs["model_uri"], logs["wer"]) == ("new", 0.4), "the same data set again changes nothing"


def test_recording_is_transcribed_or_refused(
    tuner, toy_model, one_thread, encoded, speech, monkeypatch: pytest.MonkeyPatch
):
    short = functools.partial(transcriber.Transcriber, max_new_tokens=8)  # a toy writes nonsense for as long as it may
    monkeypatch.setattr(transcriber, "Transcriber", short)
    wav = encoded(speech(2 * 16_000))
    heard = short(whisper_model.resolve(str(toy_model)), "sv", "transformers").transcribe(wav)
    asked = tuner.check("test", {"audio": f"data:audio/wav;base64,{base64.b64encode(wav).decode()}"}, dict(PREPARED))
    assert asked == {"audio": wav, "language": "sv"}
    assert tuner.test(asked, {}) == {
        "text": heard.text, "confidence": round(heard.confidence, 4), "duration_s": 2.0, "model": "base"
    }  # fmt: skip
    assert tuner.test(asked, {"model_uri": str(toy_model)})["model"] == "tuned"
    tuner.max_duration_s = 1.0
    for sound, about in ((wav, "the recording is too long: 2.0 s"), (b"RIFF", "the file is not audio")):
        with pytest.raises(LabError, match=about):
            tuner.test({"audio": sound, "language": "sv"}, {})


# --- Whisper: a whole life over HTTP ----------------------------------------------------------------------------------

EPOCHS = 2.5
"""30 steps, with a checkpoint after every tenth."""


class Worker:
    """`python -m pipelines worker` as a process of its own."""

    def __init__(self, runs: Path, *options: str):
        command = [sys.executable, "-m", "pipelines", "worker", "--runs", str(runs), "--port", "0", "--json", *options]
        self.errors = (runs.parent / "worker.err").open("a+")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LAB_API_TOKEN": TOKEN}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        line = self.process.stdout.readline()
        assert line, (runs.parent / "worker.err").read_text()
        self.told = json.loads(line)
        self.client = Client(self.told["url"], {"Authorization": f"Bearer {TOKEN}".encode()})

    def kill(self) -> list[psutil.Process]:
        """SIGKILL; the children that it had."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        return children

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(30)
        self.errors.close()


@pytest.mark.slow
def test_killed_worker_trains_the_weights_of_an_undisturbed_run(
    toy_recipe, toy_model, toy_settings, toy_cache, one_thread, tmp_path, monkeypatch
):
    runs, hub = tmp_path / "runs", Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    toy = ("--recipe", str(toy_recipe), "--set", f"model.base={toy_model}", "--set", "evaluation.max_new_tokens=3")
    toy += ("--set", "training.eval_every=10", "--store", "hub=hub://lab/{name}")
    toy += ("--store", f"saved={runs / 'worker' / 'saved' / '{name}'}")
    shutil.copytree(toy_cache.folder, runs / "worker" / "features" / toy_cache.folder.name)  # else 5 s more

    def checkpoints() -> list[int]:
        sealed = (runs / "worker" / "tuned").glob("*/toy/train-*/checkpoints/checkpoint-*/manifest.json")
        return sorted(int(path.parent.name.split("-")[1]) for path in sealed)

    worker = Worker(runs, *toy)
    try:
        client = worker.client
        assert worker.told["state"] == "Ready" and worker.told["token"] is True
        assert client.do("dataset") == "Ready"
        assert client.status()["dataset"] == "toy:sv"
        assert client.status()["clips"] == {"train": 48, "validation": 8, "test": 12}
        assert client.do("eval") == "Ready"
        before = client.status()["scores"]
        assert before["base"]["clips"] == 12 and before.keys() == {"base"}

        train = {"epochs": EPOCHS, "learning_rate": 1e-3, "warmup_ratio": 0.1}
        assert client.post("train", train).json() == {"internal_state": "Busy training", "started": "train"}
        told = until(lambda: (told := client.status())["loss"] and told)
        assert 0 < told["progress_percent"] < 100 and 0 < told["epoch"] < EPOCHS and 0 < told["learning_rate"] <= 1e-3
        until(checkpoints)
        assert gone(worker.kill()), "a job does not outlive its server"
        kept = max(checkpoints())
        assert not list((runs / "worker").glob("tuned/*/toy/train-*/model/manifest.json")), "it was not done yet"

        worker = Worker(runs, *toy)
        client = worker.client
        assert worker.told["state"] == "Busy training"
        assert client.settled() == "Ready"
        log = client.log()
        assert f"resuming from checkpoint-{kept}" in log
        assert sum(line.startswith("starting from ") for line in log) == 1
        told = client.status()
        assert (told["progress_percent"], told["epoch"]) == (100.0, EPOCHS)
        (tuned,) = (runs / "worker" / "tuned").glob("*/toy/train-*/model")
        assert told["model"] == tuned.parent.name.replace("train", "toy")

        assert client.do("eval", {"split": "test"}) == "Ready"
        scores = client.status()["scores"]
        assert scores["base"] == before["base"] and scores["tuned"]["clips"] == 12

        assert client.post("save", {"store": "saved"}).json()["result"] == {
            "store": "saved", "model": told["model"], "name": told["model"]
        }  # fmt: skip
        published = client.post("save", {"store": "hub", "name": "mine"}).json()["result"]
        assert (published["store"], client.status()["saved"]) == ("hub", published)
        assert published["uri"].startswith("hub://lab/mine@")
        saved = runs / "worker" / "saved" / told["model"]
        assert manifest.problem(saved) is None
        said = json.dumps([client.log(), client.post("status").json()])
        assert str(tmp_path) not in said and str(toy_model) not in said and "Traceback" not in said
    finally:
        worker.stop()
    assert worker.process.returncode == 0
    output = (tmp_path / "worker.err").read_text()
    assert "hemlig" not in output and hub.token not in output
    fetched = stores.open_store(published["uri"]).fetch(published["uri"], into=tmp_path)

    settings = {"epochs": EPOCHS, "learning_rate": 1e-3, "warmup_ratio": 0.1}
    plain = toy_settings({"evaluation.max_new_tokens": 3, "training.eval_every": 10})
    alone = recipes.resolve(plain.model_dump(mode="json"), whisper_tasks.settings_of(settings, 12))
    base = whisper_model.resolve(str(toy_model))
    whole = training_loop.train(training_run.TrainingRun(alone, toy_cache, base, tmp_path / "alone"))
    assert whole.digest == manifest.read(tuned)["digest"]
    for name in ("model.safetensors", "generation_config.json"):
        for kept in (saved, fetched):
            assert manifest.sha256(kept / name) == manifest.sha256(Path(whole.uri) / name), "not one bit differs"


def test_dry_run_prints_the_offered_choices(capsys, monkeypatch, toy_recipe, tmp_path):
    from pipelines import __main__ as cli

    options = ["--recipe", str(toy_recipe), "--store", "hub=hub://me/{name}", "--runs", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["pipelines", "worker", *options, "--dry-run"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    said = capsys.readouterr().out
    assert "on 127.0.0.1 port 8001, data sets toy; stores hub" in said and "nothing was done" in said
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(sys, "argv", ["pipelines", "worker", *options, "--store", "nothing"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--store takes NAME=URI" in capsys.readouterr().err
