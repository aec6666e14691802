"""`mistral-rerank score --cluster`: reads pairs, shuffles them into shards and scores those, on Ray Data.

Ray Data reads the input, brings the rows of a shard together and runs the actors, and starts those again that die. A
shard is one file of the output, which is written when it is complete, so a run that is started again scores the shards
that have no file yet.
Source: https://docs.ray.io/en/latest/data/transforming-data.html
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mistral_rerank.data_files.atomic import only_writer
from mistral_rerank.data_files.pairs import pair_record
from mistral_rerank.data_files.text import lines_of
from mistral_rerank.errors import InvalidInputError, MissingDependencyError, ScoringError
from mistral_rerank.offline.files import OutputFolder, PairFiles, find_pairs
from mistral_rerank.offline.shard import ShardScorer, rows_of
from mistral_rerank.offline.sharding import BUCKETS, Sharding, bucket_of
from mistral_rerank.ray_connection import connect, ray_address

try:
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, DataContext
except ImportError as error:
    raise MissingDependencyError.of("cluster", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray
    from ray.data import Dataset

    from mistral_rerank.settings import RerankSettings

SHARD_PAIRS = 4096
"""Pairs of a shard: what a killed worker loses at most."""
READ_ROWS = 4096
"""Rows of a batch that is read."""
MOST_PARTITIONS = 1024
"""The most tasks of the actors; with more shards a task has several."""


@dataclass(frozen=True, slots=True)
class Workers:
    """The actors, each with its own model.

    Attributes:
        number: how many; None for as many as the cluster has room for.
        cpus: CPUs, and so threads, of each.
        gpus: GPUs of each; a fraction shares one.

    """

    number: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of a run.

    Attributes:
        pairs: rows of the input.
        scored: pairs that were scored by this run, not by a stopped one before it.
        rejected: invalid rows of the shards that were scored by this run.
        tokens: that the model read, of the pairs that were scored by this run.

    """

    pairs: int = 0
    scored: int = 0
    rejected: int = 0
    tokens: int = 0


def score_on_ray(
    settings: RerankSettings,
    source: str,
    out: str,
    *,
    workers: Workers,
    recorded: Mapping[str, object],
    progress: Callable[[int, int], None],
    rejects: str | None = None,
    shard_pairs: int = SHARD_PAIRS,
) -> Totals:
    """Score a file or folder of pairs into a folder of shards, on the cluster of RAY_ADDRESS or on a local one.

    Rows and files of the output are in no particular order.

    Args:
        settings: of the reranker.
        source: path or URL of .parquet or .jsonl files with the columns or fields "query" and "passage".
        out: path or URL of the folder. All machines of the cluster must be able to read and write both.
        workers: the actors.
        recorded: settings that a run must resume with, as JSON preserves them.
        progress: called after each task with the number of pairs done and of all pairs.
        rejects: path or URL of a file for invalid rows, with reasons; None to stop at the first one.
        shard_pairs: pairs of a shard.

    Raises:
        InvalidInputError: a row is invalid, there is no input, or `out` exists.
        SettingsError: a stopped run in `out` has other settings or pairs, or another process writes it.

    """
    folder = OutputFolder(out)
    context = DataContext.get_current()
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    with only_writer(Path(folder.path)) if folder.is_local else nullcontext(), _connected(workers), _own_errors():
        name, checksum, shared = ray.get(ray.remote(**workers.resources)(_describe).remote(settings))
        files = find_pairs(source)
        weights = {"model": name, "weights": checksum, "shard_pairs": shard_pairs}
        folder.start({**weights, **recorded, "input": files.fingerprint})
        rows = _rows(files)
        sharding = _sharding(rows, shared, shard_pairs, strict=rejects is None)
        if not sharding.pairs:
            raise InvalidInputError(f"{source} holds no pairs")
        sharded = rows.map_batches(_with_shard, batch_format="pyarrow", fn_args=(sharding, shared))
        counts = sharded.groupby("shard", num_partitions=max(1, min(sharding.shards, MOST_PARTITIONS))).map_groups(
            ShardScorer,
            fn_constructor_args=(settings, out, shared),
            fn_constructor_kwargs={"has_rejects": rejects is not None},
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=_number(workers), max_tasks_in_flight_per_actor=1),
            **workers.resources,
        )
        totals = Totals()
        progress(0, sharding.pairs)
        for row in counts.iter_rows():
            totals = Totals(**{name: total + row[name] for name, total in asdict(totals).items()})
            progress(totals.pairs, sharding.pairs)
        if totals.pairs != sharding.pairs:
            raise ScoringError(
                f"{source} has changed during the run, which saw {totals.pairs} of {sharding.pairs} pairs"
            )
        folder.finish(rejects, {"pairs": totals.pairs})
    return totals


@contextmanager
def _connected(workers: Workers) -> Iterator[None]:
    """Connect to Ray, unless the program has."""
    if ray.is_initialized():
        yield
        return
    room = {}
    if ray_address() == "local" and workers.number is not None:  # and one CPU for reading
        room["num_cpus"] = max(os.cpu_count() or 1, int(workers.number * workers.cpus) + 1)
    connect(**room)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its log file has all, with the tracebacks
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the errors of the workers, which Ray wraps."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _number(workers: Workers) -> int:
    """Give the number of actors; by default all CPUs, or GPUs, are theirs, but for one CPU that reads."""
    if workers.number is not None:
        return workers.number
    resources = ray.cluster_resources()
    if workers.gpus:
        return max(1, int(resources.get("GPU", 0) / workers.gpus))
    return max(1, int((resources.get("CPU", 0) - 1) / (workers.cpus or 1)))


def _describe(settings: RerankSettings) -> tuple[str, str | None, str]:
    """Give the model's name, the checksum of its weights, and which side of a pair shares computation."""
    with settings.open() as reranker:
        shared = "passage" if reranker.shares_passages else "query"
        return reranker.model_name, reranker.weights_checksum(), shared


def _rows(files: PairFiles) -> Dataset:
    """Read rows as `ShardScorer` takes them, without the number of the shard."""
    if files.is_parquet:
        table = ray.data.read_parquet(list(files.paths), filesystem=files.filesystem)
        return table.map_batches(_nested, batch_format="pyarrow", batch_size=READ_ROWS, fn_args=(files.source,))
    paths = ray.data.from_items(
        [{"path": path} for path in files.paths], override_num_blocks=min(len(files.paths), MOST_PARTITIONS)
    )
    return paths.map_batches(partial(_read_lines, files), batch_size=1)


def _nested(table: pa.Table, source: str) -> pa.Table:
    rows = table.to_struct_array().combine_chunks()
    nulls = pa.nulls(len(rows), pa.int64())
    return pa.table({"file": [source] * len(rows), "line": nulls, "row": rows})


def _read_lines(files: PairFiles, paths: dict[str, NDArray[Any]]) -> Iterator[dict[str, list[Any]]]:
    for path in map(str, paths["path"]):
        with files.filesystem.open_input_file(path) as content:
            numbered = enumerate(lines_of(content, path), start=1)
            lines = ((number, line.rstrip("\r\n")) for number, line in numbered if line.strip())
            while block := list(islice(lines, READ_ROWS)):
                numbers, texts = zip(*block, strict=True)
                yield {"file": [path] * len(block), "line": list(numbers), "row": list(texts)}


def _sharding(rows: Dataset, shared: str, shard_pairs: int, *, strict: bool) -> Sharding:
    """Read all rows once, to count those of each bucket and to find invalid ones before anything is scored."""
    buckets = rows.map_batches(_buckets, batch_format="pyarrow", fn_args=(shared,))
    counts = np.zeros(BUCKETS, dtype=np.int64)
    for batch in buckets.iter_batches(batch_size=None, batch_format="numpy"):
        if strict and (errors := list(filter(None, batch["error"]))):
            raise InvalidInputError(errors[0])
        counts += np.bincount(batch["bucket"], minlength=BUCKETS)
    return Sharding(counts, shard_pairs)


def _buckets(table: pa.Table, shared: str) -> dict[str, list[Any]]:
    texts, _, errors = _texts(table, shared)
    return {"bucket": list(map(bucket_of, texts)), "error": errors}


def _with_shard(table: pa.Table, sharding: Sharding, shared: str) -> pa.Table:
    texts, others, _ = _texts(table, shared)
    return table.append_column("shard", pa.array(sharding.shards_of(texts, others)))


def _texts(table: pa.Table, shared: str) -> tuple[list[str], list[str], list[str]]:
    """Give the shared text, the other text and the error, if any, of each row; an invalid row is its shared text."""
    texts, others, errors = [], [], []
    for row, location in rows_of(table):
        try:
            record, error = pair_record(row, location), ""
        except InvalidInputError as invalid:
            record, error = {"query": str(row), "passage": str(row)}, str(invalid)
        texts.append(str(record[shared]))
        others.append(str(record["query" if shared == "passage" else "passage"]))
        errors.append(error)
    return texts, others, errors
