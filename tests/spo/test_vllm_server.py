"""What the vLLM server bears of strangers' requests; no vLLM is needed for it."""

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from softpref.spo import vllm_server
from softpref.spo.vllm_server import EngineServer

pytestmark = pytest.mark.fast


@pytest.fixture
def server():
    """A server with an engine of a model that 100 bytes of weights may come for."""
    with EngineServer(("127.0.0.1", 0), token="", options={}) as server:
        server._core = SimpleNamespace(most_weight_bytes=100)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def address(server):
    return server.server_address


def asked(address, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(*address, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


@pytest.mark.parametrize("path", ["/engine", f"/weights/{'0' * 32}", "/samples"])
def test_json_that_is_nested_too_deeply_is_a_bad_request(address, path):
    method = "PUT" if path == "/engine" else "POST"
    assert asked(address, method, path, "[" * 100_000)[0] == 400
    assert asked(address, "GET", "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("method", "path", "size"),
    [
        ("PUT", "/engine", 1 << 21),
        ("POST", f"/weights/{'0' * 32}", 1 << 21),
        ("POST", "/samples", 1 << 27),
        ("PUT", f"/weights/{'0' * 32}/0", 101),
        ("PUT", "/engine", "9" * 5000),
    ],
)
def test_a_body_that_is_too_large_is_refused_before_it_is_read(address, method, path, size):
    status, answer = asked(address, method, path, b"", **{"Content-Length": str(size)})
    assert status == 413
    assert "at most" in answer["error"]


def test_idle_connections_are_bounded_and_make_room_when_they_end(address):
    idle = [socket.create_connection(address, timeout=10) for _ in range(vllm_server._MAX_CONNECTIONS)]
    with socket.create_connection(address, timeout=10) as one_more:
        assert one_more.recv(1) == b""
    for one in idle:
        one.close()
    for _ in range(100):
        try:
            assert asked(address, "GET", "/health")[0] == 200
            return
        except (OSError, http.client.HTTPException):
            threading.Event().wait(0.05)
    pytest.fail("no connection became free")


def test_weights_that_are_never_loaded_do_not_fill_the_disk(server, address):
    for number in range(5):
        assert asked(address, "PUT", f"/weights/{number:032x}/0", b"weights") == (200, {})
    kept = {folder.name for folder in Path(server._folder.name).iterdir()}
    assert kept == {f"{number:032x}" for number in (3, 4)}


def test_the_parts_of_weights_together_are_bounded_by_the_engines_model(server, address):
    version = "0" * 32
    assert asked(address, "PUT", f"/weights/{version}/0", b"w" * 60) == (200, {})
    status, answer = asked(address, "PUT", f"/weights/{version}/1", b"w" * 41)
    assert (status, "at most 40 bytes" in answer["error"]) == (413, True)
    assert asked(address, "PUT", f"/weights/{version}/1", b"w" * 40) == (200, {})


def test_weights_for_no_engine_are_not_kept(server, address):
    server._core = None
    status, answer = asked(address, "PUT", f"/weights/{'0' * 32}/0", b"weights")
    assert (status, answer) == (409, {"error": "has no engine yet"})
    assert list(Path(server._folder.name).iterdir()) == []


@pytest.mark.parametrize(
    "head",
    [b"GET /health HTTP/1.1\r\n", b"PUT /weights/%032d/0 HTTP/1.1\r\nContent-Length: 90\r\n\r\n" % 0],
    ids=["head", "body"],
)
def test_a_request_that_trickles_in_is_given_up(server, address, monkeypatch, head):
    monkeypatch.setattr(vllm_server, "_PATIENCE", 0.5)
    began = time.monotonic()
    with socket.create_connection(address, timeout=10) as trickle:
        trickle.sendall(head)
        answer = b""
        while time.monotonic() < began + 10:  # a byte each 50 ms: never silent for the half second
            try:
                trickle.sendall(b"x")
                trickle.settimeout(0.05)
                if not (found := trickle.recv(1 << 16)):
                    break
                answer += found
            except TimeoutError:
                continue
            except OSError:
                break
    assert time.monotonic() - began < 5
    assert not answer or b" 408 " in answer.splitlines()[0]
    assert asked(address, "GET", "/health") == (200, {"status": "ok"})
    assert not list(Path(server._folder.name).rglob("*.partial"))
