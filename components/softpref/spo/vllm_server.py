"""A vLLM server for SPO training: `python -m softpref.spo.vllm_server [--host 0.0.0.0] [--port 8021]`.

It runs in the environment that has vLLM, on this machine or another. The trainer, given
`sampling_engine=vllm` and `vllm_server=http://HOST:8021`, tells it which model to build, sends the policy's
weights at each refresh (safetensors, nothing is ever unpickled) and has prompts sampled. It serves one
trainer at a time; trainers of the same model may follow one another.

It listens on this machine alone unless told otherwise. To be reached from others it needs a secret, in the
environment variable `SOFTPREF_VLLM_TOKEN` of both sides. It speaks plain HTTP: on a shared network, put TLS
or a tunnel in front of it.

    GET  /health                    whether it runs; asks for no token
    GET  /engine                    {"built": whether it has an engine}
    PUT  /engine                    builds the engine of an `EngineSpec`, unless it is there already
    PUT  /weights/VERSION/PART      stores a part of the weights, a safetensors file; all parts together may
                                    be twice as large as the engine's model
    POST /weights/VERSION           {"parts": n}: loads them
    POST /samples                   {"weights": VERSION, "prompts": …, "seeds": …, "max_new_tokens": …,
                                    "stop_ids": …} -> {"samples": [[completion, token_logps, truncated], …]}
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from softpref.errors import ConfigError, SoftprefError
from softpref.spo.engines import TOKEN_VARIABLE
from softpref.spo.vllm_core import EngineSpec, VLLMCore

logger = logging.getLogger("softpref.spo.vllm_server")

_MAX_JSON, _MAX_PROMPTS = 1 << 20, 64 << 20  # bytes of a request in JSON, and of one with prompts
_PATIENCE = 60.0  # seconds for a request's head, of silence, and for a body beside what its size allows
_SLOWEST = 256 << 10  # bytes of a body per second; one that comes more slowly is given up
_MAX_CONNECTIONS = 64  # at once; a trainer needs one for each of its processes
_WEIGHTS = re.compile(r"/weights/(?P<version>[0-9a-f]{32})(?:/(?P<part>\d{1,6}))?")


class Refusal(Exception):
    """A request that is answered with an HTTP status and a message."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class EngineServer(ThreadingHTTPServer):
    """Answers trainers' requests; everything that vLLM does happens in one thread, one request after another.

    Args:
        address: host and port; port 0 takes a free one.
        token: secret that requests must bear; empty asks for none.
        options: of `VLLMCore`.
    """

    daemon_threads = True
    request_queue_size = _MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], *, token: str, options: dict[str, Any]) -> None:
        super().__init__(address, _Handler)
        self.token, self._options = token, options
        self._folder = tempfile.TemporaryDirectory(prefix="softpref-weights-")
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
        self._core: VLLMCore | None = None
        self._version = ""
        self._free = threading.BoundedSemaphore(_MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own; one too many is closed at once."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def alone(self, task: Callable[..., dict[str, object]], *arguments: Any) -> dict[str, object]:
        """What a task of the engine answers, in the engine's own thread."""
        return self._worker.submit(task, *arguments).result()

    def state(self) -> dict[str, object]:
        return {"built": self._core is not None}

    def room(self, version: str) -> int:
        """Bytes that may still come of these weights: no more is kept than the engine's model can have."""
        folder = Path(self._folder.name, version)
        kept = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
        most: int = self._engine().most_weight_bytes
        return max(0, most - kept)

    def store(self, version: str, part: int, body: BufferedIOBase, size: int) -> dict[str, object]:
        """Keep a part of the weights until they are loaded, or until two later ones have come."""
        folder = Path(self._folder.name, version)
        folder.mkdir(exist_ok=True)
        others = [one for one in Path(self._folder.name).iterdir() if one != folder]
        for old in sorted(others, key=lambda one: one.stat().st_mtime)[:-1]:  # the last may be loading
            shutil.rmtree(old, ignore_errors=True)
        partial = folder / f"{part}.{threading.get_ident()}.partial"
        try:
            with partial.open("wb") as file:
                left = size
                while left and (block := body.read(min(left, 1 << 20))):
                    file.write(block)
                    left -= len(block)
            if left:
                raise Refusal(HTTPStatus.BAD_REQUEST, f"got {size - left} of {size} bytes")
            partial.replace(folder / f"{part}.safetensors")
        finally:
            partial.unlink(missing_ok=True)
        return {}

    def server_close(self) -> None:
        super().server_close()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._folder.cleanup()

    def build(self, spec: EngineSpec) -> dict[str, object]:
        """Build the engine of `spec`, unless it is there."""
        if self._core is None:
            logger.info("building the engine: %s, %s", spec.config.get("architectures"), spec.dtype)
            self._core = VLLMCore(spec, **self._options)
        elif self._core.spec != spec:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                f"it has an engine for another model or other limits ({_difference(self._core.spec, spec)}); "
                "restart it for this one",
            )
        return {}

    def load(self, version: str, parts: int) -> dict[str, object]:
        """Load the weights that came in `parts` parts."""
        core = self._engine()
        if self._version == version:  # the trainer got no answer and asks again
            return {}
        folder = Path(self._folder.name, version)
        files = [folder / f"{part}.safetensors" for part in range(parts)]
        if not all(file.is_file() for file in files):
            raise Refusal(HTTPStatus.CONFLICT, "has not all parts of these weights")
        self._version = ""  # neither the old nor the new ones until all are loaded
        core.load_files([str(file) for file in files])
        self._version = version
        for old in Path(self._folder.name).iterdir():
            shutil.rmtree(old, ignore_errors=True)
        return {}

    def sample(self, request: dict[str, Any]) -> dict[str, object]:
        """Sample from the weights that the request names."""
        core = self._engine()
        if request["weights"] != self._version:
            raise Refusal(HTTPStatus.CONFLICT, "has other weights than those that were sent last")
        drawn = core.sample(
            request["prompts"],
            request["seeds"],
            max_new_tokens=request["max_new_tokens"],
            stop_ids=request["stop_ids"],
        )
        return {"samples": drawn}

    def _engine(self) -> VLLMCore:
        if self._core is None:
            raise Refusal(HTTPStatus.CONFLICT, "has no engine yet")
        return self._core


class _Timed(RawIOBase):
    """What a connection sends, read until `deadline` (seconds of `time.monotonic`): a trickle ends too."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline = time.monotonic() + _PATIENCE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request comes too slowly")
        self._connection.settimeout(min(left, _PATIENCE))
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(_PATIENCE)  # of the answer


class _Handler(BaseHTTPRequestHandler):
    server: EngineServer
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE

    def setup(self) -> None:
        super().setup()
        self._timed = _Timed(self.connection)
        self.rfile = BufferedReader(self._timed, 1 << 20)

    def _answer(self) -> None:
        status, answer = HTTPStatus.OK, {}
        self.close_connection = True  # a trainer makes one for each request
        try:
            answer = self._handle()
        except Refusal as error:
            status, answer = error.status, {"error": str(error)}
        except TimeoutError as error:
            status, answer = HTTPStatus.REQUEST_TIMEOUT, {"error": f"{error}"}
        except (SoftprefError, KeyError, TypeError, ValueError, RecursionError) as error:
            status, answer = HTTPStatus.BAD_REQUEST, {"error": f"{error}"}
            logger.warning("%s %s: %s", self.command, self.path, error)
        except Exception as error:  # of vLLM: the trainer is told, the server goes on
            status, answer = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{type(error).__name__}: {error}"}
            logger.exception("%s %s", self.command, self.path)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Connection", "close")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = _answer

    def _handle(self) -> dict[str, object]:
        server, asked = self.server, (self.command, self.path)
        if asked == ("GET", "/health"):
            return {"status": "ok"}
        if server.token:
            given = self.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {server.token}".encode()):
                raise Refusal(HTTPStatus.UNAUTHORIZED, "wrong or no token")
        if asked == ("GET", "/engine"):
            return server.state()
        if asked == ("PUT", "/engine"):
            return server.alone(server.build, EngineSpec(**self._json(_MAX_JSON)))
        if asked == ("POST", "/samples"):
            return server.alone(server.sample, self._json(_MAX_PROMPTS))
        found = _WEIGHTS.fullmatch(self.path)
        if found and found["part"] and self.command == "PUT":
            size = self._body_size(server.room(found["version"]))
            return server.store(found["version"], int(found["part"]), self.rfile, size)
        if found and not found["part"] and self.command == "POST":
            return server.alone(server.load, found["version"], int(self._json(_MAX_JSON)["parts"]))
        raise Refusal(HTTPStatus.NOT_FOUND, f"does not know {self.command} {self.path}")

    def _json(self, most: int) -> Any:
        return json.loads(self.rfile.read(self._body_size(most)))

    def _body_size(self, most: int) -> int:
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or len(size) > 20 or int(size) > most:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"wants a body with a length, at most {most} bytes"
            )
        self._timed.deadline = time.monotonic() + _PATIENCE + int(size) / _SLOWEST
        return int(size)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _difference(present: EngineSpec, wanted: EngineSpec) -> str:
    """What distinguishes two specs, `name: present, not wanted`."""
    one, other = ({**spec.config, **spec._asdict(), "config": None} for spec in (present, wanted))
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return "; ".join(f"{name}: {one.get(name)!r}, not {other.get(name)!r}" for name in names)


def main(arguments: list[str] | None = None) -> int:
    """Run the server until it is stopped; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m softpref.spo.vllm_server",
        description="vLLM for SPO training in a process of its own; the trainer sends model and weights.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; by default this machine's")
    parser.add_argument("--port", type=int, default=8021, help="0 takes a free one")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model")
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        help="share of a GPU's memory to use; by default what sampling_batch_size sequences need",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code of checkpoints")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        server = _server(options)
    except SoftprefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that temporary files are removed
    host, port = server.server_address[:2]
    print(f"listening at http://{host!s}:{port}", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


def _server(options: argparse.Namespace) -> EngineServer:
    token = os.environ.get(TOKEN_VARIABLE, "")
    if options.host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise ConfigError(
            f"--host {options.host} would let anybody on the network load weights; put a secret into "
            f"{TOKEN_VARIABLE}, here and at the trainer, or leave the host at 127.0.0.1"
        )
    try:
        return EngineServer(
            (options.host, options.port),
            token=token,
            options={
                "tensor_parallel_size": options.tensor_parallel_size,
                "gpu_memory_utilization": options.gpu_memory_utilization,
                "trust_remote_code": options.trust_remote_code,
            },
        )
    except OSError as error:
        raise ConfigError(f"cannot listen at {options.host}:{options.port}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
