"""What a query is trained towards: each step of the table in native_retrieval/targets.py."""

import numpy as np
import pytest
from conftest import user
from datasets import Dataset

from native_retrieval.arguments import DataArguments
from native_retrieval.data import load_task
from native_retrieval.targets import make_targets, target_texts

BRIDGE = Dataset.from_list([{"_id": "d", "title": "Old Bridge", "text": "It was opened in 1874."}])


def arguments(**fields) -> DataArguments:
    fields = {"gold_share": 0, "rewrite_gold_share": 0, "rank_top_k": 2, **fields}
    return DataArguments(**fields)


def rows(*queries: tuple[list[dict], str, list[str]]) -> Dataset:
    return Dataset.from_list([{"messages": m, "rewrite": rewrite, "gold": gold} for m, rewrite, gold in queries])


def test_the_text_of_a_target_is_the_first_that_exists(stub_teacher):
    asked, named = "When was it opened?", "When was the old bridge opened?"
    queries = rows(
        ([user(asked)], "", ["d"]), ([user(named)], "", ["d"]), ([user(asked)], "When was the bridge opened?", ["d"])
    )
    texts = ["Old Bridge: When was it opened?", named, "When was the bridge opened?"]
    assert np.allclose(make_targets(stub_teacher, queries, BRIDGE, arguments()).vectors, stub_teacher.encode(texts))
    assert np.allclose(
        make_targets(stub_teacher, queries, None, arguments()).vectors, stub_teacher.encode([asked, named, texts[2]])
    )
    written = ["old bridge opening", "", "ignored"]
    targets = make_targets(stub_teacher, queries, BRIDGE, arguments(), written=written)
    assert np.allclose(targets.vectors, stub_teacher.encode([f"old bridge opening {texts[0]}", named, texts[2]]))
    assert target_texts([None, "r"], ["a", "b"]) == ["a", "r"]


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_a_target_moves_to_its_first_document_by_its_share(stub_teacher, share):
    question = "When was the old bridge opened?"
    queries = rows(([user(question)], "", ["d"]), ([user(question)], question, ["d"]))
    targets = make_targets(stub_teacher, queries, BRIDGE, arguments(gold_share=share, rewrite_gold_share=share / 2))
    asked, document = stub_teacher.encode([question])[0], stub_teacher.documents(BRIDGE)[0]
    for vector, moved in zip(targets.vectors, (share, share / 2), strict=True):
        wanted = (1 - moved) * asked + moved * document
        assert np.allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-6)
    assert targets.positives == [[0], [0]] and targets.vectors.dtype == np.float32


class CountingTeacher:
    """Counts the rows that are ranked."""

    def __init__(self, teacher):
        self.teacher, self.ranked = teacher, 0

    def __getattr__(self, name):
        return getattr(self.teacher, name)

    def ranking(self, targets, documents, k):
        self.ranked += len(targets)
        return self.teacher.ranking(targets, documents, k)


def test_the_ranking_is_of_the_final_targets_and_made_once(stub_teacher, beir_folder):
    task, teacher = load_task(beir_folder, "train"), CountingTeacher(stub_teacher)
    targets = make_targets(teacher, task.queries, task.corpus, arguments(rank_top_k=8, gold_share=0.5))
    assert np.array_equal(targets.ranking, stub_teacher.ranking(targets.vectors, targets.documents, 8))
    assert teacher.ranked == len(task.queries)


def test_without_a_corpus_a_text_is_its_own_target(stub_teacher):
    targets = make_targets(stub_teacher, rows(([user("Who opened it in May?")], "", [])), None, arguments(gold_share=1))
    assert np.allclose(targets.vectors, stub_teacher.encode(["Who opened it in May?"]))
    assert targets.ranking is None and targets.positives == [[]] and len(targets.documents) == 0
