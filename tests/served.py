"""Servers on this machine: those whose answers a test writes (`served`), and programs (`start_server`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from ssl import SSLContext
from typing import Any, NoReturn

from werkzeug import Request, Response
from werkzeug.exceptions import HTTPException, abort
from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server


class _Quiet(WSGIRequestHandler):
    def log(self, *arguments: Any) -> None: ...


@contextlib.contextmanager
def served(
    answer: Callable[[Request], Any], ssl_context: SSLContext | None = None, port: int = 0
) -> Iterator[str]:
    """Serve what `answer` returns for each request, until the block ends; gives the server's URL.

    A `Response` is sent as it is, a string as text, anything else as JSON; `refuse` ends a request. Without a
    port it is any free one.
    """

    @Request.application
    def application(request: Request) -> Response:
        found = answer(request)
        if isinstance(found, Response):
            return found
        is_text = isinstance(found, str)
        return Response(
            found if is_text else json.dumps(found), mimetype="text/plain" if is_text else "application/json"
        )

    server = make_server(
        "127.0.0.1", port, application, threaded=True, request_handler=_Quiet, ssl_context=ssl_context
    )
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http{'s' if ssl_context else ''}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def routes(calls: dict[tuple[str, str], Callable[..., Any]]) -> Callable[[Request], Any]:
    """An `answer` by method and path: `("GET", "/runs/<run_id>")` is called with the request and `run_id`."""
    rules = Map([Rule(path, methods=[method], endpoint=call) for (method, path), call in calls.items()])

    def answer(request: Request) -> Any:
        try:
            call, given = rules.bind_to_environ(request.environ).match()
        except HTTPException:
            refuse(404, f"{request.method} {request.path} not found")
        return call(request, **given)

    return answer


class ChatEndpoint:
    """Stands in for an OpenAI-compatible endpoint; give its `answer` to `served`, and add `/v1` to the URL.

    Args:
        reply: called with the messages of a request: the text of the answer, or a pair of the text and, for
            each of its tokens, `(token, {token: log-probability})`; or a `Response` that is sent as it is.

    Attributes:
        requests: bodies, in the order that they came.
        keys: what each request was authorised with.
    """

    def __init__(self, reply: Callable[[list[dict[str, str]]], Any]) -> None:
        self.reply, self.requests, self.keys = reply, list[dict[str, Any]](), list[str]()

    def answer(self, request: Request) -> Any:
        if (request.method, request.path) != ("POST", "/v1/chat/completions"):
            return Response(f"no {request.path}", 404)
        body = request.get_json()
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization", ""))
        found = self.reply(body["messages"])
        if isinstance(found, Response):
            return found
        text, tokens = (found, None) if isinstance(found, str) else found
        content = [
            {
                "token": token,
                "logprob": chances.get(token, -20.0),
                "top_logprobs": [{"token": one, "logprob": chance} for one, chance in chances.items()],
            }
            for token, chances in tokens or ()
        ]
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                    "logprobs": {"content": content} if tokens else None,
                }
            ],
            "usage": {"prompt_tokens": 40, "completion_tokens": 10, "total_tokens": 50},
        }


def marked_texts(messages: list[dict[str, str]]) -> list[str]:
    """The prompt and the answers A and B of a question of the judge `llm`, as its marks hold them."""
    pattern = r"^(Prompt|Answer A|Answer B):\n<text (\w+)>\n(.*?)\n</text \2>$"
    marked = re.findall(pattern, messages[-1]["content"], re.MULTILINE | re.DOTALL)
    assert [name for name, _, _ in marked] == ["Prompt", "Answer A", "Answer B"]
    return [text for _, _, text in marked]


def refuse(status: int, message: str, reason: str = "") -> NoReturn:
    """End a request with an error, as Kubernetes and Kubeflow Pipelines write theirs."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason}
    abort(Response(json.dumps({**body, "message": message}), status, mimetype="application/json"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_server(command: list[str], url: str, log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """A program that serves, once `url` answers; `kill_server` ends it with all that it started."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=1).close()
            return process
        time.sleep(0.1)
    kill_server(process)
    raise AssertionError(log.read_text())


def kill_server(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
