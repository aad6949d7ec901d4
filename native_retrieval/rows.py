"""Reads the files of a data set line by line, and checks each row. Every bad row is named by file, line and reason.

The loader in `data.py` knows folders, the Hub and Arrow; this module knows lines, JSON objects and judgements.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Json

from messages_native_retrieval import check_messages, clean_messages

from .cache import is_lfs_pointer

PROBLEMS_SHOWN = 20
# A wrong file or field name makes every row bad. Then there is no need to read a large file to its end.
PROBLEMS_PER_FILE = 1000

# Half of a character, where a program has cut a text. Arrow cannot store it.
_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """Data that cannot be loaded.

    Attributes:
        source: the folder, file or Hub id.
        problems: every problem found, one string each: `file:line: reason`. Reading a file stops at 1,000 of them.
    """

    def __init__(self, source: Any, problems: list[str]) -> None:
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


class BadRow(ValueError):
    """The reason why one row cannot be used."""


def raise_if_any(source: Any, problems: list[str]) -> None:
    if problems:
        raise DataError(source, problems)


# Lines and JSON objects


def read_lines(folder: Path, name: str, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Non-blank lines and their numbers, from 1. Only `\\n` ends a line: JSON strings may hold other separators."""
    path = folder / name
    if is_lfs_pointer(path):
        problems.append(f"{name}: a Git LFS pointer and not the data; fetch the data with `git lfs pull`")
        return
    empty = True
    number = 0
    start = len(problems)
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
                    # Some Windows programs write a byte-order mark before the first line.
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


def read_json(
    folder: Path, name: str, parse: Callable[[dict[str, Any]], dict[str, Any]], problems: list[str]
) -> Iterator[dict[str, Any]]:
    for _, row in _numbered_rows(folder, name, parse, problems):
        yield row


def read_identified(
    folder: Path, name: str, parse: Callable[[dict[str, Any]], dict[str, Any]], problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Rows whose `_id` no earlier row has."""
    first: dict[str, int] = {}
    for number, row in _numbered_rows(folder, name, parse, problems):
        earlier = first.setdefault(row["_id"], number)
        if earlier == number:
            yield row
        else:
            problems.append(
                f"{name}:{number}: duplicate _id {row['_id']!r}, first seen at line {earlier} — ids must be unique"
            )


def _numbered_rows(
    folder: Path, name: str, parse: Callable[[dict[str, Any]], dict[str, Any]], problems: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    first = True
    for number, line in read_lines(folder, name, problems):
        if first and (line.strip() == "{" or line.lstrip().startswith("[")):
            seen, program = ("a JSON array", ".[]") if "[" in line else ("an object over several lines", ".")
            problems.append(
                f"{name}:{number}: a JSON object is needed in each line (JSON Lines), this is {seen}; "
                f"convert the file with `jq -c '{program}'`"
            )
            return
        first = False
        try:
            yield number, parse(_json_object(line))
        except BadRow as error:
            problems.append(f"{name}:{number}: {error}")


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        raise BadRow(f"not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadRow(f"a JSON object is needed, this is {_kind(value)}")
    return value


# The rules for one row


def document(row: dict[str, Any]) -> dict[str, Any]:
    return {"_id": _identifier(row), **title_and_text(row)}


def title_and_text(row: dict[str, Any]) -> dict[str, Any]:
    title, text = _optional_string(row, "title"), _optional_string(row, "text")
    if not title.strip() and not text.strip():
        raise BadRow("title and text are both missing or empty")
    return {"title": title, "text": text}


def query(row: dict[str, Any]) -> dict[str, Any]:
    identifier = _identifier(row)
    messages = _messages(row)
    tools = row.get("tools")
    if not isinstance(tools, (list, type(None))):
        raise BadRow(f"tools is {_kind(tools)}, wanted a list of objects, as a model's API takes them")
    for tool in tools or ():
        if not isinstance(tool, dict):
            raise BadRow(f"tools is a list with {_kind(tool)}, wanted objects, as a model's API takes them")
    rewrite = _optional_string(row, "rewrite")
    metadata = row.get("metadata")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise BadRow(f"metadata is {_kind(metadata)}, wanted an object")

    conv = metadata.get("conv")
    if conv is not None and type(conv) not in (str, int):
        raise BadRow(f"metadata.conv is {_kind(conv)}, wanted a string or an integer")
    turn = metadata.get("turn")
    if turn is None:
        turn = max(1, sum(message["role"] == "user" for message in messages))
    elif type(turn) is not int or not 1 <= turn < 2**31:
        raise BadRow(f"metadata.turn is {shown(turn)}, wanted an integer from 1, the first turn")
    switch = metadata.get("switch")
    if switch is not None and type(switch) is not bool:
        raise BadRow(f"metadata.switch is {shown(switch)}, wanted true, false or null")
    return {
        "_id": identifier,
        "messages": _stored("messages", messages),
        "tools": _stored("tools", tools),
        "rewrite": rewrite if rewrite.strip() else "",
        "conv": identifier if conv is None or conv == "" else _SURROGATE.sub("\ufffd", str(conv)),
        "turn": turn,
        "switch": switch,
    }


def _stored(name: str, value: list[dict[str, Any]] | None) -> str | None:
    """A list as JSON, which is how the Arrow file holds it. Raises `BadRow` if it cannot be read back from there."""
    if value is None:
        return None
    text = _SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False))
    try:
        Json().decode_example(text)
    except ValueError as error:
        raise BadRow(f"{name} cannot be stored ({error}); write large numbers as strings") from None
    return text


def _identifier(row: dict[str, Any]) -> str:
    value = row.get("_id")
    if type(value) is int:
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow("_id is missing or empty")
    if not isinstance(value, str):
        raise BadRow(f"_id is {_kind(value)}, wanted a string or an integer")
    if "\t" in value or "\n" in value:
        raise BadRow(f"_id {shown(value)} holds a tab or a line break, which a qrels file cannot name")
    if _SURROGATE.search(value):
        raise BadRow(f"_id {shown(value)} holds half a surrogate pair, which a qrels file cannot name")
    return value


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    if row.get("messages") is None:
        hint = ' — write its text as [{"role": "user", "content": ...}]' if "text" in row else ""
        raise BadRow(f"messages is missing{hint}")
    try:
        check_messages(row["messages"], "messages")
    except ValueError as error:
        raise BadRow(str(error)) from None
    return clean_messages(row["messages"])


def _optional_string(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{field} is {_kind(value)}, wanted a string")
    return _SURROGATE.sub("\ufffd", value)


def _kind(value: object) -> str:
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return {str: "a string", list: "a list", dict: "an object"}[type(value)]


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
