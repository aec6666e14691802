"""What whoever runs a server decides."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from mistral_rerank.server.keys import fault_of
from mistral_rerank.settings import environment_field, warn_of_unknown_variables

ENV_PREFIX = "MISTRAL_RERANK_SERVER_"


def _setting(name: str, default: object, description: str, **constraints: Any) -> Any:
    return environment_field(ENV_PREFIX + name.upper(), default, description, **constraints)


class ServerSettings(BaseModel):
    """Names, keys and limits of a server; each can be set as `MISTRAL_RERANK_SERVER_<NAME>` too."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    model_id: str | None = _setting("model_id", None, "what clients call the model; default: its own name")
    aliases: tuple[str, ...] = _setting("aliases", (), "further names that requests may give the model")
    api_keys: tuple[SecretStr, ...] = Field(
        default_factory=lambda: os.environ.get(
            f"{ENV_PREFIX}API_KEYS", ()
        ),  # set and empty is a mistake, refused below
        validate_default=True,
        description="who sends one of them may rerank; none: everybody",
    )
    cors_origins: tuple[str, ...] = _setting("cors_origins", (), "origins whose pages may call the server")
    max_body_bytes: int = _setting("max_body_bytes", 8_000_000, "longest body of a request", ge=1)
    max_passages: int = _setting("max_passages", 1000, "most passages of a request", ge=1)
    max_requests: int = _setting("max_requests", 256, "most requests waiting or running; others get a 503", ge=1)
    max_connections: int = _setting(
        "max_connections", 512, "most open connections; the longest idle one gives way", ge=1
    )
    max_held_bytes: int = _setting("max_held_bytes", 64_000_000, "most bytes of bodies of all requests together", ge=1)
    timeout: float = _setting("timeout", 120.0, "seconds after which a request gets a 504", gt=0)
    transfer_timeout: float = _setting(
        "transfer_timeout", 30.0, "seconds in which a body must arrive, and a reply be taken", gt=0
    )
    telemetry: bool = _setting("telemetry", False, "an OpenTelemetry span of each request and ranking, without texts")
    strict: bool = _setting("strict", False, "refuse fields that the protocol does not name, as NIM 2 does")

    @model_validator(mode="before")
    @classmethod
    def _read_environment(cls, values: object) -> object:
        warn_of_unknown_variables(ENV_PREFIX, cls.model_fields)
        return values

    @field_validator("aliases", "api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Read a comma-separated list, as environment variables hold it."""
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.removeprefix("\ufeff").split(","))

    @field_validator("aliases", "cors_origins")
    @classmethod
    def _hold_something(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value.strip() for value in values):
            raise ValueError("one of them is blank; give them separated by commas, or leave the setting out")
        return values

    @field_validator("api_keys")
    @classmethod
    def _can_match(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        """Refuse keys that no client can send; blank ones must not leave the server open by mistake."""
        for position, key in enumerate(keys, 1):
            if fault := fault_of(key.get_secret_value()):
                raise ValueError(f"key {position} {fault}; give keys separated by commas, or leave the setting out")
        return keys
