"""A headless ComfyUI with the pack in it, and a client of its HTTP API.

The server gets a base directory of its own (models, output, user settings, log), in whose custom_nodes the checkout
is linked: the host's own loader imports the pack, as it does for a user.  It runs in its own process group, which
ends with the `with` block, also on Ctrl-C.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from . import process_groups
from .host import ROOT, Host

PACK_NAME = "ComfyUI-Sluice"
NOT_THE_PACK = shutil.ignore_patterns(".*", "__pycache__", "output", "tests", "tools", "demo", "benchmarks")

Workflow = dict[str, dict[str, Any]]
Outputs = dict[str, dict[str, Any]]


class ServerError(Exception):
    """The server did not start or ended by itself; the message holds the end of its log."""


class PromptFailed(Exception):  # noqa: N818  (an event of the server, not a mistake of the caller)
    """A workflow was refused or broke off.  `node_errors` maps a node's id to what its error box shows."""

    def __init__(self, message: str, node_errors: dict[str, str]) -> None:
        super().__init__("\n".join([message, *(f"node {node}: {text}" for node, text in node_errors.items())]))
        self.node_errors = node_errors


class Server:
    """One ComfyUI process; use it as a context manager."""

    def __init__(self, host: Host, base: Path, *args: str) -> None:
        self.host = host
        self.base = base
        self.args = args
        self.models_dir = base / "models"
        self.output_dir = base / "output"
        self.log_path = base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Server:
        self.log_path.unlink(missing_ok=True)
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # --- the process

    def start(self, timeout: float = 180) -> None:
        """Start the process and return when it answers."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = server_command(self.host, self.base, "--port", str(port), "--disable-auto-launch", *self.args)
        with self.log_path.open("ab") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            options = {**streams, **process_groups.GROUP}
            self.process = subprocess.Popen(command, env=self.host.env(), cwd=self.base, **options)
        try:
            deadline = time.monotonic() + timeout
            while not self._answers():
                self._check_alive()
                if time.monotonic() > deadline:
                    raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s.\n{self.log_tail()}")
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process group: politely, then not."""
        if self.process is None:
            return
        for ask, patience in ((process_groups.terminate, 10), (process_groups.kill, 10)):
            ask(self.process)
            try:
                self.process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        self.process = None

    def restart(self) -> None:
        """A fresh process on the same base directory."""
        self.stop()
        self.start()

    def log_tail(self, lines: int = 40) -> str:
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return f"The end of {self.log_path}:\n" + "\n".join(text.splitlines()[-lines:])

    def peak_memory_bytes(self) -> int | None:
        """The most memory that the process held at once, file pages included; None where the system does not say."""
        if self.process is None:
            return None
        status = Path(f"/proc/{self.process.pid}/status")
        if status.exists():
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            return int(fields["VmHWM"].split()[0]) * 1024
        probe = "import sys, psutil; m = psutil.Process(int(sys.argv[1])).memory_info(); print(max(m))"
        command = [str(self.host.python), "-c", probe.replace("max(m)", "getattr(m, 'peak_wset', m.rss)")]
        done = subprocess.run([*command, str(self.process.pid)], capture_output=True, text=True)
        return int(done.stdout) if done.returncode == 0 else None

    def _answers(self) -> bool:
        try:
            self.get("/system_stats", timeout=5)
            return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _check_alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            code = None if self.process is None else self.process.returncode
            raise ServerError(f"ComfyUI ended with exit status {code}.\n{self.log_tail()}")

    # --- the API

    def get(self, path: str, timeout: float = 60) -> Any:
        return json.loads(self._request(path, None, timeout))

    def post(self, path: str, body: Any, timeout: float = 60) -> Any:
        answer = self._request(path, json.dumps(body).encode(), timeout)
        return json.loads(answer) if answer else None

    def object_info(self) -> dict[str, Any]:
        """Every node type that the server knows, with its inputs and outputs."""
        return self.get("/object_info")

    def queue(self, workflow: Workflow, *, ui: Any = None, timeout: float = 300) -> Outputs:
        """Run a workflow in API form and return each output node's results; PromptFailed when it does not finish.

        `ui` is the same workflow as the frontend writes it, to be stored in the pictures.
        """
        body: dict[str, Any] = {"prompt": workflow, "client_id": "sluice"}
        if ui is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": ui}}
        try:
            prompt_id = self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise _refused(json.loads(error.read())) from None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._check_alive()
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status"):
                return _finished(entry)
            time.sleep(0.05)
        self.post("/interrupt", {})
        raise PromptFailed(f"the workflow did not finish within {timeout:.0f} s.\n{self.log_tail()}", {})

    def images(self, outputs: Outputs) -> list[bytes]:
        """The files of every picture in the outputs."""
        found = [image for output in outputs.values() for image in output.get("images", [])]
        return [self._request("/view?" + urllib.parse.urlencode(image), None, 60) for image in found]

    def _request(self, path: str, body: bytes | None, timeout: float) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        # A proxy in the environment must not stand between us and our own machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
            return answer.read()


def server_command(host: Host, base: Path, *args: str) -> list[str]:
    """The command line of a ComfyUI whose every file lies under `base`, with the pack among its custom nodes."""
    for folder in ("models", "custom_nodes", "input", "output", "temp", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    _link_pack(base / "custom_nodes" / PACK_NAME)
    database = f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"
    own = ["--base-directory", str(base), "--database-url", database, "--disable-api-nodes"]
    return host.command(host.comfyui / "main.py", *own, *args, pack=False)


def _link_pack(place: Path) -> None:
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
    try:
        place.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows without developer mode
        shutil.copytree(ROOT, place, ignore=NOT_THE_PACK)


def _refused(answer: dict[str, Any]) -> PromptFailed:
    errors = {
        node: "; ".join(_describe(error) for error in found["errors"])
        for node, found in (answer.get("node_errors") or {}).items()
    }
    return PromptFailed(f"the server refused the workflow: {_describe(answer['error'])}", errors)


def _describe(error: dict[str, Any]) -> str:
    return f"{error['message']}: {error['details']}" if error.get("details") else error["message"]


def _finished(entry: dict[str, Any]) -> Outputs:
    status = entry["status"]
    if status["status_str"] == "success":
        return entry["outputs"]
    for event, data in status["messages"]:
        if event == "execution_error":
            text = f"{data['exception_type']}: {data['exception_message']}".strip()
            raise PromptFailed(f"the workflow failed in {data['node_type']}", {data["node_id"]: text})
    raise PromptFailed(f"the workflow ended with status {status['status_str']!r}", {})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
