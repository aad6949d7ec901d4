"""What a training learns from: which queries, how often, how augmented, and which plain texts.

[`load_data`] reads the data sets. [`training_sets`] lists what an epoch is made of, in this order, before anything costly
is computed:

| set | queries of | what the model reads |
|---|---|---|
| a data set, in each mode | `train_data`, `train_weights` times | the conversations |
| ..., augmented | `augmentation_share` of its queries | with typos, system prompts, tools, half turns |
| ..., after a topic shift | `topic_shift_share` of its conversations | after turns of other conversations |
| plain text, questions | `plain_text_share` of all these | single sentences and questions |
"""

import os
import random
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import ConcatDataset

from .arguments import DataArguments, ModelArguments, NativeRetrievalTrainingArguments, split_source
from .augmentation import Conversation, augment, others_by_name, shift_topic
from .data import drop_overlap, load_queries, load_task, load_texts, num_words, splits
from .dataset import QuerySet, build_examples
from .teacher import Teacher

NUM_DISTRACTORS = 1000  # conversations whose turns come before a topic shift
NUM_PASSAGES = 1000  # documents that a tool may have returned


class Data(NamedTuple):
    """What [`load_data`] has read: a set for each entry of `train_data` and `dev_data`, plain texts, and questions."""

    train: list[QuerySet]
    dev: list[QuerySet]
    texts: list[str]
    questions: list[str]


def load_data(arguments: DataArguments) -> Data:
    """
    Train and dev sets and plain texts, without training conversations that dev or test sets have too.

    Raises:
        `ValueError`: naming what cannot be read, has no judgements, or has no query left.
    """
    dev = [_load_set(entry, "dev") for entry in arguments.dev_data]
    for entry, queries in zip(arguments.dev_data, dev, strict=True):
        if queries.corpus is None:
            raise ValueError(
                f"dev_data {entry} has no qrels/dev.tsv; add it, or name a split that is there: {entry}:SPLIT"
            )
    # Some collections are cut from the same conversations: the test set of one may be in the training set of another.
    held_out = [queries.rows for queries in dev]
    entries = list(map(split_source, [*arguments.train_data, *arguments.dev_data]))
    for source in dict.fromkeys(source for source, _ in entries):
        if "test" in splits(source) and (source, "test") not in entries:  # who names it trains on it
            held_out.append(load_queries(source, "test"))
    weights = arguments.train_weights or [1.0] * len(arguments.train_data)
    train = [
        _training_set(entry, weight, held_out, arguments)
        for entry, weight in zip(arguments.train_data, weights, strict=True)
    ]
    texts = [load_texts(source) for source in arguments.plain_text]
    texts = concatenate_datasets(texts) if texts else Dataset.from_dict({"text": []})
    texts = texts.select(subsample(range(len(texts)), arguments.num_plain_texts))["text"][:]
    return Data(train, dev, texts, questions_of(train) if arguments.turns_as_text else [])


def _load_set(entry: str, default_split: str) -> QuerySet:
    """`NAME:SPLIT`, or of `NAME` the default split; without it, all queries, and no documents."""
    source, split = split_source(entry)
    split = split or (default_split if default_split in splits(source) else "")
    if not split:
        return QuerySet(Path(source).name, load_queries(source))
    task = load_task(source, split)
    return QuerySet(Path(source).name, task.queries, task.corpus, task.qrels)


def _training_set(entry: str, weight: float, held_out: Sequence[Dataset], arguments: DataArguments) -> QuerySet:
    """An entry of `train_data` without what is held out, as long as `max_train_queries` and a weight below 1 say."""
    train, dropped = _load_set(entry, "train"), 0
    rows = train.rows
    for others in held_out:
        rows, count = drop_overlap(rows, others)
        dropped += count
    if dropped:
        print(f"{train.name}: left out {dropped} training queries whose conversation is in the dev or test data")
    if train.corpus is None:
        print(f"{train.name}: no qrels/train.tsv, so it is trained on without documents, towards its questions alone")
    count = min(arguments.max_train_queries or len(rows), len(rows))
    rows = rows.select(range(round(min(weight, 1.0) * count)))
    if not len(rows):
        raise ValueError(
            f"train_data {entry} has no query left: {dropped} are of conversations that dev or test data have too, and "
            "train_weights and max_train_queries leave none of the others; name other data, or leave it out"
        )
    return replace(train, rows=rows, qrels=None, passes=max(1, round(weight)))


def training_sets(data: Data, arguments: DataArguments) -> list[QuerySet]:
    """What an epoch is made of; see the table above. Changed conversations are made when they are iterated over."""
    sets, offset = [], 0
    for entry, train in zip(arguments.train_data, data.train, strict=True):
        modes = arguments.modes_of(entry)
        sets += [replace(train, mode=mode, id_offset=offset) for mode in modes]
        # Each pass is augmented differently. The generated mode is not: the backbone would have to write more queries.
        for number in range(train.passes if "context" in modes else 0):
            for what, (rows, changed) in {
                "augmented": augmented(train.rows, arguments.augmentation_share, train.corpus, number),
                "after a topic shift": with_topic_shifts(train.rows, arguments.topic_shift_share, number),
            }.items():
                if len(rows):
                    more = {"name": f"{train.name}, {what}", "rows": rows, "changed": changed, "passes": 1}
                    sets.append(replace(train, id_offset=offset, **more))
        # The modes share a corpus, and so its ids; the next data set's begin after it.
        offset += (len(train.corpus) if train.corpus is not None else 0) + len(train.rows)
    # Single questions and sentences among the conversations: a text that stands alone keeps its vector.
    wanted = round(arguments.plain_text_share * sum(len(queries) * queries.passes for queries in sets))
    for name, texts in (("plain text", data.texts), ("questions", data.questions)):
        texts = subsample(texts, wanted * len(texts) // max(1, len(data.texts) + len(data.questions)))
        if texts:
            rows = [{"messages": [{"role": "user", "content": text}], "rewrite": text, "gold": []} for text in texts]
            sets.append(QuerySet(name, Dataset.from_list(rows), plain=True, id_offset=offset))
            offset += len(rows)
    return sets


def build_training_examples(
    model, teacher: Teacher, sets: Sequence[QuerySet], arguments: DataArguments, consistency: bool = False
) -> ConcatDataset:
    """All sets as examples. With `consistency`, changed conversations have the ones that they were made of beside them."""
    parts, originals = [], None
    for queries in sets:
        unchanged = originals if consistency and queries.changed is not None else None
        examples = build_examples(model, teacher, queries, arguments, unchanged)
        parts += [examples] * queries.passes
        if queries.changed is None and queries.mode == "context":
            originals = examples
    return ConcatDataset(parts)


def questions_of(train: Sequence[QuerySet]) -> list[str]:
    """Every user turn and rewrite that says something on its own."""
    turns = (m for queries in train for messages in queries.rows["messages"] for m in messages)
    questions = {message["content"] for message in turns if message["role"] == "user"}
    questions |= {rewrite for queries in train for rewrite in queries.rows["rewrite"] if rewrite}
    return sorted(text for text in questions if num_words(text) > 3)


def augmented(
    rows: Dataset, share: float, corpus: Dataset | None = None, number: int = 0
) -> tuple[Dataset, Iterator[Conversation]]:
    """A share of the queries, and their conversations as they may look in an agent; others for each `number`."""
    chosen = subsample(range(len(rows)), round(share * len(rows)))
    rows = rows.select([(row + number) % len(rows) for row in chosen])

    def changed() -> Iterator[Conversation]:
        rng = random.Random(number)
        passages = corpus[:NUM_PASSAGES]["text"] if corpus is not None else []
        for messages, rewrite in zip(rows["messages"], rows["rewrite"], strict=True):
            yield augment(messages, passages, rng, rewrite)

    return rows, changed()


def with_topic_shifts(rows: Dataset, share: float, number: int = 0) -> tuple[Dataset, Iterator[Conversation]]:
    """
    The queries of a share of the conversations, and these after turns of others; of other ones for each `number`.

    All queries of a conversation come after the same turns: so one pass of the backbone serves them.
    """
    conversations = sorted(set(rows["conv"]))
    chosen = set(subsample(conversations, round(share * len(conversations))))
    shifted = rows.select([i for i, name in enumerate(rows["conv"]) if name in chosen])

    def changed() -> Iterator[Conversation]:
        everyone = rows.select(subsample(range(len(rows)), NUM_DISTRACTORS))
        others = others_by_name(everyone["conv"][:], everyone["messages"][:])
        for messages, name in zip(shifted["messages"], shifted["conv"], strict=True):
            yield shift_topic(messages, others(name), random.Random(f"{number} {name}"))

    return shifted, changed()


def training_info(
    argv: Sequence[str],
    model: ModelArguments,
    arguments: DataArguments,
    training: NativeRetrievalTrainingArguments,
    data: Data,
) -> dict:
    """What the model card says of a training's model and data."""
    device = training.device
    of_model = ("backbone", "backbone_revision", "teacher", "teacher_revision")
    of_data = ("turns_as_text", "query_modes", "augmentation_share", "topic_shift_share", "data_license", "license")
    return {
        **{name: getattr(model, name) for name in of_model},
        **{name: getattr(arguments, name) for name in of_data},
        "train_data": {queries.name: len(queries) for queries in data.train},
        "dev_data": {queries.name: len(queries) for queries in data.dev},
        "plain_texts": len(data.texts),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        "processes": training.world_size,
        # What follows --..._token is no one else's.
        "command": re.sub(r"(--\S*token)[= ]\S+", r"\1 ...", shlex.join(["train.py", *argv])),
    }


def subsample(items: Sequence, count: int) -> list:
    """`count` of the items at most, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
