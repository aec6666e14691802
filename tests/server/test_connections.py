"""Connections and bodies that come too slowly, too many or too large, on a real socket; and models that come late."""

import gzip
import json
import shutil
import socket
import ssl
import subprocess
import time

import httpx
import pytest
from server.running import commanded, running, served, wait_until_ready
from support import LengthReranker

from mistral_rerank import RemoteReranker
from mistral_rerank.errors import AuthenticationError, CheckpointError, EndpointUnreachableError
from mistral_rerank.server import service as services
from mistral_rerank.server.app import create_app
from mistral_rerank.server.errors import is_temporary
from mistral_rerank.server.lifecycle import server_config
from mistral_rerank.server.settings import ServerSettings

BODY = {"query": "q", "documents": ["a", "bbb"]}
HEAD = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"


def connected(url: str, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30)
    connection.sendall(sent)
    return connection


def ending(connection: socket.socket) -> bytes:
    """All that the server still sends, up to its closing the connection."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize("sent", [b"", HEAD[:40]])
def test_a_connection_without_a_whole_request_is_closed(sent, monkeypatch):
    monkeypatch.setattr("mistral_rerank.server.connections.limited_protocol.__defaults__", (0.2,))
    with running(LengthReranker()) as url:
        assert ending(connected(url, sent)) == b""
        assert httpx.get(url + "/health").status_code == 200


def test_a_body_that_does_not_arrive_is_a_408_and_frees_its_place():
    with running(LengthReranker(), transfer_timeout=0.2, max_requests=1) as url:
        reply = ending(connected(url, HEAD + b"\r\n{"))
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b'"status":408' in reply
        assert httpx.post(url + "/v1/rerank", json=BODY).status_code == 200


def test_a_request_counts_before_its_body_is_there():
    with running(LengthReranker(), max_requests=1) as url:
        with connected(url, HEAD + b"\r\n{"):
            while "mistral_rerank_queue_size 1.0" not in httpx.get(url + "/metrics").text:
                pass
            assert httpx.post(url + "/v1/rerank", json=BODY).status_code == 429


def test_bodies_of_all_requests_together_have_a_limit():
    with running(LengthReranker(), max_held_bytes=1000) as url:
        reply = httpx.post(url + "/v1/rerank", json=BODY | {"documents": ["a" * 2000]})
        assert (reply.status_code, reply.headers["Retry-After"]) == (429, "1")
        assert httpx.post(url + "/v1/rerank", json=BODY).status_code == 200


def test_the_longest_idle_connection_gives_way_to_a_new_one():
    with running(LengthReranker(), max_connections=2) as url:
        first, second = connected(url), connected(url)
        assert httpx.get(url + "/health").status_code == 200
        assert ending(first) == b""
        second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert ending(second).startswith(b"HTTP/1.1 200 ")


NOT_HTTP = {
    "two lengths": b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
    "a signed length": b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n12345",
    "length and chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another encoding": b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a blank before a colon": b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length : 3\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


@pytest.mark.parametrize("sent", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_a_proxy_may_read_otherwise_is_a_400_with_the_error_object_and_the_end(sent):
    with running(LengthReranker()) as url:
        reply = ending(connected(url, sent + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert reply.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert reply.count(b"HTTP/1.1 ") == 1
    error = json.loads(reply.partition(b"\r\n\r\n")[2])
    assert (error["object"], error["status"]) == ("error", 400)


@pytest.mark.parametrize("sent", [{"Content-Type": "text/plain"}, {}, {"Content-Type": "application/x-json"}])
def test_a_body_of_another_type_is_a_415_that_names_the_header(sent):
    with running(LengthReranker()) as url:
        reply = httpx.post(url + "/v1/rerank", content=json.dumps(BODY), headers=sent)
    assert (reply.status_code, "Content-Type" in reply.json()["message"]) == (415, True)


def test_a_compressed_body_is_a_415_that_names_the_header():
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    with running(LengthReranker()) as url:
        reply = httpx.post(url + "/v1/rerank", content=gzip.compress(json.dumps(BODY).encode()), headers=headers)
    assert (reply.status_code, "Content-Encoding" in reply.json()["message"]) == (415, True)


def test_a_client_that_closes_its_side_of_a_pipeline_causes_no_traceback(caplog):
    body = json.dumps(BODY).encode()
    request = HEAD.replace(b"100", str(len(body)).encode()) + b"\r\n" + body
    with running(LengthReranker()) as url:
        for cut in (0, 1, len(body) + 1, len(request) - 1):
            with connected(url, request * 3 + request[:cut]) as connection:
                connection.shutdown(socket.SHUT_WR)
                ending(connection)
        while "mistral_rerank_queue_size 0.0" not in httpx.get(url + "/metrics").text:
            pass
    assert [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"] == []


def test_behind_a_proxy_that_removes_a_prefix_the_open_paths_stay_open():
    with running(LengthReranker(), root_path="/api/", api_keys="key") as url:
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/v1/models").status_code == 401
        error = httpx.post(url + "/rerank", json={}, headers={"Authorization": "Bearer key"}).json()
        assert (error["status"], error["error_type"]) == (422, "Validation")


@pytest.mark.parametrize(("trusted", "address"), [(None, "127.0.0.1"), ("127.0.0.1", "10.1.2.3")])
def test_a_forwarded_address_is_believed_only_of_named_proxies(trusted, address):
    app = create_app(LengthReranker())
    seen = []

    async def recorded(scope, receive, send):
        if scope["type"] == "http":
            seen.append(scope["client"][0])
        await app(scope, receive, send)

    config = server_config(recorded, ServerSettings(forwarded_allow_ips=trusted))
    with served(config, app.state.service) as url:
        httpx.get(url + "/health", headers={"X-Forwarded-For": "10.1.2.3"})
    assert seen == [address]


def test_a_unix_socket_replaces_the_port(tiny, tmp_path):
    path = tmp_path / "socket"
    with commanded("--model", str(tiny), "--uds", str(path), ready=False) as server:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
            wait_until_ready(client)
            assert client.post("/v1/rerank", json=BODY).status_code == 200
        assert not server.poll()


def test_tls_needs_only_a_certificate_and_its_key(tmp_path):
    certificate, key = write_certificate(tmp_path)
    with running(LengthReranker(), ssl_certfile=certificate, ssl_keyfile=key) as url:
        context = ssl.create_default_context(cafile=str(certificate))
        reply = httpx.get(url.replace("http:", "https:").replace("127.0.0.1", "localhost") + "/health", verify=context)
    assert reply.status_code == 200


@pytest.mark.parametrize("tls", [True, False])
def test_a_client_that_mistakes_http_for_https_or_the_reverse_is_told_so(tls, tmp_path):
    certificate, key = write_certificate(tmp_path)
    with running(LengthReranker(), **({"ssl_certfile": certificate, "ssl_keyfile": key} if tls else {})) as url:
        mistaken = url.replace("http:", "http:" if tls else "https:")
        with RemoteReranker("m", base_url=mistaken, retries=0) as reranker:
            with pytest.raises(EndpointUnreachableError, match=f"give a base_url with {'https' if tls else 'http'}://"):
                reranker.rank("q", ["p"])


def write_certificate(folder):
    """Write a certificate for localhost and its key with the openssl command."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("no openssl on the PATH")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-out", certificate, "-keyout", key]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_no_body_is_read_before_its_key_is_checked():
    with running(LengthReranker(), api_keys="key") as url:
        with connected(url, HEAD + b"\r\n") as connection:  # and no byte of the body
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


class Late(LengthReranker):
    """Fails twice, and then answers."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.asked = error, 0

    async def ascore_pairs(self, pairs, *, overflow=None):
        self.asked += 1
        if self.asked <= 2:
            raise self.error
        return self.score_pairs(pairs)


def unfetched() -> CheckpointError:
    error = CheckpointError("could not be fetched")
    error.__cause__ = httpx.ConnectError("no route")
    return error


@pytest.mark.parametrize("error", [EndpointUnreachableError("refused"), unfetched()], ids=["remote", "local"])
def test_a_server_recovers_from_what_passes_at_its_start(error, monkeypatch):
    monkeypatch.setattr(services, "FIRST_PAUSE", 0.01, raising=False)
    late = Late(error)
    with running(late) as url:
        while httpx.get(url + "/v1/health/ready").status_code != 200:
            time.sleep(0.01)
    assert late.asked == 3


@pytest.mark.parametrize("error", [AuthenticationError("no", status=401), CheckpointError("no weights")])
def test_what_does_not_pass_ends_the_start(error):
    assert not is_temporary(error)
