"""Scores a shard in one call of a reranker, and writes it as one file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from mistral_rerank.data_files.pairs import columns_of, pair_record, record_line, scored_records
from mistral_rerank.errors import InvalidInputError
from mistral_rerank.offline.files import OutputFolder
from mistral_rerank.scores import usage_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mistral_rerank.data_files.text import Record
    from mistral_rerank.scores import Score
    from mistral_rerank.settings import RerankSettings


class ShardScorer:
    """An actor's model, which scores shards into a folder.

    A shard is a table with the columns `shard` (its number), `file`, `line` and `row`: a line of JSON, or a struct of
    the columns of a Parquet file.

    Args:
        settings: of the reranker. An API key comes from the environment of the actor.
        out: the folder, see `OutputFolder`.
        shared: "query" or "passage": pairs with the same one share computation.
        has_rejects: whether invalid rows are written to the rejects; otherwise they raise an `InvalidInputError`.

    """

    def __init__(self, settings: RerankSettings, out: str, shared: str, *, has_rejects: bool) -> None:
        self._reranker = settings.open()
        self._out, self._shared, self._has_rejects = OutputFolder(out), shared, has_rejects

    def __call__(self, shard: pa.Table) -> dict[str, list[int]]:
        """Score a shard, unless its file exists; give one row of counts."""
        is_parquet = pa.types.is_struct(shard["row"].type)
        name = f"part-{shard['shard'][0].as_py():05}"
        file = f"{name}.{'parquet' if is_parquet else 'jsonl'}"
        counts = {"pairs": len(shard), "scored": 0, "rejected": 0, "tokens": 0}
        if not self._out.exists(file):
            records, rejects = self._read(shard)
            order = sorted(records, key=lambda row: (str(records[row][self._shared]), str(records[row]["query"])))
            scored = list(scored_records(self._reranker, [records[row] for row in order]))
            scores = [score for _, score in scored]
            if rejects:
                with self._out.writing(f"_rejects/{name}.jsonl") as sink:
                    sink.write(_lines(rejects))
            with self._out.writing(file) as sink:
                if is_parquet:
                    pq.write_table(_with_scores(shard["row"].take(pa.array(order, pa.int64())), scores), sink)
                else:
                    sink.write(_lines([record | columns_of(score) for record, score in scored]))
            counts |= {"scored": len(scores), "rejected": len(rejects), "tokens": usage_of(scores).tokens}
        return {name: [count] for name, count in counts.items()}

    def _read(self, shard: pa.Table) -> tuple[dict[int, Record], list[Record]]:
        """Give the valid records by their row of the shard, and the rejects."""
        records: dict[int, Record] = {}
        rejects: list[Record] = []
        for position, (row, location) in enumerate(rows_of(shard)):
            try:
                records[position] = pair_record(row, location)
            except InvalidInputError as error:
                if not self._has_rejects:
                    raise
                rejects.append(
                    {name: shard[name][position].as_py() for name in ("file", "line")}
                    | {
                        "reason": str(error),
                        "text": row
                        if isinstance(row, str)
                        else json.dumps(shard["row"][position].as_py(), default=str),
                    }
                )
        return records, rejects


def rows_of(table: pa.Table) -> Iterator[tuple[str | Record, str]]:
    """Give each row of an input as a line of JSON or a record, with its location for errors."""
    rows = table["row"]
    if pa.types.is_struct(rows.type):
        columns = pa.Table.from_struct_array(rows)
        names = [name for name in columns.column_names if name in ("query", "passage")]
        rows = columns.select(names) if len(names) == 2 else pa.array([dict.fromkeys(columns.column_names)] * len(rows))
    for file, line, row in zip(table["file"].to_pylist(), table["line"].to_pylist(), rows.to_pylist(), strict=True):
        yield row, file if line is None else f"{file}:{line}"


def _lines(records: Sequence[Record]) -> bytes:
    return "".join(map(record_line, records)).encode("utf-8", "backslashreplace")


def _with_scores(rows: pa.ChunkedArray, scores: Sequence[Score]) -> pa.Table:
    """Add the columns of scores to a struct of columns."""
    table = pa.Table.from_struct_array(rows)
    for name in ("logit", "probability"):
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, pa.array([columns_of(score)[name] for score in scores], pa.float64()))
    return table
