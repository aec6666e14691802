"""The application on Ray Serve: autoscaled replicas on any number of machines.

`mistral-rerank serve --cluster` runs it from here, and `serve deploy` from a file such as deploy/ray-serve.yaml,
which names `application`. Each replica has its own model, limits and metrics.
Source: https://docs.ray.io/en/latest/serve/production-guide/config.html
"""

from __future__ import annotations

import logging
import logging.config
import signal
import threading
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import MutableHeaders

from mistral_rerank.errors import MissingDependencyError, SettingsError
from mistral_rerank.ray_connection import connect, ray_address
from mistral_rerank.server.app import create_app
from mistral_rerank.server.keys import ApiKeys
from mistral_rerank.server.lifecycle import DRAIN_SECONDS, warn_of_open_server
from mistral_rerank.server.request_log import log_config
from mistral_rerank.server.settings import ClusterSettings, ServerSettings
from mistral_rerank.settings import RerankSettings

try:
    import ray
    from ray import serve
except ImportError as error:
    raise MissingDependencyError.of("cluster", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI
    from ray.serve import Application
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mistral_rerank.reranker import Reranker

logger = logging.getLogger(__name__)

NAME = "mistral-rerank"


class Arguments(BaseModel):
    """The `args` of a configuration file; missing values come from the environment and the defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    reranker: RerankSettings = Field(default_factory=RerankSettings)
    server: ServerSettings = Field(default_factory=ServerSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)


class _WithoutRequestId:
    """Removes `X-Request-Id` from replies, because Ray's proxy adds its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-Id"]
            await send(message)

        await self._app(scope, receive, without_id)


def deployment(
    open_reranker: Callable[[], Reranker], server: ServerSettings, cluster: ClusterSettings, *, loopback: bool = False
) -> Application:
    """Make the Ray Serve application.

    Args:
        open_reranker: called in each replica, which is ready when its model is loaded.
        server: names, keys and limits of each replica; `max_requests` is per replica.
        cluster: number and size of the replicas.
        loopback: whether the replicas are all on this machine, and listen on loopback alone.

    """

    def build() -> FastAPI:
        if loopback:
            _listen_on_loopback()
        logging.config.dictConfig(log_config(server.log_level, server.log_format))
        reranker = open_reranker()
        reranker.score_pairs([("warm", "up")])
        app = create_app(reranker, server)
        app.add_middleware(_WithoutRequestId)
        return app

    replica = serve.deployment(
        name=NAME,
        autoscaling_config={
            "min_replicas": cluster.min_replicas,
            "max_replicas": cluster.max_replicas,
            "target_ongoing_requests": cluster.target_requests,
        },
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        max_ongoing_requests=server.max_requests,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    )
    return replica(serve.ingress(build)()).bind()


def _listen_on_loopback() -> None:
    """Change the address of this replica's port for other replicas: Ray has no setting for it, and uses all of them."""
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda grpc, address: add_port(grpc, address.replace("[::]", "127.0.0.1"))


def application(args: dict[str, Any]) -> Application:
    """Make the Ray Serve application of a configuration file; Ray calls this with its `args`, see `Arguments`.

    Raises:
        pydantic.ValidationError: names each invalid field.

    """
    chosen = Arguments.model_validate(args)
    if chosen.reranker.share_batches is None:
        chosen.reranker.share_batches = True
    return deployment(chosen.reranker.open, chosen.server, chosen.cluster)


def serve_cluster(
    reranker: RerankSettings, server: ServerSettings, cluster: ClusterSettings, *, host: str, port: int
) -> None:
    """Serve replicas on the Ray cluster of RAY_ADDRESS, or on one of its own, until SIGINT or SIGTERM.

    Other applications on the cluster stay.

    Raises:
        SettingsError: the replicas cannot be started.

    """
    for name in ("uds", "forwarded_allow_ips", "threads"):
        if getattr(server, name) is not None:
            raise SettingsError(f"a cluster has no {name}; leave it out, or --cluster")
    warn_of_open_server(server, host)
    ApiKeys(server.api_keys, server.api_key_file)  # fails here rather than in the replicas
    connect()
    starts_serve = not serve.status().proxies
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # before the replicas answer, so that both signals stop the same way
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the replicas notice a changed key file
    try:
        if starts_serve:
            serve.start(http_options=_http_options(server, host, port))
        else:
            logger.warning("Ray Serve runs already; its proxy's address counts, not %s:%d", host, port)
        serve.run(deployment(reranker.open, server, cluster, loopback=ray_address() == "local"), name=NAME)
        if starts_serve:
            logger.warning("serving at %s://%s:%d", "https" if server.ssl_certfile else "http", host, port)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:
        raise SettingsError(f"the replicas cannot be started: {_replica_errors()}") from error
    finally:
        if NAME in serve.status().applications:
            serve.delete(NAME)  # waits for running requests, unlike shutdown
        if starts_serve and not serve.status().applications:  # others may have deployed meanwhile
            serve.shutdown()
        ray.shutdown()


def _http_options(server: ServerSettings, host: str, port: int) -> dict[str, Any]:
    tls = {"ssl_certfile": server.ssl_certfile, "ssl_keyfile": server.ssl_keyfile}
    return {"host": host, "port": port, "root_path": server.root_path} | {
        name: str(file) for name, file in tls.items() if file is not None
    }


def _replica_errors() -> str:
    """Give Ray's messages about replicas that it cannot start."""
    status = serve.status().applications.get(NAME)
    messages = [each.message for each in status.deployments.values()] if status else []
    return " ".join(messages) or "Ray gives no reason; its log says more"
