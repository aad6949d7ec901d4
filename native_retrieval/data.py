"""Conversations, documents and judgements on disk -> `datasets.Dataset`.

The layout is BEIR's, with chat messages in the place of a query's text. Each file may be plain or gzipped (`.gz`):

    corpus.jsonl        {"_id": "d1", "title": "...", "text": "..."}
    queries.jsonl       {"_id": "q1", "messages": [{"role": "user", "content": "..."}, ...],
                         "rewrite": "...", "metadata": {"conv": "c7", "turn": 3, "switch": false}}
    qrels/<split>.tsv   query-id <tab> corpus-id <tab> score

`rewrite` and `metadata` are optional. A source is a folder in this layout, or the id of a data set on the Hub in the
same layout. Files are read line by line into Arrow files in the cache of `datasets`, keyed by the content of the files:
a corpus never sits in memory, an edited file is read again, and nothing is written beside the user's data. What does
sit in memory, while a file is first read, are its ids.

A loader either returns every row or raises one `DataError` that names each bad row by file, line and reason.
"""

import gzip
import hashlib
import json
import os
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

Source = str | os.PathLike[str]

ROLES = ("system", "user", "assistant", "tool")

CORPUS_FEATURES = Features({"_id": Value("string"), "title": Value("string"), "text": Value("string")})
QUERY_FEATURES = Features(
    {
        "_id": Value("string"),
        "messages": [{"role": Value("string"), "content": Value("string")}],
        "rewrite": Value("string"),
        "conv": Value("string"),
        "turn": Value("int32"),
        "switch": Value("bool"),
        "gold": [Value("string")],
    }
)
TEXT_FEATURES = Features({"text": Value("string")})

# Plain text from a corpus, in characters: most sentences are shorter than the one, and what is shorter than the other
# is a list number or an initial that the sentence split cut off.
MAX_TEXT_CHARS = 500
MIN_TEXT_CHARS = 15

PROBLEMS_SHOWN = 20
# A wrong file, or a wrong field name, makes every row bad: say so without reading on through a large file.
PROBLEMS_PER_FILE = 1000

MIN_OVERLAP_WORDS = 4
# Thai, Lao, Burmese, Khmer; Japanese syllables; Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HEADER = ["query-id", "corpus-id", "score"]
# At most nine digits: no real score is longer, and Python refuses to convert very long ones.
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]”’»])\s+|(?<=[。！？])|\n+")


class DataError(ValueError):
    """Data that cannot be loaded.

    Attributes:
        source: the folder, file or Hub id.
        problems: every problem found, one string each: `file:line: reason`. Reading a file stops at 1,000 of them.
    """

    def __init__(self, source: Source, problems: list[str]) -> None:
        super().__init__(source, problems)
        self.source = str(source)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}"
        lines = [f"{self.source}: {len(self.problems):,} problems", *self.problems[:PROBLEMS_SHOWN]]
        if len(self.problems) > PROBLEMS_SHOWN:
            lines.append(f"... and {len(self.problems) - PROBLEMS_SHOWN:,} more")
        return "\n  ".join(lines)


class _BadRow(ValueError):
    """The reason why one row cannot be used."""


class _Judgement(NamedTuple):
    line: int
    query: str
    document: str
    score: int


@dataclass(frozen=True)
class Task:
    """One split of a retrieval task.

    Attributes:
        name: the folder's name, or the Hub id.
        split: the name of the qrels file.
        corpus: columns `_id`, `title`, `text`.
        queries: the split's queries, see `load_queries`.
        qrels: query id -> document id -> score, for exactly the ids in `queries`.
    """

    name: str
    split: str
    corpus: Dataset
    queries: Dataset
    qrels: dict[str, dict[str, int]]


def load_corpus(source: Source, *, revision: str | None = None) -> Dataset:
    """Documents in file order: `_id`, `title`, `text`, all strings.

    An integer `_id` becomes a string. `title` and `text` may be absent or null (then `""`), but not both be blank.

    Raises:
        DataError: naming every bad row.
    """
    folder = _folder(source, ["corpus.jsonl*"], revision)
    return _load_corpus(folder)


def read_documents(file: Path) -> list[dict[str, str]]:
    """As [`load_corpus`], of one file of any name (`.gz` or not), into memory. Raises `DataError`, naming every bad row."""
    problems: list[str] = []
    documents = list(_identified_rows(file.parent, file.name, _document, problems))
    _raise_if_any(str(file.parent), problems)
    return documents


def read_conversations(file: Path) -> list[list[dict[str, str]]]:
    """The `messages` of [`load_queries`], of one file of any name, into memory. Raises `DataError`, naming every bad row."""
    if not file.is_file():
        raise DataError(file, ["no such file; name a queries.jsonl with messages"])
    problems: list[str] = []
    conversations = [row["messages"] for row in _identified_rows(file.parent, file.name, _query, problems)]
    _raise_if_any(str(file.parent), problems)
    return conversations


def load_queries(source: Source, split: str | None = None, *, revision: str | None = None) -> Dataset:
    """Queries in file order: those that have a relevant document in `qrels/<split>.tsv`, or all if `split` is None.

    Columns:
        _id: string; an integer in the file becomes one.
        messages: list of `{"role", "content"}`, as they stand, empty ones included. Other fields of a message are left
            out. A message with `tool_calls` may lack `content`, or have null; it becomes `""`.
        rewrite: the stand-alone question that a human wrote, `""` when there is none.
        conv: `metadata.conv` as a string; the query's id when there is none. Unique within a split at best: collections
            number their conversations from 1 in each split.
        turn: `metadata.turn`; the number of user messages when there is none.
        switch: `metadata.switch`, whether this turn changes the topic; null when unknown.
        gold: ids of the documents with a score above 0, in the order of the qrels file; empty when `split` is None.

    A conversation may end on any role, but not on an empty user message.

    Raises:
        DataError: naming every bad row of the queries and of the qrels, and judgements of unknown queries.
    """
    folder = _folder(source, ["queries.jsonl*", "qrels/*.tsv*"], revision)
    return _load_queries(folder, split)


def load_qrels(source: Source, split: str, *, revision: str | None = None) -> dict[str, dict[str, int]]:
    """Judgements of one split: query id -> document id -> score, zeros included.

    Columns are separated by tabs, scores are integers. The header line `query-id corpus-id score` may be missing: a
    first line that is itself a judgement counts as one. The same pair twice is an error if the scores differ.

    Raises:
        DataError: naming every bad row. Ids are checked against queries and corpus by `load_task`.
    """
    folder = _folder(source, ["qrels/*.tsv*"], revision)
    problems: list[str] = []
    judgements = _read_judgements(folder, split, problems)
    if problems:
        raise DataError(source, problems)
    return _by_query(judgements)


def splits(source: Source, *, revision: str | None = None) -> list[str]:
    """Names of the qrels files, sorted; empty for a folder of queries without judgements."""
    return sorted(_splits(_folder(source, ["qrels/*.tsv*"], revision)))


def load_task(source: Source, split: str, *, revision: str | None = None) -> Task:
    """Corpus, queries and judgements of one split, checked against each other.

    Queries whose judgements are all 0 or below are left out of `queries` and of `qrels`: no ranking of theirs is right.

    Raises:
        DataError: with the problems of all the files together.
    """
    folder = _folder(source, ["corpus.jsonl*", "queries.jsonl*", "qrels/*.tsv*"], revision)
    problems: list[str] = []
    try:
        corpus = _load_corpus(folder)
    except DataError as error:
        problems += error.problems
    try:
        queries = _load_queries(folder, split)
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(source, problems)

    judgements = _read_judgements(folder, split, problems)
    missing = {judgement.document for judgement in judgements}
    for batch in corpus.select_columns("_id").iter(batch_size=10_000):
        missing.difference_update(batch["_id"])
    for judgement in judgements:
        if judgement.document in missing:
            where = f"{_qrels_file(folder, split)}:{judgement.line}"
            problems.append(f"{where}: unknown document {judgement.document!r} — no row of the corpus has this _id")
    if problems:
        raise DataError(source, problems)
    qrels = _by_query(judgements)
    name = folder.name if Path(source).is_dir() else str(source)
    return Task(name, split, corpus, queries, {query: qrels[query] for query in queries["_id"]})


def load_texts(source: Source, *, revision: str | None = None) -> Dataset:
    """Plain text for alignment, one column `text`. The source is one of:

    - `.txt` or `.txt.gz`: one text a line, blank lines skipped;
    - `.jsonl` or `.jsonl.gz`: `{"text", "title"?}` a line, the text being title, space, text;
    - a folder or Hub id in this module's layout: the sentences of its corpus.

    The sentence split is a simple one: after `.`, `!` or `?` (and a closing quote or bracket) before white space,
    after `。！？`, and at line breaks, so abbreviations are cut too. Sentences above 500 characters are cut at a space,
    pieces below 15 are dropped. A document without a text gives its title.

    Raises:
        DataError: naming every bad row.
    """
    path = Path(source)
    if path.name.endswith((".txt", ".txt.gz", ".jsonl", ".jsonl.gz")) and not path.is_dir():
        if not path.is_file():
            raise DataError(source, [f"{path.name}: no such file"])
        rows = _line_texts if path.name.endswith((".txt", ".txt.gz")) else _json_texts
        return _build(rows, TEXT_FEATURES, path.resolve().parent, [path.name], {"name": path.name})
    if path.is_file():
        raise DataError(source, [f"{path.name}: the name must end in .txt, .txt.gz, .jsonl or .jsonl.gz"])
    folder = _folder(source, ["corpus.jsonl*"], revision)
    name = _find(folder, "corpus")
    return _build(_sentence_texts, TEXT_FEATURES, folder, [name], {"name": name})


def drop_overlap(train_queries: Dataset, held_out_queries: Dataset) -> tuple[Dataset, int]:
    """Training queries without those whose conversation also stands in a held-out split, and how many were dropped.

    A training row goes if, ignoring case and white space, a held-out row has the same first user message (of at least
    4 words: shorter ones open many conversations), the same rewrite, or the same messages throughout. In scripts that
    write no spaces between words, three characters are counted as a word.
    """
    held_out = {key for keys in _overlap_keys(held_out_queries) for key in keys}
    keep = [i for i, keys in enumerate(_overlap_keys(train_queries)) if held_out.isdisjoint(keys)]
    return train_queries.select(keep), len(train_queries) - len(keep)


def _overlap_keys(queries: Dataset) -> Iterator[list[tuple[str, ...]]]:
    for batch in queries.select_columns(["messages", "rewrite"]).iter(batch_size=1000):
        for messages, rewrite in zip(batch["messages"], batch["rewrite"], strict=True):
            turns = [(message["role"], _normalised(message["content"])) for message in messages]
            keys: list[tuple[str, ...]] = [("messages", *(part for turn in turns if turn[1] for part in turn))]
            first = next((text for role, text in turns if role == "user" and text), "")
            if num_words(first) >= MIN_OVERLAP_WORDS:
                keys.append(("first", first))
            if rewrite.strip():
                keys.append(("rewrite", _normalised(rewrite)))
            yield keys


def num_words(text: str) -> int:
    """How many words a text has, roughly: between white space, or three characters of a script that writes no spaces."""
    unspaced = len(_UNSPACED.findall(text))
    return len(_UNSPACED.sub(" ", text).split()) + -(-unspaced // 3)


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


# Finding the files


def _folder(source: Source, patterns: list[str], revision: str | None) -> Path:
    """The local folder of a source, fetched from the Hub if it is not here."""
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a local folder, and revision={revision!r} is for data sets on the Hub only")
        return Path(source).resolve()
    if not _HUB_ID.fullmatch(str(source)):
        raise DataError(source, ["no such folder, and not a Hub id (owner/name) either"])
    try:
        return Path(
            snapshot_download(str(source), repo_type="dataset", allow_patterns=patterns, revision=revision)
        ).resolve()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise DataError(source, [f"no such folder, and the Hub does not give such a data set: {error}"]) from error


def _find(folder: Path, stem: str) -> str:
    """The name of the file that is there, `<stem>.jsonl` or `<stem>.jsonl.gz`."""
    names = [f"{stem}.jsonl", f"{stem}.jsonl.gz"]
    found = [name for name in names if (folder / name).is_file()]
    if len(found) == 2:
        raise DataError(folder, [f"both {names[0]} and {names[1]} are there — keep one of them"])
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DataError(folder, [f"{names[0]}: no such file, nor {names[1]}; there is {there}"])
    return found[0]


def _splits(folder: Path) -> dict[str, str]:
    """The name of each split's file, `qrels/<split>.tsv` or `qrels/<split>.tsv.gz`."""
    found: dict[str, str] = {}
    for path in sorted([*folder.glob("qrels/*.tsv"), *folder.glob("qrels/*.tsv.gz")]):
        split = path.name.removesuffix(".gz").removesuffix(".tsv")
        if split in found:
            raise DataError(folder, [f"both {found[split]} and qrels/{path.name} are there — keep one of them"])
        found[split] = f"qrels/{path.name}"
    return found


# Building the data sets


def _build(
    rows: Callable[..., Iterator[dict[str, Any]]],
    features: Features,
    folder: Path,
    files: list[str],
    arguments: dict[str, str | None],
) -> Dataset:
    # `datasets` finds its cached result by the generator's arguments, so the digest among them is what makes it see
    # another content. A hash, not size and time of change: these can stay the same, and hashing is cheap beside
    # parsing. This file's own text is hashed too, so that a new version of the rules does not meet old rows.
    digest = hashlib.blake2b(digest_size=16)
    for path in (Path(__file__), *(folder / name for name in files)):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        digest.update(b"\0")
    try:
        return Dataset.from_generator(
            rows,
            features=features,
            gen_kwargs={"folder": str(folder), "digest": digest.hexdigest(), **arguments},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _load_corpus(folder: Path) -> Dataset:
    name = _find(folder, "corpus")
    return _build(_corpus_rows, CORPUS_FEATURES, folder, [name], {"name": name})


def _load_queries(folder: Path, split: str | None) -> Dataset:
    name = _find(folder, "queries")
    files = [name]
    if split is not None:
        files.append(_qrels_file(folder, split))
    return _build(_query_rows, QUERY_FEATURES, folder, files, {"name": name, "split": split})


# Generators. `digest` is unused in them: see `_build`. All of them read to the end before they complain.


def _corpus_rows(folder: str, name: str, digest: str) -> Iterator[dict[str, Any]]:
    problems: list[str] = []
    yield from _identified_rows(Path(folder), name, _document, problems)
    _raise_if_any(folder, problems)


def _query_rows(folder: str, name: str, split: str | None, digest: str) -> Iterator[dict[str, Any]]:
    problems: list[str] = []
    judgements = [] if split is None else _read_judgements(Path(folder), split, problems)
    gold: dict[str, list[str]] = {}
    for judgement in judgements:
        documents = gold.setdefault(judgement.query, [])
        if judgement.score > 0 and judgement.document not in documents:
            documents.append(judgement.document)

    unknown = set(gold)
    for row in _identified_rows(Path(folder), name, _query, problems):
        unknown.discard(row["_id"])
        relevant = gold.get(row["_id"], [])
        if split is None or relevant:
            yield {**row, "gold": relevant}
    # While rows are unreadable, their ids are missing too: naming these would bury the cause under its effects.
    if not problems:
        for judgement in judgements:
            if judgement.query in unknown:
                where = f"{_qrels_file(Path(folder), split)}:{judgement.line}"
                problems.append(f"{where}: unknown query {judgement.query!r} — no row of {name} has this _id")
    _raise_if_any(folder, problems)


def _line_texts(folder: str, name: str, digest: str) -> Iterator[dict[str, str]]:
    problems: list[str] = []
    for _, line in _lines(Path(folder), name, problems):
        yield {"text": line.strip()}
    _raise_if_any(folder, problems)


def _json_texts(folder: str, name: str, digest: str) -> Iterator[dict[str, str]]:
    problems: list[str] = []
    for _, row in _json_rows(Path(folder), name, _title_and_text, problems):
        yield {"text": f"{row['title']} {row['text']}".strip()}
    _raise_if_any(folder, problems)


def _sentence_texts(folder: str, name: str, digest: str) -> Iterator[dict[str, str]]:
    problems: list[str] = []
    count = 0
    for row in _identified_rows(Path(folder), name, _document, problems):
        for text in _sentences(row["text"] if row["text"].strip() else row["title"]):
            count += 1
            yield {"text": text}
    if not count and not problems:
        problems.append(f"{name}: no sentence of at least {MIN_TEXT_CHARS} characters")
    _raise_if_any(folder, problems)


def _sentences(text: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(text):
        for piece in textwrap.wrap(sentence, MAX_TEXT_CHARS, break_on_hyphens=False):
            if len(piece) >= MIN_TEXT_CHARS:
                yield piece


def _raise_if_any(folder: str, problems: list[str]) -> None:
    if problems:
        raise DataError(folder, problems)


# Reading files


def _lines(folder: Path, name: str, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Non-blank lines and their numbers, from 1. Only `\\n` ends a line: JSON strings may hold other separators."""
    empty = True
    number = 0
    start = len(problems)
    path = folder / name
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
        try:
            for number, raw in enumerate(file, start=1):
                if number == 1 and raw.startswith(b"\x1f\x8b"):
                    problems.append(f"{name}: holds gzip data — its name must end in .gz (once)")
                    return
                if len(problems) - start >= PROBLEMS_PER_FILE:
                    problems.append(f"{name}:{number}: reading stopped here, after {PROBLEMS_PER_FILE:,} problems")
                    return
                try:
                    # The byte-order mark that some Windows programs write is no part of the first line.
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    problems.append(f"{name}:{number}: not UTF-8 ({error.reason}: {byte:#04x})")
                    empty = False
                    continue
                if line.strip():
                    empty = False
                    yield number, line
        except gzip.BadGzipFile as error:
            problems.append(f"{name}:{number + 1}: not a gzip file, or a damaged one ({error})")
            return
        except (EOFError, zlib.error) as error:
            problems.append(f"{name}:{number + 1}: truncated or damaged gzip file ({error})")
            return
    if empty:
        problems.append(f"{name}: empty file")


def _json_rows(
    folder: Path, name: str, parse: Callable[[dict[str, Any]], dict[str, Any]], problems: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(folder, name, problems):
        try:
            yield number, parse(_json_object(line))
        except _BadRow as error:
            problems.append(f"{name}:{number}: {error}")


def _identified_rows(
    folder: Path, name: str, parse: Callable[[dict[str, Any]], dict[str, Any]], problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Rows whose `_id` no earlier row has."""
    first: dict[str, int] = {}
    for number, row in _json_rows(folder, name, parse, problems):
        earlier = first.setdefault(row["_id"], number)
        if earlier == number:
            yield row
        else:
            problems.append(
                f"{name}:{number}: duplicate _id {row['_id']!r}, first seen at line {earlier} — ids must be unique"
            )


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if "\\u" in line:
            # An escape can spell half a surrogate pair, which is no character and which Arrow cannot store.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _BadRow(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except UnicodeEncodeError:
        raise _BadRow("half a surrogate pair in an escape (\\ud800 to \\udfff) is not a character") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        raise _BadRow(f"not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise _BadRow(f"a JSON object is needed, this is {_kind(value)}")
    return value


def _qrels_file(folder: Path, split: str) -> str:
    there = _splits(folder)
    if split not in there:
        raise DataError(
            folder, [f"qrels/{split}.tsv: no such split; there is {', '.join(there) or 'none (no qrels/*.tsv)'}"]
        )
    return there[split]


def _read_judgements(folder: Path, split: str, problems: list[str]) -> list[_Judgement]:
    name = _qrels_file(folder, split)
    judgements: list[_Judgement] = []
    scores: dict[tuple[str, str], _Judgement] = {}
    start = len(problems)
    first = True
    for number, line in _lines(folder, name, problems):
        columns = line.rstrip("\r\n").split("\t")
        header_here, first = first, False
        if header_here and [column.strip().lower() for column in columns] == _HEADER:
            continue
        try:
            judgement = _judgement(number, columns)
            earlier = scores.setdefault((judgement.query, judgement.document), judgement)
            if earlier.score != judgement.score:
                raise _BadRow(
                    f"score {judgement.score} for {judgement.query!r} and {judgement.document!r}, "
                    f"but {earlier.score} at line {earlier.line}"
                )
        except _BadRow as error:
            hint = " — the first line must be `query-id corpus-id score` or a judgement" if header_here else ""
            problems.append(f"{name}:{number}: {error}{hint}")
        else:
            judgements.append(judgement)
    if len(problems) == start and not any(judgement.score > 0 for judgement in judgements):
        problems.append(f"{name}: no judgement has a score above 0 — a split needs a relevant document")
    return judgements


def _judgement(number: int, columns: list[str]) -> _Judgement:
    if len(columns) != 3:
        raise _BadRow(f"{len(columns)} columns separated by tabs, wanted 3: query-id, corpus-id, score")
    query, document, score = columns
    if not query.strip() or not document.strip():
        raise _BadRow("the query id or the document id is empty")
    if not _INTEGER.fullmatch(score.strip()):
        raise _BadRow(f"score {_shown(score)} is not an integer")
    return _Judgement(number, query, document, int(score))


def _by_query(judgements: Iterable[_Judgement]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for judgement in judgements:
        qrels.setdefault(judgement.query, {})[judgement.document] = judgement.score
    return qrels


# The rules for one row


def _document(row: dict[str, Any]) -> dict[str, Any]:
    return {"_id": _identifier(row), **_title_and_text(row)}


def _title_and_text(row: dict[str, Any]) -> dict[str, Any]:
    title, text = _optional_string(row, "title"), _optional_string(row, "text")
    if not title.strip() and not text.strip():
        raise _BadRow("title and text are both missing or empty")
    return {"title": title, "text": text}


def _query(row: dict[str, Any]) -> dict[str, Any]:
    identifier = _identifier(row)
    messages = _messages(row)
    rewrite = _optional_string(row, "rewrite")
    metadata = row.get("metadata")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise _BadRow(f"metadata is {_kind(metadata)}, wanted an object")

    conv = metadata.get("conv")
    if conv is not None and type(conv) not in (str, int):
        raise _BadRow(f"metadata.conv is {_kind(conv)}, wanted a string or an integer")
    turn = metadata.get("turn")
    if turn is None:
        turn = max(1, sum(message["role"] == "user" for message in messages))
    elif type(turn) is not int or not 1 <= turn < 2**31:
        raise _BadRow(f"metadata.turn is {_shown(turn)}, wanted an integer from 1, the first turn")
    switch = metadata.get("switch")
    if switch is not None and type(switch) is not bool:
        raise _BadRow(f"metadata.switch is {_shown(switch)}, wanted true, false or null")
    return {
        "_id": identifier,
        "messages": messages,
        "rewrite": rewrite if rewrite.strip() else "",
        "conv": identifier if conv is None or conv == "" else str(conv),
        "turn": turn,
        "switch": switch,
    }


def _identifier(row: dict[str, Any]) -> str:
    value = row.get("_id")
    if type(value) is int:
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _BadRow("_id is missing or empty")
    if not isinstance(value, str):
        raise _BadRow(f"_id is {_kind(value)}, wanted a string or an integer")
    if "\t" in value or "\n" in value:
        raise _BadRow(f"_id {_shown(value)} holds a tab or a line break, which a qrels file cannot name")
    return value


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    entries = row.get("messages")
    if entries is None:
        hint = ' — write its text as [{"role": "user", "content": ...}]' if "text" in row else ""
        raise _BadRow(f"messages is missing{hint}")
    if not isinstance(entries, list):
        raise _BadRow(f"messages is {_kind(entries)}, wanted a list")
    if not entries:
        raise _BadRow("messages is empty")
    messages = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise _BadRow(f"messages[{i}] is {_kind(entry)}, wanted an object")
        role, content = entry.get("role"), entry.get("content")
        if role not in ROLES:
            raise _BadRow(f"messages[{i}].role is {_shown(role)}, wanted one of {', '.join(ROLES)}")
        if content is None and entry.get("tool_calls"):
            content = ""  # an agent that calls a tool need not say anything
        if not isinstance(content, str):
            raise _BadRow(f"messages[{i}].content is {_kind(content)}, wanted a string")
        messages.append({"role": role, "content": content})
    if not any(message["content"].strip() for message in messages):
        raise _BadRow("every message is empty")
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        raise _BadRow("the last message is an empty user turn")
    return messages


def _optional_string(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _BadRow(f"{field} is {_kind(value)}, wanted a string")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return {str: "a string", list: "a list", dict: "an object"}[type(value)]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
