import gzip
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from fuzz import check_folder, folders
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from messages_native_retrieval import ROLES
from native_retrieval import data, rows
from native_retrieval.data import (
    DataError,
    drop_overlap,
    load_corpus,
    load_qrels,
    load_queries,
    load_task,
    load_texts,
    read_conversations,
    splits,
)

CORPUS = [
    {"_id": "d1", "title": "Tea", "text": "Tea is a drink."},
    {"_id": "d2", "title": "", "text": "Coffee is another drink."},
    {"_id": "d3", "title": "Water", "text": ""},
]
QUERIES = [
    {
        "_id": "q1",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "What is tea?"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "And coffee?"},
        ],
        "rewrite": "What is coffee?",
        "metadata": {"conv": 7, "turn": 5, "switch": True, "source": "a log"},
    },
    {"_id": "q2", "messages": [{"role": "user", "content": "What is water?"}]},
    {"_id": "q3", "messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": ""}]},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td1\t0\nq2\td3\t2\n"


def message(role: Any = "user", content: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = before


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path, files: dict[str, str | bytes | list[Any]]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = jsonl(content)
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return folder


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    return write(tmp_path, {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.tsv": QRELS})


def problems_of(load: Callable[..., Any], *arguments: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(*arguments)
    return caught.value.problems


# What loads


def test_task_round_trip(task_folder: Path) -> None:
    task = load_task(task_folder, "test")
    assert (task.name, task.split) == (task_folder.name, "test")
    assert task.corpus.to_list() == CORPUS
    assert task.queries.to_list() == [
        {
            "_id": "q1",
            "messages": QUERIES[0]["messages"],
            "tools": None,
            "rewrite": "What is coffee?",
            "conv": "7",
            "turn": 5,
            "switch": True,
            "gold": ["d2"],
        },
        {
            "_id": "q2",
            "messages": QUERIES[1]["messages"],
            "tools": None,
            "rewrite": "",
            "conv": "q2",
            "turn": 1,
            "switch": None,
            "gold": ["d3"],
        },
    ]
    assert task.qrels == {"q1": {"d2": 1, "d1": 0}, "q2": {"d3": 2}}
    assert load_qrels(task_folder, "test") == task.qrels
    assert splits(task_folder) == ["test"]


def test_queries_without_a_split_are_all_rows(task_folder: Path) -> None:
    queries = load_queries(task_folder)
    assert queries["_id"][:] == ["q1", "q2", "q3"]
    assert queries["gold"][:] == [[], [], []]
    assert queries[2]["messages"] == QUERIES[2]["messages"]  # ends on an empty assistant turn, which is legal


def test_gzip_equals_plain(task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = {"corpus.jsonl.gz": CORPUS, "queries.jsonl.gz": QUERIES, "qrels/test.tsv.gz": QRELS}
    folder = write(tmp_path_factory.mktemp("zipped"), files)
    zipped = load_task(folder, "test")
    assert data.splits(folder) == ["test"]
    plain = load_task(task_folder, "test")
    assert zipped.corpus.to_list() == plain.corpus.to_list()
    assert zipped.queries.to_list() == plain.queries.to_list()
    assert zipped.qrels == plain.qrels


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\ufeff" + jsonl(CORPUS), id="byte-order mark"),
        pytest.param(jsonl(CORPUS).replace("\n", "\r\n"), id="windows line ends"),
        pytest.param("\n" + jsonl(CORPUS).replace("\n", "\n\n"), id="blank lines"),
        pytest.param(jsonl(CORPUS).rstrip("\n"), id="no last line end"),
        pytest.param(
            jsonl(CORPUS).replace('"title": "", ', '"title": null, "url": 3, '), id="null title, other fields"
        ),
    ],
)
def test_corpus_variants(tmp_path: Path, text: str) -> None:
    assert load_corpus(write(tmp_path, {"corpus.jsonl": text})).to_list() == CORPUS


def test_integer_ids_become_strings(tmp_path: Path) -> None:
    write(tmp_path, {"corpus.jsonl": [{"_id": 3, "text": "a"}], "queries.jsonl": [QUERIES[1] | {"_id": 12}]})
    write(tmp_path, {"qrels/test.tsv": "12\t3\t1\n"})
    task = load_task(tmp_path, "test")
    assert task.corpus[0] == {"_id": "3", "title": "", "text": "a"}
    assert task.qrels == {"12": {"3": 1}}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("q1\td2\t1\n", id="no header"),
        pytest.param("\ufeffquery-id\tcorpus-id\tscore\r\nq1\td2\t1\r\n\r\n", id="windows"),
        pytest.param("q1\td2\t1\nq1\td2\t1\n", id="the same line twice"),
        pytest.param("q1\td2\t1.0\n", id="a decimal score"),
        pytest.param("q1\td2\t1.\nq1\td2\t+1.00\n", id="decimal scores"),
        pytest.param("q1\td2\t1\t\n", id="trailing tab"),
        pytest.param("query-id\tcorpus-id\tscore\t\nq1\td2\t1\t\t\r\n", id="trailing tabs and a header"),
        pytest.param("q1 0 d2 1\n", id="TREC, blanks"),
        pytest.param("\ufeffq1   Q0 d2 1.0 \n", id="TREC, many blanks"),
        pytest.param("q1\t0\td2\t1\t\n", id="TREC, tabs"),
        pytest.param("topic iteration docno relevance\nq1 0 d2 1\n", id="TREC, a header"),
        pytest.param("q1 d2 1\n", id="blanks"),
        pytest.param("query-id,corpus-id,score\nq1,d2,1\n", id="CSV"),
        pytest.param('"q1", "d2", "1"\n', id="CSV, quotes and blanks"),
        pytest.param("score;doc_id;Query ID\r\n1,0;d2;q1\r\n".replace("1,0", "1.0"), id="semicolons, other order"),
        pytest.param("qid\tdocid\tlabel\nq1\td2\t1\n", id="other names"),
        pytest.param("qid,timestamp,pid,rel,note\nq1,5,d2,1,\n", id="more columns"),
    ],
)
@pytest.mark.parametrize("name", ["test.tsv", "test.csv", "test.tsv.gz", "test.csv.gz"])
def test_qrels_variants(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, {f"qrels/{name}": text})
    assert load_qrels(tmp_path, "test") == {"q1": {"d2": 1}}
    assert splits(tmp_path) == ["test"]


def test_ids_with_blanks_and_commas(tmp_path: Path) -> None:
    """As BEIR's tables have them; a comma or a blank separates columns only where no tab does."""
    write(tmp_path, {"qrels/a.tsv": "my query\tParis, Texas\t1\n", "qrels/b.tsv": "q1 0 Paris,Texas 1\n"})
    assert load_qrels(tmp_path, "a") == {"my query": {"Paris, Texas": 1}}
    assert load_qrels(tmp_path, "b") == {"q1": {"Paris,Texas": 1}}


def test_query_without_a_relevant_document_is_left_out(task_folder: Path) -> None:
    write(task_folder, {"qrels/dev.tsv": "q1\td1\t0\nq2\td1\t1\n"})
    task = load_task(task_folder, "dev")
    assert task.queries["_id"][:] == ["q2"]
    assert task.qrels == {"q2": {"d1": 1}}
    assert load_qrels(task_folder, "dev") == {"q1": {"d1": 0}, "q2": {"d1": 1}}
    assert splits(task_folder) == ["dev", "test"]


CALLS = [{"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"query": "tea", "k": 3}'}}]
AGENT = [
    message("developer", "Answer in French."),
    message("user", [{"type": "text", "text": "Look at this."}, {"type": "text", "text": "What is it?"}], name="eve"),
    message(
        "assistant", None, tool_calls=[*CALLS, {**CALLS[0], "id": "2"}], reasoning_content="A picture.", refusal=None
    ),
    message("tool", "A teapot.", tool_call_id="1"),
    message("tool", [{"type": "text", "text": "Two results."}], tool_call_id="2"),
    message("system", "Be brief."),
    message("assistant", None, function_call={"name": "search", "arguments": "{}"}),
    message("function", '{"found": [1, 2.5, null]}', name="search"),
    message("assistant", None, refusal="I cannot say."),
    message("user", "And the lid?"),
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"deep": [{"x": None}, 2**53 + 1]}}}]},
]
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}]


def test_messages_keep_what_an_agent_sends(tmp_path: Path) -> None:
    rows = [
        {"_id": "q1", "messages": AGENT, "tools": TOOLS},
        {"_id": "q2", "messages": AGENT[1:2], "tools": None},
        {"_id": "q3", "messages": AGENT[9:10], "tools": []},
    ]
    loaded = load_queries(write(tmp_path, {"queries.jsonl": rows}))
    assert [len(messages) for messages in loaded["messages"]] == [len(row["messages"]) for row in rows]
    for before, after in zip(AGENT, loaded[0]["messages"], strict=True):
        kept = {key: value for key, value in before.items() if key not in ("refusal", "function_call", "tool_calls")}
        assert {**kept, "content": ""}.items() <= {**after, "content": ""}.items()
    assert loaded[0]["messages"][6]["tool_calls"][0]["function"]["name"] == "search"
    assert loaded[0]["messages"][8]["content"] == "I cannot say."
    contents = [message["content"] for message in loaded[0]["messages"]]
    assert contents[:5] == ["Answer in French.", "Look at this.\nWhat is it?", "", "A teapot.", "Two results."]
    assert all(isinstance(content, str) for content in contents)
    assert [tools or [] for tools in loaded["tools"]] == [TOOLS, [], []]
    assert loaded["turn"][:] == [2, 1, 1]
    assert read_conversations(tmp_path / "queries.jsonl") == list(loaded["messages"])


@pytest.mark.parametrize("last", range(1, len(AGENT)))
def test_a_conversation_may_end_on_any_turn(tmp_path: Path, last: int) -> None:
    write(tmp_path, {"queries.jsonl": [{"_id": "q1", "messages": AGENT[: last + 1]}]})
    assert len(load_queries(tmp_path)[0]["messages"]) == last + 1


def test_halves_of_characters_are_replaced_and_nul_is_removed(tmp_path: Path) -> None:
    half = "\ud83d"
    messages = [
        message("user", f"one {half}"),
        message("assistant", "ok", tool_calls=[{"function": {"name": "f", "arguments": f"{half}x"}}]),
        message("user", [{"type": "text", "text": f"t\x00wo{half}"}]),
    ]
    queries = [{"_id": "q", "messages": messages, "rewrite": f"r{half}", "tools": [{"name": half}]}]
    corpus = [{"_id": "d", "title": f"{half}title", "text": f"text{half}"}]
    text = "\n".join(map(json.dumps, queries)), "\n".join(map(json.dumps, corpus))
    write(tmp_path, {"queries.jsonl": text[0], "corpus.jsonl": text[1]})
    loaded = load_queries(tmp_path)[0]
    assert [message["content"] for message in loaded["messages"]] == ["one \ufffd", "ok", "two\ufffd"]
    assert loaded["messages"][1]["tool_calls"][0]["function"]["arguments"] == "\ufffdx"
    assert (loaded["rewrite"], loaded["tools"]) == ("r\ufffd", [{"name": "\ufffd"}])
    assert load_corpus(tmp_path)[0] == {"_id": "d", "title": "\ufffdtitle", "text": "text\ufffd"}


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, {"corpus.jsonl": [{"_id": "a", "text": "old"}]}) / "corpus.jsonl"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    assert load_corpus(tmp_path)["text"][:] == ["old"]
    write(tmp_path, {"corpus.jsonl": [{"_id": "a", "text": "new"}]})
    os.utime(path, ns=times)  # the same size and the same time of change
    assert load_corpus(tmp_path)["text"][:] == ["new"]
    write(tmp_path, {"corpus.jsonl": [{"_id": "a", "text": ""}]})
    assert problems_of(load_corpus, tmp_path) == ["corpus.jsonl:1: title and text are both missing or empty"]


def test_nothing_is_written_beside_the_data(task_folder: Path) -> None:
    before = sorted(task_folder.rglob("*"))
    load_task(task_folder, "test")
    load_texts(task_folder)
    assert sorted(task_folder.rglob("*")) == before


def test_loading_is_deterministic(task_folder: Path) -> None:
    assert load_corpus(task_folder)._fingerprint == load_corpus(str(task_folder))._fingerprint


# What does not load: one file, one bad thing


def document(**fields: Any) -> str:
    return json.dumps({"_id": "x", "text": "some text"} | fields)


def query(**fields: Any) -> str:
    return json.dumps({"_id": "x", "messages": [message()]} | fields)


def short(value: Any) -> str | None:
    """Test names: some bad rows are very long, and pytest would put all of them into the environment."""
    return repr(value[:30]) if isinstance(value, (str, bytes)) else None


BAD_DOCUMENTS = [
    ("{", ":2: not valid JSON ("),
    ('{"_id": ' + "9" * 5000 + "}", ":2: not readable as JSON ("),
    ("[" * 100_000, ":2: not readable as JSON ("),
    ("[1]", ":2: a JSON object is needed, this is a list"),
    ('"d9"', ":2: a JSON object is needed, this is a string"),
    ('{"text": "t"}', ":2: _id is missing or empty"),
    (document(_id=""), ":2: _id is missing or empty"),
    (document(_id=None), ":2: _id is missing or empty"),
    (document(_id=1.5), ":2: _id is a number, wanted a string or an integer"),
    (document(_id=True), ":2: _id is true or false, wanted a string or an integer"),
    (document(_id=["a"]), ":2: _id is a list, wanted a string or an integer"),
    (document(_id="a\tb"), ":2: _id 'a\\tb' holds a tab or a line break"),
    (document(_id="d1"), ":2: duplicate _id 'd1', first seen at line 1 — ids must be unique"),
    ('{"_id": "x"}', ":2: title and text are both missing or empty"),
    (document(text=" \n"), ":2: title and text are both missing or empty"),
    (document(text=3), ":2: text is a number, wanted a string"),
    (document(title={}), ":2: title is an object, wanted a string"),
    (document(_id="a\ud800"), ":2: _id 'a\\ud800' holds half a surrogate pair"),
    (b"\xff", ":2: not UTF-8 (invalid start byte: 0xff)"),
]

BAD_QUERIES = [
    ("nonsense", ":2: not valid JSON ("),
    ("null", ":2: a JSON object is needed, this is missing or null"),
    (query(_id=None), ":2: _id is missing or empty"),
    (query(_id="q1"), ":2: duplicate _id 'q1', first seen at line 1 — ids must be unique"),
    ('{"_id": "x"}', ":2: messages is missing"),
    ('{"_id": "x", "text": "hi"}', ':2: messages is missing — write its text as [{"role": "user"'),
    (query(messages="hi"), ":2: messages is a str; give a list of"),
    (query(messages={}), ":2: messages is a dict; give a list of"),
    (query(messages=[]), ":2: messages is empty; give at least one message"),
    (query(messages=[message(), "hi"]), ":2: messages, message 1, is a str; give"),
    (query(messages=[message(), {"content": "hi"}]), ":2: messages, message 1, is a dict without a role; give"),
    (query(messages=[message("boss")]), ":2: messages, message 0: unknown role 'boss'; use one of system, developer"),
    (query(messages=[message(None)]), ":2: messages, message 0, is a dict without a role; give"),
    (query(messages=[message(["user"])]), ":2: messages, message 0: unknown role ['user']; use one of"),
    (query(messages=[message(content=4)]), ":2: messages, message 0: content is a int; give a string, a list of parts"),
    (query(messages=[message("assistant", [])]), ":2: messages has no text in any turn"),
    (query(messages=[message("assistant", None)]), ":2: messages has no text in any turn"),
    (query(messages=[message("system"), message("developer")]), ":2: messages has no text in any turn"),
    (query(messages=[message(content=" "), message("assistant", "")]), ":2: messages has no text in any turn"),
    (query(messages=[message(), message(content=None)]), ":2: messages: the last turn, message 1, is empty; give the"),
    (
        query(messages=[message(), message(content="\u200b\ufeff \u2060")]),
        ":2: messages: the last turn, message 1, is empty",
    ),
    (
        query(messages=[message(), message(content="\x00\u00ad\u200e")]),
        ":2: messages: the last turn, message 1, is empty",
    ),
    (
        query(messages=[message(content=[{"type": "text", "text": "\u200d"}])]),
        ":2: messages: the last turn, message 0, is",
    ),
    (query(messages=[message(n=2**70)]), ":2: messages cannot be stored"),
    (query(messages=[message(), message(n=2**70)]), ":2: messages cannot be stored"),
    (query(tools={"type": "function"}), ":2: tools is an object, wanted a list"),
    (query(tools=["search"]), ":2: tools is a list with a string"),
    (query(rewrite=7), ":2: rewrite is a number, wanted a string"),
    (query(metadata=[]), ":2: metadata is a list, wanted an object"),
    (query(metadata={"conv": 1.5}), ":2: metadata.conv is a number, wanted a string or an integer"),
    (query(metadata={"turn": "3"}), ":2: metadata.turn is '3', wanted an integer from 1"),
    (query(metadata={"turn": 0}), ":2: metadata.turn is 0, wanted an integer from 1, the first turn"),
    (query(metadata={"turn": True}), ":2: metadata.turn is True, wanted an integer from 1"),
    (query(metadata={"turn": 2**40}), ":2: metadata.turn is 1099511627776, wanted an integer from 1"),
    (query(metadata={"switch": "yes"}), ":2: metadata.switch is 'yes', wanted true, false or null"),
    (b'{"_id": "\xc3"}', ":2: not UTF-8 (invalid continuation byte: 0xc3)"),
]


@pytest.mark.parametrize(
    ("name", "load", "first", "bad", "reason"),
    [("corpus", load_corpus, CORPUS[0], *row) for row in BAD_DOCUMENTS]
    + [("queries", load_queries, QUERIES[0], *row) for row in BAD_QUERIES],
    ids=short,
)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_bad_row(
    tmp_path: Path,
    ending: str,
    name: str,
    load: Callable[[Path], Any],
    first: dict[str, Any],
    bad: str | bytes,
    reason: str,
) -> None:
    bad = bad.encode() if isinstance(bad, str) else bad
    write(tmp_path, {name + ending: jsonl([first]).encode() + bad + b"\n" + jsonl([first | {"_id": "z"}]).encode()})
    (problem,) = problems_of(load, tmp_path)
    assert problem.startswith(name + ending + reason)


@pytest.mark.parametrize(
    ("qrels", "problem"),
    [
        ("", "qrels/test.tsv: empty file"),
        ("\n \n", "qrels/test.tsv: empty file"),
        ("query-id\tcorpus-id\tscore\n", "qrels/test.tsv: no judgement has a score above 0"),
        ("q1\td1\t0\nq2\td2\t-1\n", "qrels/test.tsv: no judgement has a score above 0"),
        ("q1\td1\t1\nq1\td2\n", "qrels/test.tsv:2: 2 columns separated by tabs, wanted 3"),
        ("q1 0 d1 1\nq1 d2 1\n", "qrels/test.tsv:2: 3 columns separated by white space, wanted 4"),
        ("q1,d1,1\nq1,d2,1,5\n", "qrels/test.tsv:2: 4 columns separated by commas, wanted 3"),
        (
            "q1 Q0 d1 1 0.5 bm25\n",
            "qrels/test.tsv:1: 6 columns separated by white space, wanted 3: query-id, corpus-id",
        ),
        ("q1\td1\t7\t1\n", "qrels/test.tsv:1: 4 columns separated by tabs, wanted 3: query-id, corpus-id, score (or"),
        ("q1,d1\n", "qrels/test.tsv:1: 2 columns separated by commas, wanted 3"),
        ("q1\td1\t1\nq1\td2\t1.5\n", "qrels/test.tsv:2: score '1.5' is not an integer; write 0 for"),
        ("q1\td1\t1\nq1 0 d2 1\n", "qrels/test.tsv:2: 1 columns separated by tabs, wanted 3"),
        ("q1\td1\t1\nq1\t0\td2\t1\n", "qrels/test.tsv:2: 4 columns separated by tabs, wanted 3"),
        ("q1\td1\t1\nq1\td2\t0.5\n", "qrels/test.tsv:2: score '0.5' is not an integer"),
        ("q1\td1\t1\nq1\td2\t1_0\n", "qrels/test.tsv:2: score '1_0' is not an integer"),
        ("q1\td1\t1\nq1\td2\t" + "9" * 5000, "qrels/test.tsv:2: score '999"),
        ("q1\td1\t1\nq1\td2\t\n", "qrels/test.tsv:2: score '' is not an integer"),
        ("q1\td1\t1\n\td2\t1\n", "qrels/test.tsv:2: the query id or the document id is empty"),
        ("q1\td1\t1\nq1\td1\t2\n", "qrels/test.tsv:2: score 2 for 'q1' and 'd1', but 1 at line 1"),
        ("from\tto\tvalue\nq1\td1\t1\n", "qrels/test.tsv:1: score 'value' is not an integer; write 0 for"),
        (
            "from\tto\tvalue\nq1\td1\t1\n",
            "qrels/test.tsv:1: score 'value' is not an integer; write 0 for not relevant, "
            "1 or more for relevant — the first line must be `query-id corpus-id score` or a judgement",
        ),
        ("q1\td1\t1\nqx\td1\t1\n", "qrels/test.tsv:2: unknown query 'qx' — no row of queries.jsonl has this _id"),
        ("q1\td1\t1\nq1\tdx\t1\n", "qrels/test.tsv:2: unknown document 'dx' — no row of the corpus has this _id"),
        (b"q1\td1\t1\n\xe9\td1\t1\n", "qrels/test.tsv:2: not UTF-8 ("),
    ],
    ids=short,
)
def test_bad_qrels(task_folder: Path, qrels: str | bytes, problem: str) -> None:
    write(task_folder, {"qrels/test.tsv": qrels})
    (found,) = problems_of(load_task, task_folder, "test")
    assert found.startswith(problem)
    if "unknown" not in problem:
        (found,) = problems_of(load_qrels, task_folder, "test")
        assert found.startswith(problem)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("corpus.jsonl", b"", "corpus.jsonl: empty file"),
        ("corpus.jsonl", b"\n\n", "corpus.jsonl: empty file"),
        ("corpus.jsonl.gz", gzip.compress(b"", mtime=0), "corpus.jsonl.gz: empty file"),
        ("corpus.jsonl.gz", b"", "corpus.jsonl.gz: empty file"),
        ("corpus.jsonl.gz", jsonl(CORPUS).encode(), "corpus.jsonl.gz:1: not a gzip file"),
        ("corpus.jsonl.gz", gzip.compress(jsonl(CORPUS).encode(), mtime=0)[:-9], "corpus.jsonl.gz:"),
        ("corpus.jsonl.gz", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "corpus.jsonl.gz: holds gzip data"),
        ("corpus.jsonl", gzip.compress(jsonl(CORPUS).encode(), mtime=0), "corpus.jsonl: holds gzip data"),
        ("corpus.jsonl", jsonl(CORPUS).encode("utf-16"), "corpus.jsonl:1: not UTF-8 (invalid start byte: 0xff)"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert problems_of(load_corpus, tmp_path)[0].startswith(problem)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        (json.dumps(CORPUS), "jq -c '.[]'"),
        (json.dumps(CORPUS, indent=2), "jq -c '.[]'"),
        ("[\n" + ",\n".join(map(json.dumps, CORPUS)) + "\n]", "jq -c '.[]'"),
        ("\n".join(json.dumps(row, indent=4) for row in CORPUS), "jq -c '.'"),
    ],
)
def test_json_where_json_lines_are_wanted(tmp_path: Path, text: str, way_out: str, start: str, ending: str) -> None:
    write(tmp_path, {f"corpus.jsonl{ending}": start + text, f"queries.jsonl{ending}": start + text})
    for load, name in ((load_corpus, "corpus"), (load_queries, "queries")):
        (problem,) = problems_of(load, tmp_path)
        assert problem.startswith(
            f"{name}.jsonl{ending}:{1 + start.count(chr(10))}: a JSON object is needed in each line"
        )
        assert "JSON Lines" in problem and way_out in problem and "\n" not in problem


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "corpus.jsonl.gz", "qrels/test.tsv.gz"]
)
def test_git_lfs_pointers_are_named(task_folder: Path, name: str) -> None:
    (task_folder / name.removesuffix(".gz")).unlink()
    (task_folder / name).write_text(POINTER)
    (problem,) = problems_of(load_task, task_folder, "test")
    assert problem.startswith(f"{name}: a Git LFS pointer") and "git lfs pull" in problem


def test_truncated_gzip_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(jsonl(CORPUS).encode(), mtime=0)[:-9])
    (problem,) = problems_of(load_corpus, tmp_path)
    assert "truncated or damaged gzip file" in problem


def test_missing_files_and_splits(tmp_path: Path) -> None:
    assert problems_of(load_corpus, tmp_path) == [
        "corpus.jsonl: no such file, nor corpus.jsonl.gz; there is nothing",
    ]
    write(tmp_path, {"corpus.json": CORPUS})
    assert problems_of(load_queries, tmp_path) == [
        "queries.jsonl: no such file, nor queries.jsonl.gz; there is corpus.json",
    ]
    assert splits(tmp_path) == []
    assert problems_of(load_qrels, tmp_path, "test") == [
        "qrels/test.tsv: no such split; there is none (no qrels/*.tsv)",
    ]
    write(tmp_path, {"qrels/train.tsv": QRELS, "qrels/dev.tsv": QRELS})
    assert problems_of(load_qrels, tmp_path, "test") == ["qrels/test.tsv: no such split; there is dev, train"]
    assert problems_of(load_qrels, tmp_path, "../secret")[0].startswith("qrels/../secret.tsv: no such split")


def test_plain_and_gzipped_together(tmp_path: Path) -> None:
    write(tmp_path, {"corpus.jsonl": CORPUS, "corpus.jsonl.gz": CORPUS})
    assert problems_of(load_corpus, tmp_path) == [
        "both corpus.jsonl and corpus.jsonl.gz are there — keep one of them",
    ]


def test_problems_of_all_files_come_together(tmp_path: Path) -> None:
    write(tmp_path, {"corpus.jsonl": "{\n", "queries.jsonl": "[]\n", "qrels/test.tsv": "q1\n"})
    assert [problem.split(": ")[0] for problem in problems_of(load_task, tmp_path, "test")] == [
        "corpus.jsonl:1",
        "qrels/test.tsv:1",
        "queries.jsonl:1",
    ]


def test_message_shows_twenty_problems(tmp_path: Path) -> None:
    write(tmp_path, {"corpus.jsonl": "{}\n" * 51})
    with pytest.raises(DataError) as caught:
        load_corpus(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(caught.value.problems) == 51
    assert lines[0] == f"{tmp_path.resolve()}: 51 problems"
    assert lines[20] == "  corpus.jsonl:20: _id is missing or empty"
    assert lines[21:] == ["  ... and 31 more"]
    assert isinstance(caught.value, ValueError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.source, copy.problems, str(copy)) == (caught.value.source, caught.value.problems, str(caught.value))


def test_reading_stops_after_many_problems(tmp_path: Path) -> None:
    write(tmp_path, {"corpus.jsonl": "{}\n" * 5000})
    problems = problems_of(load_corpus, tmp_path)
    assert len(problems) == rows.PROBLEMS_PER_FILE + 1
    assert problems[-1] == "corpus.jsonl:1001: reading stopped here, after 1,000 problems"


# The Hub


def test_hub_source(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(repo_id: str, **arguments: Any) -> str:
        calls.append((repo_id, arguments))
        return str(task_folder)

    monkeypatch.setattr(data, "snapshot_download", fake)
    task = load_task("someone/some-data", "test", revision="v1")
    assert task.name == "someone/some-data"
    assert task.corpus.to_list() == CORPUS
    patterns = ["corpus.jsonl*", "queries.jsonl*", "qrels/*.[ct]sv*"]
    wanted = {"repo_type": "dataset", "allow_patterns": patterns, "revision": "v1"}
    assert calls == [("someone/some-data", wanted)]


def test_no_such_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(data, "snapshot_download", fake)
    assert problems_of(load_corpus, "someone/nothing") == [
        "no such folder, and the Hub does not give such a data set: offline",
    ]
    assert problems_of(load_corpus, tmp_path / "nothing") == ["no such folder, and not a Hub id (owner/name) either"]


def test_revision_of_a_folder(task_folder: Path) -> None:
    with pytest.raises(ValueError, match="local folder"):
        load_corpus(task_folder, revision="v1")


# Plain text


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_texts_from_files(tmp_path: Path, ending: str) -> None:
    write(tmp_path, {f"a.txt{ending}": " One line.\n\nAnother\u2028line.\n", f"a.jsonl{ending}": CORPUS})
    assert load_texts(tmp_path / f"a.txt{ending}")["text"][:] == ["One line.", "Another\u2028line."]
    assert load_texts(tmp_path / f"a.jsonl{ending}")["text"][:] == [
        "Tea Tea is a drink.",
        "Coffee is another drink.",
        "Water",
    ]


def test_texts_from_a_corpus(tmp_path: Path) -> None:
    texts = [
        "First sentence here. Is it so? “Yes, it is so!” 1. No.",
        "一二三四五六七八九十一二三四五。" * 2,
        "word " * 150,
    ]
    rows = [{"_id": i, "title": "Not read", "text": text} for i, text in enumerate(texts)]
    rows.append({"_id": "t", "title": "A title without a text"})
    loaded = load_texts(write(tmp_path, {"corpus.jsonl": rows}))["text"][:]
    assert loaded[0] == "First sentence here."
    assert loaded[1:3] == ["“Yes, it is so!”", "一二三四五六七八九十一二三四五。"]
    assert all(data.MIN_TEXT_CHARS <= len(text) <= data.MAX_TEXT_CHARS for text in loaded)
    assert loaded[-1] == "A title without a text"
    assert sum(text.count("word") for text in loaded) == 150


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"\n", "a.txt: empty file"),
        ("a.txt", b"good\n\xff\n", "a.txt:2: not UTF-8 ("),
        ("a.txt.gz", b"no", "a.txt.gz:1: not a gzip file"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: text is a number, wanted a string"),
        ("a.jsonl", b"{}", "a.jsonl:1: title and text are both missing or empty"),
        ("a.csv", b"text", "a.csv: the name must end in .txt, .txt.gz, .jsonl or .jsonl.gz"),
        ("gone.txt", None, "gone.txt: no such file"),
    ],
)
def test_bad_texts(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (found,) = problems_of(load_texts, tmp_path / name)
    assert found.startswith(problem)


def test_corpus_without_sentences(tmp_path: Path) -> None:
    write(tmp_path, {"corpus.jsonl": [{"_id": "a", "text": "short"}]})
    assert problems_of(load_texts, tmp_path) == ["corpus.jsonl: no sentence of at least 15 characters"]


# Overlap of splits


def queries_of(*rows: tuple[list[str], str]) -> datasets.Dataset:
    roles = ("user", "assistant")
    return datasets.Dataset.from_list(
        [
            {
                "_id": str(i),
                "messages": [{"role": roles[j % 2], "content": text} for j, text in enumerate(texts)],
                "rewrite": rewrite,
            }
            for i, (texts, rewrite) in enumerate(rows)
        ]
    )


def test_drop_overlap() -> None:
    held_out = queries_of((["who wrote the Iliad?"], ""), (["Hi there"], "What is tea?"), (["And?", "", "Tea"], ""))
    train = queries_of(
        (["Who wrote  the ILIAD?", "Homer.", "When?"], ""),  # the same first message
        (["who wrote the Odyssey?"], ""),
        (["Hi there", "Hello.", "Coffee?"], ""),  # the same first message, too short to count
        (["Something else entirely, please"], " what is TEA? "),  # the same rewrite
        (["and?", " ", "tea"], ""),  # the same messages
        (["and?", "Tea"], ""),  # the same words, other roles
    )
    kept, dropped = drop_overlap(train, held_out)
    assert kept["_id"][:] == ["1", "2", "5"]
    assert dropped == 3


@pytest.mark.parametrize(
    ("question", "greeting"),
    [("ベルフォード博物館はいつ設立されましたか", "こんにちは"), ("贝尔福德博物馆是什么时候成立的", "你好")],
)
def test_drop_overlap_knows_questions_of_scripts_without_spaces(question: str, greeting: str) -> None:
    held_out = queries_of(([question], ""), ([greeting], ""))
    kept, _ = drop_overlap(queries_of(([question, "…", "?"], ""), ([greeting, "…", "?"], "")), held_out)
    assert kept["_id"][:] == ["1"]


# Properties

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
filled = text.filter(lambda value: value.strip() != "")
identifiers = filled.filter(lambda value: "\t" not in value and "\n" not in value)
documents = st.fixed_dictionaries({"_id": identifiers, "title": text, "text": filled})
names = filled.map(lambda value: value.replace("\0", "0"))
chats = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(ROLES), "content": text.map(lambda value: value.replace("\0", ""))},
        optional={"name": names, "tool_calls": st.just(CALLS), "reasoning_content": names},
    ),
    min_size=1,
    max_size=4,
).map(lambda messages: [*messages, {"role": "user", "content": "last"}])
queries = st.fixed_dictionaries(
    {
        "_id": identifiers,
        "messages": chats,
        "rewrite": filled,
        "metadata": st.fixed_dictionaries(
            {"conv": filled, "turn": st.integers(1, 99), "switch": st.none() | st.booleans()}
        ),
    }
)
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(
    corpus=st.lists(documents, min_size=1, max_size=5, unique_by=lambda row: row["_id"]),
    asked=st.lists(queries, min_size=1, max_size=5, unique_by=lambda row: row["_id"]),
    ascii_only=st.booleans(),
)
def test_valid_rows_load_unchanged(corpus: list[dict[str, Any]], asked: list[dict[str, Any]], ascii_only: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        for stem, rows in (("corpus", corpus), ("queries", asked)):
            lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
            (Path(name) / f"{stem}.jsonl").write_bytes("\n".join(lines).encode())
        assert load_corpus(name).to_list() == corpus
        loaded = load_queries(name).to_list()
    assert loaded == [
        {key: row[key] for key in ("_id", "messages", "rewrite")} | row["metadata"] | {"gold": [], "tools": None}
        for row in asked
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["_id", "text", "messages", "role", "content", "metadata", "turn"]), inner)
    ),
    max_leaves=8,
)
noise = st.binary(max_size=80) | st.lists(json_values, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)))


@few
@given(noise=noise, ending=st.sampled_from(["", ".gz"]), zipped=st.booleans())
def test_noise_raises_nothing_but_data_errors(noise: str | bytes, ending: str, zipped: bool) -> None:
    content = noise if isinstance(noise, bytes) else noise.encode()
    if ending and zipped:
        content = gzip.compress(content, mtime=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "qrels").mkdir()
        for file in (f"corpus.jsonl{ending}", f"queries.jsonl{ending}", "qrels/test.tsv", f"t.txt{ending}"):
            (folder / file).write_bytes(content)
        for load, arguments in (
            (load_task, (folder, "test")),
            (load_qrels, (folder, "test")),
            (load_queries, (folder,)),
            (load_texts, (folder,)),
            (load_texts, (folder / f"t.txt{ending}",)),
        ):
            try:
                load(*arguments)
            except DataError as error:
                assert error.problems


@few
@given(folders())
def test_a_damaged_folder_raises_nothing_but_data_errors(files: dict[str, bytes]) -> None:
    check_folder(files)


# The research slices, where they are at hand

SLICES = Path(
    os.environ.get("NATIVE_RETRIEVAL_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data")
)


@pytest.mark.skipif(not SLICES.is_dir(), reason=f"no research slices at {SLICES}: set NATIVE_RETRIEVAL_DATA")
@pytest.mark.parametrize(
    ("name", "documents", "sizes"),
    [
        ("qrecc", 5093, {"train": 776, "dev": 152, "test": 425}),
        ("doc2dial", 3914, {"train": 2771, "dev": 400, "test": 801}),
        ("topiocqa_lead", 10033, {"train": 11366, "dev": 312, "test": 301}),
        ("topiocqa_answer", 43155, {"train": 41798, "dev": 2340}),
        ("canard", None, {None: 3380}),
    ],
)
def test_research_slices(name: str, documents: int | None, sizes: dict[str | None, int]) -> None:
    source = SLICES / name
    assert splits(source) == sorted(split for split in sizes if split is not None)
    for split, size in sizes.items():
        if split is None:
            assert len(load_queries(source)) == size
            continue
        task = load_task(source, split)
        assert (len(task.corpus), len(task.queries), len(task.qrels)) == (documents, size, size)
        assert all(task.queries.with_format("numpy")["turn"][:] > 0)
