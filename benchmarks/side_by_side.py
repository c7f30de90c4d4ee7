"""Run one side of a benchmark in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_in_process(script: str, arguments: list[str], variables: Mapping[str, str]) -> Any:
    """Run a benchmark script in a new process and return the JSON value on its last line.

    Each side has its own process: peak memory never falls, and thread settings apply from the start.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **variables}, text=True)
    if done.returncode:
        sys.exit(f"{Path(script).name} {' '.join(arguments[:2])} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
