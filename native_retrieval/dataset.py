"""What the Trainer sees of a query: its tokens, the backbone's states, the teacher's vectors and ranking.

Everything here is either memory-mapped or a row number into something that is, so that a training process never holds a
corpus or its features.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from .arguments import DataArguments
from .augmentation import Conversation, with_typos
from .features import FeatureStore, cached_queries
from .targets import make_targets
from .teacher import Teacher

PROMPT_KEYS = ("input_ids", "attention_mask", "readout_mask", "hidden_states")  # of a batch: arguments of the model
HARD_NEGATIVE_POOL = 5  # times as many near documents as an example draws: the very nearest are often right too


@dataclass
class QuerySet:
    """
    Queries of a data set, and how they are read.

    Args:
        name (`str`): for metrics, progress bars and errors.
        rows (`Dataset`): with the columns of [`data.load_queries`]; `messages`, `rewrite` and `gold` at least.
        corpus (`Dataset`, *optional*): without it, queries have no documents.
        qrels (`dict[str, dict[str, int]]`, *optional*): grades of documents by query, for the dev metrics.
        mode (`str`): `"context"` or `"generated"`.
        changed (`Iterable[Conversation]`, *optional*): what the model reads in place of the conversations. It is iterated
            over once.
        plain (`bool`): these are single texts, and those that are too long for a prompt are left out.
        passes (`int`): how often an epoch has them.
        id_offset (`int`): tells the documents of several corpora apart.
    """

    name: str
    rows: Dataset
    corpus: Dataset | None = None
    qrels: dict[str, dict[str, int]] | None = None
    mode: str = "context"
    changed: Iterable[Conversation] | None = field(default=None, repr=False)
    plain: bool = False
    passes: int = 1
    id_offset: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> list[str]:
        return list(map(str, self.rows["_id"] if "_id" in self.rows.column_names else range(len(self.rows))))


@dataclass
class RetrievalExamples(torch.utils.data.Dataset):
    """
    One query mode's view of a set of queries.

    Args:
        sequences (`list[list[int]]`): the tokens of each prompt, in `generated` mode followed by the written query.
        num_read (`list[int]`): how many tokens at the end the head reads.
        targets (`np.ndarray` of shape `(queries, dim)`): the teacher's vectors; see `targets.py`.
        documents (`np.ndarray` of shape `(documents, dim)`): the teacher's vectors of the corpus.
        positives (`list[list[int]]`): rows of `documents` that are relevant; empty for plain text.
        ranking (`np.ndarray` of shape `(queries, k)`, *optional*): rows of the teacher's nearest documents.
        hard_negatives (`np.ndarray` of shape `(queries, pool)`, *optional*): rows of near documents that are not relevant.
        num_hard_negatives (`int`): how many of the pool an example has, others each time.
        store (`FeatureStore`, *optional*): the backbone's states; without it the model computes them in each step.
        id_offset (`int`): tells the documents of several corpora apart.
        name (`str`): of the data set, for metrics.
        mode (`str`): `"context"`, `"generated"`, or `"words"` for lexical pre-training, whose `sequences` are tokens of the
            word encoder. A batch has no rows of the last and another.
        ids (`list[str]`, *optional*): of the queries, for metrics and errors; their numbers by default.
        unchanged (`RetrievalExamples`, *optional*): the same queries, by `ids`, in the conversations as they were. Each
            example then has the prompt of its own there, whose vector it should have (the consistency loss).
        corpus (`Dataset`, *optional*), qrels (`list[dict[str, int]]`, *optional*): ids of the documents, and grades of each
            query's documents by id, for dev metrics.
    """

    sequences: list[list[int]]
    num_read: list[int]
    targets: np.ndarray
    documents: np.ndarray
    positives: list[list[int]]
    ranking: np.ndarray | None = None
    hard_negatives: np.ndarray | None = None
    num_hard_negatives: int = 0
    store: FeatureStore | None = None
    id_offset: int = 0
    name: str = ""
    mode: str = "context"
    ids: Sequence[str] | None = None
    unchanged: "RetrievalExamples | None" = None
    corpus: Dataset | None = None
    qrels: Sequence[dict[str, int]] | None = None

    def __post_init__(self) -> None:
        if self.unchanged is not None:
            place = {query: row for row, query in enumerate(self.unchanged.ids)}
            self._rows_unchanged = [place[query] for query in self.ids]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    def document_ids(self, rows: np.ndarray) -> list[list[str]]:
        """Row numbers of documents `(queries, k)` to their ids."""
        wanted, places = np.unique(rows, return_inverse=True)
        ids = np.array(self.corpus.select_columns("_id")[wanted.tolist()]["_id"], dtype=object)
        return ids[places.reshape(rows.shape)].tolist()

    def prompt(self, i: int) -> dict:
        """What the model reads of a query."""
        item = {"input_ids": self.sequences[i], "num_read": self.num_read[i]}
        if self.store is not None:
            item["hidden_states"] = self.store[i]
        return item

    def __getitem__(self, i: int) -> dict:
        positives = self.positives[i]
        item = {
            **self.prompt(i),
            "index": i,
            "query": f"{self.name}: {self.ids[i] if self.ids else i}",
            "target": self.targets[i],
            # Plain text has no document: it is its own positive.
            "positive": self.documents[positives[0]] if positives else self.targets[i],
            "positive_ids": [self.id_offset + row for row in positives] or [self.id_offset + len(self.documents) + i],
            "mode": self.mode,
        }
        if self.unchanged is not None:
            item["unchanged"] = self.unchanged.prompt(self._rows_unchanged[i])
        if self.ranking is not None:
            item["ranking"] = self.documents[self.ranking[i]]
        if self.hard_negatives is not None:
            pool = self.hard_negatives[i]
            drawn = pool[torch.randperm(len(pool))[: self.num_hard_negatives].numpy()]
            item["negatives"] = self.documents[drawn]
            item["negative_ids"] = self.id_offset + drawn
        return item


def collate(items: Sequence[dict]) -> dict[str, torch.Tensor]:
    """
    A batch for `NativeRetrievalTrainer.compute_loss`, padded on the left: the `PROMPT_KEYS`, or in the mode `"words"` their
    `word_ids` and `word_mask`; and what the losses compare the vectors with.

    `unchanged` has the prompts of the rows that `changed` marks, as they were before, in the same order.
    """
    words = items[0]["mode"] == "words"
    ids, mask = _pad_left([item["input_ids"] for item in items]) if words else (None, None)
    batch = {
        **({"word_ids": ids, "word_mask": mask.bool()} if words else _pad(items)),
        "index": torch.tensor([item["index"] for item in items]),
        "query": [item["query"] for item in items],
        "targets": torch.from_numpy(np.stack([item["target"] for item in items])),
        "positives": torch.from_numpy(np.stack([item["positive"] for item in items])),
        "mode": items[0]["mode"],
        "changed": torch.tensor(["unchanged" in item for item in items]),
    }
    if batch["changed"].any():
        batch["unchanged"] = _pad([item["unchanged"] for item in items if "unchanged" in item])
    known = max(len(item["positive_ids"]) for item in items)
    batch["positive_ids"] = torch.full((len(items), known), -1)
    for row, item in enumerate(items):
        batch["positive_ids"][row, : len(item["positive_ids"])] = torch.tensor(item["positive_ids"])
    # Rows without a ranking, or with fewer documents than others, are marked, so that a mixture makes one batch.
    for key in ("ranking", "negatives"):
        if any(key in item for item in items):
            size = max(len(item.get(key, ())) for item in items)
            dim = batch["targets"].shape[1]
            batch[key] = torch.zeros(len(items), size, dim)
            batch[f"{key}_mask"] = torch.zeros(len(items), size, dtype=torch.bool)
            for row, item in enumerate(items):
                if key in item:
                    batch[key][row, : len(item[key])] = torch.from_numpy(np.asarray(item[key]))
                    batch[f"{key}_mask"][row, : len(item[key])] = True
    if "negatives" in batch:
        # A row without negatives gets copies of its own positive, which the loss leaves out.
        batch["negative_ids"] = batch["positive_ids"][:, :1].repeat(1, batch["negatives"].shape[1])
        for row, item in enumerate(items):
            if "negative_ids" in item:
                batch["negative_ids"][row, : len(item["negative_ids"])] = torch.from_numpy(item["negative_ids"])
    return batch


def _pad(prompts: Sequence[dict]) -> dict[str, torch.Tensor]:
    """The `PROMPT_KEYS` of a batch, without states where these are computed in each step."""
    ids, mask = _pad_left([prompt["input_ids"] for prompt in prompts])
    padded = {"input_ids": ids, "attention_mask": mask, "readout_mask": torch.zeros(mask.shape, dtype=torch.bool)}
    if "hidden_states" in prompts[0]:
        first = prompts[0]["hidden_states"]
        padded["hidden_states"] = torch.zeros(*ids.shape, *first.shape[1:], dtype=first.dtype)
    for row, prompt in enumerate(prompts):
        length = len(prompt["input_ids"])
        padded["readout_mask"][row, -min(prompt["num_read"], length) :] = True
        if "hidden_states" in prompt:
            padded["hidden_states"][row, -length:] = prompt["hidden_states"]
    return padded


def _pad_left(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both `(sequences, tokens)`; the ids of padding are 0."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, -len(sequence) :] = torch.tensor(sequence)
        mask[row, -len(sequence) :] = 1
    return ids, mask


class GroupedByLength(LengthGroupedSampler):
    """The order of an epoch, from the seed and the epoch's number, so that a resumed run has the orders of an undisturbed one."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed)
        for _ in range(self.epoch()):
            torch.randperm(len(self.lengths), generator=self.generator)  # what an epoch before has drawn
        return super().__iter__()


def build_examples(
    model, teacher: Teacher, queries: QuerySet, arguments: DataArguments, unchanged: RetrievalExamples | None = None
) -> RetrievalExamples:
    """
    Queries to training or dev examples. What is costly is read from `arguments.cache_dir`, or computed into it.

    Args:
        model (`NativeRetrievalModel`): its processor makes the prompts, its backbone the states and the written queries.
        unchanged (`RetrievalExamples`, *optional*): those of the same queries, and maybe others, without `changed`.

    Raises:
        `ValueError`: if a conversation has no prompt, naming its query.
    """
    if queries.plain:
        queries = _that_fit(queries, model.processor)
    prompts = _read(queries, model.processor)
    num_read, written = [model.config.num_context_tokens] * len(prompts), None
    if queries.mode == "generated":
        query_ids = cached_queries(model, prompts, arguments.cache_dir)
        start = model.tokenizer(model.config.query_prompt, add_special_tokens=False)["input_ids"]
        prompts = [[*prompt, *start, *query] for prompt, query in zip(prompts, query_ids, strict=True)]
        num_read = [max(1, len(query)) for query in query_ids]
        written = [model.tokenizer.decode(query).strip() for query in query_ids]
    targets = make_targets(teacher, queries.rows, queries.corpus, arguments, name=queries.name, written=written)
    examples = RetrievalExamples(
        prompts,
        num_read,
        targets.vectors,
        targets.documents,
        targets.positives,
        targets.ranking,
        id_offset=queries.id_offset,
        name=queries.name,
        mode=queries.mode,
        ids=queries.ids,
        unchanged=unchanged,
        corpus=queries.corpus,
        qrels=[queries.qrels[query] for query in queries.ids] if queries.qrels else None,
    )
    if queries.corpus is not None and arguments.num_hard_negatives:
        pool = _hard_negatives(targets.ranking, targets.positives, HARD_NEGATIVE_POOL * arguments.num_hard_negatives)
        examples.hard_negatives, examples.num_hard_negatives = pool, arguments.num_hard_negatives
    if not arguments.online_features:
        progress = f"Hidden states: {queries.name}, {queries.mode}"
        examples.store = FeatureStore.build(model, prompts, arguments.cache_dir, progress=progress)
    return examples


def _read(queries: QuerySet, processor) -> list[list[int]]:
    """Prompts of what the model reads."""
    rows, prompts = queries.rows, []
    tools = rows["tools"] if "tools" in rows.column_names else [None] * len(rows)
    conversations = rows["messages"] if queries.changed is None else queries.changed
    for query, messages, own_tools in zip(queries.ids, conversations, tools, strict=True):
        try:
            prompts.append(processor.encode(messages, tools=own_tools))
        except ValueError as error:
            raise ValueError(f"{queries.name}, query {query}: {error}") from error
    return prompts


def _that_fit(queries: QuerySet, processor) -> QuerySet:
    """Those whose prompt is not too long."""

    def fits(messages: Conversation) -> bool:
        try:
            return bool(processor.encode(messages, truncation=False))
        except ValueError:
            return False

    kept = [i for i, messages in enumerate(queries.rows["messages"]) if fits(messages)]
    return replace(queries, rows=queries.rows.select(kept), plain=False)


def _hard_negatives(ranking: np.ndarray, positives: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """The first of each ranking that are not relevant: `(queries, count)`, or fewer if a ranking has fewer."""
    pools = [ranked[~np.isin(ranked, relevant)][:count] for ranked, relevant in zip(ranking, positives, strict=True)]
    shortest = min(map(len, pools))  # a query may have more relevant documents than another
    return np.stack([pool[:shortest] for pool in pools])


def build_texts(
    processor, teacher: Teacher, texts: Sequence[str], name: str, typo_share: float = 0.0
) -> RetrievalExamples:
    """
    Plain texts for lexical pre-training: their pieces for the word encoder, and the teacher's vector as the target.

    Args:
        typo_share (`float`): this share of them follows once more with typos, towards the vector of the right spelling.
    """
    sequences = processor.encode_words(texts)
    keep = [i for i, sequence in enumerate(sequences) if sequence]
    targets = teacher.cached([texts[i] for i in keep], "query", f"Teacher: {name}", half_precision=True)
    sequences = [sequences[i] for i in keep]
    rng = random.Random(0)
    again = rng.sample(range(len(keep)), int(typo_share * len(keep)))
    if again:
        sequences += processor.encode_words([with_typos(texts[keep[i]], rng) for i in again])
        targets = np.concatenate((targets, targets[again]))
    return RetrievalExamples(
        sequences, [1] * len(targets), targets, targets[:0], [[] for _ in sequences], name=name, mode="words"
    )
