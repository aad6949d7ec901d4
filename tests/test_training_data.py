"""Which queries, how often, how augmented: what an epoch is made of, before anything costly is computed."""

import dataclasses
import random
import shutil
import tracemalloc

import pytest
from datasets import Dataset

from native_retrieval.arguments import DataArguments
from native_retrieval.augmentation import OtherConversations, others_by_name
from native_retrieval.data import load_task
from native_retrieval.training_data import Data, augmented, load_data, training_info, training_sets, with_topic_shifts


def arguments(beir_folder, **fields) -> DataArguments:
    return DataArguments(**{"train_data": [str(beir_folder)], "dev_data": [str(beir_folder)], **fields})


def test_what_is_tested_on_is_not_trained_on(beir_folder, capsys):
    """Another collection may be cut from the same conversations: here it has all of them."""
    other = shutil.copytree(beir_folder, beir_folder.parent / "other")
    shutil.rmtree(other / "qrels")
    data = load_data(arguments(beir_folder, train_data=[str(other), str(beir_folder)]))
    assert [len(queries) for queries in data.train] == [12, 12]
    said = "other: left out 12 training queries whose conversation is in the dev or test data"
    assert said in capsys.readouterr().out
    seen = {query for queries in data.train for query in queries.ids}
    assert seen.isdisjoint(data.dev[0].ids) and seen.isdisjoint(load_task(beir_folder, "test").queries["_id"])
    test = load_data(arguments(beir_folder, train_data=[f"{beir_folder}:test"])).train[0]
    assert len(test) == 6, "who names the test split trains on it"


def test_the_same_data_set_may_be_named_twice(beir_folder):
    data = load_data(arguments(beir_folder, train_data=[str(beir_folder)] * 2, train_weights=[1.0, 0.5]))
    assert [len(queries) for queries in data.train] == [12, 6]


def num_examples(data: Data, settings: DataArguments) -> int:
    return sum(len(queries) * queries.passes for queries in training_sets(data, settings))


@pytest.mark.parametrize("shifts", [0, 1])
def test_data_sets_are_seen_as_often_as_their_weights_say(beir_folder, shifts):
    fields = {"augmentation_share": 0, "plain_text_share": 0, "topic_shift_share": shifts}
    counts = {}
    for weight in (0.5, 1.0, 3.0):
        settings = arguments(beir_folder, train_weights=[weight], **fields)
        counts[weight] = num_examples(load_data(settings), settings)
    once = 12 * (1 + shifts)
    assert counts == {0.5: once / 2, 1.0: once, 3.0: 3 * once}


def test_an_epoch_is_made_of_what_the_table_says(beir_folder, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"Sentence number {i} about rivers.\n" for i in range(50)))
    fields = {"augmentation_share": 0.5, "topic_shift_share": 0.5, "plain_text_share": 0.5, "train_weights": [2.0]}
    settings = arguments(beir_folder, query_modes=["context", "generated"], plain_text=[str(texts)], **fields)
    data = load_data(settings)
    sets = training_sets(data, settings)
    assert [(queries.name, queries.mode, len(queries), queries.passes) for queries in sets[:-2]] == [
        ("beir", "context", 12, 2),
        ("beir", "generated", 12, 2),
        *[("beir, augmented", "context", 6, 1), ("beir, after a topic shift", "context", 6, 1)] * 2,
    ]
    conversations = sum(len(queries) * queries.passes for queries in sets[:-2])
    plain = sum(len(queries) for queries in sets[-2:])
    assert plain == pytest.approx(conversations / 2, abs=2) and all(queries.plain for queries in sets[-2:])
    assert all(row["rewrite"] == row["messages"][0]["content"] for row in sets[-1].rows)
    # Documents of the two plain sets and of the data set can be told apart.
    assert sets[-2].id_offset == len(data.train[0].corpus) + 12 and sets[-1].id_offset > sets[-2].id_offset


def test_questions_are_plain_texts_on_request(beir_folder):
    questions = load_data(arguments(beir_folder)).questions
    assert "When was Arnwick Lighthouse founded?" in questions and "Who founded Arnwick Lighthouse?" in questions
    assert not any("Inver Harbour" in question for question in questions), "of the test split"
    assert load_data(arguments(beir_folder, turns_as_text=False)).questions == []


def test_dev_sets_bring_their_grades_along(beir_folder):
    path = beir_folder / "qrels" / "dev.tsv"
    path.write_text(path.read_text() + "q4_1\td4_2\t3\nq4_1\td4_3\t0\n")
    dev = load_data(arguments(beir_folder)).dev[0]
    assert dev.qrels["q4_1"] == {"d4_1": 1, "d4_2": 3, "d4_3": 0}


# -- augmentation and topic shifts -------------------------------------------------------------------------------------


def conversations(count: int) -> Dataset:
    rows = []
    for thing in (f"thing {i}" for i in range(count)):
        first = [{"role": "user", "content": f"What is {thing}?"}]
        then = [
            *first,
            {"role": "assistant", "content": f"{thing}: made of sand."},
            {"role": "user", "content": "Why?"},
        ]
        rows += [{"conv": thing, "messages": messages, "rewrite": ""} for messages in (first, then)]
    return Dataset.from_list(rows)


def shifted(rows: Dataset, share: float, number: int = 0):
    some, changed = with_topic_shifts(rows, share, number)
    return some, list(changed)


def test_distractor_turns_are_of_other_conversations_and_the_same_for_all_queries_of_one():
    queries = conversations(30)
    some, seen = shifted(queries, 0.5)
    assert len(set(some["conv"])) == 15 and len(some) == len(seen) == 30
    own = list(zip(some["conv"], some["messages"], strict=True))
    counts = set()
    for (thing, messages), (_, later), before, after in zip(own[::2], own[1::2], seen[::2], seen[1::2], strict=True):
        assert before[-1:] == messages and after[-3:] == later
        assert after[: len(before)] == before, "not after the same turns: a pass of the backbone for each"
        others = before[:-1]
        counts.add(sum(message["role"] == "user" for message in others))
        assert not any(message["content"].startswith((f"What is {thing}?", f"{thing}:")) for message in others)
    assert min(counts) >= 1 and max(counts) <= 20 and len(counts) > 3
    assert shifted(queries, 0.5)[1] == seen
    assert shifted(queries, 0.5, number=1)[1] != seen
    assert shifted(queries, 0)[1] == []
    alone = queries.filter(lambda row: row["conv"] == "thing 0")
    assert shifted(alone, 1.0)[1] == alone["messages"][:], "there are no others"


def test_the_memory_of_topic_shifts_is_linear():
    """Each of a thousand conversations once had a list of the thousand others."""

    def peak(count: int) -> int:
        queries = conversations(count)
        tracemalloc.start()
        _, changed = with_topic_shifts(queries, 1.0)
        for _ in changed:
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(50)  # imports and caches
    assert peak(1000) < 3 * peak(250)


def test_a_view_of_other_conversations_is_a_list_without_them():
    names = random.Random(0).choices("abc", k=40)
    conversations = [[{"role": "user", "content": str(i)}] for i in range(40)]
    others = others_by_name(names, conversations)
    for name in "abcd":
        wanted = [messages for own, messages in zip(names, conversations, strict=True) if own != name]
        view = others(name)
        assert isinstance(view, OtherConversations) and len(view) == len(wanted) and list(view) == wanted
        assert [view[i] for i in range(len(view))] == wanted
        assert [random.Random(s).choice(view) for s in range(9)] == [random.Random(s).choice(wanted) for s in range(9)]


def test_each_pass_augments_other_queries():
    rows = [{"messages": [{"role": "user", "content": f"What is thing {i}?"}], "rewrite": ""} for i in range(10)]
    passes = [augmented(Dataset.from_list(rows), 0.3, None, number) for number in range(3)]
    assert [len(some) for some, _ in passes] == [3] * 3
    assert len({messages[0]["content"] for some, _ in passes for messages in some["messages"]}) == 9
    assert list(passes[1][1]) == list(augmented(Dataset.from_list(rows), 0.3, None, 1)[1])


def test_nothing_is_computed_for_what_is_only_counted(beir_folder, monkeypatch):
    monkeypatch.setattr("native_retrieval.training_data.augment", lambda *a: pytest.fail("augmented"))
    monkeypatch.setattr("native_retrieval.training_data.shift_topic", lambda *a: pytest.fail("shifted"))
    settings = arguments(beir_folder)
    assert num_examples(load_data(settings), settings) > 12


def test_no_token_is_published(beir_folder, tmp_path):
    from native_retrieval.arguments import parse

    words = ["--hub_token", "hf_a1", "--hub-token=hf_b2", "--output_dir", str(tmp_path / "a b"), "--use_cpu"]
    model, data, _, training = parse(words)
    info = training_info(words, model, data, training, Data([], [], [], []))
    assert "hf_" not in info["command"] and f"'{tmp_path / 'a b'}'" in info["command"]
    assert dataclasses.asdict(data)["license"] == info["license"]
