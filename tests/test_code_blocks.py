"""The Python blocks of the docs run: extracted from their pages, each page as one program, with mini where it ranks.

A comment `<!-- not run: REASON -->` above a block leaves it out. The lines of a `text` block are what the block before
it prints. Of a `diff` block the added lines run. Shell commands are in `test_docs.py`.
"""

import re
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from langchain_core.documents import Document

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
PASSAGES = ["Warm water freezes more slowly than cold water.", "Ice is less dense than water, so it floats."]
"""What pages of the reference take as known."""


def blocks(page):
    """The blocks of a page that run or are compared with what is printed: (language, code)."""
    matches = [match.groupdict() for match in BLOCK.finditer(page.read_text("utf-8"))]
    return [(block["language"], block["code"]) for block in matches if block["reason"] is None]


PAGES = [
    page for page in sorted(DOCS.glob("**/*.md")) if any(language in ("python", "diff") for language, _ in blocks(page))
]


def words(text):
    """The words of an output, and its probabilities as numbers, which other hardware may round otherwise."""
    return [float(word) if re.fullmatch(r"0\.\d+", word) else word for word in text.split()]


def close_to(expected):
    return [pytest.approx(word, abs=0.05) if isinstance(word, float) else word for word in words(expected)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, tmp_path):
    names = {"query": "Why does ice float?", "passages": PASSAGES, "documents": [Document(text) for text in PASSAGES]}
    printed = ""
    with chdir(tmp_path):
        for number, (language, code) in enumerate(blocks(page), 1):
            if language == "text":
                assert words(printed) == close_to(code), f"block {number}"
            if language == "diff":
                code = "".join(line[1:] for line in code.splitlines(keepends=True) if line.startswith("+"))
            if language in ("python", "diff"):
                with redirect_stdout(StringIO()) as output:
                    exec(compile(code, f"{page.name}, block {number}", "exec"), names)
                printed = output.getvalue()
