"""Groups of `examples/contrast`: the questions of a scene with the passages of two similar scenes."""

import random
from pathlib import Path

from bm25 import best_rows, index_of
from questions import Group

from mistral_rerank.evaluation.datasets import load_beir

CONTRAST = Path(__file__).parent.parent.parent / "contrast"


def contrast_groups(turn: int, seed: int) -> list[Group]:
    """Build a group of each training scene; each turn and seed draws other second scenes."""
    draw = random.Random(f"contrast {seed} {turn}")
    texts = load_beir(CONTRAST, split="train")
    scenes: dict[str, tuple[list[str], list[str]]] = {}
    for key in texts.queries:
        if texts.positives(key):
            scenes.setdefault(key.rsplit("-", 1)[0], ([], []))[0].append(key)
    for key in texts.corpus:
        if (scene := key.rsplit("-", 1)[0]) in scenes:
            scenes[scene][1].append(key)
    names = list(scenes)
    scene_texts = [
        [*(texts.queries[key] for key in scenes[name][0]), *(texts.corpus[key] for key in scenes[name][1])]
        for name in names
    ]
    whole = [" ".join(parts) for parts in scene_texts]
    alike = best_rows(index_of(whole), whole, 6)
    groups = []
    for number, name in enumerate(names):
        other = names[draw.choice([row for row in alike[number] if row != number][:4])]
        questions, passages = scenes[name][0], scenes[name][1] + scenes[other][1]
        draw.shuffle(passages)
        groups.append(
            Group(
                [texts.queries[question] for question in questions],
                [texts.corpus[passage] for passage in passages],
                [[float(passage in texts.positives(question)) for passage in passages] for question in questions],
            )
        )
    return groups
