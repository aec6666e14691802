"""`serve`: put a reranker behind HTTP."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mistral_rerank.cli.options import app, given, with_reranker_options
from mistral_rerank.errors import MissingDependencyError
from mistral_rerank.settings import RerankSettings


@app.command()
@with_reranker_options
def serve(
    host: Annotated[str, typer.Option(help="the address to listen at; 0.0.0.0 for all of them")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="its port")] = 8000,
    model_id: Annotated[str | None, typer.Option(help="what clients call the model  [default: its name]")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="one more name that clients may use; repeatable")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="keys that clients must send, one a line; # begins a comment")
    ] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="refuse fields that the protocol lacks")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="replicas on Ray Serve (extra cluster)")] = False,
    **reranker: Any,
) -> None:
    """Put a reranker behind HTTP, in the protocols of NVIDIA, Cohere, Jina, vLLM, TEI and Voyage.

    Keys can also come from MISTRAL_RERANK_SERVER_API_KEYS, separated by commas; limits from the other
    MISTRAL_RERANK_SERVER_ variables; how many replicas a cluster has, from the MISTRAL_RERANK_CLUSTER_ ones.
    """
    try:
        from mistral_rerank.server.keys import read_keys
        from mistral_rerank.server.lifecycle import serve as run
        from mistral_rerank.server.settings import ServerSettings
    except ImportError as error:
        raise MissingDependencyError.of("serve", error) from error

    aliases = tuple(alias) if alias else None
    api_keys = None if api_key_file is None else read_keys(api_key_file)
    settings = ServerSettings(**given(locals(), "model_id", "aliases", "api_keys", "strict"))
    chosen = RerankSettings(**reranker)
    if chosen.share_batches is None:
        chosen.share_batches = True
    if cluster:
        from mistral_rerank.server.cluster import ClusterSettings, serve_cluster

        serve_cluster(chosen, settings, ClusterSettings(), host=host, port=port)
        return
    with chosen.open() as opened:
        run(opened, settings, host=host, port=port)
