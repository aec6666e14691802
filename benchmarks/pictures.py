"""Make the pictures of the README: the demo in a terminal, as SVG, and the server's page, as PNG.

    python benchmarks/pictures.py [--out docs/images]

Needs the extras local and serve, playwright, and Chromium or Chrome on the PATH.
"""

import argparse
import io
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from playwright.sync_api import sync_playwright
from rich.console import CONSOLE_SVG_FORMAT

from mistral_rerank import Reranker, open_reranker
from mistral_rerank.cli.demo import print_demo
from mistral_rerank.cli.terminal import Terminal
from mistral_rerank.server.app import create_app

COLUMNS = 104
PAGE = {"width": 1100, "height": 940}


def terminal_svg(reranker: Reranker) -> str:
    """Give the output of `mistral-rerank demo` as an SVG that loads no font from the network."""
    console = Terminal(record=True, force_terminal=True, color_system="truecolor", width=COLUMNS, file=io.StringIO())
    console.print("$ mistral-rerank demo")
    print_demo(reranker, console)
    console.print()  # else the last line is cut
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    svg = console.export_svg(title="mistral-rerank demo", code_format=template, unique_id="demo")
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


@contextmanager
def served(reranker: Reranker) -> Iterator[str]:
    """Serve on a free local port; yields the base URL."""
    server = uvicorn.Server(uvicorn.Config(create_app(reranker), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def page_png(url: str) -> bytes:
    """Give a screenshot of the page after its sample was reranked."""
    browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=next(filter(None, browsers), None))
        page = browser.new_page(viewport=PAGE, color_scheme="light", reduced_motion="reduce")
        page.goto(url)
        page.get_by_role("button", name="Load the sample").click()
        page.get_by_role("button", name="Rerank").click()
        page.locator("#ranking mark").first.wait_for(timeout=120_000)
        picture = page.screenshot()
        browser.close()
    return picture


def main() -> None:
    """Write demo.svg and page.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="the folder to write to")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with open_reranker("mini") as reranker:
        (options.out / "demo.svg").write_text(terminal_svg(reranker), "utf-8")
        with served(reranker) as url:
            (options.out / "page.png").write_bytes(page_png(url))
    for file in ("demo.svg", "page.png"):
        print(f"{options.out / file}: {(options.out / file).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
