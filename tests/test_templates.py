import pytest

from mistral_rerank import SettingsError
from mistral_rerank.templates import Template


def test_the_default_template_is_nvidias():
    text = Template().format("who?", "me")
    assert text.text == "question:who? \n \n passage:me"
    assert text.text[text.passage_start : text.passage_end] == "me"


def test_braces_and_placeholders_in_texts_are_text():
    text = Template("Q {query} P {passage}!").format("{passage}", "{query} {0}")
    assert text.text == "Q {passage} P {query} {0}!"
    assert text.text[text.passage_start : text.passage_end] == "{query} {0}"


def test_the_passage_may_come_first():
    text = Template("P {passage}\nQ {query}").format("who {passage}?", "me")
    assert text.text == "P me\nQ who {passage}?"
    assert text.text[text.passage_start : text.passage_end] == "me"


@pytest.mark.parametrize("template", ["{query}", "{passage}", "{query} {query} {passage}", ""])
def test_a_template_without_both_placeholders_once_is_refused(template):
    with pytest.raises(SettingsError, match="must hold"):
        Template(template)
