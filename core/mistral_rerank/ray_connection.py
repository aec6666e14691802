"""The connection to Ray, for `serve --cluster` and `score --cluster`."""

from __future__ import annotations

import logging
import os
import socket
from urllib.parse import urlsplit

from mistral_rerank.errors import MissingDependencyError, SettingsError

try:
    import ray
except ImportError as error:
    raise MissingDependencyError.of("cluster", error) from error

SECONDS = 10.0
"""To wait for the port of a cluster; Ray itself retries for minutes."""


def ray_address() -> str:
    """Give RAY_ADDRESS, or "local" for a Ray of its own; Ray's default is any cluster on this machine."""
    return os.environ.get("RAY_ADDRESS") or "local"


def connect(**options: object) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one of its own on this machine.

    Args:
        **options: of `ray.init`.

    Raises:
        SettingsError: no cluster answers, or none can be started.

    """
    address = ray_address()
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if parts.hostname and parts.port:
            socket.create_connection((parts.hostname, parts.port), timeout=SECONDS).close()
        ray.init(address, log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING, **options)
    except Exception as error:  # Ray raises bare ones too
        if address == "local":
            raise SettingsError(f"Ray does not start on this machine: {error}") from error
        advice = "start it, correct RAY_ADDRESS, or unset it for a Ray of its own"
        raise SettingsError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}; {advice}") from error
