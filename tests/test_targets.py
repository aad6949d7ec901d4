"""What a query is trained towards: each step of the table in native_retrieval/targets.py."""

import numpy as np
import pytest
from conftest import assistant, user
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from native_retrieval.arguments import DataArguments
from native_retrieval.conversations import earlier_answers
from native_retrieval.data import load_task
from native_retrieval.targets import make_targets, repel, target_texts

BRIDGE = Dataset.from_list([{"_id": "d", "title": "Old Bridge", "text": "It was opened in 1874."}])


def arguments(**fields) -> DataArguments:
    fields = {"gold_share": 0, "rewrite_gold_share": 0, "target_repulsion_threshold": 1, "rank_top_k": 2, **fields}
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


ANSWERS = ["It was opened in 1874.", "It was built by Ada Moss, an engineer."]
CORPUS = Dataset.from_list(
    [{"_id": str(i), "title": "", "text": text} for i, text in enumerate([*ANSWERS, "It was opened in 1874, in May."])]
)


def repelled(stub_teacher, queries: Dataset, **fields) -> np.ndarray:
    answers = [earlier_answers(messages) for messages in queries["messages"]]
    fields = {"rank_top_k": 3, "target_repulsion_threshold": 0.1, **fields}
    return make_targets(stub_teacher, queries, CORPUS, arguments(**fields), answers=answers).vectors


def test_targets_are_turned_away_from_earlier_answers(stub_teacher):
    rewrite = "Who built the bridge that was opened in 1874?"
    asked = [user("When was it opened?"), assistant(ANSWERS[0]), user("Who built it?")]
    other = [asked[0], assistant("It was opened in May, in 1874."), asked[2]]
    # Asked for once more; and a document that is nearer to the answer than the others are.
    queries = rows((asked, rewrite, ["1"]), (asked, rewrite, ["0"]), (other, rewrite, ["2"]))
    plain, moved = repelled(stub_teacher, queries, target_repulsion_threshold=1), repelled(stub_teacher, queries)
    said = stub_teacher.documents(CORPUS)[0]
    assert np.array_equal(moved[1:], plain[1:])
    assert plain[0] @ said > moved[0] @ said > 0 and np.allclose(np.linalg.norm(moved, axis=1), 1)
    above = repelled(stub_teacher, queries, target_repulsion_threshold=float(plain[0] @ said) + 0.01)
    assert np.array_equal(above, plain)


def test_a_target_is_not_turned_away_from_what_is_asked_for_once_more(stub_teacher):
    """Whether the right document has been an answer before, or not: it is turned away from the others alone."""
    right, other = "It was opened in 1874 by Ada Moss.", "The bridge was built of slate."
    corpus = Dataset.from_list([{"_id": str(i), "title": "", "text": text} for i, text in enumerate((right, other))])

    def conversation(*answers):
        return [*(m for answer in answers for m in (user("And?"), assistant(answer))), user("Once more, when?")]

    rewrite = "When was the bridge opened, was it 1874?"
    queries = rows(*((conversation(*answers), rewrite, ["0"]) for answers in ((), (other,), (right, other))))
    answers = [earlier_answers(messages) for messages in queries["messages"]]
    settings = arguments(target_repulsion_threshold=0.1)
    plain, moved, repeated = make_targets(stub_teacher, queries, corpus, settings, answers=answers).vectors
    assert ((moved - plain) ** 2).sum() > 0
    assert np.allclose(moved, repeated)


def test_without_a_corpus_targets_are_turned_away_all_the_same(stub_teacher):
    queries = rows(([user("When?"), assistant(ANSWERS[0]), user("Who opened it in May?")], "", []))
    targets = make_targets(
        stub_teacher, queries, None, arguments(target_repulsion_threshold=0.1), answers=[[ANSWERS[0]]]
    )
    asked, said = stub_teacher.encode(["Who opened it in May?", ANSWERS[0]])
    assert targets.vectors[0] @ said < asked @ said
    assert targets.ranking is None and targets.positives == [[]] and len(targets.documents) == 0


class CountingTeacher:
    """Counts the rows that are ranked."""

    def __init__(self, teacher):
        self.teacher, self.ranked = teacher, 0

    def __getattr__(self, name):
        return getattr(self.teacher, name)

    def ranking(self, targets, documents, k):
        self.ranked += len(targets)
        return self.teacher.ranking(targets, documents, k)


@pytest.mark.parametrize("threshold", [1, 0.1])
def test_the_ranking_is_of_the_final_targets_and_made_once(stub_teacher, beir_folder, threshold):
    task, teacher = load_task(beir_folder, "train"), CountingTeacher(stub_teacher)
    answers = [earlier_answers(messages) for messages in task.queries["messages"]]
    settings = arguments(target_repulsion_threshold=threshold, rank_top_k=8, gold_share=0.5)
    targets = make_targets(teacher, task.queries, task.corpus, settings, answers=answers)
    assert np.array_equal(targets.ranking, stub_teacher.ranking(targets.vectors, targets.documents, 8))
    plain = make_targets(stub_teacher, task.queries, task.corpus, arguments(rank_top_k=8, gold_share=0.5)).vectors
    moved = (plain != targets.vectors).any(1).sum()
    assert (moved > 0) == (threshold < 1)
    assert teacher.ranked == len(task.queries) + moved, "a query whose target stays is ranked once"


@given(st.integers(1, 9), st.floats(-1, 1), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_only_what_is_above_the_threshold_turns_a_target_away(count, threshold, seed):
    rng = np.random.default_rng(seed)
    target, *others = rng.normal(size=(count + 1, 6))
    target, others = target / np.linalg.norm(target), np.array([o / np.linalg.norm(o) for o in others])
    turned = repel(target, others, threshold)
    assert np.linalg.norm(turned) == pytest.approx(1, abs=1e-5)
    if (others @ target <= threshold).all():
        assert np.allclose(turned, target, atol=1e-6)
    assert np.allclose(repel(target, others[::-1], threshold), turned, atol=1e-5)
