"""Request URLs from base URLs, and the vendor of a host."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlsplit

from mistral_rerank.errors import SettingsError
from mistral_rerank.protocols import PROTOCOLS
from mistral_rerank.protocols.cohere import JINA
from mistral_rerank.protocols.nvidia import NVIDIA
from mistral_rerank.protocols.tei import TEI

if TYPE_CHECKING:
    from mistral_rerank.protocols.protocol import WireProtocol

ROUTES = {
    "/ranking": (NVIDIA,),
    "/reranking": (NVIDIA, JINA),
    "/rerank": (JINA, TEI),
    "/reranks": (JINA,),
    "/invocations": (NVIDIA, JINA, TEI),
}
"""Ends of base URLs that are whole routes, with the protocols that `auto` tries there."""
COHERE_ROUTES = ("/v1/reranking", "/reranking", "/v1/reranks", "/v3/rerank")
"""Routes of some servers for Cohere's body, beside `/v1/rerank` and `/rerank`: llama.cpp, lemonade, DashScope,
OpenVINO Model Server."""
VERSION = re.compile(r"/v\d+$")
SECRET_NAME = re.compile(r"key|token|secret|sig|code|pass|auth|cred", re.IGNORECASE)
HOSTED_NVIDIA = "ai.api.nvidia.com"
FIRST_MODEL = ("nvidia/rerank-qa-mistral-4b", "nv-rerank-qa-mistral-4b:1", "ai-rerank-qa-mistral-4b")
"""Names of the one model whose URL at the hosted API does not contain its name."""


def clean_url(base_url: str) -> str:
    """Validate a base URL, and remove the slash at the end of its path.

    Raises:
        SettingsError: it is not http or https, or holds credentials, a key in its query, or a fragment.

    """
    parts = urlsplit(base_url.strip())
    shown = f"{parts.scheme}://{parts.hostname or ''}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError("base_url must be like http://host:8000/v1 or https://host")
    if parts.username is not None or parts.password is not None:
        raise SettingsError(f"base_url {shown} holds credentials; give the key as api_key")
    if parts.fragment:
        raise SettingsError(f"base_url {shown} has a fragment; give scheme, host, port, path and query")
    secret = next((name for name, _ in parse_qsl(parts.query, True) if SECRET_NAME.search(name)), None)
    if secret is not None:
        raise SettingsError(
            f"base_url {shown} has a {secret!r:.40} in its query, which logs would show; give it as api_key, "
            "or in headers"
        )
    try:
        port = parts.port
    except ValueError:
        raise SettingsError(f"base_url {shown} has a port that is no number up to 65535") from None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}{query}"


def shown_url(url: str) -> str:
    """Give a URL for messages: without its query, which may contain secrets."""
    return url.partition("?")[0]


def sibling_url(url: str, name: str) -> str:
    """Give the URL of another route in the same folder, with the same query."""
    path, mark, query = url.partition("?")
    return f"{path.rsplit('/', 1)[0]}/{name}{mark}{query}"


def vendor_of(url: str) -> WireProtocol | None:
    """Give the protocol of the vendor of an https URL's host.

    A vendor's hosts are those of its domain: `ai.api.nvidia.com` and `integrate.api.nvidia.com` are both NVIDIA's.
    """
    if urlsplit(url).scheme != "https":
        return None
    return next((p for p in PROTOCOLS.values() if p.hosted and _domain(p.hosted) == _domain(url)), None)


def request_url(url: str, protocol: WireProtocol, model: str | None) -> str:
    """Give the URL to post to, for a clean base URL: the root of a host, or with `/v1`, a prefix, or the whole route.

    The model's name is part of the URL at NVIDIA's hosted API.
    """
    if _ending(url) is not None:
        return url
    base, mark, query = url.partition("?")
    return f"{_route(base, protocol, model)}{mark}{query}"


def candidates(base_url: str | None, name: str, model: str | None) -> tuple[tuple[WireProtocol, str], ...]:
    """Give protocols with their request URLs, in the order to try them.

    A named protocol gives one. `auto` recognizes vendors by their hosts, and complete routes by their endings. For any
    other URL it tries the order of NVIDIA's client, then Cohere's and TEI's bodies at their other routes.

    Raises:
        SettingsError: the base URL is invalid, or missing for a protocol without a vendor's host.

    """
    if name != "auto":
        protocol = PROTOCOLS[name]
        if base_url is None and protocol.hosted is None:
            raise SettingsError(f"protocol {name} needs a base_url, such as http://localhost:8000")
        url = clean_url(base_url or protocol.hosted or "")
        return ((protocol, request_url(url, protocol, model)),)
    url = clean_url(base_url or NVIDIA.hosted or "")
    host = urlsplit(url).hostname
    vendor = next((p for p in PROTOCOLS.values() if p.hosted and urlsplit(p.hosted).hostname == host), None)
    if vendor is not None:
        return ((vendor, request_url(url, vendor, model)),)
    ending = _ending(url)
    if ending is not None:
        return tuple((protocol, url) for protocol in ROUTES[ending])
    base, mark, query = url.partition("?")
    root = VERSION.sub("", base)
    quoted = quote(model or "", safe="/:")
    named = (f"/v1/ranking/{quoted}", f"/v1/retrieval/{quoted}/reranking") if model else ()
    return tuple(
        dict.fromkeys(
            (protocol, f"{address}{mark}{query}")
            for protocol, address in (
                (NVIDIA, _route(base, NVIDIA, model)),
                (JINA, _route(base, JINA, model)),
                *((NVIDIA, root + path) for path in named),
                (JINA, f"{root}/rerank"),
                (TEI, f"{root}/rerank"),
                *((JINA, root + path) for path in COHERE_ROUTES),
            )
        )
    )


def _route(base: str, protocol: WireProtocol, model: str | None) -> str:
    if urlsplit(base).hostname == HOSTED_NVIDIA and protocol is NVIDIA:
        if model is None or model in FIRST_MODEL:
            return f"https://{HOSTED_NVIDIA}/v1/retrieval/nvidia/reranking"
        slug = model.removeprefix("nvidia/").replace(".", "_")
        return f"https://{HOSTED_NVIDIA}/v1/retrieval/nvidia/{slug}/reranking"
    if protocol.path.count("/") == 1:  # a route without a version
        return VERSION.sub("", base) + protocol.path
    if VERSION.search(base):
        return f"{base}/{protocol.path.rsplit('/', 1)[1]}"
    return f"{base}{protocol.path}"


def _ending(url: str) -> str | None:
    path = url.partition("?")[0]
    return next((ending for ending in ROUTES if path.endswith(ending)), None)


def _domain(url: str) -> list[str]:
    """Give the last two labels of the host, which are a vendor's registered domain."""
    return (urlsplit(url).hostname or "").split(".")[-2:]
