"""Settings of an evaluation; `mistral-rerank evaluate` has an option for each of them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class EvaluationSettings(BaseModel):
    """Settings of an evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: tuple[Path, ...] = Field(min_length=1, description="a BEIR folder; repeatable")
    first_stage: str = Field("bm25", description="bm25, dense:MODEL, hybrid:MODEL, or a path of TREC runs")
    top_k: int = Field(50, ge=1, description="candidates of a question that are reranked")
    queries: int | None = Field(None, ge=1, description="questions sampled from each data set; default: all")
    questions_at_once: int = Field(1, ge=1, description="questions whose candidates are scored in one call")
    split: str | None = Field(None, description="which qrels/SPLIT.tsv; default: the only one")
    query_prefix: str | None = Field(None, description="prefix of questions, instead of the embedding preset's")
    passage_prefix: str | None = Field(None, description="prefix of passages, instead of the embedding preset's")
    drop_same_id: bool = Field(False, description="drop candidates with the question's id (ArguAna, Quora)")
    seed: int = Field(0, description="seed of the sampling of questions")
