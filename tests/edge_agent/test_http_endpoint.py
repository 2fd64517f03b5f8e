"""The HTTP endpoint: what it answers, what it refuses, and that nobody can wear it out."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.generation import Request, gathered
from edge_agent.http_endpoint import MAX_BODY_BYTES, MAX_CONNECTIONS, Endpoint
from edge_agent.library import Library
from edge_agent.model_versions import Candidate, ModelMaker
from edge_agent.sampling import Sampling
from fedloom.errors import ConfigError
from tests.edge_agent.toy import LABELS, PARAMETERS, Toy
from tests.edge_agent.toy_lm import MAX_TOKENS, ToyLm, save_toy_lm

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def toy_lm(tmp_path: Path) -> ToyLm:
    return save_toy_lm(tmp_path / "lm")


@pytest.fixture
def maker(toy: Toy, toy_lm: ToyLm, tmp_path: Path) -> ModelMaker:
    """Both adapters of a device: `toy` classifies, `reply` writes."""
    found = ModelMaker(tmp_path / "models", "kitchen-pi", Ed25519PrivateKey.generate())
    add(found, toy, 0)
    found.add(Candidate(toy_lm.folder, toy_lm.plan, toy_lm.theta, bytes(16), 1))
    return found


def add(maker: ModelMaker, toy: Toy, label: int) -> None:
    theta = np.zeros(PARAMETERS, np.float32)
    theta[PARAMETERS - len(LABELS) + label] = 5.0
    maker.add(Candidate(toy.folder, toy.plan, theta, bytes(16), label + 1))


@contextlib.contextmanager
def serving(maker: ModelMaker, **limits: Any) -> Iterator[Endpoint]:
    with Endpoint(("127.0.0.1", 0), Library(maker, threads=1), **limits) as endpoint:
        thread = threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield endpoint
        finally:
            endpoint.shutdown()
            thread.join()


@pytest.fixture
def endpoint(maker: ModelMaker) -> Iterator[Endpoint]:
    with serving(maker) as found:
        yield found


def ask(
    endpoint: Endpoint,
    method: str,
    path: str,
    body: object = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.server_port, timeout=30)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    with contextlib.closing(connection):
        connection.request(method, path, content, JSON if headers is None else headers)
        response = connection.getresponse()
        text = response.read()
    return response.status, json.loads(text) if text else None


def infer(endpoint: Endpoint, **body: Any) -> tuple[int, Any]:
    return ask(endpoint, "POST", "/v1/infer", {"adapter": "toy", "inputs": ["lamp"]} | body)


def generate(endpoint: Endpoint, **body: Any) -> tuple[int, Any]:
    return ask(endpoint, "POST", "/v1/generate", {"adapter": "reply", "prompt": "a"} | body)


def test_adapters_are_listed(endpoint: Endpoint) -> None:
    status, found = ask(endpoint, "GET", "/v1/adapters")
    assert status == 200
    reply, toy = found["adapters"]
    assert (toy["adapter"], toy["version"], toy["labels"]) == ("toy", 1, list(LABELS))
    assert (reply["adapter"], reply["task"]) == ("reply", "CausalLanguageModelling")


def test_inputs_are_answered_in_order(endpoint: Endpoint) -> None:
    status, found = infer(endpoint, inputs=["lamp", "", "rain"], top=2)
    assert status == 200
    assert (found["adapter"], found["version"]) == ("toy", 1)
    assert [row["label"] for row in found["outputs"]] == [LABELS[0]] * 3
    assert [len(row["probabilities"]) for row in found["outputs"]] == [2] * 3


def test_a_new_version_answers_without_a_restart(
    endpoint: Endpoint, maker: ModelMaker, toy: Toy
) -> None:
    assert infer(endpoint)[1]["version"] == 1
    add(maker, toy, 2)
    _, found = infer(endpoint)
    assert (found["version"], found["outputs"][0]["label"]) == (2, LABELS[2])


def test_a_text_is_whole_or_streamed(endpoint: Endpoint, toy_lm: ToyLm) -> None:
    asked = {"max_tokens": 20, "temperature": 1.5, "top_p": 0.9, "seed": 7}
    status, whole = generate(endpoint, **asked)
    assert status == 200
    model = endpoint.library.adapter("reply").model
    request = Request(20, Sampling(1.5, top_p=0.9, seed=7))
    text, ended = gathered(model.generate(toy_lm.theta, "a", request))
    assert (whole["text"], whole["tokens"], whole["ending"]) == (text, ended.tokens, ended.ending)

    connection = http.client.HTTPConnection("127.0.0.1", endpoint.server_port, timeout=30)
    body = {"adapter": "reply", "prompt": "a", "stream": True, **asked}
    connection.request("POST", "/v1/generate", json.dumps(body), JSON)
    response = connection.getresponse()
    assert response.getheader("Content-Type") == "text/event-stream"
    events = [json.loads(line[6:]) for line in response.read().splitlines() if line]
    connection.close()
    assert events[0] == {"adapter": "reply", "version": 1}
    assert "".join(event["text"] for event in events[1:-1]) == text
    assert events[-1] == {"ending": ended.ending, "prompt_tokens": 1, "tokens": ended.tokens}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/infer", {"inputs": ["a"]}, 404),  # two adapters, none named
        ("/v1/infer", {"adapter": "../toy", "inputs": ["a"]}, 404),
        ("/v1/infer", {"adapter": 7, "inputs": ["a"]}, 400),
        ("/v1/infer", {"adapter": "toy"}, 400),
        ("/v1/infer", {"adapter": "toy", "inputs": "a"}, 400),
        ("/v1/infer", {"adapter": "toy", "inputs": [7]}, 400),
        ("/v1/infer", {"adapter": "toy", "inputs": ["a"] * 1025}, 400),
        ("/v1/infer", {"adapter": "toy", "inputs": ["a"], "top": 0}, 400),
        ("/v1/infer", {"adapter": "toy", "inputs": ["a"], "more": 1}, 400),
        ("/v1/infer", {"adapter": "reply", "inputs": ["a"]}, 400),
        ("/v1/infer", b'{"adapter": "toy", "inputs": ["\\ud800"]}', 400),
        ("/v1/infer", b"[" * 100_000, 400),
        ("/v1/infer", b'{"adapter": "toy", "inputs": [' + b"9" * 5000 + b"]}", 400),
        ("/v1/infer", b"\xff\xfe", 400),
        ("/v1/infer", b"", 400),
        ("/v1/generate", {"adapter": "toy", "prompt": "a"}, 400),
        ("/v1/generate", {"adapter": "reply"}, 400),
        ("/v1/generate", {"adapter": "reply", "prompt": {"a": 1}}, 400),
        ("/v1/generate", {"adapter": "reply", "prompt": {"a": "b"}}, 400),
        ("/v1/generate", {"adapter": "reply", "prompt": "x" * MAX_TOKENS}, 400),
        ("/v1/generate", {"adapter": "reply", "prompt": "a", "max_tokens": 0}, 400),
        ("/v1/generate", {"adapter": "reply", "prompt": "a", "max_tokens": True}, 400),
        ("/v1/generate", {"adapter": "reply", "prompt": "a", "temperature": "hot"}, 400),
        ("/v1/generate", {"adapter": "reply", "prompt": "a", "top_p": 2}, 400),
        ("/v1/generate", {"adapter": "reply", "prompt": "a", "stop": [1]}, 400),
        ("/v1/generate", {"adapter": "reply", "prompt": "a", "beams": 4}, 400),
        ("/v1/generate", b'{"adapter": "reply", "prompt": "a", "temperature": NaN}', 400),
        ("/v1/generate", b'{"adapter": "reply", "prompt": "\\udc00"}', 400),
        ("/elsewhere", {}, 404),
    ],
)
def test_what_is_wrong_is_refused_with_a_reason(
    endpoint: Endpoint, path: str, body: object, status: int
) -> None:
    found, told = ask(endpoint, "POST", path, body)
    assert found == status
    assert "expected" in told["error"]
    assert infer(endpoint)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({}, 415),
        (JSON | {"Origin": "http://example.org"}, 403),
        (JSON | {"Origin": "null"}, 403),
        (JSON | {"Host": "example.org"}, 403),
        (JSON | {"Host": "127.0.0.1.example.org:80"}, 403),
        (JSON | {"Host": "localhost:80"}, 200),
        (JSON | {"Host": "[::1]"}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_pages_in_a_browser_cannot_ask(
    endpoint: Endpoint, headers: dict[str, str], status: int
) -> None:
    body = {"adapter": "toy", "inputs": ["lamp"]}
    assert ask(endpoint, "POST", "/v1/infer", body, headers)[0] == status


def raw(endpoint: Endpoint, data: bytes) -> bytes:
    """Send bytes, end the sending, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", endpoint.server_port), timeout=30) as connection:
        with contextlib.suppress(OSError):  # hung up on while sending
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                found += part
        return found


HEAD = b"POST /v1/infer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"\r\n", b"411"),
        (HEAD + b"Content-Length: -1\r\n\r\n", b"411"),
        (HEAD + "Content-Length: ٣\r\n\r\n".encode(), b"411"),
        (HEAD + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (HEAD + b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1), b"413"),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", b"413"),
        (HEAD + b"Content-Length: 10\r\n\r\n{}", b"400"),
        (b"GET /v1/adapters HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000, b"431"),
        (b"GET /v1/adapters HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"431"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET /v1/adapters HTTP/9.9\r\n\r\n", b"505"),
        (b"DELETE /v1/adapters HTTP/1.1\r\nHost: localhost\r\n\r\n", b"501"),
        (b"\x16\x03\x01\x00\xf5\x01\x00\r\n\r\n", b"400"),
    ],
)
def test_hostile_bytes_get_a_status_and_no_more(
    endpoint: Endpoint, data: bytes, status: bytes
) -> None:
    found = raw(endpoint, data)
    assert status in found[:400]  # some are answered before it is known that they are HTTP/1.1
    assert infer(endpoint)[0] == 200


def test_any_bytes_leave_it_at_work(endpoint: Endpoint) -> None:
    generator = np.random.default_rng(1)
    whole = HEAD + b"Content-Length: 33\r\n\r\n" + b'{"adapter":"toy","inputs":["a"]}\n'
    assert b"200 OK" in raw(endpoint, whole)
    for _ in range(60):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), generator.integers(1, 8)):
            data[place] = generator.integers(0, 256)
        raw(endpoint, bytes(data[: generator.integers(1, len(data) + 1)]))
    assert infer(endpoint)[0] == 200


def test_nothing_follows_on_a_connection(endpoint: Endpoint) -> None:
    request = b"GET /v1/adapters HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(endpoint, request * 3).count(b"HTTP/1.1 200") == 1


def test_who_is_slow_to_ask_is_hung_up_on(maker: ModelMaker) -> None:
    with serving(maker, read_seconds=0.3) as endpoint:
        address = ("127.0.0.1", endpoint.server_port)
        with socket.create_connection(address, timeout=30) as connection:
            with contextlib.suppress(OSError):
                for byte in HEAD * 20:  # a byte now and then is life, but no request
                    connection.sendall(bytes([byte]))
                    time.sleep(0.02)
            with contextlib.suppress(OSError):
                assert b"200" not in connection.recv(65536)
        assert infer(endpoint)[0] == 200


def test_too_many_connections_are_closed_and_later_ones_served(maker: ModelMaker) -> None:
    with serving(maker, read_seconds=20) as endpoint:
        address = ("127.0.0.1", endpoint.server_port)
        idle = [socket.create_connection(address, timeout=30) for _ in range(MAX_CONNECTIONS)]
        one_more = socket.create_connection(address, timeout=30)
        with one_more, contextlib.suppress(ConnectionResetError):
            assert one_more.recv(1) == b""
        for connection in idle:
            connection.close()
        for _ in range(200):
            with contextlib.suppress(OSError, http.client.HTTPException):
                if infer(endpoint)[0] == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("expected an answer once the others were gone")


def test_who_must_wait_too_long_is_told_to_come_back(maker: ModelMaker) -> None:
    with serving(maker, workers=1, queue_seconds=0.05) as endpoint:
        assert endpoint.work.acquire(timeout=1)  # a request that computes for long
        status, told = infer(endpoint)
        assert status == 503
        assert "expected" in told["error"]
        endpoint.work.release()
        assert infer(endpoint)[0] == 200


def test_a_reader_that_leaves_ends_the_text(endpoint: Endpoint) -> None:
    body = json.dumps({"adapter": "reply", "prompt": "a", "stream": True, "max_tokens": 60})
    for _ in range(4):  # more than the workers, which must all come free again
        connection = http.client.HTTPConnection("127.0.0.1", endpoint.server_port, timeout=30)
        connection.request("POST", "/v1/generate", body, JSON)
        connection.sock.close()
        connection.close()
    assert generate(endpoint, max_tokens=3)[0] == 200


def test_others_are_let_in_only_where_that_is_said(maker: ModelMaker) -> None:
    library = Library(maker, threads=1)
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):  # noqa: S104 - is refused
        with pytest.raises(ConfigError, match="allow-remote"):
            Endpoint((host, 0), library)
    with Endpoint(("0.0.0.0", 0), library, allow_remote=True) as endpoint:  # noqa: S104
        assert endpoint.server_port > 0
    with serving(maker) as endpoint, pytest.raises(ConfigError, match="expected to listen"):
        Endpoint(("127.0.0.1", endpoint.server_port), library)


def test_a_model_that_broke_is_a_failure_of_ours(maker: ModelMaker, toy: Toy) -> None:
    add(maker, replace(toy, plan=replace(toy.plan, name="broken")), 1)
    (maker.path("broken", 1) / "version.sig").write_bytes(bytes(64))
    with serving(maker) as endpoint:
        assert infer(endpoint, adapter="broken")[0] == 500
        _, told = ask(endpoint, "GET", "/v1/adapters")
        assert ["problem" in row for row in told["adapters"]] == [True, False, False]
        assert infer(endpoint)[0] == 200
