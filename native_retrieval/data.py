"""Conversations, documents and judgements on disk -> `datasets.Dataset`.

The layout is BEIR's, with chat messages in place of a query's text. Each file may be plain or gzipped (`.gz`):

    corpus.jsonl        {"_id": "d1", "title": "...", "text": "..."}
    queries.jsonl       {"_id": "q1", "messages": [{"role": "user", "content": "..."}, ...], "tools": [...],
                         "rewrite": "...", "metadata": {"conv": "c7", "turn": 3, "switch": false}}
    qrels/<split>.tsv   query-id <tab> corpus-id <tab> score

`messages` and `tools` have the shapes of OpenAI's API. `tools`, `rewrite` and `metadata` are optional. Qrels may also be
comma-separated (`.csv`), or have TREC's four columns. A source is a folder in this layout, or the id of a data set on the
Hub in the same layout.

Files are read line by line into Arrow files in the cache of `datasets`, keyed by the content of the files. So a corpus
never sits in memory, an edited file is read again, and nothing is written beside the user's data. Only the ids of a file
are in memory while it is read for the first time.

A loader either returns every row or raises one `DataError` that names each bad row by file, line and reason.
"""

import hashlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from messages_native_retrieval import clean_messages

from . import rows
from .cache import sha256
from .qrels import QRELS, by_query, qrels_file, qrels_files, read_judgements
from .rows import DataError, raise_if_any, read_identified, read_json, read_lines

Source = str | os.PathLike[str]

CORPUS_FEATURES = Features({"_id": Value("string"), "title": Value("string"), "text": Value("string")})
QUERY_FEATURES = Features(
    {
        "_id": Value("string"),
        "messages": Json(),
        "tools": Json(),
        "rewrite": Value("string"),
        "conv": Value("string"),
        "turn": Value("int32"),
        "switch": Value("bool"),
        "gold": List(Value("string")),
    }
)
TEXT_FEATURES = Features({"text": Value("string")})

# Limits of a sentence of plain text, in characters. Most sentences are shorter than the first. Pieces shorter than the
# second are list numbers or initials that the sentence split has cut off.
MAX_TEXT_CHARS = 500
MIN_TEXT_CHARS = 15

MIN_OVERLAP_WORDS = 4
# Thai, Lao, Burmese, Khmer; Japanese syllables; Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]”’»])\s+|(?<=[。！？])|\n+")


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
    return _load_corpus(_folder(source, ["corpus.jsonl*"], revision))


def read_documents(file: Path) -> list[dict[str, str]]:
    """Like [`load_corpus`], but from one file of any name into memory. Raises `DataError`, naming every bad row."""
    problems: list[str] = []
    documents = list(read_identified(file.parent, file.name, rows.document, problems))
    raise_if_any(file.parent, problems)
    return documents


def read_conversations(file: Path) -> list[list[dict[str, Any]]]:
    """The `messages` of a queries.jsonl of any name, into memory. Raises `DataError`, naming every bad row."""
    if not file.is_file():
        raise DataError(file, ["no such file; name a queries.jsonl with messages"])
    problems: list[str] = []
    encoded = [row["messages"] for row in read_identified(file.parent, file.name, rows.query, problems)]
    raise_if_any(file.parent, problems)
    return list(map(json.loads, encoded))


def load_queries(source: Source, split: str | None = None, *, revision: str | None = None) -> Dataset:
    """Queries in file order: those that have a relevant document in `qrels/<split>.tsv`, or all if `split` is None.

    Columns:
        _id: string; an integer in the file becomes one.
        messages: list of messages with all their fields, empty messages included. `content` is always a string: the
            parts of a list are joined by line breaks, null becomes `""`, and characters that cannot be stored are replaced.
        tools: list of tool schemas; null when the row has none.
        rewrite: the stand-alone question that a human wrote; `""` when there is none.
        conv: `metadata.conv` as a string; the query's id when there is none. It is unique within a split at best, because
            collections number their conversations from 1 in each split.
        turn: `metadata.turn`; the number of user messages when there is none.
        switch: `metadata.switch`, whether this turn changes the topic; null when unknown.
        gold: ids of the documents with a score above 0, in the order of the qrels file; empty when `split` is None.

    A conversation may end on any role, but not on an empty user message.

    Raises:
        DataError: naming every bad row of the queries and of the qrels, and judgements of unknown queries.
    """
    return _load_queries(_folder(source, ["queries.jsonl*", QRELS], revision), split)


def load_qrels(source: Source, split: str, *, revision: str | None = None) -> dict[str, dict[str, int]]:
    """Judgements of one split: query id -> document id -> score, zeros included.

    Columns are separated by tabs, commas or white space: query-id, corpus-id, score, or TREC's query-id, 0, corpus-id,
    score. A header line may name them in any order. Scores are whole numbers; `1.0` is one. The same pair twice is an
    error if the scores differ.

    Raises:
        DataError: naming every bad row. Ids are checked against queries and corpus by `load_task`.
    """
    folder = _folder(source, [QRELS], revision)
    problems: list[str] = []
    judgements = read_judgements(folder, qrels_file(folder, split), problems)
    raise_if_any(source, problems)
    return by_query(judgements)


def splits(source: Source, *, revision: str | None = None) -> list[str]:
    """Names of the qrels files, sorted; empty for a folder of queries without judgements."""
    return sorted(qrels_files(_folder(source, [QRELS], revision)))


def load_task(source: Source, split: str, *, revision: str | None = None) -> Task:
    """Corpus, queries and judgements of one split, checked against each other.

    Queries whose judgements are all 0 or below are left out of `queries` and `qrels`, because no ranking of them is right.

    Raises:
        DataError: with the problems of all the files together.
    """
    folder = _folder(source, ["corpus.jsonl*", "queries.jsonl*", QRELS], revision)
    problems: list[str] = []
    try:
        corpus = _load_corpus(folder)
    except DataError as error:
        problems += error.problems
    try:
        queries = _load_queries(folder, split)
    except DataError as error:
        problems += error.problems
    raise_if_any(source, problems)

    name = qrels_file(folder, split)
    judgements = read_judgements(folder, name, problems)
    missing = {judgement.document for judgement in judgements}
    for batch in corpus.select_columns("_id").iter(batch_size=10_000):
        missing.difference_update(batch["_id"])
    problems += [
        f"{name}:{judgement.line}: unknown document {judgement.document!r} — no row of the corpus has this _id"
        for judgement in judgements
        if judgement.document in missing
    ]
    raise_if_any(source, problems)
    scores = by_query(judgements)
    source_name = folder.name if Path(source).is_dir() else str(source)
    return Task(source_name, split, corpus, queries, {query: scores[query] for query in queries["_id"]})


def load_texts(source: Source, *, revision: str | None = None) -> Dataset:
    """Plain text for lexical pre-training, one column `text`. The source is one of:

    - `.txt` or `.txt.gz`: one text a line, blank lines skipped;
    - `.jsonl` or `.jsonl.gz`: `{"text", "title"?}` a line; the title and a space are put before the text;
    - a folder or Hub id in this module's layout: the sentences of its corpus.

    The sentence split is simple: after `.`, `!` or `?` (and a closing quote or bracket) before white space, after `。！？`,
    and at line breaks. So it also splits after abbreviations. Sentences over 500 characters are split at a space, pieces
    under 15 are dropped. A document without a text gives its title.

    Raises:
        DataError: naming every bad row.
    """
    path = Path(source)
    if path.name.endswith((".txt", ".txt.gz", ".jsonl", ".jsonl.gz")) and not path.is_dir():
        if not path.is_file():
            raise DataError(source, [f"{path.name}: no such file"])
        read = _line_texts if path.name.endswith((".txt", ".txt.gz")) else _json_texts
        return _build(read, TEXT_FEATURES, path.resolve().parent, [path.name], {"name": path.name})
    if path.is_file():
        raise DataError(source, [f"{path.name}: the name must end in .txt, .txt.gz, .jsonl or .jsonl.gz"])
    folder = _folder(source, ["corpus.jsonl*"], revision)
    name = _find(folder, "corpus")
    return _build(_sentence_texts, TEXT_FEATURES, folder, [name], {"name": name})


def drop_overlap(train_queries: Dataset, held_out_queries: Dataset) -> tuple[Dataset, int]:
    """Training queries whose conversation is in no held-out split, and how many others were dropped.

    A training row is dropped if a held-out row has the same first user message (of at least 4 words, because shorter ones
    begin many conversations), the same rewrite, or the same messages. Case and white space are ignored. In scripts without
    spaces between words, three characters count as a word.
    """
    held_out = {key for keys in _overlap_keys(held_out_queries) for key in keys}
    keep = [i for i, keys in enumerate(_overlap_keys(train_queries)) if held_out.isdisjoint(keys)]
    return train_queries.select(keep), len(train_queries) - len(keep)


def _overlap_keys(queries: Dataset) -> Iterator[list[tuple[str, ...]]]:
    for batch in queries.select_columns(["messages", "rewrite"]).iter(batch_size=1000):
        for messages, rewrite in zip(batch["messages"], batch["rewrite"], strict=True):
            said = [(message["role"], _normalised(message["content"])) for message in clean_messages(messages)]
            keys: list[tuple[str, ...]] = [("messages", *(part for turn in said if turn[1] for part in turn))]
            first = next((text for role, text in said if role == "user" and text), "")
            keys += [("first", first)] if num_words(first) >= MIN_OVERLAP_WORDS else []
            keys += [("rewrite", _normalised(rewrite))] if rewrite.strip() else []
            yield keys


def num_words(text: str) -> int:
    """Roughly how many words a text has. In scripts without spaces, three characters count as a word."""
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
        folder = snapshot_download(str(source), repo_type="dataset", allow_patterns=patterns, revision=revision)
        return Path(folder).resolve()
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


# Building the data sets


def _build(
    generator: Callable[..., Iterator[dict[str, Any]]],
    features: Features,
    folder: Path,
    files: list[str],
    arguments: dict[str, str | None],
) -> Dataset:
    # `datasets` finds its cached result by the generator's arguments, so they hold a digest of the files. It is a hash and
    # not the size and time of change, which can stay the same; hashing is cheap beside parsing. The code that reads and
    # checks rows is hashed too, so that a new version of the rules does not meet old rows.
    digest = hashlib.blake2b(digest_size=16)
    code = (__name__, rows.__name__, read_judgements.__module__, clean_messages.__module__)
    for path in (*(sys.modules[name].__file__ for name in code), *(folder / name for name in files)):
        digest.update(sha256(path).encode())
    try:
        return Dataset.from_generator(
            generator,
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
    files = [name] if split is None else [name, qrels_file(folder, split)]
    return _build(_query_rows, QUERY_FEATURES, folder, files, {"name": name, "split": split})


# Generators. They do not use `digest`, see `_build`. All of them read to the end before they raise.


def _corpus_rows(folder: str, name: str, digest: str) -> Iterator[dict[str, Any]]:
    problems: list[str] = []
    yield from read_identified(Path(folder), name, rows.document, problems)
    raise_if_any(folder, problems)


def _query_rows(folder: str, name: str, split: str | None, digest: str) -> Iterator[dict[str, Any]]:
    problems: list[str] = []
    qrels = None if split is None else qrels_file(Path(folder), split)
    judgements = [] if qrels is None else read_judgements(Path(folder), qrels, problems)
    gold: dict[str, list[str]] = {}
    for judgement in judgements:
        documents = gold.setdefault(judgement.query, [])
        if judgement.score > 0 and judgement.document not in documents:
            documents.append(judgement.document)

    unknown = set(gold)
    for row in read_identified(Path(folder), name, rows.query, problems):
        unknown.discard(row["_id"])
        relevant = gold.get(row["_id"], [])
        if split is None or relevant:
            yield {**row, "gold": relevant}
    # The ids of bad rows are unknown too. To name them would hide the cause among its effects.
    if not problems:
        problems = [
            f"{qrels}:{judgement.line}: unknown query {judgement.query!r} — no row of {name} has this _id"
            for judgement in judgements
            if judgement.query in unknown
        ]
    raise_if_any(folder, problems)


def _line_texts(folder: str, name: str, digest: str) -> Iterator[dict[str, str]]:
    problems: list[str] = []
    for _, line in read_lines(Path(folder), name, problems):
        yield {"text": line.strip()}
    raise_if_any(folder, problems)


def _json_texts(folder: str, name: str, digest: str) -> Iterator[dict[str, str]]:
    problems: list[str] = []
    for row in read_json(Path(folder), name, rows.title_and_text, problems):
        yield {"text": f"{row['title']} {row['text']}".strip()}
    raise_if_any(folder, problems)


def _sentence_texts(folder: str, name: str, digest: str) -> Iterator[dict[str, str]]:
    problems: list[str] = []
    count = 0
    for row in read_identified(Path(folder), name, rows.document, problems):
        for text in _sentences(row["text"] if row["text"].strip() else row["title"]):
            count += 1
            yield {"text": text}
    if not count and not problems:
        problems.append(f"{name}: no sentence of at least {MIN_TEXT_CHARS} characters")
    raise_if_any(folder, problems)


def _sentences(text: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(text):
        for piece in textwrap.wrap(sentence, MAX_TEXT_CHARS, break_on_hyphens=False):
            if len(piece) >= MIN_TEXT_CHARS:
                yield piece
