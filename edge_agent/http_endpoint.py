"""Answers over HTTP for programs on this device: JSON in, JSON or server-sent events out.

Every response closes its connection: there is nothing to smuggle a second request into, and the end
of a stream is the end of the connection. Pages in a browser on this device must not be able to ask:
a request with an `Origin`, another content type than JSON, or a foreign `Host` is refused.
"""

import ipaddress
import itertools
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog

from edge_agent.answer_json import DEFAULT_TOP, answer_json, ended_json, read_request
from edge_agent.generation import Ended, LanguageModel, gathered
from edge_agent.inference import Adapter
from edge_agent.library import Library
from fedloom.errors import ConfigError, FedloomError, Reason, Refused

MAX_BODY_BYTES = 1 << 20
MAX_INPUTS = 1024
MAX_CONNECTIONS = 32
DEFAULT_WORKERS = 2  # requests that compute at the same time
READ_SECONDS = 10.0  # for a whole request to come in, and for a client to take a piece
QUEUE_SECONDS = 5.0  # that a request waits for others before it is told to come back
_LOOPBACK_NAMES = frozenset(("localhost", "127.0.0.1", "[::1]"))
_log = structlog.get_logger()


class Problem(Exception):
    """A request that is not answered, and with which status."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Endpoint(ThreadingHTTPServer):
    """Serves one library; `workers` requests compute at a time, others wait a little."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS
    allow_reuse_address = True

    def __init__(
        self,
        address: tuple[str, int],
        library: Library,
        allow_remote: bool = False,
        workers: int = DEFAULT_WORKERS,
        read_seconds: float = READ_SECONDS,
        queue_seconds: float = QUEUE_SECONDS,
    ) -> None:
        """Listen; raises ConfigError for an address that others reach, unless it is allowed."""
        if not (allow_remote or is_loopback(address[0])):
            raise ConfigError(
                "listen",
                f"expected a loopback address, found {address[0]}: anybody who reaches it could "
                "ask; --allow-remote permits it",
            )
        self.library = library
        self.local_only = not allow_remote
        self.read_seconds = read_seconds
        self.queue_seconds = queue_seconds
        self.work = threading.BoundedSemaphore(workers)
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.listens_on = address
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise ConfigError(
                "listen", f"expected to listen on {address[0]}:{address[1]}: {error.strerror}"
            ) from error

    def server_bind(self) -> None:
        """Bind without asking the resolver for a name of our own."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.listens_on)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.listens_on[0], self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread, or close it when there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve the connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what no rule foresaw; its text could quote what was asked."""
        del request, client_address
        kind, _, _ = sys.exc_info()
        _log.error("request failed", error=kind.__name__ if kind else "")


def is_loopback(host: str) -> bool:
    """Whether only this device reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"
    server_version = "fedloom-agent"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.read_seconds)
        # Reading has one deadline for everything: a byte now and then must not hold a connection.
        self._deadline = threading.Timer(self.server.read_seconds, self._hang_up)
        self._deadline.daemon = True
        self._deadline.start()

    def finish(self) -> None:
        self._deadline.cancel()
        with suppress(OSError):  # the client is gone
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):  # the client is gone, or was hung up on
            super().handle()

    def do_GET(self) -> None:
        self._answer(self._list)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *arguments: object) -> None:
        """Say nothing: what is asked is nobody's business, not even of a log."""

    def _hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, handler: Callable[[], None]) -> None:
        self.close_connection = True
        try:
            self._check_origin()
            handler()
        except Problem as problem:
            self._send_json(problem.status, {"error": problem.text})
        except ConfigError as error:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": error.problem})
        except Refused as refused:
            malformed = refused.reason is Reason.MALFORMED
            status = HTTPStatus.BAD_REQUEST if malformed else HTTPStatus.INTERNAL_SERVER_ERROR
            self._send_json(status, {"error": refused.subject})

    def _check_origin(self) -> None:
        host = self.headers.get("Host", "").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self.server.local_only and name not in _LOOPBACK_NAMES:
            raise Problem(HTTPStatus.FORBIDDEN, "expected Host: localhost")
        if "Origin" in self.headers:
            raise Problem(HTTPStatus.FORBIDDEN, "expected no request by a web page")

    def _list(self) -> None:
        self._deadline.cancel()
        if self.path != "/v1/adapters":
            raise Problem(HTTPStatus.NOT_FOUND, "expected /v1/adapters, /v1/infer or /v1/generate")
        library = self.server.library
        found = [_described(library, name) for name in library.names()]
        self._send_json(HTTPStatus.OK, {"adapters": found})

    def _post(self) -> None:
        if self.path not in ("/v1/infer", "/v1/generate"):
            raise Problem(HTTPStatus.NOT_FOUND, "expected /v1/infer or /v1/generate")
        body = self._body()
        self._deadline.cancel()
        name = body.pop("adapter", None)
        if name is not None and not isinstance(name, str):
            raise Problem(HTTPStatus.BAD_REQUEST, "expected adapter: a name")
        library = self.server.library
        if not self.server.work.acquire(timeout=self.server.queue_seconds):
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "expected fewer requests at a time")
        try:
            adapter = library.adapter(library.only_name() if name is None else name)
            (self._infer if self.path == "/v1/infer" else self._generate)(adapter, body)
        finally:
            self.server.work.release()

    def _body(self) -> dict[str, Any]:
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected Content-Type: application/json"
            )
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise Problem(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if len(length) > 12 or int(length) > MAX_BODY_BYTES:
            raise Problem(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MAX_BODY_BYTES} bytes"
            )
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise Problem(HTTPStatus.BAD_REQUEST, f"expected {length} bytes, found {len(content)}")
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Problem(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        return body

    def _infer(self, adapter: Adapter, body: dict[str, Any]) -> None:
        if isinstance(adapter.model, LanguageModel):
            raise Problem(HTTPStatus.BAD_REQUEST, f"expected /v1/generate for {adapter.name}")
        inputs, top = body.pop("inputs", None), body.pop("top", DEFAULT_TOP)
        if body or not isinstance(inputs, list) or len(inputs) > MAX_INPUTS:
            raise Problem(
                HTTPStatus.BAD_REQUEST,
                f"expected adapter, inputs: a list of at most {MAX_INPUTS}, and top; nothing else",
            )
        if type(top) is not int or top < 1:
            raise Problem(HTTPStatus.BAD_REQUEST, "expected top: a number from 1")
        answers = adapter.model.answer(adapter.theta, inputs)
        outputs = [answer_json(answer, top) for answer in answers]
        self._send_json(HTTPStatus.OK, {**_named(adapter), "outputs": outputs})

    def _generate(self, adapter: Adapter, body: dict[str, Any]) -> None:
        model = adapter.model
        if not isinstance(model, LanguageModel):
            raise Problem(HTTPStatus.BAD_REQUEST, f"expected /v1/infer for {adapter.name}")
        streamed = body.pop("stream", False)
        prompt = model.prompt(_prompt(body.pop("prompt", None)))
        pieces = model.generate(adapter.theta, prompt, read_request(body))
        if streamed is True:
            self._stream(adapter, pieces)
            return
        text, ended = gathered(pieces)
        answer = {**_named(adapter), "text": text, **ended_json(ended)}
        self._send_json(HTTPStatus.OK, answer)

    def _stream(self, adapter: Adapter, pieces: Iterator[str | Ended]) -> None:
        first = next(pieces)  # what is refused is refused before the status is sent
        self._send_head(HTTPStatus.OK, "text/event-stream")
        self._event(_named(adapter))
        try:
            for piece in itertools.chain((first,), pieces):
                self._event({"text": piece} if isinstance(piece, str) else ended_json(piece))
        except Refused as refused:  # the status is sent: an event has to tell
            self._event({"error": refused.subject})

    def _event(self, values: dict[str, object]) -> None:
        self.wfile.write(b"data: " + json.dumps(values).encode() + b"\n\n")

    def _send_json(self, status: HTTPStatus, values: dict[str, object]) -> None:
        content = json.dumps(values).encode()
        self._send_head(status, "application/json", len(content))
        self.wfile.write(content)

    def _send_head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        if length is not None:
            self.send_header("Content-Length", str(length))
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        self.end_headers()


def _named(adapter: Adapter) -> dict[str, object]:
    return {"adapter": adapter.name, "version": adapter.version}


def _described(library: Library, name: str) -> dict[str, object]:
    try:
        adapter = library.adapter(name)
    except FedloomError as error:  # of this adapter: the others answer
        return {"adapter": name, "problem": str(error)}
    labels = getattr(adapter.plan.task, "labels", ())
    kind = type(adapter.plan.task).__name__
    return {**_named(adapter), "task": kind, "labels": list(labels)}


def _prompt(given: object) -> str | dict[str, str]:
    if isinstance(given, str):
        return given
    if isinstance(given, dict) and all(isinstance(value, str) for value in given.values()):
        return given
    raise Problem(HTTPStatus.BAD_REQUEST, "expected prompt: a text, or an object of texts")
