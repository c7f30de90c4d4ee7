"""A python that starts in no time: a process that has imported everything forks one for each command.

    python -c "from servers import forks; forks.serve()" SOCKET MODULE...     imports the modules and forks, until its
                                                                              standard input is closed
    python forks.py SOCKET WORD...                                            runs what `python WORD...` would

The second takes its place in every respect: arguments, environment, folder, open files, signals, exit code. What needs
a fresh interpreter (code with arguments, options) gets one.
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
import sys
import threading
import types

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve() -> None:
    """Import, then fork; returns in no process."""
    address, *modules = sys.argv[1:]
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    ended, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
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
            _tell_codes(running)
        for child in [child for child, connection in running.items() if connection in ready]:
            _kill(child)  # whoever asked for it is gone
            running.pop(child).close()
        if listener in ready:
            connection, _ = listener.accept()
            job, files = _received(connection)
            if not (child := os.fork()):
                for other in (listener, connection, *running.values()):
                    other.close()
                return _become(job, files)
            for file in files:
                os.close(file)
            running[child] = connection
            connection.sendall(struct.pack("i", child))


def _tell_codes(running: dict[int, socket.socket]) -> None:
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


def _received(connection: socket.socket) -> tuple[dict, list[int]]:
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    (size,) = struct.unpack("i", head)
    body = b""
    while len(body) < size:
        body += connection.recv(size - len(body))
    return json.loads(body), files


def _become(job: dict, files: list[int]) -> None:
    """What `python WORD...` does, up to its exit."""
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
    _end(code)


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


def _end(code: int) -> None:
    """As an interpreter ends, but nothing is taken apart: that would copy all memory that is shared until then."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run(address: str, python: str, words: list[str]) -> int:
    """Have `words` run by the process at `address`; the exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    told = {"words": words, "python": python, "folder": os.getcwd(), "variables": dict(os.environ)}
    body = json.dumps(told).encode()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    socket.send_fds(connection, [struct.pack("i", len(body))], [0, 1, 2])
    connection.sendall(body)
    (child,) = struct.unpack("i", connection.recv(4))
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = connection.recv(4)
    return struct.unpack("i", code)[0] if code else 1


def takes(words: list[str]) -> bool:
    """Whether a forked process will do: a module, a file, or code without arguments."""
    return bool(words) and (words[0] == "-m" or words[0].endswith(".py") or (words[0] == "-c" and len(words) == 2))


if __name__ == "__main__":
    address, python, real, *words = sys.argv[1:]
    words = words[words[:1] == ["-u"] :]  # torchrun's; what is printed comes at the end at the latest
    if not takes(words):
        os.execv(real, [real, *words])
    code = run(address, python, words)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
