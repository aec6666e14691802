"""Settings of the server and of its replicas, from arguments or environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, field_validator, model_validator

from mistral_rerank.server.keys import fault_of
from mistral_rerank.server.request_log import LogFormat, LogLevel
from mistral_rerank.settings import read_environment, warn_of_unknown_variables


class EnvironmentSettings(BaseModel):
    """Settings whose missing values come from environment variables that begin with `env_prefix`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    env_prefix: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _read_environment(cls, values: Any) -> Any:
        warn_of_unknown_variables(cls.env_prefix, cls.model_fields)
        return read_environment(cls.env_prefix, cls.model_fields) | values if isinstance(values, dict) else values


class ServerSettings(EnvironmentSettings):
    """Names, keys and limits of a server; each can be set as `MISTRAL_RERANK_SERVER_<NAME>` too."""

    env_prefix = "MISTRAL_RERANK_SERVER_"

    model_id: str | None = Field(None, description="name of the model for clients; default: its own")
    aliases: tuple[str, ...] = Field((), description="further names of the model for clients")
    model_memory: ByteSize | None = Field(
        None,
        gt=0,
        description="memory for the weights of several models, such as 8GiB; the least recently used is freed; "
        "default: all stay",
    )
    api_keys: tuple[SecretStr, ...] = Field((), description="keys of which a client must send one; default: no key")
    api_key_file: Path | None = Field(
        None, description="keys of clients, one per line, as KEY, NAME: KEY or NAME: KEY SHARE%; read again on a change"
    )
    cors_origins: tuple[str, ...] = Field((), description="origins whose pages may call the server")
    max_body_bytes: int = Field(8_000_000, ge=1, description="most bytes of a request's body")
    max_passages: int = Field(1000, ge=1, description="most passages of a request")
    max_requests: int = Field(256, ge=1, description="most requests waiting or running; others get a 429 or 503")
    max_connections: int = Field(
        512, ge=1, description="most open connections; over it, the longest idle one is closed"
    )
    max_held_bytes: int = Field(64_000_000, ge=1, description="most bytes of the bodies of all requests together")
    timeout: float = Field(120.0, gt=0, description="seconds after which a request gets a 504")
    transfer_timeout: float = Field(
        30.0, gt=0, description="seconds within which a body must arrive, and a reply be read"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; default: the CPUs of the container")
    ssl_certfile: Path | None = Field(
        None, description="certificates for TLS, in PEM; the keys may be in the same file"
    )
    ssl_keyfile: Path | None = Field(None, description="private key for TLS, in PEM")
    uds: Path | None = Field(None, description="Unix socket to listen on, instead of a host and port")
    root_path: str = Field("", description="prefix of all paths that a proxy removes, such as /rerank-api")
    forwarded_allow_ips: str | None = Field(
        None, description="proxies whose X-Forwarded-For and -Proto are believed, with commas, or *; default: none"
    )
    log_level: LogLevel = Field("info", description="least level of the server's log lines")
    log_format: LogFormat = Field("text", description="form of the server's log lines")
    telemetry: bool = Field(False, description="an OpenTelemetry span of each request and ranking, without texts")
    strict: bool = Field(False, description="refuse fields that the protocol does not name, as NIM 2 does")

    @model_validator(mode="before")
    @classmethod
    def _keep_empty_keys(cls, values: Any) -> Any:
        """Let `_can_match` refuse an empty variable of keys, which else would leave the server open."""
        keys = os.environ.get(f"{cls.env_prefix}API_KEYS")
        return {"api_keys": keys} | values if keys is not None and isinstance(values, dict) else values

    @field_validator("aliases", "api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Read a comma-separated list, as environment variables hold it."""
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.removeprefix("\ufeff").split(","))

    @field_validator("aliases", "cors_origins")
    @classmethod
    def _not_blank(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value.strip() for value in values):
            raise ValueError("one of the values is blank; give them separated by commas, or leave the setting out")
        return values

    @field_validator("api_keys")
    @classmethod
    def _can_match(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        """Refuse keys that no client can send; blank ones must not leave the server open by mistake."""
        for position, key in enumerate(keys, 1):
            if fault := fault_of(key.get_secret_value()):
                raise ValueError(f"key {position} {fault}; give keys separated by commas, or leave the setting out")
        return keys


class ClusterSettings(EnvironmentSettings):
    """Number and size of the replicas; each can be set as `MISTRAL_RERANK_CLUSTER_<NAME>` too."""

    env_prefix = "MISTRAL_RERANK_CLUSTER_"

    min_replicas: int = Field(1, ge=1, description="fewest replicas")
    max_replicas: int = Field(1, ge=1, description="most replicas")
    target_requests: float = Field(
        32.0, gt=0, description="requests waiting or running at a replica, over which another is started"
    )
    cpus: float = Field(1.0, ge=0, description="CPUs of a replica, or of a worker of score --cluster")
    gpus: float = Field(0.0, ge=0, description="GPUs of a replica or worker; 0.5 for two on one")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, under min_replicas, {self.min_replicas}")
        return self
