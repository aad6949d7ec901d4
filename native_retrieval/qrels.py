"""Reads relevance judgements ("qrels"): tab-separated as in BEIR, comma-separated, or in TREC's four columns."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .rows import BadRow, DataError, read_lines, shown

QRELS = "qrels/*.[ct]sv*"

# At most nine digits: no real score is longer, and Python refuses to convert very long ones.
_SCORE = re.compile(r"[+-]?[0-9]{1,9}(?:\.0*)?")
# Names of columns in a qrels file, in lower case and without punctuation.
_HEADER = (
    {"queryid", "qid", "query", "topic", "topicid"},
    {"corpusid", "docid", "docno", "doc", "documentid", "document", "passageid", "pid"},
    {"score", "relevance", "rel", "label", "grade", "judgment", "judgement", "qrel"},
)
_WANTED = "wanted 3: query-id, corpus-id, score (or TREC's 4: query-id, 0, corpus-id, score)"


class Judgement(NamedTuple):
    line: int
    query: str
    document: str
    score: int


def qrels_files(folder: Path) -> dict[str, str]:
    """The name of each split's file, `qrels/<split>.tsv` or `.csv`, or one of these with `.gz`."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob(QRELS)):
        split, _, ending = path.name.removesuffix(".gz").rpartition(".")
        if ending not in ("tsv", "csv"):
            continue
        if split in found:
            raise DataError(folder, [f"both {found[split]} and qrels/{path.name} are there — keep one of them"])
        found[split] = f"qrels/{path.name}"
    return found


def qrels_file(folder: Path, split: str) -> str:
    there = qrels_files(folder)
    if split not in there:
        raise DataError(
            folder, [f"qrels/{split}.tsv: no such split; there is {', '.join(there) or 'none (no qrels/*.tsv)'}"]
        )
    return there[split]


class _Layout(NamedTuple):
    """How the lines of a qrels file are written."""

    separator: str | None  # None: white space
    num_columns: int
    places: tuple[int, ...]  # the columns of query, document and score


def read_judgements(folder: Path, name: str, problems: list[str]) -> list[Judgement]:
    """The judgements of a qrels file. Its first line, a header or a judgement, tells how all lines are written."""
    judgements: list[Judgement] = []
    scores: dict[tuple[str, str], Judgement] = {}
    start = len(problems)
    layout: _Layout | None = None
    first = True
    for number, line in read_lines(folder, name, problems):
        hint = " — the first line must be `query-id corpus-id score` or a judgement" if first else ""
        first = False
        try:
            if layout is None:
                layout, is_header = _layout_of(line)
                if is_header:
                    continue
            judgement = _judgement(number, line, layout)
            earlier = scores.setdefault((judgement.query, judgement.document), judgement)
            if earlier.score != judgement.score:
                raise BadRow(
                    f"score {judgement.score} for {judgement.query!r} and {judgement.document!r}, "
                    f"but {earlier.score} at line {earlier.line}"
                )
        except BadRow as error:
            problems.append(f"{name}:{number}: {error}{hint}")
        else:
            judgements.append(judgement)
    if len(problems) == start and not any(judgement.score > 0 for judgement in judgements):
        problems.append(f"{name}: no judgement has a score above 0 — a split needs a relevant document")
    return judgements


def _layout_of(line: str) -> tuple[_Layout, bool]:
    """The layout of a file by its first line, and whether that line is a header. Raises `BadRow` if it is neither."""
    errors = []
    for separator in ("\t", ",", ";", None):
        num_columns = 0
        try:
            columns = _columns(line, separator)
            num_columns = len(columns)
            names = [re.sub("[^a-z]", "", column.lower()) for column in columns]
            found = [[i for i, name in enumerate(names) if name in known] for known in _HEADER]
            if all(len(places) == 1 for places in found):
                return _Layout(separator, num_columns, tuple(place for (place,) in found)), True
            trec = num_columns == 4 and columns[1].strip() in ("0", "Q0")
            layout = _Layout(separator, 3 + trec, (0, 2, 3) if trec else (0, 1, 2))
            _judgement(0, line, layout)
            return layout, False
        except BadRow as error:
            errors.append((num_columns > 1, error))
    raise next((error for several, error in errors if several), errors[0][1])


def _columns(line: str, separator: str | None) -> list[str]:
    if separator is None:
        return line.split()
    if separator == "\t":
        columns = line.rstrip("\r\n").split("\t")
    else:
        try:
            columns = next(csv.reader([line.strip()], delimiter=separator, skipinitialspace=True))
        except csv.Error as error:
            raise BadRow(f"not readable as CSV ({error})") from None
    while len(columns) > 3 and not columns[-1].strip():  # a separator at the end of the line
        columns.pop()
    return columns


def _judgement(number: int, line: str, layout: _Layout) -> Judgement:
    columns = _columns(line, layout.separator)
    if not max(layout.places) < len(columns) <= layout.num_columns:
        by = {"\t": "tabs", ",": "commas", ";": "semicolons", None: "white space"}[layout.separator]
        wanted = _WANTED if layout.num_columns == 3 else f"wanted {layout.num_columns}, as in the first line"
        raise BadRow(f"{len(columns)} columns separated by {by}, {wanted}")
    query, document, score = (columns[place] for place in layout.places)
    if not query.strip() or not document.strip():
        raise BadRow("the query id or the document id is empty")
    if not _SCORE.fullmatch(score.strip()):
        raise BadRow(f"score {shown(score)} is not an integer; write 0 for not relevant, 1 or more for relevant")
    return Judgement(number, query, document, int(score.partition(".")[0]))


def by_query(judgements: Iterable[Judgement]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for judgement in judgements:
        qrels.setdefault(judgement.query, {})[judgement.document] = judgement.score
    return qrels
