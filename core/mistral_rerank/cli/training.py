"""`train`, `mine` and `early-exit`: train a reranker."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mistral_rerank.cli.options import (
    app,
    encoder_device,
    needs,
    progress_bar,
    progress_bars,
    stderr,
    with_reranker,
    with_settings,
)
from mistral_rerank.cli.terminal import printable
from mistral_rerank.settings import RerankSettings, open_reranker
from mistral_rerank.training.settings import TrainSettings


@app.command()
@with_settings("settings", TrainSettings)
@needs("train")
def train(
    settings: dict[str, Any],
    out: Annotated[Path, typer.Option(help="the checkpoint folder to write; it must not exist")],
) -> None:
    """Fine-tune a base with LoRA on BEIR folders or files of groups. A stopped run resumes with the same command."""
    from mistral_rerank.training.finetune import finetune

    chosen = TrainSettings(**settings)
    finetune(chosen, out, notice=partial(stderr.print, soft_wrap=True))
    with_base = f" --base {chosen.base}" if chosen.base is not None and Path(chosen.base).expanduser().is_dir() else ""
    stderr.print(f"wrote {out}; try: mistral-rerank rank QUESTION FILE --model {out}{with_base}", soft_wrap=True)


@app.command()
@with_reranker
@needs("train")
def mine(
    data: Annotated[list[Path], typer.Option(help="a BEIR folder; repeatable")],
    teacher: Annotated[str, typer.Option(help="an embedding model: MODEL of `evaluate --first-stage dense:MODEL`")],
    out: Annotated[Path, typer.Option(help="the .jsonl of groups to write; it must not exist")],
    reranker: dict[str, Any],
    first_stage: Annotated[
        str, typer.Option(help="source of the negatives: bm25, dense:MODEL, hybrid:MODEL, or a path of TREC runs")
    ] = "bm25",
    questions: Annotated[int, typer.Option(help="questions of a group, which share its passages", min=1)] = 1,
    negatives: Annotated[int, typer.Option(help="hard negatives of a group: judged 0, or retrieved", min=0)] = 4,
    random_negatives: Annotated[int, typer.Option(help="random negatives of a group", min=0)] = 0,
    depth: Annotated[int, typer.Option(help="lowest rank of a retrieved negative", min=1)] = 30,
    max_queries: Annotated[
        int | None, typer.Option(help="most questions of each data set  [default: all]", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
) -> None:
    """Mine hard negatives, checked and scored by a teacher, for `train --data`.

    With --model they come from the upper half of the first stage's passages, as that reranker ranks them.
    """
    from mistral_rerank.evaluation.embedding_models import open_encoder
    from mistral_rerank.evaluation.first_stage import open_first_stage
    from mistral_rerank.training.groups import check_free, write_groups
    from mistral_rerank.training.mining import load_split
    from mistral_rerank.training.mining import mine as mine_set

    check_free(out)
    device = encoder_device(reranker)
    stage, encoder = open_first_stage(first_stage, device=device), open_encoder(teacher, device=device)
    with open_reranker(**reranker) if {"model", "base_url"} & reranker.keys() else nullcontext() as opened:
        groups = []
        for folder in data:
            dataset = load_split(folder, "train")
            with progress_bar() as progress:
                task = progress.add_task(
                    printable(folder.name), total=min(len(dataset.queries), max_queries or len(dataset.queries))
                )
                mined = mine_set(
                    dataset,
                    encoder,
                    first_stage=stage,
                    reranker=opened,
                    questions=questions,
                    negatives=negatives,
                    random_negatives=random_negatives,
                    depth=depth,
                    max_queries=max_queries,
                    seed=seed,
                    progress=partial(progress.advance, task),
                )
            groups += mined.groups
            stderr.print(
                f"{folder.name}: {len(mined.groups)} groups, {mined.short} questions with too few known negatives"
                f"; {mined.teaching}"
            )
    write_groups(groups, out)


@app.command()
@with_settings("training", TrainSettings, "data", "max_queries", "seed")
@with_settings("reranker", RerankSettings, "model", "base", "device", "dtype")
@needs("train")
def early_exit(
    training: dict[str, Any],
    reranker: dict[str, Any],
    layer: Annotated[int | None, typer.Option(help="layers of the first pass  [default: 3/8 of all]", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="write a copy with it here  [default: change MODEL]")] = None,
    epochs: Annotated[int, typer.Option(help="passes over the questions", min=1)] = 6,
    max_length: Annotated[int, typer.Option(help="most tokens of a pair while fitting", min=16)] = 512,
) -> None:
    """Fit the early exit that `--cascade-depth` needs: it estimates scores from the lower layers' hidden states."""
    from mistral_rerank.local.checkpoints.update import checkpoint_to_update, store_early_exit
    from mistral_rerank.local.device import pick_device, pick_dtype
    from mistral_rerank.local.model.early_exit import EarlyExitConfig
    from mistral_rerank.local.scorer import LoadedCheckpoint
    from mistral_rerank.training.early_exit import draw_questions, fit_early_exit

    sampling = TrainSettings(**training, negatives=11, random_negatives=4)
    settings = RerankSettings(backend="local", **reranker)
    folder = checkpoint_to_update(settings.named_model, out)
    questions = draw_questions(sampling)
    device = pick_device(settings.device)
    loaded = LoadedCheckpoint(
        settings.named_model,
        base=settings.base,
        device=device,
        dtype=pick_dtype(settings.dtype, device),
        quantization=None,
        max_length=max_length,
        overflow="truncate",
        resumable=True,
    )
    layer = layer or max(1, loaded.layers * 3 // 8)
    with progress_bars() as notify:
        fitted = fit_early_exit(loaded, questions, layer=layer, epochs=epochs, seed=sampling.seed, notify=notify)
    config = EarlyExitConfig(
        layer=layer, fitted_on=tuple(path.resolve().name for path in sampling.data), questions=fitted.questions
    )
    written = store_early_exit(fitted.early_exit, config, folder, out)
    print(printable(f"early exit {config}"))  # noqa: T201
    print(fitted)  # noqa: T201
    stderr.print(
        f"wrote {written}; measure its speed: mistral-rerank bench --model {written} --cascade-depth 5", soft_wrap=True
    )
