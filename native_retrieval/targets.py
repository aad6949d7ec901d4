"""What a query is trained towards: a unit vector in the teacher's space, and the teacher's ranking by it.

| step | target of a query |
|---|---|
| 1. a text: the first that exists | the rewrite in the data: a human's, or the agent's own query from its log |
| | in `generated` mode, the query that the backbone writes, followed by the next row's text |
| | the last question, after the title of its first relevant document (a question seldom names its topic) |
| 2. its vector | the teacher's, of this text as a query |
| 3. towards the document | a mixture with the vector of the first relevant document: `rewrite_gold_share` of it if the query has a rewrite, else `gold_share` |
| 4. ranking | the `rank_top_k` documents nearest to it |

Plain text is its own target. Without a corpus, steps 3 and 4 are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from .arguments import DataArguments
from .conversations import last_question
from .teacher import Teacher


@dataclass
class Targets:
    """
    Of a set of queries, in their order.

    Attributes:
        vectors (`np.ndarray` of shape `(queries, dim)`): unit vectors, float32.
        documents (`np.ndarray` of shape `(documents, dim)`): the teacher's vectors of the corpus; none without one.
        positives (`list[list[int]]`): rows of `documents` that are relevant.
        ranking (`np.ndarray` of shape `(queries, k)`, *optional*): rows of the nearest documents, best first.
    """

    vectors: np.ndarray
    documents: np.ndarray
    positives: list[list[int]]
    ranking: np.ndarray | None


def make_targets(
    teacher: Teacher,
    queries: Dataset,
    corpus: Dataset | None,
    arguments: DataArguments,
    *,
    name: str = "",
    written: Sequence[str] | None = None,
) -> Targets:
    """
    The targets of queries, as the table above says.

    Args:
        queries (`Dataset`): with `messages`, `rewrite` and `gold`, as [`data.load_queries`] gives them.
        name (`str`): of the data set, for progress bars.
        written (`list[str]`, *optional*): the queries that the backbone writes.
    """
    gold, rewrites = queries["gold"][:], queries["rewrite"][:]
    rows, titles = _rows_and_titles(corpus, gold) if corpus is not None else ({}, {})
    questions = [
        _with_title(titles[documents[0]] if titles else "", last_question(messages))
        for documents, messages in zip(gold, queries["messages"], strict=True)
    ]
    texts = target_texts(rewrites, questions, written)
    vectors = np.array(teacher.cached(texts, "query", f"Teacher: targets of {name}"))
    documents, positives, ranking = vectors[:0], [[] for _ in texts], None
    if corpus is not None:
        documents = teacher.documents(corpus)
        positives = [[rows[document] for document in relevant] for relevant in gold]
        has_rewrite = np.array(list(map(bool, rewrites)))
        shares = np.where(has_rewrite, arguments.rewrite_gold_share, arguments.gold_share).astype(np.float32)
        vectors = towards_documents(vectors, documents[[relevant[0] for relevant in positives]], shares)
        ranking = teacher.ranking(vectors, documents, arguments.rank_top_k)
    return Targets(vectors, documents, positives, ranking)


def target_texts(
    rewrites: Sequence[str | None], questions: Sequence[str], written: Sequence[str] | None = None
) -> list[str]:
    """Step 1: the text of each target."""
    if written is not None:
        questions = [f"{query} {question}".strip() for query, question in zip(written, questions, strict=True)]
    return [rewrite or question for rewrite, question in zip(rewrites, questions, strict=True)]


def towards_documents(vectors: np.ndarray, documents: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Step 3: unit vectors `(n, dim)`, moved to a document each `(n, dim)` by a share of the way `(n,)`."""
    share = shares[:, None]
    return _unit((1 - share) * vectors + share * documents)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _rows_and_titles(corpus: Dataset, gold: Sequence[Sequence[str]]) -> tuple[dict[str, int], dict[str, str]]:
    """Of the documents that are relevant to a query, by id; a corpus may be larger than memory."""
    wanted = {document for relevant in gold for document in relevant}
    rows, titles, first = {}, {}, 0
    for batch in corpus.select_columns(["_id", "title"]).iter(batch_size=10_000):
        for row, (document, title) in enumerate(zip(batch["_id"], batch["title"], strict=True), start=first):
            if document in wanted:
                rows[document], titles[document] = row, title
        first += len(batch["_id"])
    return rows, titles


def _with_title(title: str, question: str) -> str:
    return f"{title}: {question}" if title and title.lower() not in question.lower() else question
