# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Cuts the public data sets of the tables from their original release files into the layout that training and evaluation
read. Nothing is downloaded: get the files from their authors, and mind their licenses.

    python benchmarks/public_slices.py qrecc qrecc_train.json --output data/qrecc
    python benchmarks/public_slices.py canard dev.json --output data/canard
    python benchmarks/public_slices.py doc2dial doc2dial_doc.json doc2dial_dial_validation.json --output data/doc2dial
    python benchmarks/public_slices.py topiocqa_lead topiocqa_train.json topiocqa_dev.json corpus.jsonl \\
        --output data/topiocqa_lead
    python benchmarks/public_slices.py topiocqa_answer topiocqa_train.json topiocqa_dev.json --output data/topiocqa_answer

qrecc            QReCC, https://github.com/apple/ml-qrecc (CC BY-SA 3.0). 2,000 turns of qrecc_train.json, chosen by a hash
                 of conversation and turn. The documents are the answers of these turns and of the turns before them, so
                 this is answer retrieval and not passage retrieval from QReCC's own collection. The slice in the tables is
                 another sample of the same size, so expect similar numbers and not the same ones.
canard           CANARD, https://sites.google.com/view/qanta/projects/canard (CC BY-SA 4.0). Questions with human rewrites,
                 without documents. The tables leave out 50 of the 3,430 rows of dev.json.
doc2dial         Doc2Dial v1.0.1, https://doc2dial.github.io (CC BY 3.0). A document is a section of a web page. The gold
                 document of a user's turn is the section that the agent's reply is grounded in. Expect 2,771, 400 and 801
                 queries in train, dev and test, and 3,914 documents.
topiocqa_lead    TopiOCQA, https://github.com/McGill-NLP/topiocqa (CC BY-NC-SA 4.0). Answerable turns whose topic is an
                 article in the last file, a corpus.jsonl with the title of a Wikipedia article as _id. (With the articles
                 that `make demo` fetches, expect 11,366, 312 and 301 queries, and 10,033 documents.)
topiocqa_answer  TopiOCQA again: all answerable turns. A document is a turn's topic, section and answer. Expect 41,798 and
                 2,340 queries in train and dev, and 43,155 documents.

Every split is by conversation, and always comes out the same.
"""

import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.data import read_documents

QRECC_TURNS = 2000


@dataclass
class Slice:
    """A data set to write. `qrels` holds a split, a query and a document each."""

    queries: list[dict[str, Any]] = field(default_factory=list)
    corpus: list[dict[str, str]] = field(default_factory=list)
    qrels: list[tuple[str, str, str]] = field(default_factory=list)

    def add_query(self, query_id: str, messages: list[dict[str, str]], rewrite: str | None = None, **metadata) -> None:
        row = {"_id": query_id, "messages": messages, "metadata": metadata}
        self.queries.append(row if rewrite is None else {**row, "rewrite": rewrite})

    def add_texts(self, texts: Iterable[str]) -> dict[str, str]:
        """Adds documents without titles, each text once, and returns the id of each text."""
        ids = {text: str(number) for number, text in enumerate(dict.fromkeys(texts))}
        self.corpus = [{"_id": number, "title": "", "text": text} for text, number in ids.items()]
        return ids

    def write(self, output: Path) -> None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"--output: {output} exists and is not empty; choose another folder, or remove it")
        partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
        try:
            (partial / "qrels" if self.qrels else partial).mkdir(parents=True)
            for name, rows in (("corpus", self.corpus), ("queries", self.queries)):
                if rows:
                    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            for split in dict.fromkeys(split for split, _, _ in self.qrels):
                lines = (f"{query}\t{document}\t1\n" for name, query, document in self.qrels if name == split)
                text = "query-id\tcorpus-id\tscore\n" + "".join(lines)
                (partial / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
            if output.exists():  # and is empty
                output.rmdir()
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def qrecc(train: Path) -> Slice:
    made = Slice()
    turns = [turn for turn in read(train, list, "Context", "Question", "Rewrite", "Answer") if turn["Answer"].strip()]
    chosen = sorted(turns, key=lambda turn: digest(name_of(turn)))[:QRECC_TURNS]
    answers = [turn["Answer"] for turn in chosen]
    earlier = [text for turn in chosen for text in turn["Context"][1::2] if text.strip()]
    ids = made.add_texts([*answers, *earlier])
    for turn in chosen:
        conversation = turn["Conversation_no"]
        made.add_query(
            name_of(turn),
            alternating([*turn["Context"], turn["Question"]]),
            turn["Rewrite"],
            conv=conversation,
            turn=turn["Turn_no"],
        )
        share = digest(str(conversation)) % 10
        split = "train" if share < 6 else "dev" if share == 6 else "test"
        made.qrels.append((split, name_of(turn), ids[turn["Answer"]]))
    return made


def canard(dev: Path) -> Slice:
    made = Slice()
    for turn in read(dev, list, "History", "QuAC_dialog_id", "Question", "Question_no", "Rewrite"):
        title, section, *said = turn["History"]
        conversation, number = turn["QuAC_dialog_id"], turn["Question_no"]
        messages = alternating([*said, turn["Question"]])
        made.add_query(
            f"{conversation}_{number}",
            messages,
            turn["Rewrite"],
            conv=conversation,
            turn=number,
            section=f"{title} / {section}",
        )
    return made


def doc2dial(documents: Path, dialogues: Path) -> Slice:
    made = Slice()
    section_of: dict[tuple[str, str], str] = {}  # of a document's id and a span's
    starts: dict[tuple[str, str], int] = {}
    for domain in read(documents, dict, "doc_data")["doc_data"].values():
        for document_id, document in domain.items():
            for spans in sections(document["spans"].values()):
                text = " ".join(" ".join(span["text_sp"] for span in spans).split())
                title = document_id.rpartition("#")[0] or document_id
                section_id = str(len(made.corpus))
                made.corpus.append({"_id": section_id, "title": title, "text": text})
                for span in spans:
                    section_of[document_id, span["id_sp"]] = section_id
                    starts[document_id, span["id_sp"]] = span["start_sp"]
    by_id = {}
    for name, domain in read(dialogues, dict, "dial_data")["dial_data"].items():
        for document_id, several in domain.items():
            for dialogue in several:
                by_id[dialogue["dial_id"]] = (name, document_id, dialogue["turns"])
    split_of = shuffled_splits(by_id)
    for conversation, (domain, document_id, turns) in by_id.items():
        messages: list[dict[str, str]] = []
        for turn, reply in zip(turns, [*turns[1:], None], strict=True):
            role = "user" if turn["role"] == "user" else "assistant"
            messages = [*messages, {"role": role, "content": turn["utterance"]}]
            if role != "user" or reply is None or reply["role"] == "user":
                continue
            spans = [(document_id, reference["sp_id"]) for reference in reply.get("references", ())]
            spans = sorted(filter(section_of.get, spans), key=starts.get)
            if spans:
                number = turn["turn_id"]
                query_id = f"{conversation}_{number}"
                made.add_query(query_id, messages, conv=conversation, turn=number, domain=domain)
                made.qrels.append((split_of[conversation], query_id, section_of[spans[0]]))
    return made


def sections(spans: Iterable[dict]) -> Iterator[list[dict]]:
    """The spans of a document, in order, grouped by section; a heading belongs to the section below it."""
    group: list[dict] = []
    for span in spans:
        if group and span["id_sec"] != group[-1]["id_sec"] and span["title"].strip() != group[-1]["title"].strip():
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def shuffled_splits(conversations: Iterable[str]) -> dict[str, str]:
    """70, 10 and 20 percent of the conversations."""
    shuffled = sorted(conversations)
    random.Random(0).shuffle(shuffled)
    ends = int(0.7 * len(shuffled)), int(0.8 * len(shuffled))
    return {
        conversation: "train" if place < ends[0] else "dev" if place < ends[1] else "test"
        for place, conversation in enumerate(shuffled)
    }


def topiocqa_lead(train: Path, dev: Path, leads: Path) -> Slice:
    made = Slice(corpus=read_documents(leads))
    articles = {document["_id"] for document in made.corpus}
    for source, turn, messages, metadata in topiocqa_turns(train, dev):
        if turn["Topic"] in articles:
            query_id = f"{source}_{name_of(turn)}"
            made.add_query(query_id, messages, **metadata, section=turn["Topic_section"])
            # Of the development conversations, those with an even number are dev, the others test.
            split = "test" if source == "dev" and turn["Conversation_no"] % 2 else source
            made.qrels.append((split, query_id, turn["Topic"]))
    return made


def topiocqa_answer(train: Path, dev: Path) -> Slice:
    made = Slice()
    turns = list(topiocqa_turns(train, dev))
    texts = [" | ".join((turn["Topic"], turn["Topic_section"], turn["Answer"])) for _, turn, _, _ in turns]
    ids = made.add_texts(texts)
    for (source, turn, messages, metadata), text in zip(turns, texts, strict=True):
        query_id = f"{source}_{name_of(turn)}"
        made.add_query(query_id, messages, **metadata)
        made.qrels.append((source, query_id, ids[text]))
    return made


def topiocqa_turns(train: Path, dev: Path) -> Iterator[tuple[str, dict, list[dict[str, str]], dict]]:
    """The answerable turns: `train` or `dev`, the row, its conversation so far, and the metadata of the query."""
    for source, path in (("train", train), ("dev", dev)):
        said: list[str] = []
        before: dict = {}
        for turn in read(path, list, "Conversation_no", "Turn_no", "Question", "Answer", "Topic", "Topic_section"):
            if turn["Conversation_no"] != before.get("Conversation_no"):
                said, before = [], {}
            if turn["Answer"] != "UNANSWERABLE":
                switch = turn["Topic"] != before.get("Topic", turn["Topic"])
                metadata = {"conv": turn["Conversation_no"], "turn": turn["Turn_no"], "switch": switch}
                yield source, turn, alternating([*said, turn["Question"]]), metadata
            said, before = [*said, turn["Question"], turn["Answer"]], turn


def alternating(texts: list[str]) -> list[dict[str, str]]:
    """Texts by the user and the assistant in turn, of which the last is the user's."""
    first = len(texts) % 2 == 0
    return [{"role": ("user", "assistant")[(i + first) % 2], "content": text} for i, text in enumerate(texts)]


def name_of(turn: dict) -> str:
    return f"{turn['Conversation_no']}_{turn['Turn_no']}"


def digest(text: str) -> int:
    return int(hashlib.md5(text.encode()).hexdigest(), 16)


def read(path: Path, kind: type, *fields: str) -> Any:
    """A release file, with the fields that its rows must have. Raises `ValueError` for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); name a release file, see --help") from None
    if not isinstance(content, kind) or not content:
        raise ValueError(f"{path} is no JSON {'array' if kind is list else 'object'} with content; see --help")
    for number, row in enumerate(content if kind is list else [content]):
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}: entry {number} has no {missing[0]!r}; name a release file, see --help")
    return content


SLICES = {
    "qrecc": (qrecc, 1),
    "canard": (canard, 1),
    "doc2dial": (doc2dial, 2),
    "topiocqa_lead": (topiocqa_lead, 3),
    "topiocqa_answer": (topiocqa_answer, 2),
}


@one_line_errors("public_slices.py")
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("public_slices.py", __doc__)
    parser.add_argument("name", choices=SLICES, help="which slice")
    parser.add_argument("files", nargs="+", type=Path, help="its release files, in the order above")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must be new or empty")
    arguments = parser.parse_args(argv)
    cut, wanted = SLICES[arguments.name]
    if len(arguments.files) != wanted:
        raise ValueError(f"{arguments.name} needs {wanted} files, got {len(arguments.files)}; --help names them")
    made = cut(*arguments.files)
    made.write(arguments.output)
    counts = Counter(split for split, _, _ in made.qrels)
    parts = [f"{count:,} {split}" for split, count in counts.items()] or [f"{len(made.queries):,}"]
    print(f"{arguments.output}: {', '.join(parts)} queries, {len(made.corpus):,} documents")


if __name__ == "__main__":
    sys.exit(main())
