"""The HTTP API under load: requests per second and response times for 1 to 50 users without pauses.

    python benchmarks/serving.py --model runs/tour/train-.../model     30 s for each number of users
    python benchmarks/serving.py --soak-minutes 10 --users 10          memory over time, and failed requests
    python benchmarks/serving.py --soak-minutes 30 --users 20 --microphones 5       the app beside the API
    python benchmarks/serving.py --smoke                               seconds, to check that it runs

The server runs in another process on the loopback interface (`python -m pipelines serve`), the users are locust's
(benchmarks/locustfile.py), and both share the cores of this machine. The clips are the first of the tour's test split,
2 s on average, sent as wav. A user sends the next clip when it has the transcript of the last, so with more than one
user the response time is mostly waiting time. `failed` counts every request without a transcript.

The last line is one JSON object: `users` (for each number: `requests`, `failed`, `per_s`, `p50_s`, `p95_s`) and
`peak_mb` of the server; with --soak-minutes `requests`, `failed`, `minutes`, `rss_mb` (every ten seconds) and `growth`
(the median of the last quarter over that of the second; the first is warm-up); always `model`, `engine`, `cores` and
`load` (of the machine at the start).

--microphones also starts app.py and opens this many live microphones in it. Each speaks some clips with pauses, then
the next talk. The result then has `servers` (of each: memory, temporary files, open file descriptors and threads every
ten seconds, and the files that were left when it had ended), `routes` (requests and failures), `failures` (with their
reasons) and `microphones` (`talks`, `unfinished`, `spoken_s`, `transcribed_s` and the WER of the talks).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra.parallel import process_pool

USERS = "1,2,5,10,20,50"
SAMPLE_S = 10.0
FEWEST_CLIPS = 5
"""With fewer clips, as for --smoke, talks are short, too."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="model URI; default: as `serve` chooses")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--users", default="", help=f"numbers of users; default: {USERS}")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of users")
    parser.add_argument("--soak-minutes", type=float, default=0.0)
    parser.add_argument("--microphones", type=int, default=0, help="live microphones in the app during the soak")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if options.microphones and not options.soak_minutes:
        parser.error("--microphones are part of the soak: add --soak-minutes")
    if options.smoke:
        options.seconds, options.clips = 2.0, 2
    users = [int(number) for number in (options.users or ("1,3" if options.smoke else USERS)).split(",")]
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as temp, contextlib.ExitStack() as servers:
        clips = Path(temp, "clips")
        texts = write_clips(clips, options.clips)
        api = servers.enter_context(served("api", options, max(users), Path(temp)))
        send_each_once(api.url, clips)
        if options.microphones:
            app = servers.enter_context(served("app", options, max(users), Path(temp)))
            result = soak([api, app], clips, max(users), options)
            result["failures"] = json_lines(Path(temp, "failures.jsonl"))
            result["microphones"] = talks(json_lines(Path(temp, "talks.jsonl")), texts)
        elif options.soak_minutes:
            result = soak([api], clips, max(users), options)
        else:
            result = ramp(api, clips, users, options.seconds)
        servers.close()
        if options.microphones:
            for server in (api, app):
                result["servers"][server.name]["files_left"] = len(files(server.temp))
    print(json.dumps({**result, **api.info, "cores": process_pool.cores(), "load": load}))


def write_clips(folder: Path, count: int) -> dict[str, str]:
    """Write the first clips of the tour's test split as wav; return their sentences by file name without ending."""
    folder.mkdir()
    texts = {}
    for example in itertools.islice(TourSource().examples(("test",)), count):
        (folder / f"{example.id}.wav").write_bytes(example.audio)
        texts[example.id] = example.text
    return texts


@dataclass
class Server:
    """A server in another process."""

    name: str
    process: psutil.Process
    url: str
    info: dict[str, str]
    """`model` and `engine` of the API."""
    temp: Path
    """Its folder of temporary files."""


@contextlib.contextmanager
def served(name: str, options: argparse.Namespace, users: int, folder: Path) -> Iterator[Server]:
    """Run the API or the app in another process, with its temporary files in `folder`; end it with SIGTERM."""
    (temp := folder / name).mkdir()
    command = [sys.executable, "app.py", "--log", str(folder / "log.csv")]
    if name == "api":
        command = [sys.executable, "-m", "pipelines", "serve", "--port", "0", "--json", "--queue", str(users)]
    command += ["--engine", options.engine, *(["--model", options.model] if options.model else [])]
    environment = {**os.environ, "TMPDIR": str(temp)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = ""
        for line in process.stdout:
            if line.startswith(("{", "page: ")):
                break
        else:
            sys.exit(f"the server ({name}) did not start: see its last line")
        info = json.loads(line) if name == "api" else {"url": line.removeprefix("page: ").strip()}
        url = info["url"].rstrip("/")
        yield Server(name, psutil.Process(process.pid), url, {key: info.get(key) for key in ("model", "engine")}, temp)
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            sys.exit(f"the server ({name}) did not end cleanly: {process.returncode}")
    finally:
        process.kill()
        process.wait()


def send_each_once(url: str, clips: Path) -> None:
    """Send each clip once as warm-up."""
    for clip in sorted(clips.glob("*.wav")):
        request = urllib.request.Request(f"{url}/predict", clip.read_bytes(), {"Content-Type": "audio/wav"})
        with urllib.request.urlopen(request, timeout=600) as response:
            response.read()


def ramp(api: Server, clips: Path, users: list[int], seconds: float) -> dict[str, Any]:
    """Run each number of users for `seconds`; print a table and return the figures."""
    print(f"{'users':>6} {'requests':>9} {'failed':>7} {'per s':>7} {'p50 s':>7} {'p95 s':>7}", flush=True)
    by_users, peak = {}, 0
    for number in users:
        one = figures(json.loads(finished(locust(api.url, clips, number, seconds))))
        peak = max(peak, api.process.memory_info().rss)
        by_users[str(number)] = one
        print(
            f"{number:>6} {one['requests']:>9} {one['failed']:>7} {one['per_s']:>7.2f} {one['p50_s']:>7.2f} "
            f"{one['p95_s']:>7.2f}",
            flush=True,
        )
    return {"users": by_users, "peak_mb": round(peak / 1e6)}


def soak(servers: list[Server], clips: Path, users: int, options: argparse.Namespace) -> dict[str, Any]:
    """Record what the servers hold while `users` send requests and microphones speak without a pause."""
    minutes = options.soak_minutes
    running = locust(servers[0].url, clips, users, minutes * 60, options.microphones, servers[-1].url)
    started, samples = time.monotonic(), {server.name: [] for server in servers}
    print("minute  server   MB  files  their MB  descriptors  threads", flush=True)
    output = None
    while output is None:
        for server in servers:
            samples[server.name].append(one := sample(server))
            minute = (time.monotonic() - started) / 60
            print(
                f"{minute:>6.1f} {server.name:>7} {one['rss_mb']:>4} {one['files']:>6} {one['files_mb']:>9.1f} "
                f"{one['descriptors']:>12} {one['threads']:>8}",
                flush=True,
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            output = finished(running, SAMPLE_S)
    entries = json.loads(output)
    rss = [one["rss_mb"] for one in samples["api"]]
    result = {"minutes": round(minutes, 2), "at_once": users, "rss_mb": rss, "growth": growth(rss)}
    result |= figures([entry for entry in entries if entry["name"] == "/v1/audio/transcriptions"])
    print(f"{result['requests']} requests, {result['failed']} failed, memory {result['growth'] - 1:+.1%}", flush=True)
    if options.microphones:
        result["servers"] = {
            name: {key: [one[key] for one in those] for key in those[0]}
            | {"growth": growth([one["rss_mb"] for one in those])}
            for name, those in samples.items()
        }
        result["routes"] = {
            entry["name"]: {"requests": entry["num_requests"], "failed": entry["num_failures"]} for entry in entries
        }
    return result


def sample(server: Server) -> dict[str, float]:
    """Return what the server holds now."""
    sizes = files(server.temp)
    return {
        "rss_mb": round(server.process.memory_info().rss / 1e6),
        "files": len(sizes),
        "files_mb": round(sum(sizes) / 1e6, 1),
        "descriptors": server.process.num_fds(),
        "threads": server.process.num_threads(),
    }


def files(folder: Path) -> list[int]:
    """Return the sizes of all files below `folder`, in bytes."""
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            status = path.lstat()
            sizes += [status.st_size] if stat.S_ISREG(status.st_mode) else []
    return sizes


def growth(values: list[float]) -> float:
    """Return the median of the last quarter over that of the second; the first quarter is warm-up."""
    quarter = max(len(values) // 4, 1)
    return round(statistics.median(values[-quarter:]) / statistics.median(values[quarter : 2 * quarter] or values), 4)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def talks(lines: list[dict[str, Any]], texts: dict[str, str]) -> dict[str, Any]:
    """Return the figures of all talks into the microphones: seconds, unfinished ones with their reasons, and WER."""
    from pipelines.speech import scoring

    ended = [talk for talk in lines if not talk["error"]]
    references = [" ".join(texts[name] for name in talk["clips"]) for talk in ended]
    result = {
        "talks": len(lines),
        "unfinished": [talk["error"] for talk in lines if talk["error"]],
        "spoken_s": round(sum(talk["spoken_s"] for talk in lines), 1),
        "transcribed_s": round(sum(talk["transcribed_s"] for talk in lines), 1),
        "late_s": sorted(talk["late_s"] for talk in ended),
        "without_text": sum(not talk["text"].strip() for talk in ended),
    }
    if ended:
        score = scoring.score(references, [talk["text"] for talk in ended])
        result |= {"wer": round(score.wer, 4), "words": score.words, "words_missing": score.deletions}
    return result


def locust(
    url: str, clips: Path, users: int, seconds: float, microphones: int = 0, app_url: str = ""
) -> subprocess.Popen:
    """Start locust; its users finish their last request, and its statistics go to standard output."""
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "benchmarks" / "locustfile.py"), "--headless", "--json"]
    command += ["--host", url, "-u", str(users + microphones), "-r", str(users + microphones)]
    command += ["-t", f"{max(round(seconds), 1)}s"]
    command += ["--stop-timeout", "600", "--exit-code-on-error", "0", "--loglevel", "ERROR"]
    environment = {"CLIPS": str(clips), "TALKS": str(clips.parent / "talks.jsonl")}
    environment["FAILURES"] = str(clips.parent / "failures.jsonl")
    if len(list(clips.iterdir())) < FEWEST_CLIPS:
        environment["CLIPS_PER_TALK"] = "1,2"
    environment |= {"MICROPHONES": str(microphones), "APP": app_url if microphones else ""}
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def finished(running: subprocess.Popen, timeout_s: float | None = None) -> str:
    """Return what locust wrote. Raises TimeoutExpired if it is still running; a later call returns everything."""
    output, _ = running.communicate(timeout=timeout_s)  # a full pipe would stop locust
    if running.returncode:
        sys.exit("locust failed: see its last line")
    return output


def figures(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return requests, failures, rate and percentiles from locust's statistics (locust rounds times to two digits)."""
    if not entries:
        sys.exit("no request was answered in this time: use more --seconds")
    (entry,) = entries
    times_ms = {float(time_ms): count for time_ms, count in entry["response_times"].items()}
    lasted_s = max(entry["last_request_timestamp"] - entry["start_time"], 1e-3)
    return {
        "requests": entry["num_requests"],
        "failed": entry["num_failures"],
        "per_s": round((entry["num_requests"] - entry["num_failures"]) / lasted_s, 3),
        "p50_s": percentile(times_ms, 0.5) / 1000,
        "p95_s": percentile(times_ms, 0.95) / 1000,
    }


def percentile(counts: dict[float, int], share: float) -> float:
    """Return the smallest value that is at least as large as `share` of all values."""
    needed, seen = share * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    raise ValueError("nothing was counted")


if __name__ == "__main__":
    main()
