"""`train`, `mine` and `early-exit`: make a reranker."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mistral_rerank.cli.options import (
    Base,
    Device,
    Dtype,
    Model,
    app,
    encoder_device,
    given,
    notices,
    progress_bar,
    stderr,
    with_reranker_options,
)
from mistral_rerank.cli.terminal import printable
from mistral_rerank.settings import RerankSettings, open_reranker

Data = Annotated[list[Path], typer.Option(help="a BEIR folder or a .jsonl of groups; give it once for each data set")]
MaxQueries = Annotated[int | None, typer.Option(help="questions of each data set at most  [default: all]", min=1)]


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="the checkpoint folder to write; it must not exist")],
    validation: Annotated[
        list[Path] | None, typer.Option(help="like --data, kept out of training; the best weights on it are kept")
    ] = None,
    max_queries: MaxQueries = None,
    patience: Annotated[int | None, typer.Option(help="stop after so many validations without a better one")] = None,
    base: Annotated[str | None, typer.Option(help="a folder, a hub id, or smollm2-135m")] = None,
    layers: Annotated[int | None, typer.Option(help="keep only the first N layers of the base")] = None,
    loss: Annotated[str | None, typer.Option(help="bce, infonce, bce+infonce  [default: bce+infonce]")] = None,
    init: Annotated[str | None, typer.Option(help="instead of a base: go on from this adapter, or mini")] = None,
    template: Annotated[str | None, typer.Option(help="the prompt, with {query} and {passage}")] = None,
    questions: Annotated[int | None, typer.Option(help="questions that share their passages  [default: 1]")] = None,
    negatives: Annotated[int | None, typer.Option(help="hard negatives of a group  [default: 4]")] = None,
    random_negatives: Annotated[int | None, typer.Option(help="random ones  [default: 1]")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a pair while training  [default: 512]")] = None,
    bidirectional: Annotated[bool, typer.Option(help="tokens look ahead too, and their mean is pooled")] = False,
    frozen_layers: Annotated[int | None, typer.Option(help="lower layers without LoRA  [default: 0]")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="rank of the LoRA matrices  [default: 16]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="its highest value  [default: 3e-4]")] = None,
    epochs: Annotated[float | None, typer.Option(help="times every question is seen  [default: 1]")] = None,
    groups_per_step: Annotated[int | None, typer.Option(help="groups of one step  [default: 32]")] = None,
    groups_per_forward: Annotated[int | None, typer.Option(help="held in memory at once  [default: 4]")] = None,
    save_steps: Annotated[int | None, typer.Option(help="between states, and validations  [default: 50]")] = None,
    distill: Annotated[float | None, typer.Option(help="weight of the teacher's scores  [default: 1]")] = None,
    four_bit: Annotated[bool, typer.Option(help="keep the base in 4 bits while training (QLoRA)")] = False,
    activation_checkpointing: Annotated[bool, typer.Option(help="less memory, a third more time")] = False,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="the same seed draws the same examples and weights")] = 0,
) -> None:
    """Fine-tune a base with LoRA on BEIR folders or files of groups; start it again after a stop and it goes on."""
    chosen = given(locals(), *(name for name in locals() if name != "out"))
    from mistral_rerank.training.finetune import TrainSettings, finetune

    finetune(TrainSettings(**chosen), out, notice=stderr.print)
    with_base = f" --base {base}" if base is not None and Path(base).expanduser().is_dir() else ""
    stderr.print(f"wrote {out}; try: mistral-rerank rank QUESTION FILE --model {out}{with_base}", soft_wrap=True)


@app.command()
@with_reranker_options
def mine(
    data: Annotated[list[Path], typer.Option(help="a BEIR folder; give it once for each data set")],
    teacher: Annotated[str, typer.Option(help="an embedding model: MODEL of `evaluate --first-stage dense:MODEL`")],
    out: Annotated[Path, typer.Option(help="the .jsonl of groups to write; it must not exist")],
    first_stage: Annotated[
        str, typer.Option(help="finds the negatives: bm25, dense:MODEL, hybrid:MODEL, or a path of TREC runs")
    ] = "bm25",
    questions: Annotated[int, typer.Option(help="questions that share their passages", min=1)] = 1,
    negatives: Annotated[int, typer.Option(help="hard negatives of a group: judged 0, or found", min=0)] = 4,
    random_negatives: Annotated[int, typer.Option(help="passages of a group from anywhere", min=0)] = 0,
    depth: Annotated[int, typer.Option(help="how far down the ranking negatives may come from", min=1)] = 30,
    max_queries: MaxQueries = None,
    seed: Annotated[int, typer.Option(help="the same seed draws the same groups")] = 0,
    **reranker: Any,
) -> None:
    """Draw hard negatives that a teacher has checked, with its scores, for `train --data`.

    With --model they come from the upper half of what that reranker makes of the first stage's passages.
    """
    from mistral_rerank.evaluation.first_stage import open_encoder, open_first_stage
    from mistral_rerank.training.groups import check_free, write_groups
    from mistral_rerank.training.mining import mine as mine_set
    from mistral_rerank.training.sources import load_split

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
def early_exit(
    data: Data,
    model: Model = None,
    base: Base = None,
    max_queries: MaxQueries = None,
    layer: Annotated[int | None, typer.Option(help="layers of the first pass  [default: 3 of 8]", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="write a copy with it here  [default: change MODEL]")] = None,
    epochs: Annotated[int, typer.Option(help="times every question is seen", min=1)] = 6,
    max_length: Annotated[int, typer.Option(help="tokens of a pair that are read", min=16)] = 512,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="the same seed draws the same passages and weights")] = 0,
) -> None:
    """Fit the early exit that `--cascade-depth` needs: it estimates scores from the lower layers' hidden states."""
    from mistral_rerank.local.checkpoints.update import checkpoint_to_update, store_early_exit
    from mistral_rerank.local.device import pick_device, pick_dtype
    from mistral_rerank.local.model.early_exit import EarlyExitConfig
    from mistral_rerank.local.reranker import LoadedCheckpoint
    from mistral_rerank.training.early_exit import draw_questions, fit_early_exit

    chosen = RerankSettings(backend="local", **given(locals(), "model", "base", "device", "dtype"))
    folder = checkpoint_to_update(chosen.named_model, out)
    questions = draw_questions(data, max_queries=max_queries, seed=seed)
    where = pick_device(chosen.device)
    loaded = LoadedCheckpoint(
        chosen.named_model,
        base=chosen.base,
        device=where,
        dtype=pick_dtype(chosen.dtype, where),
        quantization=None,
        max_length=max_length,
        overflow="truncate",
        resumable=True,
    )
    layer = layer or max(1, loaded.layers * 3 // 8)
    with notices() as notify:
        fitted = fit_early_exit(loaded, questions, layer=layer, epochs=epochs, seed=seed, notify=notify)
    config = EarlyExitConfig(
        layer=layer, fitted_on=tuple(path.resolve().name for path in data), questions=fitted.questions
    )
    written = store_early_exit(fitted.early_exit, config, folder, out)
    print(printable(f"early exit {config}"))  # noqa: T201
    print(fitted)  # noqa: T201
    stderr.print(
        f"wrote {written}; see what it costs: mistral-rerank bench --model {written} --cascade-depth 5", soft_wrap=True
    )
