"""HTTP around the routes, on the standard library's server.

Its threads are enough: one job runs at a time whatever the server, answers are small, and no dependency is added to an
installation for users without a GPU. What it lacks is put on here: limits on bodies, connections and idle time.
"""

from __future__ import annotations

import select
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any

from diff2to3.errors import InputError
from diff2to3.web.guard import Guard
from diff2to3.web.routes import COMMON_HEADERS, Answer, Request, Routes, problem
from diff2to3.web.service import Service

MAX_CONNECTIONS = 48
#: Seconds without a byte after which a connection is closed.
IDLE = 30
#: Bodies that are read at a time: each is held in memory.
BODIES = 4


class Server(ThreadingHTTPServer):
    """Serves one :class:`Service`; ``close()`` also ends its jobs."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self, address: tuple[str, int], service: Service, guard: Guard, *, verbose: bool = False
    ) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.service, self.guard, self.verbose = service, guard, verbose
        self.routes = Routes(service)
        self.places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.bodies = threading.BoundedSemaphore(BODIES)
        try:
            super().__init__(address, Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{address[0]}, port {address[1]}: cannot be listened on: {reason}") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.places.acquire(blocking=False):
            self.shutdown_request(request)  # too many at once: the client may try again
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are nothing to report."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.server_close()
        self.service.close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "diff2to3"
    sys_version = ""
    timeout = IDLE

    def __init__(self, request: Any, client_address: Any, server: BaseServer) -> None:
        assert isinstance(server, Server)
        self.web = server
        super().__init__(request, client_address, server)

    def do_GET(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def do_DELETE(self) -> None:
        self.serve()

    def serve(self) -> None:
        refusal = self.web.guard.refusal(self.command, {k: v for k, v in self.headers.items()})
        if refusal is not None:
            self.close_connection = True  # its body is not read
            extra = {"WWW-Authenticate": 'Basic realm="diff2to3"'} if refusal.status == 401 else {}
            return self.send(problem(refusal.status, refusal.message, **extra))
        length = self.body_length()
        if isinstance(length, Answer):
            self.close_connection = True
            return self.send(length)
        body = b""
        if length:
            with self.web.bodies:
                body = self.rfile.read(length)
        if len(body) < length:  # the client left
            self.close_connection = True
            return None
        return self.send(self.web.routes(Request(self.command, self.path, body, self.gone)))

    def body_length(self) -> int | Answer:
        """Bytes of the body, or the answer to a body that is not taken."""
        most = self.web.service.limits.upload_bytes
        text = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding") or (text is None and self.command == "POST"):
            return problem(411, "send the body with its length (Content-Length)")
        if text is None:
            return 0
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            return problem(400, "Content-Length: expected a number")
        if int(text) > most:
            return problem(413, f"the request is larger than {most / 1e6:.0f} MB")
        return int(text)

    def gone(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            readable = select.select([self.connection], [], [], 0)[0]
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {**COMMON_HEADERS, **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.media_type)
        self.send_header("Content-Length", str(len(answer.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *values: Any) -> None:
        if self.web.verbose:
            super().log_message(format, *values)
