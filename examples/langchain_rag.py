"""Answer questions from documents with citations, or say that no document answers them.

pip install '.[local,langchain,eval]'

BM25 finds passages, MistralRerank keeps those above a threshold, and a chat model writes the answer. The threshold is
the lowest probability at which 90% of the kept passages answered KNOWN, questions with known answers.
"""

from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableBranch, RunnableLambda, RunnablePassthrough

from langchain_mistral_rerank import MistralRerank
from mistral_rerank.calibration.fit import pick_threshold
from mistral_rerank.evaluation.first_stage import BM25

TEXTS = {
    "leave": "Employees have 28 days of paid holiday a year. Up to five unused days move to the next year.",
    "sick": "If you are ill, call your manager before nine. A doctor's note is needed from the third day on.",
    "remote": "Employees may work from home on two days a week, after their first three months.",
    "travel": "Trains are booked in second class. Receipts must be handed in within 30 days of the journey.",
    "laptop": "A lost or stolen laptop must be reported to the IT desk within the hour, so that it can be locked.",
    "password": "Passwords need at least 14 characters and are changed only after a leak.",
    "parental": "Parents may take up to 14 weeks of paid leave in the first year after a birth.",
    "training": "Each employee has 1,500 euros a year for courses and conferences.",
}
KNOWN = {
    "How many days of holiday do I get?": "leave",
    "When do I need a doctor's note?": "sick",
    "Can I work from home?": "remote",
    "How long must a password be?": "password",
    "Who pays for the canteen?": None,
    "Is there a parking space for visitors?": None,
}
"""Questions with the document that answers them; None if no document does."""

NOT_ANSWERED = "The documents do not answer this question."
PROMPT = ChatPromptTemplate.from_template(
    "Answer the question from the passages. Cite each passage that you use by its number.\n\n"
    "{context}\n\nQuestion: {query}"
)


def threshold(reranker: MistralRerank, *, precision: float = 0.9) -> float:
    """Find the lowest probability at which that share of the kept passages answers a question of KNOWN."""
    pairs = [(question, name) for question in KNOWN for name in TEXTS]
    scores = reranker.use().score_pairs([(question, TEXTS[name]) for question, name in pairs])
    labels = [int(KNOWN[question] == name) for question, name in pairs]
    return pick_threshold([score.probability for score in scores], labels, precision=precision)


def quote(prompt: PromptValue) -> AIMessage:
    """Quote the first passage: replace this function with a chat model, such as ChatOpenAI()."""
    first = next(line for line in prompt.to_string().splitlines() if line.startswith("[1] "))
    return AIMessage(f"{first.removeprefix('[1] ')} [1]")


def rag_chain(reranker: MistralRerank) -> Runnable[dict[str, Any], dict[str, Any]]:
    """Make a chain from {"query"} to {"query", "documents", "context", "answer"}."""
    bm25 = BM25(TEXTS)

    def search(request: dict[str, Any]) -> list[Document]:  # replace with your retriever
        (ranking,) = bm25.search([request["query"]], k=8)
        return [Document(TEXTS[name], id=name) for name, _ in ranking]

    def numbered(request: dict[str, Any]) -> str:
        return "\n".join(f"[{n}] {document.page_content}" for n, document in enumerate(request["documents"], start=1))

    answer = PROMPT | RunnableLambda(quote) | (lambda message: message.text)
    return (
        RunnablePassthrough.assign(documents=search)
        | RunnablePassthrough.assign(documents=reranker.as_runnable())
        | RunnablePassthrough.assign(context=numbered)
        | RunnablePassthrough.assign(
            answer=RunnableBranch((lambda request: not request["documents"], lambda _: NOT_ANSWERED), answer)
        )
    )


def main() -> None:
    """Answer three questions that are not in KNOWN; no document answers the last one."""
    least = threshold(MistralRerank())
    chain = rag_chain(MistralRerank(top_n=3, min_score=least))
    print(f"threshold {least:.2f}")
    for query in (
        "My laptop was stolen. What must I do?",
        "How much money do I get for courses?",
        "Which dentist does the company recommend?",
    ):
        result = chain.invoke({"query": query})
        print(f"\n{query}\n  {result['answer']}")
        for number, document in enumerate(result["documents"], start=1):
            print(f"  [{number}] {document.id}, probability {document.metadata['relevance_score']:.2f}")


if __name__ == "__main__":
    main()
