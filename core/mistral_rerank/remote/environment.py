"""Errors for proxies and certificates in the environment that httpx cannot use."""

from __future__ import annotations

import os
import ssl

import httpx

from mistral_rerank.errors import MissingDependencyError, RerankError, SettingsError

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

UNUSABLE = (ImportError, ValueError, OSError, httpx.InvalidURL)
"""Exceptions of httpx's clients for them."""


def misconfigured(error: Exception, *, proxy: str | None) -> RerankError:
    """Make an error that names the setting or the variable; the only value that it shows is a file's path.

    Args:
        error: one of `UNUSABLE`.
        proxy: the argument; None if the proxy comes from the environment.

    """
    if isinstance(error, OSError | ssl.SSLError):
        name = next((name for name in CERTIFICATES if os.environ.get(name)), "verify")
        return SettingsError(
            f"{name} names no usable file of certificates: {os.environ.get(name, '')} ({error.strerror or error}); "
            "give the path of a PEM file, or unset it"
        )
    socks = isinstance(error, ImportError)
    name = "proxy" if proxy else _variable(socks=socks)
    if socks:
        return MissingDependencyError(
            f"{name} is a SOCKS proxy, which needs an extra: pip install 'mistral-rerank[socks]'"
        )
    return SettingsError(f"{name} is no usable proxy; give an address like http://host:3128 or socks5://host:1080")


def _variable(*, socks: bool) -> str:
    """Give the variable with a SOCKS proxy, or with a proxy that httpx cannot use."""
    for name in (*PROXIES, *map(str.lower, PROXIES)):
        value = os.environ.get(name)
        if value and (value.startswith("socks") if socks else not _is_usable(value)):
            return name
    return " or ".join((*PROXIES, "NO_PROXY"))


def _is_usable(value: str) -> bool:
    try:
        httpx.Proxy(value if "://" in value else f"http://{value}")
    except UNUSABLE:
        return False
    return True
