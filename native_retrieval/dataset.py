"""What the Trainer sees of a query: its tokens, the backbone's states, the teacher's vectors and ranking.

Everything here is either memory-mapped or a row number into something that is, so that a training process never holds a
corpus or its features.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from modeling_native_retrieval import NativeRetrievalModel

from .augmentation import Conversation, with_typos
from .conversations import last_question
from .features import FeatureStore, cached_queries
from .teacher import Teacher

NOVELTY_RIDGE = 0.3
SAME_TEXT = 0.95  # the cosine from which on two texts count as one
PROMPT_KEYS = ("input_ids", "attention_mask", "readout_mask", "hidden_states")  # of a batch: arguments of the model
HARD_NEGATIVE_POOL = 5  # times as many near documents as an example draws: the very nearest are often right too


@dataclass
class RetrievalExamples(torch.utils.data.Dataset):
    """
    One query mode's view of a set of queries.

    Args:
        sequences (`list[list[int]]`): the tokens of each prompt, in `generated` mode with the written query behind it.
        num_read (`list[int]`): how many tokens at the end the head reads.
        targets (`np.ndarray` of shape `(queries, dim)`): the teacher's vectors that alignment draws towards.
        documents (`np.ndarray` of shape `(documents, dim)`): the teacher's vectors of the corpus.
        positives (`list[list[int]]`): rows of `documents` that are relevant; empty for plain text.
        ranking (`np.ndarray` of shape `(queries, k)`, *optional*): rows of the teacher's nearest documents.
        hard_negatives (`np.ndarray` of shape `(queries, pool)`, *optional*): rows of near documents that are not relevant.
        num_hard_negatives (`int`): how many of the pool an example draws, anew each time.
        store (`FeatureStore`, *optional*): the backbone's states; without it the model computes them in each step.
        id_offset (`int`): tells the documents of several corpora apart.
        name (`str`): of the data set, for metrics.
        ids (`list[str]`, *optional*): of the queries, for errors; their numbers by default.
        unchanged (`RetrievalExamples`, *optional*): has the same queries, by `ids`, in conversations that nothing was put
            around: an example brings the prompt of its own along, whose vector it should have.
        mode (`str`): `"context"`, `"generated"`, `"probe"`, or `"words"` for plain texts of the copy path's words. A
            batch has rows of one mode, but for the first two.
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

    def __post_init__(self) -> None:
        if self.unchanged is not None:
            place = {query: row for row, query in enumerate(self.unchanged.ids)}
            self._rows_unchanged = [place[query] for query in self.ids]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

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
    A batch, padded on the left; the keys are the arguments of `NativeRetrievalTrainer.compute_loss`.

    `unchanged` has the prompts of the rows that `changed` marks, as they were before, in the same order.
    """
    batch = {
        **_pad(items),
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
    width = max(len(prompt["input_ids"]) for prompt in prompts)
    padded = {
        "input_ids": torch.zeros(len(prompts), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(prompts), width, dtype=torch.long),
        "readout_mask": torch.zeros(len(prompts), width, dtype=torch.bool),
    }
    if "hidden_states" in prompts[0]:
        first = prompts[0]["hidden_states"]
        padded["hidden_states"] = torch.zeros(len(prompts), width, *first.shape[1:], dtype=first.dtype)
    for row, prompt in enumerate(prompts):
        length = len(prompt["input_ids"])
        padded["input_ids"][row, -length:] = torch.tensor(prompt["input_ids"])
        padded["attention_mask"][row, -length:] = 1
        padded["readout_mask"][row, -min(prompt["num_read"], length) :] = True
        if "hidden_states" in prompt:
            padded["hidden_states"][row, -length:] = prompt["hidden_states"]
    return padded


def build_texts(
    model: NativeRetrievalModel, teacher: Teacher, texts: Sequence[str], name: str, typo_share: float = 0.0
) -> RetrievalExamples:
    """
    Plain texts for the copy path's words: their tokens, without a chat template, and the teacher's vector as the target.

    Args:
        typo_share (`float`): how many of them follow once more with typos, towards the vector of the right spelling.
    """
    sequences = model.encode_words(texts)
    keep = [i for i, sequence in enumerate(sequences) if sequence]
    targets = teacher.cached([texts[i] for i in keep], "query", f"Teacher: {name}", half_precision=True)
    sequences = [sequences[i] for i in keep]
    rng = random.Random(0)
    again = rng.sample(range(len(keep)), int(typo_share * len(keep)))
    if again:
        misspelt = [with_typos(texts[keep[i]], rng) for i in again]
        sequences += model.encode_words(misspelt)
        targets = np.concatenate((targets, targets[again]))
    return RetrievalExamples(
        sequences, [1] * len(targets), targets, targets[:0], [[] for _ in sequences], name=name, mode="words"
    )


def build_examples(
    model: NativeRetrievalModel,
    teacher: Teacher,
    queries: Dataset,
    corpus: Dataset | None,
    mode: str,
    *,
    cache_dir: str,
    online_features: bool = False,
    gold_share: float = 0.5,
    rewrite_gold_share: float = 0.0,
    target_repulsion_threshold: float = 1.0,
    rank_top_k: int = 128,
    num_hard_negatives: int = 0,
    id_offset: int = 0,
    name: str = "",
    seen: Sequence[Conversation] | None = None,
    unchanged: RetrievalExamples | None = None,
) -> RetrievalExamples:
    """
    Queries with messages to training (or dev) examples, everything costly read from `cache_dir` or computed into it.

    A query's target is the teacher's vector of, first that exists: its human rewrite; the query the backbone writes
    (known in `generated` mode) with the last question behind it; the last question. Where no human has rewritten it, the
    title of its first relevant document stands before the question, which seldom names its topic.

    Args:
        gold_share, rewrite_gold_share (`float`): how far the target of a query, without a rewrite or with one, moves from
            the query's vector towards its first relevant document's.
        target_repulsion_threshold (`float`): the target is then turned away from the conversation's earlier answers that are nearer
            to it than this cosine (see [`turned_away`]), unless that brings its documents nearer to those of others: where
            answers are no documents of the index, the next one may well be near the last.
        num_hard_negatives (`int`): documents near the target, from the top of the teacher's ranking, that are not
            relevant.
        seen (`list[Conversation]`, *optional*): what the model reads in the place of `queries["messages"]`; see
            `augmentation.py`.
        unchanged (`RetrievalExamples`, *optional*): those of the same queries, and maybe others, without `seen`.
    """
    seen = queries["messages"] if seen is None else seen
    ids = queries["_id"] if "_id" in queries.column_names else range(len(queries))
    prompts = []
    for query, messages in zip(ids, seen, strict=True):
        try:
            prompts.append(model.build_prompt(messages))
        except ValueError as error:
            raise ValueError(f"{name}, query {query}: {error}") from error
    rows, titles = _rows_and_titles(corpus, queries["gold"]) if corpus is not None else ({}, {})
    texts = [
        rewrite or _with_title(titles.get(gold[0]) if gold else None, last_question(messages))
        for rewrite, gold, messages in zip(queries["rewrite"], queries["gold"], queries["messages"], strict=True)
    ]
    if mode == "generated":
        written = cached_queries(model, prompts, cache_dir)
        start = model.tokenizer(model.config.query_prompt, add_special_tokens=False)["input_ids"]
        sequences = [[*prompt, *start, *query] for prompt, query in zip(prompts, written, strict=True)]
        num_read = [max(1, len(query)) for query in written]
        decoded = [model.tokenizer.decode(query).strip() for query in written]
        texts = [
            rewrite or f"{query} {text}".strip()
            for rewrite, query, text in zip(queries["rewrite"], decoded, texts, strict=True)
        ]
    else:
        sequences, num_read = prompts, [model.config.num_context_tokens] * len(prompts)
    targets = np.array(teacher.cached(texts, "query", f"Teacher: targets of {name}"))
    examples = RetrievalExamples(
        sequences,
        num_read,
        targets,
        targets[:0],
        [[] for _ in prompts],
        id_offset=id_offset,
        name=name,
        mode=mode,
        ids=list(map(str, ids)),
        unchanged=unchanged,
    )
    if corpus is not None:
        examples.documents = teacher.documents(corpus)
        examples.positives = [[rows[document_id] for document_id in gold] for gold in queries["gold"]]
        # A last question alone often names nothing; its document does.
        share = np.array(
            [[rewrite_gold_share if rewrite else gold_share] for rewrite in queries["rewrite"]], np.float32
        )
        gold = examples.documents[[rows[document_ids[0]] for document_ids in queries["gold"]]]
        examples.targets = _unit((1 - share) * targets + share * gold)
    said = [_earlier_answers(messages) for messages in seen]
    if target_repulsion_threshold < 1 and any(said):
        texts = sorted({text for answers in said for text in answers})
        vectors = teacher.cached(texts, "document", f"Teacher: earlier answers of {name}")
        place = {text: row for row, text in enumerate(texts)}
        near = examples.positives  # of no query, if there is no corpus
        if corpus is not None:
            near = teacher.ranking(examples.targets, examples.documents, rank_top_k)
        for i, answers in enumerate(said):
            if answers:
                others = np.asarray(vectors[[place[text] for text in answers]])
                for row in examples.positives[i]:  # an answer that is asked for once more
                    others = others[others @ examples.documents[row] < SAME_TEXT]
                turned = turned_away(examples.targets[i], others, target_repulsion_threshold)
                before, after = _margins(
                    examples.documents, near[i], examples.positives[i], examples.targets[i], turned
                )
                if after >= before:
                    examples.targets[i] = turned
    if corpus is not None:
        examples.ranking = teacher.ranking(examples.targets, examples.documents, rank_top_k)
        if num_hard_negatives:
            pools = [
                ranked[~np.isin(ranked, positives)][: HARD_NEGATIVE_POOL * num_hard_negatives]
                for ranked, positives in zip(examples.ranking, examples.positives, strict=True)
            ]
            shortest = min(map(len, pools))  # a query may have more relevant documents than another
            examples.hard_negatives = np.stack([pool[:shortest] for pool in pools])
            examples.num_hard_negatives = num_hard_negatives
    if not online_features and mode != "probe":  # which needs the backbone in every step
        examples.store = FeatureStore.build(model, sequences, cache_dir, progress=f"Hidden states: {name}, {mode}")
    return examples


def turned_away(target: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
    """
    A unit vector `(dim,)` turned away from `others` `(n, dim)` as far as its cosine to them is over the threshold, by ridge
    regression, as the model's `HistoryRepulsion` does it: an answer that was given is near the next question, and is not what is
    looked for.
    """
    excess = np.maximum(others @ target - threshold, 0)
    weights = np.linalg.solve(others @ others.T + NOVELTY_RIDGE * np.eye(len(others)), excess)
    return _unit(target - weights @ others)


def _margins(documents: np.ndarray, near: Sequence[int], positives: Sequence[int], *vectors: np.ndarray) -> list[float]:
    """For each vector, how far the nearest of the positives stands above the nearest other of `near`; 0 without any."""
    others = np.setdiff1d(near, positives)
    if not len(positives) or not len(others):
        return [0.0] * len(vectors)
    relevant, others = documents[positives], documents[others]
    return [float((relevant @ vector).max() - (others @ vector).max()) for vector in vectors]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _earlier_answers(messages: Conversation) -> list[str]:
    """What the assistant has said before the last turn."""
    return [
        message["content"] for message in messages[:-1] if message["role"] == "assistant" and message["content"].strip()
    ]


def _rows_and_titles(corpus: Dataset, gold: Sequence[Sequence[str]]) -> tuple[dict[str, int], dict[str, str]]:
    """Of the documents that are relevant to a query, by id; a corpus may be larger than memory."""
    wanted = {document_id for document_ids in gold for document_id in document_ids}
    rows, titles = {}, {}
    first = 0
    for batch in corpus.select_columns(["_id", "title"]).iter(batch_size=10_000):
        for row, (document_id, title) in enumerate(zip(batch["_id"], batch["title"], strict=True), start=first):
            if document_id in wanted:
                rows[document_id], titles[document_id] = row, title
        first += len(batch["_id"])
    return rows, titles


def _with_title(title: str | None, question: str) -> str:
    return f"{title}: {question}" if title and title.lower() not in question.lower() else question
