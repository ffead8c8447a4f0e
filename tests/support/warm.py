"""Python processes that begin with everything imported, for tests that start many trainers.

A trainer's imports take longer than the tiny trainings of these tests, and a run of torchrun has them once for each process and once for
itself. `python()` is a program that is used in place of `sys.executable`, with `[-u] -m MODULE ...`: it asks a server, which has imported
everything, for a fork of itself, and stands for that process: signals go on to it, a kill kills it, and it ends as that one did. torchrun's
own processes come from there as well (PYTHON_EXEC). The server has one thread and ends with the test's process.

Not for tests about the imports themselves, or about variables that are read while something is imported.
"""

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys
forwarded = {{signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}}
signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
pid = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big")
for number in forwarded:
    signal.signal(number, lambda n, _: os.kill(pid, n))
signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
code = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big", signed=True)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@cache
def python() -> str:
    """The program; the server starts with the first call."""
    folder = Path(tempfile.mkdtemp(prefix="warm", dir="/tmp"))  # a socket's address is short
    command = [sys.executable, "-m", "support.warm", str(folder)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # goes first
    if server.stdout.read(1) != b".":
        raise RuntimeError("the server of warm processes did not start: see its error above")
    return str(folder / "python")


# ------------------------------------------------------------------------------------------------------- the server ----
def _import_everything() -> None:
    import finetune_cli
    import finetune_trainer

    for package in (finetune_cli, finetune_trainer):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in (
        "datasets",
        "peft",
        "tensorboard.summary.writer.event_file_writer",
        "torch.distributed.fsdp",
        "torch.distributed.run",
        "torch.utils.tensorboard",
        "transformers.models.auto.modeling_auto",
        "transformers.models.bert.modeling_bert",
        "transformers.models.bert.tokenization_bert",
    ):
        importlib.import_module(name)


def _serve(listener: socket.socket, folder: Path) -> list[str]:
    """Comes back in each fork, as the process that was asked for: its arguments."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, woken, 0, *running.values()], [], [])
        if 0 in ready:  # the test's process is gone
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(folder)
            os._exit(0)
        for pid, asked in running.items():
            if asked in ready:  # its stand-in is gone
                os.kill(pid, signal.SIGKILL)
        if woken in ready:
            os.read(woken, 4096)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with running.pop(pid) as asked, contextlib.suppress(BrokenPipeError):
                    asked.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
        if listener in ready:
            asked, _ = listener.accept()
            length, files, _, _ = socket.recv_fds(asked, 4, 3)
            request = asked.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            if len(files) < 3 or len(request) < int.from_bytes(length, "big"):
                continue  # its stand-in was killed while it asked
            if (pid := os.fork()) == 0:
                for mine in (listener, asked, *running.values()):
                    mine.close()
                signal.set_wakeup_fd(-1)
                return _become(json.loads(request), files)
            for file in files:
                os.close(file)
            with contextlib.suppress(BrokenPipeError):
                asked.sendall(pid.to_bytes(4, "big"))
            running[pid] = asked


def _become(request: tuple[list[str], dict[str, str], str], files: list[int]) -> list[str]:
    arguments, env, folder = request
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    program = os.environ["PYTHON_EXEC"]
    os.environ.clear()
    os.environ.update(env, PYTHON_EXEC=program)
    os.chdir(folder)
    sys.path[0] = folder
    sys.path[1:1] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    random.seed()  # forks would all choose the same
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return [argument for argument in arguments if argument != "-u"]


def main(folder: Path) -> None:
    """Serves; returns nothing in the server itself, and runs a module in each fork."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    _import_everything()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        program = folder / "python"
        program.write_text(STAND_IN.format(python=sys.executable, address=str(folder / "socket")))
        program.chmod(0o755)
        os.environ["PYTHON_EXEC"] = str(program)
        os.write(1, b".")
        option, module, *sys.argv[1:] = _serve(listener, folder)
    assert option == "-m", "warm processes run modules"
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
