"""The HTTP API under load: requests per second and response times for 1 to 50 users without pauses.

    python benchmarks/serving.py --model runs/tour/train-.../model     30 s for each number of users
    python benchmarks/serving.py --soak-minutes 10 --users 10          memory over time, and failed requests
    python benchmarks/serving.py --smoke                               seconds, to check that it runs

The server runs in another process on the loopback interface (`python -m pipelines serve`), the users are locust's
(benchmarks/locustfile.py), and both share the cores of this machine. The clips are the first of the tour's test split,
2 s on average, sent as wav. A user sends the next clip when it has the transcript of the last, so with more than one
user the response time is mostly waiting time. `failed` counts every request without a transcript.

The last line is one JSON object: `users` (for each number: `requests`, `failed`, `per_s`, `p50_s`, `p95_s`) and
`peak_mb` of the server; with --soak-minutes `requests`, `failed`, `minutes`, `rss_mb` (every ten seconds) and `growth`
(the median of the last quarter over that of the second; the first is warm-up); always `model`, `engine`, `cores` and
`load` (of the machine at the start).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra.parallel import process_pool

USERS = "1,2,5,10,20,50"
SAMPLE_S = 10.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="model URI; default: as `serve` chooses")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--users", default="", help=f"numbers of users; default: {USERS}")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of users")
    parser.add_argument("--soak-minutes", type=float, default=0.0)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seconds, options.clips = 2.0, 2
    users = [int(number) for number in (options.users or ("1,3" if options.smoke else USERS)).split(",")]
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as temp:
        clips = Path(temp)
        for example in itertools.islice(TourSource().examples(("test",)), options.clips):
            (clips / f"{example.id}.wav").write_bytes(example.audio)
        with served(options.model, options.engine, max(users)) as (server, info):
            url = info.pop("url")
            send_each_once(url, clips)
            if options.soak_minutes:
                result = soak(server, url, clips, max(users), options.soak_minutes * 60)
            else:
                result = ramp(server, url, clips, users, options.seconds)
    print(json.dumps({**result, **info, "cores": process_pool.cores(), "load": load}))


@contextlib.contextmanager
def served(model: str, engine: str, users: int) -> Iterator[tuple[psutil.Process, dict[str, Any]]]:
    """Run a server in another process; yield it with its url, model and engine; end it with SIGTERM."""
    command = [sys.executable, "-m", "pipelines", "serve", "--port", "0", "--json", "--engine", engine]
    command += ["--queue", str(users), *(["--model", model] if model else [])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if not line:
            sys.exit("the server did not start: see its last line")
        info = json.loads(line)
        yield psutil.Process(process.pid), {name: info[name] for name in ("url", "model", "engine")}
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            sys.exit(f"the server did not end cleanly: {process.returncode}")
    finally:
        process.kill()
        process.wait()


def send_each_once(url: str, clips: Path) -> None:
    """Send each clip once as warm-up."""
    for clip in sorted(clips.glob("*.wav")):
        request = urllib.request.Request(f"{url}/predict", clip.read_bytes(), {"Content-Type": "audio/wav"})
        with urllib.request.urlopen(request, timeout=600) as response:
            response.read()


def ramp(server: psutil.Process, url: str, clips: Path, users: list[int], seconds: float) -> dict[str, Any]:
    """Run each number of users for `seconds`; print a table and return the figures."""
    print(f"{'users':>6} {'requests':>9} {'failed':>7} {'per s':>7} {'p50 s':>7} {'p95 s':>7}", flush=True)
    by_users, peak = {}, 0
    for number in users:
        one = figures(json.loads(finished(locust(url, clips, number, seconds))))
        peak = max(peak, server.memory_info().rss)
        by_users[str(number)] = one
        print(
            f"{number:>6} {one['requests']:>9} {one['failed']:>7} {one['per_s']:>7.2f} {one['p50_s']:>7.2f} "
            f"{one['p95_s']:>7.2f}",
            flush=True,
        )
    return {"users": by_users, "peak_mb": round(peak / 1e6)}


def soak(server: psutil.Process, url: str, clips: Path, users: int, seconds: float) -> dict[str, Any]:
    """Record the server's memory while `users` send requests without a pause."""
    running, started, rss = locust(url, clips, users, seconds), time.monotonic(), []
    print("minute   MB", flush=True)
    while running.poll() is None:
        rss.append(round(server.memory_info().rss / 1e6))
        print(f"{(time.monotonic() - started) / 60:>6.1f} {rss[-1]:>4}", flush=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(SAMPLE_S)
    one = figures(json.loads(finished(running)))
    quarter = max(len(rss) // 4, 1)
    growth = statistics.median(rss[-quarter:]) / statistics.median(rss[quarter : 2 * quarter] or rss)
    minutes = round(seconds / 60, 2)
    print(f"{one['requests']} requests, {one['failed']} failed, memory {growth - 1:+.1%}", flush=True)
    return {"minutes": minutes, "at_once": users, **one, "rss_mb": rss, "growth": round(growth, 4)}


def locust(url: str, clips: Path, users: int, seconds: float) -> subprocess.Popen:
    """Start locust; its users finish their last request, and its statistics go to standard output."""
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "benchmarks" / "locustfile.py"), "--headless", "--json"]
    command += ["--host", url, "-u", str(users), "-r", str(users), "-t", f"{max(round(seconds), 1)}s"]
    command += ["--stop-timeout", "600", "--exit-code-on-error", "0", "--loglevel", "ERROR"]
    return subprocess.Popen(command, env={**os.environ, "CLIPS": str(clips)}, stdout=subprocess.PIPE, text=True)


def finished(running: subprocess.Popen) -> str:
    output, _ = running.communicate()
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
