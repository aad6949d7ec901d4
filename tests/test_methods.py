"""The methods of the comparison, with a tiny model and a stub in the teacher's place."""

import numpy as np
import pytest
from datasets import Dataset

from native_retrieval.conversations import full_history, last_question, turns
from native_retrieval.data import Task, load_task
from native_retrieval.index import DocumentIndex
from native_retrieval.methods import METHODS, Comparison, fused


@pytest.fixture
def task(beir_folder, tmp_path, monkeypatch) -> Task:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return load_task(beir_folder, "test")


@pytest.fixture
def index(task, stub_teacher, tmp_path) -> DocumentIndex:
    vectors = stub_teacher.documents(task.corpus)
    return DocumentIndex.build(task.corpus, vectors, stub_teacher.fingerprint, "stub-teacher", tmp_path / "index")


@pytest.fixture
def comparison(tiny_model, stub_teacher, index, task) -> Comparison:
    return Comparison(tiny_model, stub_teacher, index, task.queries, batch_size=4)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_every_method_returns_documents_for_every_query(comparison, task, index):
    runs = comparison.runs()
    assert list(runs) == list(METHODS)
    for name, run in runs.items():
        assert list(run) == list(task.queries["_id"]), name
        for scores in run.values():
            assert set(scores) <= set(index.ids)
            if not name.startswith("bm25"):  # which finds only what shares a word with the query
                assert len(scores) == len(index)


def test_native_vectors_are_those_of_embed_query(comparison, tiny_model):
    expected = tiny_model.embed_query(comparison.messages, mode="context", batch_size=4).numpy()
    np.testing.assert_array_equal(comparison.methods["native-context"].vectors(), expected)
    expected = tiny_model.embed_query(comparison.messages, mode="generated", batch_size=4).numpy()
    np.testing.assert_array_equal(comparison.methods["native-generated"].vectors(), expected)


def test_native_context_alone_writes_no_query(tiny_model, stub_teacher, index, task, monkeypatch):
    comparison = Comparison(tiny_model, stub_teacher, index, task.queries, ["native-context"], batch_size=4)
    monkeypatch.setattr(tiny_model, "write_queries", pytest.fail)
    run = comparison.runs()["native-context"]
    vectors = tiny_model.embed_query(comparison.messages, mode="context", batch_size=4).numpy()
    scores, rows = index.search(vectors, 1)
    assert [max(found, key=found.get) for found in run.values()] == [index.ids[row] for row in rows[:, 0]]


def test_queries_are_written_once_for_all_methods(comparison, tiny_model, monkeypatch):
    calls = []
    write = tiny_model.write_queries
    monkeypatch.setattr(tiny_model, "write_queries", lambda cache: calls.append(0) or write(cache))
    comparison.runs()
    assert len(calls) == 2  # 6 queries in batches of 4


def test_each_query_alone_gives_the_vector_of_the_batch(comparison, stub_teacher):
    comparison.runs()
    for name, method in comparison.methods.items():
        for i in range(len(comparison.query_ids)):
            alone = method.query(i, comparison.prefill(i) if method.reads_prompt else None)
            if name.startswith("bm25"):
                assert alone.shape == (len(comparison.index),)
            elif name in ("rank-fusion", "hybrid"):
                for part, seen in zip(method.parts, alone, strict=True):
                    wanted = comparison.methods[part].query(i, comparison.prefill(i))
                    np.testing.assert_allclose(seen, wanted, atol=1e-5)
            elif name.startswith("native") or name == "teacher-mean":
                np.testing.assert_allclose(alone, method.vectors()[i], atol=1e-5)
            else:
                np.testing.assert_allclose(alone, stub_teacher.encode(method.texts)[i], atol=1e-6)


def test_latencies(comparison):
    times = comparison.latencies(4)
    assert list(times) == list(METHODS)
    assert all(len(values) == 4 and min(values) > 0 for values in times.values())
    assert all(len(values) == 6 for values in comparison.latencies(100).values())
    assert comparison.latencies(0) == dict.fromkeys(METHODS)


def test_the_clock_does_not_run_during_the_prefill(tiny_model, stub_teacher, index, task, monkeypatch):
    comparison = Comparison(tiny_model, stub_teacher, index, task.queries, ["native-context"])
    clock = [0.0]
    prefill = tiny_model.prefill

    def slow_prefill(*args, **kwargs):
        clock[0] += 100.0
        return prefill(*args, **kwargs)

    monkeypatch.setattr("native_retrieval.methods.perf_counter", lambda: clock[0])
    monkeypatch.setattr(tiny_model, "prefill", slow_prefill)
    assert comparison.latencies(3) == {"native-context": [0.0, 0.0, 0.0]}
    assert clock[0] > 0


def test_written_queries_lose_quotes_and_are_never_empty(comparison, tiny_model):
    tokenizer = tiny_model.tokenizer
    assert comparison.read_query(0, tokenizer(' "the old bridge"\n')["input_ids"]) == "the old bridge"
    for empty in ("", ' "" '):
        assert comparison.read_query(0, tokenizer(empty)["input_ids"]) == comparison.last_questions[0]


def test_the_question_is_appended_to_the_written_query(comparison):
    plain = comparison.methods["generate-then-encode"].texts
    longer = comparison.methods["generate-then-encode+question"].texts
    assert plain == comparison.written.queries
    assert longer == [f"{query} {question}" for query, question in zip(plain, comparison.last_questions, strict=True)]


def test_ranks_are_fused_and_not_scores():
    runs = [{"q": {"a": 9.0, "b": 1.0, "c": 0.5}}, {"q": {"b": 0.1, "d": 0.2}}]
    wanted = {"a": 1 / 61, "b": 1 / 62 + 1 / 62, "c": 1 / 63, "d": 1 / 61}
    assert fused(runs) == {"q": pytest.approx(wanted)}
    assert fused(runs[:1]) == {"q": pytest.approx({"a": 1 / 61, "b": 1 / 62, "c": 1 / 63})}


def test_methods_that_are_made_of_others(comparison, stub_teacher, task, index):
    runs = comparison.runs()
    for name, parts in (
        ("rank-fusion", ("last-question", "full-history")),
        ("hybrid", ("native-context", "bm25-selected-words")),
    ):
        assert runs[name] == fused([runs[part] for part in parts])
    vectors = comparison.methods["teacher-mean"].vectors()
    texts = [comparison.methods[name].texts for name in ("last-question", "full-history")]
    wanted = sum(map(stub_teacher.encode, texts))
    np.testing.assert_allclose(vectors, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)
    # Alone, without the rows of their parts.
    few = Comparison(comparison.model, stub_teacher, index, task.queries, ["rank-fusion", "teacher-mean"], 4)
    assert few.runs() == {name: runs[name] for name in ("rank-fusion", "teacher-mean")}


def test_selected_words_are_those_of_extract_query(comparison, tiny_model, stub_teacher):
    texts = tiny_model.extract_query(comparison.messages)
    assert comparison.extracted == texts != comparison.last_questions
    assert comparison.methods["selected-words"].texts == comparison.methods["bm25-selected-words"].texts == texts
    np.testing.assert_allclose(comparison.methods["selected-words"].vectors(), stub_teacher.encode(texts), atol=1e-6)


def test_last_question_is_the_users_whoever_spoke_last():
    messages = [user("Who?"), assistant("She."), user("When? "), {"role": "tool", "content": "1902"}, assistant("In")]
    assert last_question(messages) == "When?"
    assert last_question([user("Who?"), user(" "), assistant("")]) == "Who?"
    assert last_question([assistant("Good morning."), {"role": "tool", "content": "1902"}]) == "1902"


def test_turns_are_what_was_said():
    messages = [{"role": "system", "content": "Be kind."}, user(" Who? "), assistant(""), user("When?")]
    assert turns(messages) == ["Who?", "When?"]


def test_full_history_drops_the_oldest_turns_whole():
    messages = [user("a b c"), assistant("d e"), user("f g")]

    def words(text: str) -> int:
        return len(text.split())

    assert full_history(messages, words, 7) == "a b c\nd e\nf g"
    assert full_history(messages, words, 6) == "d e\nf g"
    assert full_history(messages, words, 3) == "f g"
    assert full_history(messages, words, 1) == "f g"  # the teacher truncates it
    assert full_history(messages, words, None) == "a b c\nd e\nf g"


def test_full_history_fits_the_teachers_tokenizer(comparison, stub_teacher):
    texts = comparison.methods["full-history"].texts
    longest = [len(stub_teacher.tokenizer(text)["input_ids"]) for text in texts]
    assert max(longest) <= stub_teacher.max_seq_length
    assert all(text.endswith(question) for text, question in zip(texts, comparison.last_questions, strict=True))
    assert any("\n".join(turns(messages)) != text for messages, text in zip(comparison.messages, texts, strict=True))


def test_bm25_finds_words_by_their_stems_and_nothing_without_any(comparison):
    method = comparison.methods["bm25-last-question"]
    method.texts = ["founding a railway?", "what is it", "zzz", "", "founded", "the"]
    found = list(method.run().values())
    assert max(found[0], key=found[0].get).startswith("d2_")
    assert [bool(scores) for scores in found] == [True, False, False, False, True, False]
    assert found[4].keys() >= {"d0_1", "d0_2"}


def test_a_conversation_without_text_names_its_query(tiny_model, stub_teacher, index, task):
    rows = [{"_id": "q", "messages": [{"role": "system", "content": "Be kind."}], "rewrite": ""}]
    with pytest.raises(ValueError, match=r"^query 'q': .*no text"):
        Comparison(tiny_model, stub_teacher, index, Dataset.from_list(rows), ["last-question"])


def test_the_tools_of_a_row_are_in_its_prompt(tiny_model, stub_teacher, index, monkeypatch):
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    rows = [
        {"_id": name, "messages": [user("Who?")], "rewrite": "", "tools": its}
        for name, its in (("a", tools), ("b", []))
    ]
    queries = Dataset.from_list(rows)
    encode, seen = type(tiny_model.processor).encode, []

    def spy(self, messages, *, tools=None, **kwargs):
        seen.append(tools)
        return encode(self, messages, tools=tools, **kwargs)

    monkeypatch.setattr(type(tiny_model.processor), "encode", spy)
    Comparison(tiny_model, stub_teacher, index, queries, ["native-context"])
    assert [its and its[0]["function"]["name"] for its in seen] == ["search", None]
