"""`serve`: serve a reranker over HTTP."""

import os
from typing import Annotated, Any

import typer

from mistral_rerank.cli.options import app, with_reranker, with_settings
from mistral_rerank.errors import MissingDependencyError
from mistral_rerank.server.settings import ServerSettings
from mistral_rerank.settings import RerankSettings

SERVER_OPTIONS = [name for name in ServerSettings.model_fields if name not in ("aliases", "api_keys")]

MAX_LENGTH = 2048
"""The default of `max_length` on a server, at most the checkpoint's: one pair of 8,192 tokens holds up all others."""


@app.command()
@with_reranker
@with_settings("server", ServerSettings, *SERVER_OPTIONS)
def serve(
    server: dict[str, Any],
    reranker: dict[str, Any],
    host: Annotated[str, typer.Option(help="the address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="the port to listen on")] = 8000,
    alias: Annotated[list[str] | None, typer.Option(help="a further name of the model; repeatable")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="replicas on Ray Serve (extra cluster)")] = False,
) -> None:
    """Serve a reranker over HTTP with the protocols of NVIDIA, Cohere, Jina, vLLM, TEI and Voyage.

    MISTRAL_RERANK_SERVER_API_KEYS holds keys too, separated by commas. The other MISTRAL_RERANK_SERVER_ variables
    set limits, and the MISTRAL_RERANK_CLUSTER_ ones the replicas of a cluster.
    """
    try:
        from mistral_rerank.server.lifecycle import serve as run
    except ImportError as error:
        raise MissingDependencyError.of("serve", error) from error

    if alias:
        server["aliases"] = alias
    settings = ServerSettings(**server)
    chosen = RerankSettings(**reranker)
    if chosen.share_batches is None:
        chosen.share_batches = True
    if chosen.max_length is None:
        chosen.max_length = MAX_LENGTH
    if cluster:
        if "RAY_ADDRESS" not in os.environ:  # Ray reads this when it is imported: its ports run code
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # then it listens on loopback alone
        from mistral_rerank.server.cluster import ClusterSettings, serve_cluster

        serve_cluster(chosen, settings, ClusterSettings(), host=host, port=port)
        return
    if chosen.backend == "local":
        from mistral_rerank.local.threads import set_threads

        set_threads(settings.threads)
    with chosen.open() as opened:
        run(opened, settings, host=host, port=port)
