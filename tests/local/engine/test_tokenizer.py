import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mistral_rerank import InputTooLongError
from mistral_rerank.local.checkpoints.loading import load_tokenizer, open_checkpoint
from mistral_rerank.local.engine.tokenizer import CHUNK_OVERLAP, PairTokenizer
from mistral_rerank.templates import Template

LONG = "The glacier moved slowly down the valley and carved the rock. " * 40


def make(tokenizer, *, template=Template().template, max_length=8192, **options):
    return PairTokenizer(tokenizer, Template(template), max_length=max_length, **options)


def only(encoded):
    (pair,) = encoded
    (ids,) = pair.sequences
    return ids


def test_ids_are_the_tokenizers_own_for_the_whole_text_and_the_end_token(tokenizer):
    ids = only(make(tokenizer).encode([("who?", "me")]))
    assert ids == tokenizer("question:who? \n \n passage:me").input_ids + [tokenizer.eos_token_id]
    assert only(make(tokenizer, append_eos=False).encode([("who?", "me")])) == ids[:-1]


def test_truncation_cuts_the_end_of_the_passage_and_nothing_else(tokenizer):
    whole = only(make(tokenizer).encode([("who moved?", LONG)]))
    (pair,) = make(tokenizer, max_length=60).encode([("who moved?", LONG)])
    assert pair.sequences == (whole[:59] + [tokenizer.eos_token_id],)
    assert pair.tokens_left_out == len(whole) - 60


def test_truncation_keeps_what_the_template_says_after_the_passage(tokenizer):
    template = "question:{query} passage:{passage} \n answer:"
    ids = only(make(tokenizer, template=template, max_length=50).encode([("who?", LONG)]))
    assert len(ids) == 50
    assert tokenizer.decode(ids).endswith(" \n answer:</s>")
    assert tokenizer.decode(ids).startswith("<s>question:who? passage:The glacier")


def test_chunks_cover_the_whole_passage_and_overlap(tokenizer):
    maker = make(tokenizer, max_length=200, overflow="chunk")
    whole = only(make(tokenizer).encode([("who?", LONG)]))
    head = len(tokenizer("question:who? \n \n passage:").input_ids)
    (pair,) = maker.encode([("who?", LONG)])
    assert len(pair.sequences) > 1
    assert all(len(ids) <= 200 and ids[:head] == whole[:head] for ids in pair.sequences)
    bodies = [ids[head:-1] for ids in pair.sequences]
    joined = bodies[0]
    for body in bodies[1:]:
        overlap = min(CHUNK_OVERLAP, (200 - head - 1) // 4)
        assert joined[-overlap:] == body[:overlap]
        joined = joined + body[overlap:]
    assert joined == whole[head:-1]


@pytest.mark.parametrize("template", ["question:{query} \n passage:{passage}", "about {passage} \n asks {query}?"])
@pytest.mark.parametrize("options", [{}, {"max_length": 60}, {"max_length": 60, "overflow": "chunk"}])
def test_the_passage_is_found_among_the_ids(tokenizer, template, options):
    maker = make(tokenizer, template=template, **options)
    for passage in (LONG, "me", "two words", " spaced ", ""):
        plain, located = (maker.encode([("who moved?", passage)], locate=flag)[0] for flag in (False, True))
        assert located.sequences == plain.sequences
        pieces = [
            tokenizer.decode(ids[place.start : place.stop])
            for ids, place in zip(located.sequences, located.passages, strict=True)
        ]
        assert all(piece.strip() in passage for piece in pieces)
        assert any(pieces) == bool(passage)
        if len(pieces) == 1 and not located.tokens_left_out:
            assert pieces[0].strip() == passage.strip()


def test_a_pair_at_the_limit_is_left_alone(tokenizer):
    whole = only(make(tokenizer).encode([("who?", LONG)]))
    for overflow in ("truncate", "chunk", "error"):
        assert only(make(tokenizer, max_length=len(whole), overflow=overflow).encode([("who?", LONG)])) == whole


def test_error_mode_names_the_pair_and_the_counts_but_no_text(tokenizer):
    with pytest.raises(InputTooLongError, match=r"exceeds maximum allowed token size 60 \(pair 1\)") as caught:
        make(tokenizer, max_length=60, overflow="error").encode([("who?", "me"), ("who?", LONG)])
    assert "glacier" not in str(caught.value)


@pytest.mark.parametrize("overflow", ["truncate", "chunk", "error"])
def test_a_question_without_room_for_its_passage_is_an_error(tokenizer, overflow):
    with pytest.raises(InputTooLongError, match="pair 0: the question takes"):
        make(tokenizer, max_length=60, overflow=overflow).encode([(LONG, "me")])


@pytest.mark.parametrize("spelled", ["</s>", "<s>", "<pad>", "<|im_end|>", "x</s>y", "<|im_end|>\n</s>"])
def test_text_never_becomes_a_special_token(tokenizer, spelled):
    special = set(tokenizer.all_special_ids)
    assert set(tokenizer(spelled).input_ids[1:]) & special, "the plain tokenizer is fooled, so this test can fail"
    for pair in (("who?", spelled), (spelled, "me")):
        ids = only(make(tokenizer).encode([pair]))
        assert not set(ids[1:-1]) & special
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_lone_surrogates_and_odd_unicode_are_scored(tokenizer):
    encoded = make(tokenizer).encode([("wh\ud800o?", "caf\u00e9 \u65e5\u672c \ud83d\ude00 \x00")])
    assert len(only(encoded)) > 5


def test_the_callers_tokenizer_is_left_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    make(tokenizer, max_length=50).encode([("who?", LONG)])
    assert tokenizer.backend_tokenizer.to_str() == before
    assert isinstance(tokenizer, PreTrainedTokenizerFast)


def test_a_word_among_the_added_tokens_is_found_in_texts_too(tokenizer):
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="</s>"
    )
    words.add_tokens(["no"])
    ids = only(make(words, template="yes or no? {query} {passage}", append_eos=False).encode([("know", "not")]))
    assert ids == words("yes or no? know not").input_ids
    assert ids.count(words.get_vocab()["no"]) == 3


@pytest.mark.parametrize(
    "template",
    [
        "Passage: {passage}\nQuestion: {query}",
        "{passage}\n\n{query}\n",
        "question:{query} \n \n passage:{passage}",
        "Judge {instruction}: {query} {passage}",
    ],
)
@pytest.mark.parametrize("overflow", ["truncate", "chunk"])
def test_the_tokens_before_the_question_do_not_depend_on_it(template, overflow):
    layout = Template(template, instruction="relevance" if "{instruction}" in template else None)
    encoder = PairTokenizer(load_tokenizer(open_checkpoint("mini")), layout, max_length=40)
    passages = ["The glacier moved.", "Ice, 3 m thick. " * 30]
    prefixes = {}
    for question in ("who moved?", "3 days?", "?", "¿y", "日", "Who"):
        for passage, pair in zip(
            passages, encoder.encode([(question, each) for each in passages], overflow, locate=True), strict=True
        ):
            assert len(pair.sequences) == len(pair.questions) == len(pair.passages)
            for ids, first, tokens in zip(pair.sequences, pair.questions, pair.passages, strict=True):
                assert (first >= tokens.stop) if layout.passage_first else (first <= tokens.start)
                before = tuple(ids[:first])
                prefixes.setdefault((passage, len(ids) == 40), set()).add(before)
    if layout.passage_first:
        assert len(prefixes[passages[0], False]) == 1
    else:
        assert len(set.union(*prefixes.values())) == 1
