"""The page that shows what a calibration does."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from mistral_rerank.evaluation.pages import page, reliability_section, section
from mistral_rerank.files import replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mistral_rerank.local.checkpoint import Calibration
    from mistral_rerank.training.calibration import Outcome


def write_report(found: Sequence[Outcome], calibration: Calibration, file: Path) -> None:
    """Write an HTML page of the reliability before and after."""
    lead = f'<p class="lead">probability = {escape(str(calibration))}; threshold: '
    lead += f"{escape(calibration.described_threshold)}</p>"
    parts = [
        section(
            of.name,
            f"<p>{escape(of.at_threshold)}</p>" + reliability_section({"before": of.before, "after": of.after}),
        )
        for of in found
    ]
    with replacing(file) as out:
        out.write(page("Calibration", lead + "".join(parts)))
