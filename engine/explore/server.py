"""The small server behind the page: one user, one machine, the standard library's.

On a loopback address it answers requests for that address only, whatever name a foreign page made the browser look up. On any other
it asks for a token, which the address that is printed carries and a cookie keeps.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import secrets
import socket
import sys
import traceback
import urllib.parse
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from armillary.engine.explore.api import LARGEST_UPLOAD, Pages, Refused, Reply
from armillary.engine.explore.similar import NotReady

__all__ = ["Server"]

SECURITY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
IDLE_S = 60.0  # after which a connection that says nothing is closed


class Server(ThreadingHTTPServer):
    """Binds an address at once; takes connections when it is told to `listen`, and answers them in `serve`.

    Args:
        host: Address or name to listen at.
        port: Port; 0 for any that is free.

    Attributes:
        token: What requests must carry; empty on a loopback address.

    Raises:
        ValueError: The port is taken, or the address is none of this machine.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages: Pages | None = None
        try:
            super().__init__((host, port), _Handler, bind_and_activate=False)
            self.server_bind()
        except (OSError, OverflowError) as error:
            self.server_close()
            raise _refusal(host, port, error) from error
        self.local = is_loopback(host)
        self.token = "" if self.local else secrets.token_urlsafe(18)
        self.cookie = f"armillary-{self.server_address[1]}"

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name, as the library's own does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """Address of the page, with the token where there is one."""
        host = self.server_name
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.server_port}/" + (f"?token={self.token}" if self.token else "")

    def listen(self, pages: Pages) -> None:
        """Take connections, which `serve` answers."""
        self.pages = pages
        try:
            self.server_activate()
        except OSError as error:  # another one, too, had the port bound already
            raise _refusal(self.server_name, self.server_port, error) from error

    def serve(self) -> None:
        """Answer requests until `shutdown`, or an interrupt from the keyboard."""
        try:
            self.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            pass
        finally:
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "armillary"
    sys_version = ""
    timeout = IDLE_S
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # head and body leave together

    def do_GET(self) -> None:
        self._reply(self._answered(b""))

    def do_POST(self) -> None:
        try:
            body = self._body()
        except Refused as refused:
            self.close_connection = True  # what follows is the body, and no request
            return self._reply(_problem(refused.status, str(refused)))
        self._reply(self._answered(body))

    def log_message(self, *_: Any) -> None:
        """Nothing: a page with many pictures would fill the terminal."""

    def _answered(self, body: bytes) -> Reply:
        try:
            headers = self._admit()
            assert self.server.pages is not None
            name = urllib.parse.unquote(self.headers.get("X-File-Name", ""))
            reply = self.server.pages.answer(self.command, self.path, body, name)
            return Reply(reply.body, reply.kind, reply.status, {**reply.headers, **headers})
        except Refused as refused:
            return _problem(refused.status, str(refused))
        except NotReady as error:
            return _problem(503, str(error))
        except (OSError, ValueError) as error:  # a damaged shard, a survey that was moved away
            return _problem(500, str(error))
        except Exception as error:
            traceback.print_exc()
            return _problem(500, f"the server failed: {type(error).__name__}; its terminal says more")

    def _body(self) -> bytes:
        text = self.headers.get("Content-Length", "")
        if not text.isdigit():
            raise Refused(411, "the request does not say how long it is")
        largest = max(LARGEST_UPLOAD, 4 * len(self.server.pages.objects) if self.server.pages else 0)
        if int(text) > largest:
            raise Refused(413, f"the file has {int(text) / 2**20:,.0f} MiB; at most {largest >> 20} are taken")
        body = self.rfile.read(int(text))
        if len(body) != int(text):
            raise Refused(400, "the request ended early")
        return body

    def _admit(self) -> dict[str, str]:
        """Headers that an admitted request is answered with.

        Raises:
            Refused: It comes from a foreign page, or without the token.
        """
        server = self.server
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if origin not in (None, f"http://{host}"):
            raise Refused(403, "requests of other pages are not answered")
        if server.local:
            if not is_loopback(urllib.parse.urlsplit(f"//{host}").hostname or ""):
                raise Refused(403, f"this server answers at {server.url}, not at {host}")
            return {}
        given = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).get("token", [""])[-1]
        if given and hmac.compare_digest(given.encode(), server.token.encode()):
            return {"Set-Cookie": f"{server.cookie}={server.token}; HttpOnly; SameSite=Strict; Path=/"}
        kept = SimpleCookie(self.headers.get("Cookie", "")).get(server.cookie)
        if kept is not None and hmac.compare_digest(kept.value.encode(), server.token.encode()):
            return {}
        raise Refused(401, "open the address that `armillary explore` printed, with its token")

    def _reply(self, reply: Reply) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        for name, value in {"Cache-Control": "no-store", **SECURITY, **reply.headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(reply.body)


def _refusal(host: str, port: int, error: Exception) -> ValueError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return ValueError(f"port: {port} is taken on {host}; choose another with --port, or 0 for any")
    return ValueError(f"host, port: cannot listen at {host}, port {port}: {error}")


def _problem(status: int, sentence: str) -> Reply:
    return Reply.json({"problem": sentence}, status)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
