"""The server, asked over its socket: who is admitted, what is refused, a thousand requests."""

import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from armillary.engine.explore.api import LARGEST_UPLOAD
from armillary.engine.explore.server import Server, is_loopback


@pytest.fixture
def serving(pages):
    """Start a server; stop them all at the end."""
    running = []

    def start(host="127.0.0.1", answers=pages):
        server = Server(host, 0)
        server.listen(answers)
        thread = threading.Thread(target=server.serve)
        running.append((server, thread))
        thread.start()
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()


def ask(server, target, method="GET", body=None, **headers):
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        line.request(method, target, body, {k.replace("_", "-"): v for k, v in headers.items()})
        reply = line.getresponse()
        return reply.status, reply.read(), dict(reply.getheaders())
    finally:
        line.close()


def problem(reply, status):
    assert reply[0] == status
    return json.loads(reply[1])["problem"]


def test_a_page_and_its_headers(serving):
    server = serving()
    status, body, headers = ask(server, "/")
    assert status == 200 and b"<title>Armillary</title>" in body
    assert (
        headers["Content-Security-Policy"].startswith("default-src 'self'") and headers["Cache-Control"] == "no-cache"
    )
    assert server.url == f"http://127.0.0.1:{server.server_port}/" and server.token == ""
    assert "there is nothing at /nothing" in problem(ask(server, "/nothing"), 404)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "10.0.0.1", ""])
def test_other_names_for_this_machine_are_refused(serving, host):
    assert "this server answers at" in problem(ask(serving(), "/api/about", Host=host), 403)


def test_other_pages_are_refused(serving):
    server = serving()
    own = f"http://localhost:{server.server_port}"
    assert ask(server, "/api/about", Origin=own, Host=own[7:])[0] == 200
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        said = problem(ask(server, "/api/similar", "POST", b"x", Origin=origin), 403)
        assert said == "requests of other pages are not answered"


def test_a_token_for_other_machines(serving):
    server = serving("0.0.0.0")
    assert len(server.token) > 20 and server.url.endswith(f"/?token={server.token}")
    assert "open the address that" in problem(ask(server, "/"), 401)
    assert "open the address that" in problem(ask(server, "/api/about?token=wrong"), 401)
    assert "open the address that" in problem(ask(server, "/api/about", Cookie="a=b; c"), 401)
    status, _, headers = ask(server, f"/?token={server.token}")
    assert status == 200 and "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert ask(server, "/api/about", Cookie=cookie)[0] == 200
    assert ask(server, "/api/export?format=csv", "POST", bytes(4), Cookie=cookie)[0] == 200
    assert ask(server, "/api/about", Cookie=cookie[:-1] + "x")[0] == 401


def test_a_taken_port():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: {port} is taken on 127.0.0.1; choose another with --port"):
            Server("127.0.0.1", port)
    for host, number in (("no.such.host.invalid", 0), ("127.0.0.1", 99_999), ("192.0.2.1", 0)):
        with pytest.raises(ValueError, match=f"cannot listen at {host}"):
            Server(host, number)


def test_two_that_start_at_the_same_time(pages):
    first = Server("127.0.0.1", 0)
    second = Server("127.0.0.1", first.server_port)  # both are bound, and neither listens
    first.listen(pages)
    with pytest.raises(ValueError, match=f"port: {first.server_port} is taken"):
        second.listen(pages)
    first.server_close(), second.server_close()


def test_uploads_that_are_refused_before_they_are_read(serving):
    server = serving()
    large = problem(ask(server, "/api/similar", "POST", Content_Length=str(LARGEST_UPLOAD + 1)), 413)
    assert large == "the file has 64 MiB; at most 64 are taken"
    for length in ("", "-1", "x"):
        assert "does not say how long" in problem(ask(server, "/api/similar", "POST", Content_Length=length), 411)
    assert "start `armillary explore` with --run RUN" in problem(ask(server, "/api/similar", "POST", b"x"), 422)
    assert problem(ask(server, "/api/similar", "POST", Content_Length="0"), 400) == "the file is empty"


def test_what_fails_is_said_without_its_traceback(serving, pages, monkeypatch, capsys):
    server = serving()
    monkeypatch.setattr(pages.pictures, "image", lambda number: 1 / 0)
    said = problem(ask(server, "/api/images/1"), 500)
    assert said == "the server failed: ZeroDivisionError; its terminal says more"
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(pages.pictures, "image", lambda number: (_ for _ in ()).throw(OSError("disk is gone")))
    assert problem(ask(server, "/api/images/1"), 500) == "disk is gone"


@pytest.mark.slow
def test_a_thousand_requests(serving, objects):
    """Eight readers at once, a mix of addresses: every answer is whole and right."""
    server = serving()
    expected = {n: ask(server, f"/api/images/{n}")[:2] for n in range(len(objects))}
    points = objects.grid_points().tobytes()

    def some(reader):
        line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        for step in range(125):
            number = (7 * reader + step) % len(objects)
            kind = step % 4
            target = [f"/api/images/{number}", "/api/points", f"/api/similar/{number}?k=4", "/api/labels/kind"][kind]
            line.request("GET", target)
            reply = line.getresponse()
            status, body = reply.status, reply.read()
            if kind == 0:
                assert (status, body) == expected[number]
            elif kind == 1:
                assert body == points
            elif kind == 2:
                assert len(json.loads(body)["answers"]) == 4
            else:
                assert np.array_equal(np.frombuffer(body, np.uint8), objects.values("kind"))
        line.close()
        return 125

    with ThreadPoolExecutor(8) as readers:
        assert sum(readers.map(some, range(8))) == 1000


@pytest.mark.parametrize(
    ("host", "only"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.3.2.1", True), ("0.0.0.0", False), ("x", False)],
)
def test_loopback(host, only):
    assert is_loopback(host) == only
