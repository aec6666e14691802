"""Mixed abuse of a real server at a bounded rate, beside well-formed requests whose every answer is checked.

    python benchmarks/server_abuse.py --minutes 20

Starts `mistral-rerank serve` on loopback and sends, in seeded order: requests of all protocols, long passages, many
passages, too large and malformed bodies, bytes that are no HTTP, pipelines, slow and stalled connections, clients that
leave and wrong keys. It fails if the process ends, if memory grows after the warm-up, if readiness takes too long, if
a well-formed request is not answered rightly in the end, or if the server logs a traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from mistral_rerank import LocalReranker
from mistral_rerank.protocols import PROTOCOLS
from mistral_rerank.protocols.protocol import RerankRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

KEYS = {"web": "first-key", "batch": "second-key"}
MAX_LENGTH = 512
TRANSFER_SECONDS = 5
ATTEMPTS = 30
"""Attempts of a well-formed request that is told to come back later."""
TOLERANCE = 2e-3
"""Of logits: requests share batches, and rounding then depends on the others."""
QUERIES = ["why does metal feel cold?", "who wrote Faust?", "how fast is light?", "what do bees eat?"]
SHORT = [
    "Metal conducts heat away from the hand faster than wood.",
    "Faust is a tragic play by Johann Wolfgang von Goethe.",
    "Light travels at about 299,792 kilometres a second in a vacuum.",
    "Bees eat nectar and pollen.",
    "The capital of Peru is Lima, at the Pacific coast.",
    "Wood is a poor conductor of heat.",
    "'; DROP TABLE passages; -- \u202e \x00 <s>[INST]</s>",
    "\U0001f41d" * 40,
]
LONG = [" ".join(SHORT[:6]) * repeats for repeats in (40, 700)]


class Abuse:
    """The clients of one server.

    Args:
        url: of the server.
        expected: the logits of all pairs.
        seed: of the order and the sizes.

    """

    def __init__(self, url: str, expected: dict[tuple[str, str], float], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.readiness: list[float] = []
        self._url, self._port = url, int(url.rsplit(":", 1)[1])
        self._expected = expected
        self._draw = random.Random(seed)
        self._kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.well_formed: 40,
            self.pipelined: 8,
            self.long: 2,
            self.many: 2,
            self.cancelled: 10,
            self.malformed: 12,
            self.no_http: 8,
            self.huge: 4,
            self.slow: 8,
            self.unread: 3,
            self.wrong_key: 8,
        }

    async def run(self, seconds: float, rate: float) -> None:
        """Send so many requests a second."""
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=8)
        tasks: set[asyncio.Task[None]] = set()
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=180) as self._client:
            probing = asyncio.create_task(self._probe())
            start, sent = time.monotonic(), 0
            while (elapsed := time.monotonic() - start) < seconds:
                if sent > elapsed * rate or len(tasks) > 64:
                    await asyncio.sleep(0.01)
                    continue
                sent += 1
                (kind,) = self._draw.choices([*self._kinds], [*self._kinds.values()])
                task = asyncio.create_task(self._counted(kind))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks, timeout=240)
            self.faults["requests without an end"] += len(tasks)
            probing.cancel()

    async def _counted(self, kind: Callable[[], Awaitable[None]]) -> None:
        self.counts[kind.__name__] += 1
        try:
            await kind()
        except Exception as error:
            self.faults[f"{kind.__name__}: {type(error).__name__} {error}"[:120]] += 1

    async def _probe(self) -> None:
        """Ask for readiness four times a second, each time on a new connection."""
        while True:
            start = time.monotonic()
            try:
                async with httpx.AsyncClient(base_url=self._url, timeout=30) as client:
                    status = (await client.get("/v1/health/ready")).status_code
                self._expect("readiness", status, 200)
            except httpx.TransportError as error:
                self.faults[f"readiness: {type(error).__name__}"] += 1
            self.readiness.append(time.monotonic() - start)
            await asyncio.sleep(0.25)

    def _expect(self, what: str, status: int, *expected: int) -> None:
        if status not in expected:
            self.faults[f"{what}: status {status}"] += 1

    def _request(self, passages: list[str]) -> tuple[str, dict[str, object], RerankRequest]:
        """Draw a protocol and a question; give the path, the body and the request."""
        protocol = self._draw.choice(list(PROTOCOLS.values()))
        request = RerankRequest(self._draw.choice(QUERIES), tuple(passages))
        return protocol.path, protocol.write_request(request), request

    def _some_passages(self) -> list[str]:
        return self._draw.sample(SHORT, self._draw.randint(1, 6))

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._draw.choice([*KEYS.values()])}"}

    def _judge(self, what: str, reply: object, request: RerankRequest) -> None:
        """Compare a reply with the logits of the same pairs, and with their order."""
        entries = reply if isinstance(reply, list) else next(v for v in reply.values() if isinstance(v, list))  # type: ignore[attr-defined]
        logits = {entry["index"]: entry["logit"] for entry in entries}
        expected = {i: self._expected[request.query, text] for i, text in enumerate(request.passages)}
        right = logits.keys() == expected.keys() and all(abs(logits[i] - expected[i]) <= TOLERANCE for i in expected)
        if not (right and list(logits.values()) == sorted(logits.values(), reverse=True)):
            self.faults[f"{what}: a wrong reply"] += 1

    async def _answered(self, what: str, passages: list[str]) -> None:
        """Send a well-formed request, again when told so, and check the answer."""
        path, body, request = self._request(passages)
        headers = self._headers()
        for _ in range(ATTEMPTS):
            reply = await self._client.post(path, json=body, headers=headers)
            if reply.status_code not in (429, 503):
                self._expect(what, reply.status_code, 200)
                if reply.status_code == 200:
                    self._judge(what, reply.json(), request)
                return
            self.counts["told to come back"] += 1
            await asyncio.sleep(int(reply.headers["Retry-After"]))
        self.faults[f"{what}: refused {ATTEMPTS} times"] += 1

    async def well_formed(self) -> None:
        """Send a few short passages."""
        await self._answered("well-formed", self._some_passages())

    async def long(self) -> None:
        """Send a passage far over the limit."""
        await self._answered("long", [*self._some_passages(), self._draw.choice(LONG)])

    async def many(self) -> None:
        """Send two hundred passages."""
        await self._answered("many", self._draw.choices(SHORT, k=200))

    async def cancelled(self) -> None:
        """Leave while the request is transferred, waits or runs."""
        path, body, _ = self._request(self._draw.choices(SHORT, k=100))
        with suppress(TimeoutError):
            await asyncio.wait_for(
                self._client.post(path, json=body, headers=self._headers()), self._draw.uniform(0, 0.3)
            )

    async def wrong_key(self) -> None:
        """Send no key, a wrong one, or one that is no ASCII."""
        key = self._draw.choice(["", "Bearer", "Bearer wrong", "Basic first-key", "Bearer \u00e9".encode("latin-1")])
        path, body, _ = self._request(self._some_passages())
        reply = await self._client.post(path, json=body, headers={"Authorization": key} if key else {})
        self._expect("wrong key", reply.status_code, 401)

    async def malformed(self) -> None:
        """Send a body that is not JSON, or not of its protocol."""
        path, body, _ = self._request(self._some_passages())
        content = json.dumps(body).encode()
        cut = self._draw.randrange(1, len(content))
        wrong = [
            content[:cut],
            b"[" * 50_000,
            b'{"query": 1, "texts": [' + b"1," * 900 + b"1]}",
            b"\xff" + content,
            json.dumps(dict.fromkeys(body)).encode(),
        ]
        if "model" in body:  # TEI's body has none, and ignores it
            wrong.append(json.dumps({**body, "model": "another"}).encode())
        headers = self._headers() | {"Content-Type": self._draw.choice(["application/json"] * 5 + ["text/plain"])}
        reply = await self._client.post(path, content=self._draw.choice(wrong), headers=headers)
        self._expect("malformed", reply.status_code, 400, 404, 415, 422, 429, 503)

    async def huge(self) -> None:
        """Send too many bytes, values or passages."""
        values = b'{"query": "q", "texts": [' + b"1," * self._draw.choice([999, 150_000, 3_000_000]) + b"1]}"
        text = b'{"query": "q", "texts": ["' + b"a" * 9_000_000 + b'"]}'
        headers = self._headers() | {"Content-Type": "application/json"}
        try:
            reply = await self._client.post("/rerank", content=self._draw.choice([values, text]), headers=headers)
        except (httpx.WriteError, httpx.ReadError):  # the server has answered and closed the connection
            return
        self._expect("huge", reply.status_code, 413, 422, 429, 503)

    def _bytes_of(self, passages: list[str]) -> tuple[bytes, RerankRequest]:
        """Give a request as it is on the wire."""
        path, body, request = self._request(passages)
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        )
        head += "".join(f"{name}: {value}\r\n" for name, value in self._headers().items())
        return head.encode() + b"\r\n" + content, request

    async def pipelined(self) -> None:
        """Send three requests at once on one connection; some are cut off, and the client ends its side."""
        requests = [self._bytes_of(self._some_passages()) for _ in range(3)]
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            sent = b"".join(content for content, _ in requests)
            if self._draw.random() < 0.4:
                writer.write(sent[: self._draw.randrange(1, len(sent))])
                with suppress(OSError):
                    writer.write_eof()
                    await reader.read(200)
                return
            writer.write(sent)
            for _, request in requests:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 180)
                lengths = [
                    int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line
                ]
                content = await reader.readexactly(lengths[0])
                status = int(head.split()[1])
                if status == 200:
                    self._judge("pipelined", json.loads(content), request)
                else:
                    self._expect("pipelined", status, 429, 503)
        finally:
            writer.transport.abort()

    async def no_http(self) -> None:
        """Send bytes that are no request, or that two readers may read differently."""
        wrong = [
            self._draw.randbytes(self._draw.randrange(1, 3000)) + b"\r\n\r\n",
            b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        ]
        await self._raw(self._draw.choice(wrong), 15)

    async def slow(self) -> None:
        """Stall a connection before a request, in its headers or in its body."""
        content, _ = self._bytes_of(self._some_passages())
        await self._raw(content[: self._draw.choice([0, 10, 60, len(content) - 1])], 15)

    async def unread(self) -> None:
        """Leave replies unread."""
        with socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, ("127.0.0.1", self._port))
            with suppress(OSError, TimeoutError):
                asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100
                await asyncio.wait_for(loop.sock_sendall(connection, asked), 3)
                await asyncio.sleep(TRANSFER_SECONDS + 1)

    async def _raw(self, sent: bytes, seconds: float) -> None:
        """Send bytes; the server must end the connection within so many seconds."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(sent)
            async with asyncio.timeout(seconds):
                while await reader.read(65536):
                    pass
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()


def memory(pid: int) -> float:
    """Give the resident memory of a process, in MiB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def expected_logits(model: str) -> dict[tuple[str, str], float]:
    """Score every pair that the clients send."""
    pairs = [(query, passage) for query in QUERIES for passage in [*SHORT, *LONG]]
    with LocalReranker(model, device="cpu", dtype="float32", max_length=MAX_LENGTH) as reranker:
        return dict(zip(pairs, (score.logit for score in reranker.score_pairs(pairs)), strict=True))


def start_server(model: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start `serve` on a free port and wait until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = folder / "keys"
    keys.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()), "utf-8")
    command = [sys.executable, "-c", "from mistral_rerank.cli import main; main()", "serve", "--model", model]
    command += ["--port", str(port), "--api-key-file", str(keys), "--max-length", str(MAX_LENGTH), "--device", "cpu"]
    command += ["--dtype", "float32", "--transfer-timeout", str(TRANSFER_SECONDS), "--threads", "1"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stderr=log)
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/v1/health/ready").status_code == 200:
                return server, url
        time.sleep(0.1)
    sys.exit(f"the server did not start: {(folder / 'log').read_text('utf-8')[-2000:]}")


async def abuse_and_watch(abuse: Abuse, pid: int, seconds: float, rate: float) -> list[float]:
    """Run the clients; give the server's memory of each second."""
    samples: list[float] = []

    async def watch() -> None:
        while True:
            samples.append(memory(pid))
            if len(samples) % 60 == 0:
                slowest = max(abuse.readiness, default=0)
                faults = {name: count for name, count in abuse.faults.items() if count}
                print(
                    f"{len(samples) // 60} min: {abuse.counts.total()} sent, {samples[-1]:.0f} MiB, "
                    f"readiness at most {slowest:.3f} s, faults: {faults or 'none'}",
                    flush=True,
                )
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await abuse.run(seconds, rate)
    watching.cancel()
    return samples


def main() -> None:
    """Run it, and print what was sent and what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--warm-up", type=float, default=10, help="minutes in which memory may grow")
    parser.add_argument("--rate", type=float, default=5, help="requests a second")
    parser.add_argument("--readiness", type=float, default=1, help="most seconds of a readiness probe")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = ("torch", "uvicorn", "fastapi", "mistral-rerank")
    print(", ".join(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}", sep=", ")
    print(f"{os.cpu_count()} CPUs, model {options.model}, {options.minutes:g} min, {options.rate:g} requests/s")
    with tempfile.TemporaryDirectory() as folder:
        server, url = start_server(options.model, Path(folder))
        try:
            abuse = Abuse(url, expected_logits(options.model), options.seed)
            seconds = options.minutes * 60
            samples = asyncio.run(abuse_and_watch(abuse, server.pid, seconds, options.rate))
            metrics = httpx.get(f"{url}/metrics").text
            if (code := server.poll()) is not None:
                abuse.faults[f"the process ended with {code}"] += 1
            server.terminate()
            abuse.faults["no end after SIGTERM"] += server.wait(60) != 0
        finally:
            server.kill()
        log = (Path(folder) / "log").read_text("utf-8")
    abuse.faults["tracebacks in the log"] += log.count("Traceback")
    abuse.faults["requests in the queue at the end"] += "mistral_rerank_queue_size 0.0" not in metrics
    warm = int(min(options.warm_up * 60, len(samples) * 0.5))
    before, after = max(samples[:warm]), max(samples[warm:])
    abuse.faults["memory grew after the warm-up"] += after > before * 1.05 + 10
    slowest = max(abuse.readiness)
    abuse.faults[f"readiness took over {options.readiness:g} s"] += sum(t > options.readiness for t in abuse.readiness)
    print("sent:", ", ".join(f"{count} {name}" for name, count in sorted(abuse.counts.items())))
    print(f"memory, MiB: at most {before:.0f} in the warm-up, {after:.0f} after it")
    print(f"readiness: {len(abuse.readiness)} probes, the slowest {slowest:.3f} s")
    faults = {name: count for name, count in abuse.faults.items() if count}
    print("faults:", faults or "none")
    if faults:
        sys.exit(f"{log[log.find('Traceback') :][:4000]}" if "Traceback" in log else 1)


if __name__ == "__main__":
    main()
