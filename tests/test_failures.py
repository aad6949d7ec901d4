"""The page on failures, and the figure of the words that a vector is made of."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest

from native_retrieval.attributions import draw_attributions, word_weights
from native_retrieval.data import load_task
from native_retrieval.failures import write_failure_report
from native_retrieval.index import DocumentIndex
from native_retrieval.methods import Comparison
from native_retrieval.results import build_result
from processing_native_retrieval import NativeRetrievalProcessor


@pytest.fixture
def evaluated(tiny_model, stub_teacher, beir_folder, tmp_path):
    task = load_task(beir_folder, "test")
    vectors = stub_teacher.documents(task.corpus)
    index = DocumentIndex.build(task.corpus, vectors, stub_teacher.fingerprint, "stub-teacher", tmp_path / "index")
    comparison = Comparison(tiny_model, stub_teacher, index, task.queries, ["generate-then-encode", "native-context"])
    runs = comparison.runs()
    turns = list(task.queries["turn"])
    times = dict.fromkeys(runs)
    about = ("stub", "test", comparison.query_ids, turns, list(task.queries["conv"]), len(index), "eval")
    result = build_result(*about, runs, task.qrels, times)
    return result, runs, task, comparison


def test_the_page_counts_every_query_in_each_split(evaluated, tmp_path):
    page, figure = write_failure_report(tmp_path / "page.md", *evaluated)
    text = page.read_text()
    assert figure.read_bytes().startswith(b"\x89PNG") and f"({figure.name})" in text
    tables = [part for part in text.split("## ") if "| queries |" in part]
    assert len(tables) == 3
    for table in tables[:2]:
        assert sum(int(n) for n in re.findall(r"^\| [^|]+ \| (\d+) \|", table, re.M)) == len(evaluated[2].queries)
    assert "4 queries come after a turn" in text  # two conversations of three turns


def test_the_figure_may_lie_elsewhere(evaluated, tmp_path):
    page, figure = write_failure_report(tmp_path / "page.md", *evaluated, figure=tmp_path / "figures" / "hits.png")
    assert "(figures/hits.png)" in page.read_text() and figure.is_file()
    assert not (tmp_path / "page.png").exists()


def test_the_page_names_the_queries_that_are_lost(evaluated, tmp_path):
    result, runs, task, comparison = evaluated
    lost = task.queries["_id"][3]
    result["methods"]["generate-then-encode"]["ranks"] = [None] * 3 + [1] + [None] * 2
    result["methods"]["native-context"]["ranks"] = [None] * 6
    text = write_failure_report(tmp_path / "page.md", *evaluated)[0].read_text()
    assert re.findall(r"^### `(.+)`", text, re.M) == [lost]
    assert "past 1,000" in text and "which wrote" in text


def test_a_page_needs_both_methods(evaluated, tmp_path):
    result = evaluated[0]
    del result["methods"]["native-context"]
    with pytest.raises(ValueError, match="native mode"):
        write_failure_report(tmp_path / "page.md", *evaluated)


def test_the_page_shows_messages_of_any_shape(evaluated, tmp_path):
    result, runs, task, comparison = evaluated
    result["methods"]["generate-then-encode"]["ranks"] = [1] * 6
    result["methods"]["native-context"]["ranks"] = [None] * 6
    shapes = [
        {"role": "user", "content": [{"type": "text", "text": "Who wrote"}, {"type": "text", "text": "it?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "search", "arguments": "{}"}}]},
    ]
    task = SimpleNamespace(**vars(task))
    rows = [{**row, "messages": [*row["messages"], *shapes]} for row in task.queries]
    columns = {name: [row[name] for row in rows] for name in rows[0]}

    class Queries(dict):
        def __getitem__(self, key):
            return rows[key] if isinstance(key, int) else columns[key]

        def __len__(self):
            return len(rows)

    task.queries = Queries()
    text = write_failure_report(tmp_path / "page.md", result, runs, task, comparison)[0].read_text()
    assert text.count("> **user**: Who wrote it?") == 6 and "None" not in text


LLAMA_3 = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>\n\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [None, LLAMA_3])
def test_word_weights_are_the_models_own(tiny_model, template, tmp_path):
    if template:
        tokenizer = copy.deepcopy(tiny_model.tokenizer)
        tokenizer.chat_template = template
        tiny_model.processor = NativeRetrievalProcessor(tokenizer, tiny_model.processor.word_tokenizer)
    messages = [
        {"role": "user", "content": "When was the Arnwick Lighthouse founded?"},
        {"role": "assistant", "content": "In 1874."},
        {"role": "user", "content": "Who was behind it?"},
    ]
    turns = word_weights(tiny_model, messages)
    said = [[word for word, _ in words] for _, words in turns]
    assert [" ".join(words) for words in said[-3:]] == [message["content"] for message in messages]
    assert [role for role, _ in turns[-3:]] == ["user", "assistant", "user"]
    weights = np.array([weight for _, words in turns for _, weight in words])
    assert (weights >= 0).all() and 0.8 < weights.sum() <= 1.001  # a line end carries the rest
    assert all(weight > 0 for _, weight in turns[-1][1]), "the question's words are all read"
    draw_attributions(tiny_model, [messages], tmp_path / "words.png")
    assert (tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")


def test_a_head_that_reads_no_words_has_no_word_weights(make_model):
    with pytest.raises(ValueError, match="reads no words"):
        word_weights(make_model(word_vocab_size=None), [{"role": "user", "content": "When was the bridge opened?"}])
