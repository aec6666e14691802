"""The prefix cache: exact scores, counts as by hand, memory within its bound."""

import random
from concurrent.futures import ThreadPoolExecutor

import families
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_rerank import LocalReranker, Score, SettingsError, open_reranker
from mistral_rerank.local.batching.planning import plan_packed
from mistral_rerank.local.checkpoints.summary import summary
from mistral_rerank.local.engine.engine import Engine
from mistral_rerank.local.engine.prefix_cache import PrefixCache, prefix_key
from mistral_rerank.local.engine.tokenizer import EncodedPair
from mistral_rerank.local.model.rerank_model import RerankModel
from mistral_rerank.reranker import Observer, PassageCacheInfo

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def passage_first(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("passage_first")
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "rerank.json").write_text('{"template": "Passage: {passage}\\nQuestion: {query}"}')
    return folder


def local(folder, passage_cache="1MiB", **options):
    return LocalReranker(
        str(folder), device="cpu", dtype="float32", batch_tokens=200, passage_cache=passage_cache, **options
    )


@pytest.fixture(scope="module")
def plain(passage_first):
    with local(passage_first, 0) as reranker:
        reranker.warmup()
        yield reranker


@pytest.fixture(scope="module")
def token_bytes(plain):
    return plain._engine._stage.scorer.model.prefix_bytes


def tokenizer_of(reranker):
    return reranker._engine._stage.scorer.tokenizer


def scores(reranker, pairs):
    return [score.logit for score in reranker.score_pairs(pairs)]


class Sizes(Observer):
    def __init__(self):
        self.sizes, self.tokens = [], 0

    def used_prefixes(self, hits, misses, tokens_saved, cache_bytes):
        self.sizes.append(cache_bytes)

    def ran_batch(self, sequences, tokens, seconds):
        self.tokens += tokens


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=9), max_size=6),
    st.integers(0, 800),
)
def test_scores_do_not_depend_on_what_is_cached(passage_first, plain, facts, token_bytes, calls, tokens):
    questions, passages = list(facts.queries.values()), list(facts.corpus.values())
    observer = Sizes()
    with local(passage_first, tokens * token_bytes + 1) as reranker:
        reranker.observe(observer)
        for call in calls:
            pairs = [(questions[question], passages[passage]) for question, passage in call]
            assert scores(reranker, pairs) == pytest.approx(scores(plain, pairs), abs=TOLERANCE)
            info = reranker.passage_cache_info()
            assert info.bytes <= info.limit
    assert all(size <= info.limit for size in observer.sizes) if calls else True


@pytest.mark.parametrize("share_batches", [False, True])
def test_threads_and_cancellations_share_a_small_cache(passage_first, plain, facts, token_bytes, share_batches):
    questions, passages = list(facts.queries.values())[:5], list(facts.corpus.values())[:20]
    with local(passage_first, 300 * token_bytes, share_batches=share_batches) as reranker:

        def run(seed):
            chosen = random.Random(seed)
            for _ in range(6):
                pairs = [(chosen.choice(questions), chosen.choice(passages)) for _ in range(chosen.randrange(1, 8))]
                if chosen.random() < 0.3:
                    reranker._engine.submit(pairs).cancel()
                found, expected = scores(reranker, pairs), scores(plain, pairs)
                assert found == pytest.approx(expected, abs=TOLERANCE)
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(run, range(8)))
        info = reranker.passage_cache_info()
        assert info.bytes <= info.limit
        assert info.hits > 0
        assert info.misses > 20


def test_counts_are_those_by_hand(passage_first, plain, facts, token_bytes):
    first, second, third = list(facts.corpus.values())[:3]
    question, other = list(facts.queries.values())[:2]
    encoded = tokenizer_of(plain).encode([("a", text) for text in (first, second, third)], locate=True)
    one, two, three = (pair.questions[0] for pair in encoded)
    with local(passage_first, (one + two + three - 1) * token_bytes) as reranker:

        def info():
            found = reranker.passage_cache_info()
            return found.hits, found.misses, found.tokens_saved, found.entries, found.bytes

        assert info() == (0, 0, 0, 0, 0)
        scores(reranker, [(question, first)])
        assert info() == (0, 1, 0, 1, one * token_bytes)
        scores(reranker, [(question, first), (other, first), (question, second)])
        assert info() == (1, 2, one, 2, (one + two) * token_bytes)
        scores(reranker, [(question, first)])  # the second is now the least recently used
        scores(reranker, [(other, third)])
        assert info() == (2, 3, 2 * one, 2, (one + three) * token_bytes)
        scores(reranker, [(other, second), (question, third)])
        assert info() == (3, 4, 2 * one + three, 2, (two + three) * token_bytes)
    assert info() == (3, 4, 2 * one + three, 0, 0)


def test_memory_stays_under_the_bound_for_many_passages(passage_first, facts, token_bytes):
    words = " ".join(facts.corpus.values()).split()
    passages = [" ".join(words[start : start + 12]) for start in range(1000)]
    observer = Sizes()
    with local(passage_first, 2000 * token_bytes) as reranker:
        reranker.observe(observer)
        reranker.rank("who?", passages)
        info = reranker.passage_cache_info()
    assert info.misses == len(set(passages)) > 900
    assert 1900 * token_bytes < max(observer.sizes) <= 2000 * token_bytes


def test_known_passages_compute_the_question_alone(passage_first, facts):
    passages = list(facts.corpus.values())[:6]
    observer = Sizes()
    with local(passage_first) as reranker:
        reranker.rank("who?", passages)
        reranker.observe(observer)
        reranker.rank("where?", passages)
        encoded = tokenizer_of(reranker).encode([("where?", text) for text in passages], locate=True)
    rest = sum(len(pair.sequences[0]) - pair.questions[0] for pair in encoded)
    assert rest <= observer.tokens < rest + 8


def test_the_instruction_of_a_question_first_template_is_computed_once(tmp_path, facts, monkeypatch):
    folder = families.qwen3_reranker(tmp_path / "qwen3")
    passages, questions = list(facts.corpus.values())[:4], list(facts.queries.values())[:3]
    computed = {}
    for cache in (0, "1MiB"):
        tokens = computed[cache] = []
        for name in ("logits", "logits_with_prefixes"):
            method = getattr(RerankModel, name)
            monkeypatch.setattr(
                RerankModel,
                name,
                lambda self, batch, *rest, method=method, tokens=tokens: (
                    tokens.append(batch.real_tokens) or method(self, batch, *rest)
                ),
            )
        with LocalReranker(str(folder), device="cpu", dtype="float32", passage_cache=cache) as reranker:
            found = [scores(reranker, [(question, passage) for passage in passages]) for question in questions]
            (pair,) = tokenizer_of(reranker).encode([("a", "b")], locate=True)
        monkeypatch.undo()
        computed[cache] = tokens, found
    (whole, expected), (saved, found) = computed.values()
    instruction = pair.questions[0]
    assert instruction > 60
    assert saved == [whole[0], *(tokens - instruction for tokens in whole[1:])]
    for logits_, expected_ in zip(found, expected, strict=True):
        assert logits_ == pytest.approx(expected_, abs=TOLERANCE)


def test_long_passages_are_cached_by_their_chunks(passage_first, plain, facts):
    long = " ".join(facts.corpus.values())[:1100]
    observer = Sizes()
    with local(passage_first, overflow="truncate") as reranker:
        for question in ("who?", "where is it?"):
            pairs = [(question, long), (question, "short and another few words")]
            observer.tokens = 0
            reranker.observe(observer)
            assert scores(reranker, pairs) == pytest.approx(scores(plain, pairs), abs=TOLERANCE)
        assert observer.tokens < 60, "the second question alone"
        assert reranker.passage_cache_info().hits == 2
        pairs = [("how?", long * 4), ("who?", long * 4)]
        chunked = [reranker.score_pairs(pairs, overflow="chunk") for _ in range(2)]
        expected = plain.score_pairs(pairs, overflow="chunk")
        for found in chunked:
            assert [score.logit for score in found] == pytest.approx([s.logit for s in expected], abs=TOLERANCE)


class Lengths:
    """Scores a sequence by its length; the prefix is what comes before a "?". Fails if rows are over `memory`."""

    state_bytes = key_value_bytes = prefix_bytes = 1

    def __init__(self):
        self.memory, self.cached = 10**9, []

    @property
    def model(self):
        return self

    @property
    def tokenizer(self):
        return self

    def slices(self, pairs, overflow=None, *, instruction=None, locate=False):
        assert locate
        for _, passage in pairs:
            yield [EncodedPair(([ord(c) for c in passage],), (range(0),), questions=(passage.index("?"),))]

    def plan(self, sequences, budget, cached=()):
        return plan_packed(sequences, budget, cached=cached)

    def new_prefix(self, tokens):
        return tokens

    def logits_with_prefixes(self, batch, cached, new):
        self.cached.append(cached)
        if batch.real_tokens + 2 * sum(cached) > self.memory:
            raise MemoryError("too big")
        return [float(len(ids)) for ids in batch.sequences]

    def score(self, logit, *, tokens):
        return Score.from_logit(logit)


def prefix_engine(scorer, limit, **options):
    return Engine(lambda: scorer, batch_tokens=100, share_batches=False, prefixes=PrefixCache(limit), **options)


def lengths(made, *passages):
    future = made.submit([("q", passage) for passage in passages])
    return [score.logit for score in future.result(timeout=10)]


def test_running_out_of_memory_empties_the_cache_first():
    scorer = Lengths()
    made = prefix_engine(scorer, 100)
    assert lengths(made, "abcdefghij?a", "bcdefghijk?a") == [12, 12]
    scorer.memory = 30
    assert lengths(made, "abcdefghij?b", "bcdefghijk?bc") == [12, 13]
    assert scorer.cached == [[], [10, 10], []]
    assert made._size.tokens == 100
    assert made._prefixes.info() == PassageCacheInfo(0, 4, 0, 2, 20, 100)
    made.close()


def test_a_batch_planned_before_its_prefix_was_evicted_is_planned_again():
    scorer = Lengths()
    made = prefix_engine(scorer, 20)
    lengths(made, "abcdefghij?a")
    looked_up = []
    original = PrefixCache.cached_tokens

    def watched(self, keys):
        found = original(self, keys)
        looked_up.append(found)
        if len(looked_up) == 1:
            self.clear()
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PrefixCache, "cached_tokens", watched)
        assert lengths(made, "abcdefghij?b") == [12]
    assert looked_up[0] == [10]
    assert scorer.cached[-1] == []
    made.close()


def test_keys_are_token_ids_before_the_question():
    ids = list(range(20))
    assert prefix_key(ids, 12) == prefix_key([*range(12), 99], 12) != prefix_key(ids, 11)
    assert prefix_key(ids, 7) is None
    assert prefix_key(ids, 30) == prefix_key(ids, 19)
    assert prefix_key(ids, 12, "legal") != prefix_key(ids, 12)


def test_it_is_a_setting_like_others(monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_PASSAGE_CACHE", "1.5GiB")
    assert open_reranker()._options["passage_cache"] == 3 * 2**29
    assert LocalReranker(passage_cache="10MB").passage_cache_info().limit == 10_000_000
    assert LocalReranker(passage_cache="0").passage_cache_info() is None
    with pytest.raises(SettingsError, match="'much' is not known; give bytes, or a number with a unit like '1GiB'"):
        LocalReranker(passage_cache="much")
    with pytest.raises(SettingsError, match="passage_cache"):
        open_reranker(passage_cache="much")


def test_prepared_passages_are_hits(passage_first, plain, facts):
    passages = list(facts.corpus.values())[:5]
    with local(passage_first) as reranker:
        done = []
        reranker.prepare([*passages, " "], progress=done.append)
        assert done == [6]
        assert reranker.passage_cache_info().misses == 5
        pairs = [("who?", passage) for passage in passages]
        assert scores(reranker, pairs) == pytest.approx(scores(plain, pairs), abs=TOLERANCE)
        assert reranker.passage_cache_info().hits == 5


def test_passages_cannot_be_prepared_without_a_cache_or_behind_the_question(passage_first, tiny, length_reranker):
    with local(passage_first, 0) as reranker, pytest.raises(SettingsError, match="set passage_cache, such as '1GiB'"):
        reranker.prepare(["a passage"])
    with local(tiny) as reranker, pytest.raises(SettingsError, match="reads the question before the passage"):
        reranker.prepare(["a passage"])
    with pytest.raises(SettingsError, match="only a model on this machine"):
        length_reranker.prepare(["a passage"])


def test_the_summary_tells_what_is_cached(passage_first, tiny, tmp_path, token_bytes):
    def described(folder, **options):
        return summary(str(folder), device="cpu", dtype="float32", **options)["passage cache"]

    assert described(passage_first) == f"off, {token_bytes} bytes a token: passages"
    assert described(tiny).endswith("the instruction; the passage comes after the question")
    assert described(passage_first, passage_cache=2**20) == (
        f"{2**20 // token_bytes} tokens in 1.0MiB, {token_bytes} bytes a token: passages"
    )
    assert described(families.minilm(tmp_path / "minilm")) == "not with this model on this device"
