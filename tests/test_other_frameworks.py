"""The code of docs/how-to/other-frameworks.md, run in the frameworks, which `make test-clients` installs."""

import re
from pathlib import Path

import pytest
from support import LengthReranker

from mistral_rerank import RerankSettings

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "other-frameworks.md"
REASON = "not installed: make test-clients"


@pytest.fixture(autouse=True)
def _a_stand_in_is_opened(monkeypatch):
    monkeypatch.setattr(RerankSettings, "open", lambda _: LengthReranker())


def run_code_of(section: str, **names: object) -> dict[str, object]:
    """Run the code of a section of the page; give its names."""
    (code,) = re.findall(rf"^## {section}\n.*?^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    exec(code, names)
    return names


def test_the_haystack_component_ranks_in_a_pipeline():
    haystack = pytest.importorskip("haystack", reason=REASON)
    pipeline = haystack.Pipeline()
    pipeline.add_component("reranker", run_code_of("Haystack")["Reranker"](top_k=2))
    documents = [haystack.Document(content=text) for text in ("bb", "a", "dddd")]
    ranked = pipeline.run({"reranker": {"query": "q", "documents": documents}})["reranker"]["documents"]
    assert [(each.content, each.id) for each in ranked] == [(each.content, each.id) for each in documents[::-2]]
    assert [each.score for each in ranked] == pytest.approx([0.982, 0.881], abs=1e-3)


def test_the_dspy_tool_ranks_for_an_agent():
    dspy = pytest.importorskip("dspy", reason=REASON)
    search = run_code_of("DSPy", retrieve=lambda query, k: ["bb", "a", "dddd"])["search"]
    steps = [
        {"next_thought": "search", "next_tool_name": "search", "next_tool_args": {"query": "q"}},
        {"next_thought": "done", "next_tool_name": "finish", "next_tool_args": {}},
        {"reasoning": "it is the first", "answer": "dddd"},
    ]
    with dspy.context(lm=dspy.utils.DummyLM(steps)):
        prediction = dspy.ReAct("question -> answer", tools=[search])(question="q")
    assert prediction.trajectory["observation_0"] == ["dddd", "bb", "a"]
