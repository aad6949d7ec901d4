"""Writes conversations as a data set in the BEIR layout."""

import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from .entities import read_entity
from .turns import Generator, Turn


def conversation_rows(turns: Sequence[Turn], conversation: str) -> Iterator[tuple[dict, str]]:
    """The query rows of one conversation and the ids of their documents: one row for each user turn but small talk."""
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns, start=1):
        messages = [*messages, {"role": "user", "content": turn.content}]
        if turn.document_id is not None:
            metadata = {"conv": conversation, "turn": number, "switch": turn.switch, "aspect": turn.aspect}
            row = {
                "_id": f"{conversation}-{number}",
                "messages": messages,
                "rewrite": turn.rewrite,
                "metadata": metadata,
            }
            yield row, turn.document_id
        messages = [*messages, {"role": "assistant", "content": turn.answer}]


def check_corpus(corpus: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The corpus as a list. Raises ValueError, with the row's number, on a missing field or a bad or repeated `_id`."""
    documents, seen = list(corpus), set()
    if not documents:
        raise ValueError("The corpus is empty: synthesise needs documents to ask about.")
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, dict):
            raise ValueError(
                f"Corpus row {number} is a {type(document).__name__}: give an object with _id, title and text."
            )
        missing = [key for key in ("_id", "title", "text") if not isinstance(document.get(key), str)]
        if missing:
            raise ValueError(f"Corpus row {number} has no string {missing[0]!r}: it has {sorted(document)}; add it.")
        if not document["_id"] or re.search(r"[\t\r\n]", document["_id"]):
            raise ValueError(f"Corpus row {number}: _id {document['_id']!r} is empty or holds a tab or a line break.")
        if document["_id"] in seen:
            raise ValueError(f"Corpus row {number}: _id {document['_id']!r} occurs twice: drop one of the two.")
        seen.add(document["_id"])
    return documents


def synthesise(
    corpus: Iterable[dict[str, str]],
    output_dir: str | os.PathLike,
    generator: Generator,
    num_conversations: int,
    splits: Sequence[tuple[str, float]] = (("train", 0.9), ("dev", 0.05), ("test", 0.05)),
    seed: int = 0,
    write_corpus: bool = True,
) -> dict[str, int]:
    """Writes a BEIR folder with conversations about `corpus`, and returns the number of queries in each split.

    Documents and conversations are divided by the shares in `splits`: no document is asked about in two splits.
    Documents without usable text (disambiguation pages, stubs) are not asked about, but stay in the written corpus.
    The folder appears whole or not at all. Raises ValueError for an empty or broken corpus, too few usable documents
    or conversations for the splits, shares that do not add up to 1, an `output_dir` in use, and a generator that
    writes nothing usable for a split.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: choose another output_dir, or remove it.")
    names, shares = [name for name, _ in splits], [share for _, share in splits]
    if len(set(names)) < len(names) or min(shares, default=0) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"splits need different names and positive shares that add up to 1, got {tuple(splits)}.")
    if num_conversations < len(names):
        raise ValueError(f"num_conversations must be {len(names)} or more (one a split), got {num_conversations}.")
    documents = check_corpus(corpus)
    usable = [document for document in documents if (entity := read_entity(document)) and entity.questions]
    if len(usable) < 2 * len(names):
        raise ValueError(
            f"Too few usable documents for {len(names)} splits: {2 * len(names)} wanted, {len(usable)} of "
            f"{len(documents)} are usable. Usable are English texts with a title that say what it is, as an encyclopaedia does."
        )
    random.Random(seed).shuffle(usable)
    pools = dict(zip(names, divide(usable, shares, minimum=2), strict=True))
    wanted = dict(zip(names, map(len, divide(range(num_conversations), shares, minimum=1)), strict=True))

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    counts = dict.fromkeys(names, 0)
    try:
        (partial / "qrels").mkdir(parents=True)
        with (
            open(partial / "queries.jsonl", "w", encoding="utf-8") as queries,
            tqdm(total=num_conversations, desc="Synthesising", unit="conversation") as progress,
        ):
            for name in names:
                with open(partial / "qrels" / f"{name}.tsv", "w", encoding="utf-8") as qrels:
                    qrels.write("query-id\tcorpus-id\tscore\n")
                    for number, turns in enumerate(generator.generate(pools[name], wanted[name])):
                        for row, document_id in conversation_rows(turns, f"{name}-{number}"):
                            queries.write(json.dumps(row, ensure_ascii=False) + "\n")
                            qrels.write(f"{row['_id']}\t{document_id}\t1\n")
                            counts[name] += 1
                        progress.update()
                if not counts[name]:
                    raise ValueError(f"The generator wrote no usable conversation for the split {name!r}.")
        if write_corpus:
            with open(partial / "corpus.jsonl", "w", encoding="utf-8") as file:
                for document in documents:
                    row = {key: document[key] for key in ("_id", "title", "text")}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if output.exists():  # empty, see above; a rename onto a folder fails on Windows
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def divide(items: Sequence, shares: Sequence[float], minimum: int) -> list[Sequence]:
    """Cuts `items` into one piece for each share, of at least `minimum` items; the largest share takes the rest."""
    sizes = [max(minimum, round(share * len(items))) for share in shares]
    largest = max(range(len(shares)), key=shares.__getitem__)
    sizes[largest] += len(items) - sum(sizes)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [items[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def load_corpus(path: str | os.PathLike) -> list[dict[str, str]]:
    """Reads `corpus.jsonl` or `corpus.jsonl.gz`: the file itself, or the folder that holds it; see `data.py`."""
    from ..data import read_documents  # slow to import

    path = Path(path)
    candidates = [path / "corpus.jsonl", path / "corpus.jsonl.gz"] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ValueError(
            f"No corpus at {path}: expected a .jsonl or .jsonl.gz file, or a folder with corpus.jsonl in it."
        )
    return read_documents(file)
