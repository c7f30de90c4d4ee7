"""Start Python programs quickly: a process that has imported everything forks one child per program.

    python -c "from servers import fork_server; fork_server.serve()" SOCKET MODULE...   imports the modules, then forks
                                                                                        until its standard input closes
    python fork_server.py SOCKET PYTHON REAL WORD...                                    runs what `python WORD...` would
    ForkedProgram(...)                                                                  the same from Python

A forked program has the same arguments, environment, folder, open files, signals and exit code as a new process. Code
with arguments and options of the interpreter get a new interpreter.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import types

SIGNALS = (signal.SIGINT, signal.SIGTERM)


# --- the server -------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Import the modules, then fork; never returns."""
    address, *modules = sys.argv[1:]
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    print("ready", flush=True)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([0, listener, ended, *running.values()], [], [])
        if 0 in ready:
            for child in running:
                _kill(child)
            os._exit(0)
        if ended in ready:
            os.read(ended, 1024)
            _send_exit_codes(running)
        for child in [child for child, connection in running.items() if connection in ready]:
            _kill(child)  # its client is gone
            running.pop(child).close()
        if listener in ready:
            connection, _ = listener.accept()
            job, files = _receive(connection)
            if not (child := os.fork()):
                for other in (listener, connection, *running.values()):
                    other.close()
                return _become(job, files)
            for file in files:
                os.close(file)
            running[child] = connection
            connection.sendall(struct.pack("i", child))


def _send_exit_codes(running: dict[int, socket.socket]) -> None:
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not child:
            return
        if connection := running.pop(child, None):
            connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
            connection.close()


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    (size,) = struct.unpack("i", head)
    body = b""
    while len(body) < size:
        body += connection.recv(size - len(body))
    return json.loads(body), files


# --- the child --------------------------------------------------------------------------------------------------------


def _become(job: dict, files: list[int]) -> None:
    """Run what `python WORD...` runs, and exit."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["variables"])
    sys.executable = job["python"]
    try:
        _execute(*job["words"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        sys.excepthook(type(error), error, error.__traceback__)
    _exit(code)


def _execute(kind: str, *rest: str) -> None:
    sys.argv = [kind, *rest]
    if kind == "-m":
        sys.argv = [*rest]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        runpy.run_path(kind, run_name="__main__")


def _exit(code: int) -> None:
    """End as an interpreter does, but free nothing: that would copy all memory that is shared with the server."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# --- the client -------------------------------------------------------------------------------------------------------


class ForkedProgram:
    """A program that the server forked, with the methods of subprocess.Popen that tests use."""

    def __init__(self, address: str, python: str, words: list[str], folder: str, variables: dict, files: list[int]):
        """Start it with `files` (descriptors) as standard input, output and error; `python` is its sys.executable."""
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        job = {"words": words, "python": python, "folder": folder, "variables": variables}
        body = json.dumps(job).encode()
        socket.send_fds(self._connection, [struct.pack("i", len(body))], files)
        self._connection.sendall(body)
        (self.pid,) = struct.unpack("i", self._connection.recv(4))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the program runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raise subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            code = self._connection.recv(4)
            self.returncode = struct.unpack("i", code)[0] if code else 1
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(address: str, python: str, words: list[str]) -> int:
    """Run `words` on the server at `address` with this process's files and environment. Return the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    program = ForkedProgram(address, python, words, os.getcwd(), dict(os.environ), [0, 1, 2])
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(program.pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return program.wait()


def can_fork(words: list[str]) -> bool:
    """Return whether `python WORD...` can be forked: a module, a file, or code without arguments."""
    return bool(words) and (words[0] == "-m" or words[0].endswith(".py") or (words[0] == "-c" and len(words) == 2))


if __name__ == "__main__":
    address, python, real, *words = sys.argv[1:]
    words = words[words[:1] == ["-u"] :]  # torchrun adds it; output appears at the end at the latest
    if not can_fork(words):
        os.execv(real, [real, *words])
    code = run(address, python, words)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
