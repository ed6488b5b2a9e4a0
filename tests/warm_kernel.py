"""A Jupyter kernel that starts as a fork of a process with the large libraries imported; for tests that start dozens of kernels.

`python warm_kernel.py serve SOCKET` imports and waits. `python warm_kernel.py SOCKET -f CONNECTION_FILE` is what Jupyter starts in place of
ipykernel: it asks the server for a kernel and lives as long as that. Each kernel is a process of its own."""
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def kernel(argv: list[str], cwd: str, env: dict[str, str]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= env | {"JPY_PARENT_PID": str(os.getppid())}
    sys.argv = ["ipykernel_launcher", *argv]
    sys.path[0] = ""  # as with python -m
    import matplotlib
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    from ipykernel.kernelapp import launch_new_instance
    launch_new_instance()


def handle(connection: socket.socket) -> int:
    "Start one kernel, pass signals on to it, and tell the client how it ended."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked = json.loads(connection.makefile().readline())
    if not (child := os.fork()):
        connection.close()
        try: kernel(**asked)
        finally: os._exit(1)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with contextlib.suppress(OSError): connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            return 0
        if select.select([connection], [], [], 0.1)[0]:
            got = connection.recv(1)
            os.kill(child, got[0] if got else signal.SIGKILL)  # the client is gone: nobody wants the kernel any more


def serve(address: str) -> None:
    import importlib

    from pages import PRELOADED
    for name in {*PRELOADED, "ipykernel.kernelapp", "ipykernel.ipkernel"} - {"matplotlib_inline.backend_inline"}: importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(address + ".new")
        s.listen()
        os.rename(address + ".new", address)
        while os.getppid() == parent:
            if not select.select([s], [], [], 1)[0]: continue
            connection = s.accept()[0]
            if not os.fork():
                s.close()
                os._exit(handle(connection))
            connection.close()


def client(address: str, argv: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(address)
        for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, lambda n, _: s.sendall(bytes([n])))
        s.sendall(json.dumps({"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ)}).encode() + b"\n")
        return int(s.makefile().readline() or 1)


@contextlib.contextmanager
def warm_kernels(folder: Path):
    "While this lasts, Jupyter's kernel `python3` starts warm."
    address = str(folder / "s")
    spec = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": [sys.executable, __file__, address, "-f", "{connection_file}"], "display_name": "warm", "language": "python"}))
    server = subprocess.Popen([sys.executable, __file__, "serve", address])
    before = os.environ.get("JUPYTER_PATH")
    try:
        while not os.path.exists(address):
            if server.poll() is not None: raise RuntimeError("the server of warm kernels did not start")
            time.sleep(0.1)
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (str(folder / "jupyter"), before)))
        yield
    finally:
        os.environ.pop("JUPYTER_PATH") if before is None else os.environ.__setitem__("JUPYTER_PATH", before)
        server.terminate()
        server.wait()


if __name__ == "__main__":
    if sys.argv[1] == "serve": serve(sys.argv[2])
    else: sys.exit(client(sys.argv[1], sys.argv[2:]))
