"""From what a user calls the base URL to the URL of the request."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mistral_rerank.errors import SettingsError
from mistral_rerank.protocols.cohere import JINA
from mistral_rerank.protocols.contracts import CONTRACTS
from mistral_rerank.protocols.nvidia import NVIDIA
from mistral_rerank.protocols.tei import TEI

if TYPE_CHECKING:
    from mistral_rerank.protocols.contract import Contract

ENDINGS = ("/ranking", "/reranking", "/rerank")
HOSTED_NVIDIA = "ai.api.nvidia.com"
FIRST_MODEL = ("nvidia/rerank-qa-mistral-4b", "nv-rerank-qa-mistral-4b:1", "ai-rerank-qa-mistral-4b")
"""The names of the model that the hosted API serves without its name in the URL."""


def clean_url(base_url: str) -> str:
    """Check a base URL and take the slash off its end.

    Raises:
        SettingsError: it is not http or https, or holds credentials, a query or a fragment.

    """
    parts = urlsplit(base_url.strip())
    shown = f"{parts.scheme}://{parts.hostname or ''}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError("base_url must be like http://host:8000/v1 or https://host")
    if parts.username is not None or parts.password is not None:
        raise SettingsError(f"base_url {shown} holds credentials; give the key as api_key")
    if parts.query or parts.fragment:
        raise SettingsError(f"base_url {shown} has a query or a fragment; give scheme, host, port and path")
    try:
        port = parts.port
    except ValueError:
        raise SettingsError(f"base_url {shown} has a port that is no number up to 65535") from None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def is_complete(url: str) -> bool:
    """Whether a clean URL names the route itself."""
    return url.endswith(ENDINGS)


def request_url(url: str, contract: Contract, model: str | None) -> str:
    """Give the URL to post to.

    Args:
        url: a clean base URL: the root of a host, or with `/v1`, a proxy's prefix, or the whole route.
        contract: which contract is spoken there.
        model: its name, which is part of the URL at NVIDIA's hosted API.

    """
    if is_complete(url):
        return url
    if urlsplit(url).hostname == HOSTED_NVIDIA and contract.name == "nvidia":
        if model is None or model in FIRST_MODEL:
            return f"https://{HOSTED_NVIDIA}/v1/retrieval/nvidia/reranking"
        slug = model.removeprefix("nvidia/").replace(".", "_")
        return f"https://{HOSTED_NVIDIA}/v1/retrieval/nvidia/{slug}/reranking"
    if url.endswith(("/v1", "/v2")):
        return f"{url}/{contract.path.rsplit('/', 1)[1]}"
    return f"{url}{contract.path}"


def candidates(base_url: str | None, protocol: str, model: str | None) -> tuple[tuple[Contract, str], ...]:
    """Give what to try, in order: a contract and the URL of its requests.

    With a protocol there is one. `auto` knows the vendors by their hosts and complete routes by their endings;
    anything else is tried in NVIDIA's own order, TEI last.

    Raises:
        SettingsError: the base URL is unusable, or missing where the contract has no host of its own.

    """
    if protocol != "auto":
        contract = CONTRACTS[protocol]
        if base_url is None and contract.hosted is None:
            raise SettingsError(f"protocol {protocol} needs a base_url, such as http://localhost:8000")
        url = clean_url(base_url or contract.hosted or "")
        return ((contract, request_url(url, contract, model)),)
    url = clean_url(base_url or NVIDIA.hosted or "")
    host = urlsplit(url).hostname
    vendor = next((c for c in CONTRACTS.values() if c.hosted and urlsplit(c.hosted).hostname == host), None)
    if vendor is not None:
        return ((vendor, request_url(url, vendor, model)),)
    if is_complete(url):
        return ((JINA, url), (TEI, url)) if url.endswith("/rerank") else ((NVIDIA, url),)
    root = url.removesuffix("/v1")
    named = [f"{root}/v1/ranking/{model}", f"{root}/v1/retrieval/{model}/reranking"] if model else []
    return (
        (NVIDIA, request_url(url, NVIDIA, model)),
        (JINA, request_url(url, JINA, model)),
        *((NVIDIA, address) for address in named),
        (TEI, f"{root}{TEI.path}"),
    )
