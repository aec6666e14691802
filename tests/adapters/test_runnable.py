"""`as_runnable()`: what it takes, and what it leaves in traces."""

from uuid import uuid4

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda

from langchain_mistral_rerank import MistralRerank
from mistral_rerank import InvalidInputError

REQUEST = {"query": "q", "documents": [Document(page_content="a"), Document(page_content="bb")]}


class Runs(BaseCallbackHandler):
    def __init__(self):
        self.started, self.ended = [], []

    def on_chain_start(self, serialized, inputs, *, run_id, parent_run_id=None, tags=None, metadata=None, **rest):
        self.started.append((rest.get("name"), run_id, parent_run_id, tags, metadata, inputs))

    def on_chain_end(self, outputs, *, run_id, **_):
        self.ended.append(run_id)

    def on_chain_error(self, error, *, run_id, **_):
        self.ended.append(run_id)


@pytest.fixture
def runnable(length_reranker):
    return MistralRerank(reranker=length_reranker, top_n=1).as_runnable()


async def test_a_call_is_one_run_with_the_name_id_tags_and_metadata_of_its_config(runnable):
    for way in ("sync", "async"):
        runs, run_id = Runs(), uuid4()
        config = {"callbacks": [runs], "tags": ["t"], "metadata": {"m": 1}, "run_name": "mine", "run_id": run_id}
        reranked = runnable.invoke(REQUEST, config) if way == "sync" else await runnable.ainvoke(REQUEST, config)
        assert [document.page_content for document in reranked] == ["bb"]
        ((name, seen, parent, tags, metadata, inputs),) = runs.started
        assert (name, seen, parent, tags) == ("mine", run_id, None, ["t"])
        assert metadata["m"] == 1
        assert (inputs["query"], inputs["model"], inputs["top_n"]) == ("q", "length", 1)
        assert runs.ended == [run_id]


async def test_in_a_chain_its_run_is_a_child_of_the_chains(runnable):
    chain = RunnableLambda(lambda request: request) | runnable
    for way in ("sync", "async"):
        runs = Runs()
        config = {"callbacks": [runs]}
        _ = chain.invoke(REQUEST, config) if way == "sync" else await chain.ainvoke(REQUEST, config)
        names = [run[0] for run in runs.started]
        assert names == ["RunnableSequence", "RunnableLambda", "MistralRerank"]
        assert runs.started[2][2] == runs.started[0][1]
        assert len(runs.ended) == 3


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"query": "q"}, r"lacks documents \(its keys: query\)"),
        ({"question": "q", "context": []}, r"lacks query and documents \(its keys: question, context\)"),
        ({}, r"lacks query and documents \(its keys: none\)"),
        ("q", "got a str"),
    ],
)
async def test_missing_keys_are_named(runnable, request_, said):
    with pytest.raises(InvalidInputError, match=said):
        runnable.invoke(request_)
    with pytest.raises(InvalidInputError, match=said):
        await runnable.ainvoke(request_)


def test_its_input_schema_names_query_and_documents(runnable):
    schema = runnable.get_input_jsonschema()
    request = schema["$defs"]["RerankRequest"]
    assert schema["$ref"] == "#/$defs/RerankRequest"
    assert set(request["required"]) == {"query", "documents"}
    assert request["properties"]["query"]["type"] == "string"
    assert request["properties"]["documents"]["type"] == "array"


def test_other_keys_of_the_input_are_ignored(runnable):
    assert [document.page_content for document in runnable.invoke(REQUEST | {"history": []})] == ["bb"]
