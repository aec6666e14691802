"""Stage: mini as a user opens it, on this device in the default dtype, beside a CPU in float32."""

from results import Stage

from mistral_rerank import open_reranker
from mistral_rerank.benchmark.timing import kendall_tau
from mistral_rerank.demo import FACTS
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.local.model import rerank_model

LARGEST_DIFFERENCE = 0.25
"""Between two logits: twice what a plain loop in bfloat16 differs from float32 by on a CPU."""


def main() -> None:
    """Rank the passages of the example corpus for some of its questions."""
    stage = Stage("mini")
    facts = load_beir(FACTS)
    queries, passages = list(facts.queries.values())[: 4 if stage.full else 2], list(facts.corpus.values())[:30]
    passages = passages if stage.full else passages[:8]
    pairs = [(query, passage) for query in queries for passage in passages]
    with open_reranker("mini", device="cpu", dtype="float32") as reranker:
        expected = [score.logit for score in reranker.score_pairs(pairs)]
    for packed in (False, True):
        rerank_model.PACKED_ON_CUDA = packed
        with (
            stage.results.check(f"mini on {stage.device}, {'packed' if packed else 'default'}") as entry,
            open_reranker("mini", device=str(stage.device)) as reranker,
        ):
            logits = [score.logit for score in reranker.score_pairs(pairs)]
            entry["max diff"] = round(max(abs(a - b) for a, b in zip(logits, expected, strict=True)), 4)
            entry["tau"] = round(kendall_tau(logits, expected), 4)
            entry["best"] = reranker.rank(queries[0], passages, top_n=1)[0].index
            entry["ok"] = entry["max diff"] <= LARGEST_DIFFERENCE


if __name__ == "__main__":
    main()
