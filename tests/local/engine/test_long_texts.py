"""Texts far over the limit: the ids are those of the whole text, and the work is the limit's."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mistral_rerank import InputTooLongError
from mistral_rerank.local.checkpoints.loading import load_tokenizer, open_checkpoint
from mistral_rerank.local.engine import tokenizer as tokens
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.templates import Template

LATER_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATES = (Template().template, "Passage: {passage}\nQuestion: {query}", "{query}{passage}")


def byte_level(corpus):
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LATER_REGEX), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    return made


def one_word(corpus):
    """As Llama 2 and Mistral: a text is one word, spaces and all."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = (f"▁{word}" for text in corpus for word in text.split())
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(words, trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", *bytes_]))
    return made


def unigram(corpus):
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        corpus, trainers.UnigramTrainer(vocab_size=900, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return made


def word_piece(corpus):
    made = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]"]))
    return made


@pytest.fixture(
    scope="module",
    params=["mini", byte_level, one_word, unigram, word_piece],
    ids=lambda kind: getattr(kind, "__name__", kind),
)
def family(request, facts):
    if request.param == "mini":
        return load_tokenizer(open_checkpoint("mini"))
    backend = request.param([*facts.corpus.values(), "--------", "        \n\n", "aaaa" * 9])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


PIECES = [
    "The glacier moved slowly. ",
    "a",
    "ab",
    " ",
    "  \n",
    "\n",
    "-",
    "don't ",
    "0123456789",
    "日本語の文章",
    "e\u0301",
    "🙂👩\u200d👩\u200d👧",
    "\ud800",
    "\t\t",
    "x = f(y)\n    return [z]\n",
    "q7Zk+/",
]


@st.composite
def long_texts(draw):
    """Repeat some pieces, mix others: runs without an end, words without a space, and plain text."""
    text = ""
    for _ in range(draw(st.integers(1, 4))):
        chosen = draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4))
        length = draw(st.integers(1, 6000))
        if draw(st.booleans()):
            text += ("".join(chosen) * length)[:length]
        else:
            text += "".join(random.Random(draw(st.integers(0, 99))).choices(chosen, k=length))[:length]
    return text


def made(tokenizer, template, **options):
    return PairTokenizer(tokenizer, Template(template), append_eos=False, **options)


@settings(max_examples=25, deadline=None)
@given(text=long_texts(), limit=st.integers(24, 90), template=st.sampled_from(TEMPLATES))
def test_a_cut_before_tokenizing_changes_no_id(family, text, limit, template):
    pair = ("who moved?", text + " The end.")
    tokenizer = made(family, template, max_length=limit)
    found = tokenizer.encode([pair, pair], locate=True)
    tokenizer._first_cut = 10**9
    expected = tokenizer.encode([pair, pair], locate=True)
    assert [one.sequences for one in found] == [one.sequences for one in expected]
    assert [one.passages for one in found] == [one.passages for one in expected]
    assert [one.tokens_left_out > 0 for one in found] == [one.tokens_left_out > 0 for one in expected]


class Counted:
    """A backend that counts the characters that it is given."""

    def __init__(self, backend):
        self.backend, self.characters = backend, 0

    def __getattr__(self, name):
        def encode(texts, **options):
            self.characters += sum(map(len, texts))
            return getattr(self.backend, name)(texts, **options)

        return encode


HUGE = {
    "words": "The glacier moved slowly down the valley and carved the rock. " * 60_000,
    "one word": "q7Zk+/Ab" * 500_000,
    "spaces": "rock" + " " * 3_000_000 + "rock",
}


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("overflow", ["truncate", "error"])
def test_the_work_follows_the_limit_and_not_the_text(kind, overflow):
    tokenizer = load_tokenizer(open_checkpoint("mini"))
    maker = made(tokenizer, Template().template, max_length=512, overflow=overflow)
    maker._backend = counted = Counted(maker._backend)
    if overflow == "error":
        with pytest.raises(InputTooLongError, match="of at least .* exceeds maximum allowed token size 512"):
            maker.encode([("who?", HUGE[kind])])
    else:
        (pair,) = maker.encode([("who?", HUGE[kind])])
        assert len(pair.sequences[0]) == 512
        assert pair.tokens_left_out >= 256
    assert counted.characters < 200_000


def test_a_huge_question_is_refused_without_reading_all_of_it(tokenizer):
    maker = made(tokenizer, Template().template, max_length=60)
    maker._backend = counted = Counted(maker._backend)
    with pytest.raises(InputTooLongError, match="pair 1: the question takes more than"):
        maker.encode([("who?", "me"), (HUGE["words"], "me")])
    assert counted.characters < 10_000


def test_chunks_of_a_huge_passage_come_from_bounded_sections(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "SECTION_CHARACTERS", 3000)
    words = [f"w{number}" for number in range(4000)]
    maker = made(tokenizer, Template().template, max_length=200, overflow="chunk")
    maker._backend = counted = Counted(maker._backend)
    steps = list(maker.slices([("who?", "me"), ("who?", " ".join(words)), ("who?", "you")]))
    pairs = [pair for step in steps for pair in step]
    assert len(steps) > 7
    assert len(pairs) == 3
    texts = [tokenizer.decode(ids) for ids in pairs[1].sequences]
    assert all(len(ids) <= 200 for ids in pairs[1].sequences)
    assert set(words) <= {word for text in texts for word in text.replace("passage:", " ").split()}
    assert counted.characters < 2 * len(" ".join(words))
    assert pairs[1].tokens_left_out == 0


def test_many_texts_are_encoded_in_slices_with_their_positions(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "SLICE_CHARACTERS", 500)
    maker = made(tokenizer, Template().template, max_length=60)
    pairs = [("who?", f"passage {number} " * 9) for number in range(20)]
    steps = list(maker.slices(pairs))
    assert len(steps) > 3
    whole = maker.encode(pairs)
    assert [pair for step in steps for pair in step] == whole
    monkeypatch.undo()
    assert maker.encode(pairs) == whole
    with pytest.raises(InputTooLongError, match="pair 19: "):
        maker.encode([*pairs[:-1], ("who? " * 60, "me")])
