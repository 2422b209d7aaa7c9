"""Downloads of published data sets, from a real server on this machine: whole and checked, or not there at all."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib import request
from urllib.error import URLError

import pytest

from rome_lab.facts import published_sets as datasets
from rome_lab.facts.published_sets import PUBLISHED, https_only, published_file
from rome_lab.facts.sources import load_facts


class Site(BaseHTTPRequestHandler):
    """Answers every GET with the server's `status`, `headers` and `body`, and keeps the paths asked for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in self.server.body:
            try:
                self.wfile.write(chunk)
            except OSError:
                return
            if self.server.pause:
                time.sleep(self.server.pause)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    server.asked, server.status, server.headers, server.body, server.pause = [], 200, {}, [], 0.0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def opener_to(server: ThreadingHTTPServer) -> request.OpenerDirector:
    """The library's own opener, except that its HTTPS connections end at `server`, without encryption."""

    class Local(request.HTTPSHandler):
        def https_open(self, asked: request.Request) -> http.client.HTTPResponse:
            def connect(host: str, timeout: float, **kwargs: object) -> http.client.HTTPConnection:
                return http.client.HTTPConnection(*server.server_address, timeout=timeout)

            return self.do_open(connect, asked)

    return https_only(Local())


def records(n: int = 1000) -> list[dict[str, object]]:
    return [
        {
            "known_id": i,
            "subject": f"Town {i}",
            "attribute": "Peru",
            "template": "{} is in",
            "prediction": " Peru",
            "prompt": f"Town {i} is in",
            "relation_id": "P17",
        }
        for i in range(n)
    ]


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_a_data_set_is_downloaded_once_and_then_read_from_the_cache(site: ThreadingHTTPServer, tmp_path: Path) -> None:
    site.body = [json.dumps(records()).encode()]
    path = published_file("known_1000", opener_to(site))
    assert path == tmp_path / "datasets/known_1000.json"
    assert path.read_bytes() == site.body[0]
    assert published_file("known_1000", opener_to(site)) == path
    assert site.asked == ["/data/dsets/known_1000.json"]
    facts = load_facts("known_1000")
    assert [fact.prompt for fact in facts] == [f"Town {i} is in" for i in range(1000)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([b"<html>Please log in</html>"], "is no list of JSON records"),
        ([b""], "is no list of JSON records"),
        ([json.dumps(records()).encode()[:-10]], "is no list of JSON records"),
        ([json.dumps({"error": "none"}).encode()], "is no list of JSON records"),
        ([json.dumps(records(999)).encode()], "only 999 records came, expected at least 1000"),
        ([json.dumps([*records(), {"subject": "Lima"}]).encode()], "record 1001 of what arrived lacks attribute"),
        ([json.dumps([*records(), "Lima"]).encode()], "record 1001 of what arrived lacks attribute"),
        ([b" " * 1_000_000] * 11, "more than 10000000 bytes came"),
    ],
)
def test_what_is_not_the_data_set_gets_no_name_in_the_cache(
    site: ThreadingHTTPServer, tmp_path: Path, body: list[bytes], said: str
) -> None:
    site.body = body
    with pytest.raises(ConnectionError, match=said) as caught:
        published_file("known_1000", opener_to(site))
    assert files(tmp_path) == []
    for told in ("'known_1000'", PUBLISHED["known_1000"].url, str(tmp_path / "datasets/known_1000.json")):
        assert told in str(caught.value)


def test_a_refusal_of_the_server_is_told(site: ThreadingHTTPServer, tmp_path: Path) -> None:
    site.status = 404
    with pytest.raises(ConnectionError, match="HTTP Error 404"):
        published_file("zsre", opener_to(site))
    assert files(tmp_path) == []


def test_a_broken_connection_leaves_nothing(site: ThreadingHTTPServer, tmp_path: Path) -> None:
    site.headers = {"Transfer-Encoding": "chunked"}
    site.body = [b"5\r\n[1, 2\r\n"]  # and no end
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        published_file("known_1000", opener_to(site))
    assert files(tmp_path) == []


def test_a_server_that_falls_silent_is_given_up(
    site: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "SILENCE_S", 0.2)
    site.body, site.pause = [b"[", b"]"], 1.0
    with pytest.raises(ConnectionError, match="timed out"):
        published_file("known_1000", opener_to(site))
    assert files(tmp_path) == []


def test_a_server_that_trickles_is_given_up(
    site: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "DEADLINE_S", 0.3)
    site.body, site.pause = [b" "] * 40, 0.05
    with pytest.raises(ConnectionError, match=r"not complete after 0\.3 s"):
        published_file("known_1000", opener_to(site))
    assert files(tmp_path) == []


@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_a_redirection_away_from_https_is_not_followed(site: ThreadingHTTPServer, scheme: str) -> None:
    site.status, site.headers = 302, {"Location": f"{scheme}://127.0.0.1:{site.server_port}/elsewhere.json"}
    site.body = [json.dumps(records()).encode()]
    with pytest.raises(ConnectionError, match=f"unknown url type: {scheme}"):
        published_file("known_1000", opener_to(site))
    assert site.asked == ["/data/dsets/known_1000.json"]


def test_nothing_but_https_can_be_opened(
    site: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{site.server_port}")
    monkeypatch.setenv("all_proxy", f"http://127.0.0.1:{site.server_port}")
    for url in (f"http://127.0.0.1:{site.server_port}/x", (tmp_path / "x").as_uri(), "ftp://127.0.0.1/x", "data:,x"):
        with pytest.raises(URLError, match="unknown url type"):
            https_only().open(url, timeout=5)
    assert site.asked == []
    assert all(published.url.startswith("https://") for published in PUBLISHED.values())


def test_a_server_without_a_valid_certificate_is_not_trusted(site: ThreadingHTTPServer) -> None:
    with pytest.raises(URLError, match="(?i)ssl"):
        https_only().open(f"https://127.0.0.1:{site.server_port}/x", timeout=5)
    assert site.asked == []


def test_without_a_network_the_message_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path))
    for proxy in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(ConnectionError, match="Name or service not known") as caught:
        load_facts("counterfact")
    message = str(caught.value)
    assert "https://rome.baulab.info/data/dsets/counterfact.json" in message
    assert str(tmp_path / "datasets/counterfact.json") in message
    assert "\n" not in message


def test_a_cache_that_cannot_be_written_is_not_called_a_network_failure(
    site: ThreadingHTTPServer, tmp_path: Path
) -> None:
    (tmp_path / "datasets").write_text("a file where the folder should be")
    site.body = [json.dumps(records()).encode()]
    with pytest.raises(OSError, match="datasets") as caught:
        published_file("known_1000", opener_to(site))
    assert not isinstance(caught.value, ConnectionError)


def test_a_download_is_logged(site: ThreadingHTTPServer, caplog: pytest.LogCaptureFixture) -> None:
    site.body = [json.dumps(records()).encode()]
    with caplog.at_level(logging.INFO, logger="rome_lab"):
        published_file("known_1000", opener_to(site))
    assert PUBLISHED["known_1000"].url in caplog.text
