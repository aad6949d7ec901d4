"""The methods that `eval.py` compares: each turns the queries of a split into a run, and one query into milliseconds.

    text of the conversation ── teacher ──────────────────▶ vector ─┐
    prefill ── query written by the backbone ── teacher ──▶ vector ─┼─▶ the same index ──▶ {query: {document: score}}
    prefill ── head ──────────────────────────────────────▶ vector ─┘
    text of the conversation ── BM25 ─────────────────────────────────▶ {query: {document: score}}

Quality is computed in batches of prompts of similar length. Latency is measured separately, one query at a time, as in an
agent. It runs from the end of the prefill, which the agent needs in any case, to the query vector. The search in the index
is the same for every vector and is not included. BM25 has no vector: its latency is the scoring of all documents.
"""

import string
from collections.abc import Sequence
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

# What loads torch is imported where it is used: `eval.py --help` reads the methods' names from here.
if TYPE_CHECKING:
    from datasets import Dataset

    from modeling_native_retrieval import NativeRetrievalModel, QueryCache

    from .index import DocumentIndex
    from .metrics import Run
    from .teacher import Teacher

DEPTH = 1000  # documents of each query that a run keeps
WARM_UP = 2  # queries that run before the clock is read
QUOTES = "\"'`“”‘’«»"


class Method:
    """
    One way from the queries of a comparison to documents. `vectors()` are the query vectors, float32 `(queries, dim)`;
    `query(i, cache)` is the work that the clock measures: the vector of query i, or of BM25 its scores of all documents.
    """

    reads_prompt = False  # whether `query` takes the prefill of query i's prompt

    def __init__(self, name: str, comparison: "Comparison"):
        self.name, self.comparison = name, comparison

    def run(self) -> "Run":
        """`{query_id: {doc_id: score}}` for all queries."""
        return self.comparison.search(self.vectors())


class TeacherOnText(Method):
    """The teacher encodes a text that exists before the query; choosing the text is not timed."""

    texts: list[str]

    def vectors(self) -> np.ndarray:
        return self.comparison.teacher.cached(self.texts, "query", f"{self.name}: the teacher encodes")

    def query(self, i: int, cache: None = None) -> np.ndarray:
        return self.comparison.teacher.encode([self.texts[i]])[0]


class HumanRewrite(TeacherOnText):
    """The upper bound: the teacher on a stand-alone question that a human wrote."""

    @cached_property
    def texts(self) -> list[str]:
        return list(self.comparison.queries["rewrite"])


class LastQuestion(TeacherOnText):
    """The teacher on the last user message."""

    @cached_property
    def texts(self) -> list[str]:
        return self.comparison.last_questions


class FullHistory(TeacherOnText):
    """The teacher on as many of the newest turns as its context takes."""

    @cached_property
    def texts(self) -> list[str]:
        from .conversations import full_history

        teacher = self.comparison.teacher
        return [
            full_history(messages, teacher.count_tokens, teacher.max_seq_length)
            for messages in tqdm(self.comparison.messages, desc=f"{self.name}: fitting the turns", unit="query")
        ]


class TeacherMean(Method):
    """The unit mean of the teacher's vectors of the last question and of the full history: the strongest untrained row."""

    def _parts(self) -> list[TeacherOnText]:
        return [self.comparison.method("last-question"), self.comparison.method("full-history")]

    def vectors(self) -> np.ndarray:
        return unit(sum(part.vectors() for part in self._parts()))

    def query(self, i: int, cache: None = None) -> np.ndarray:
        return unit(self.comparison.teacher.encode([part.texts[i] for part in self._parts()]).sum(0))


class RankFusion(Method):
    """Reciprocal rank fusion (Cormack et al. 2009) of two other methods' documents."""

    parts = ("last-question", "full-history")

    def _parts(self) -> list[Method]:
        return [self.comparison.method(name) for name in self.parts]

    def run(self) -> "Run":
        return fused([part.run() for part in self._parts()])

    def query(self, i: int, cache: "QueryCache | None" = None) -> list[np.ndarray]:
        return [part.query(i, cache) for part in self._parts()]


class SelectedWords(TeacherOnText):
    """The teacher on the last question and the earlier words that `model.extract_query` adds to it; nothing is generated."""

    reads_prompt = True

    @cached_property
    def texts(self) -> list[str]:
        return self.comparison.extracted

    def query(self, i: int, cache: "QueryCache") -> np.ndarray:
        return self.comparison.teacher.encode(
            self.comparison.model.extract_prefilled(cache, [self.comparison.messages[i]])
        )[0]


class GenerateThenEncode(TeacherOnText):
    """Two models: the backbone writes a query after the prefill, token by token, and the teacher encodes it."""

    reads_prompt = True

    @cached_property
    def texts(self) -> list[str]:
        return [self.text(i, written) for i, written in enumerate(self.comparison.written.queries)]

    def query(self, i: int, cache: "QueryCache") -> np.ndarray:
        _, written = self.comparison.model.write_queries(cache)
        return self.comparison.teacher.encode([self.text(i, self.comparison.read_query(i, written[0]))])[0]

    def text(self, i: int, written: str) -> str:
        return written


class GenerateThenEncodeWithQuestion(GenerateThenEncode):
    """The same, with the last question appended to the written query."""

    def text(self, i: int, written: str) -> str:
        return f"{written} {self.comparison.last_questions[i]}"


class BM25(Method):
    """Words instead of vectors: bm25s over title and text, with English stemming and stop words."""

    texts: list[str]

    def run(self) -> "Run":
        ids, run = self.comparison.index.ids, {}
        self.comparison.bm25  # noqa: B018, built here, so that its progress bar is not inside the next
        for i, query_id in enumerate(tqdm(self.comparison.query_ids, desc=f"{self.name}: scoring", unit="query")):
            scores = self.query(i)
            # A document that shares no word with the query has a score of 0 and was not found.
            best = [row for row in np.argsort(-scores, kind="stable")[:DEPTH].tolist() if scores[row] > 0]
            run[query_id] = {ids[row]: float(scores[row]) for row in best}
        return run

    def query(self, i: int, cache: None = None) -> np.ndarray:
        words = self.comparison.words([self.texts[i]])[0]
        if not words:  # stop words only
            return np.zeros(len(self.comparison.index), dtype=np.float32)
        return self.comparison.bm25.get_scores(words)


class BM25LastQuestion(BM25):
    """BM25 on the last user message."""

    @cached_property
    def texts(self) -> list[str]:
        return self.comparison.last_questions


class BM25FullHistory(BM25):
    """BM25 on all turns; it has no context length."""

    @cached_property
    def texts(self) -> list[str]:
        from .conversations import turns

        return ["\n".join(turns(messages)) for messages in self.comparison.messages]


class BM25SelectedWords(BM25):
    """BM25 on what `model.extract_query` gives."""

    reads_prompt = True

    @cached_property
    def texts(self) -> list[str]:
        return self.comparison.extracted

    def query(self, i: int, cache: "QueryCache | None" = None) -> np.ndarray:
        if cache is not None:  # timed
            self.comparison.model.extract_prefilled(cache, [self.comparison.messages[i]])
        return super().query(i)


class NativeGenerated(Method):
    """One model, as in the paper: the head reads the hidden states of the query that the backbone writes."""

    reads_prompt = True
    mode = "generated"

    def vectors(self) -> np.ndarray:
        return self.comparison.written.vectors

    def query(self, i: int, cache: "QueryCache") -> np.ndarray:
        return self.comparison.model.embed_prefilled(cache, self.mode).query_embeddings[0].float().cpu().numpy()


class NativeContext(NativeGenerated):
    """One model, no query is written: the head reads the hidden states of the prompt, which the prefill computed."""

    mode = "context"

    def vectors(self) -> np.ndarray:
        """Equal to those of `embed_query`, to the last bit, with the same prompts in a batch."""
        return self.comparison.read[0]


class Hybrid(RankFusion):
    """Rank fusion of `native-context` and `bm25-selected-words`: one pass of the model gives both queries."""

    reads_prompt = True
    parts = ("native-context", "bm25-selected-words")


METHOD_CLASSES = {
    "human-rewrite": HumanRewrite,
    "last-question": LastQuestion,
    "full-history": FullHistory,
    "teacher-mean": TeacherMean,
    "rank-fusion": RankFusion,
    "selected-words": SelectedWords,
    "generate-then-encode": GenerateThenEncode,
    "generate-then-encode+question": GenerateThenEncodeWithQuestion,
    "bm25-last-question": BM25LastQuestion,
    "bm25-full-history": BM25FullHistory,
    "bm25-selected-words": BM25SelectedWords,
    "native-generated": NativeGenerated,
    "native-context": NativeContext,
    "hybrid": Hybrid,
}
METHODS = tuple(METHOD_CLASSES)
SELECTING = ("selected-words", "bm25-selected-words", "hybrid")  # need a head that selects words


RANK_OFFSET = 60  # of rank fusion, as in its paper


def fused(runs: Sequence["Run"]) -> "Run":
    """Every document scored by the sum of 1 / (60 + its rank) over the runs that have it."""
    scores: Run = {}
    for run in runs:
        for query, documents in run.items():
            best = sorted(documents, key=documents.get, reverse=True)
            own = scores.setdefault(query, {})
            for rank, document in enumerate(best, start=1):
                own[document] = own.get(document, 0.0) + 1 / (RANK_OFFSET + rank)
    return scores


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class Written(NamedTuple):
    """The queries that the backbone wrote, and the vectors that the head reads from them."""

    queries: list[str]
    vectors: np.ndarray  # float32 (queries, embedding_dim)


def read_query(tokenizer, tokens: list[int], last_question: str) -> str:
    """The text of a written query without quotes around it; the last question if the query is empty."""
    return tokenizer.decode(tokens, skip_special_tokens=True).strip(string.whitespace + QUOTES) or last_question


class Comparison:
    """
    Methods over the same queries and the same index. What several methods need is computed once: one written query serves
    generate-then-encode, its variant with the question, and native-generated.

    Args:
        model (`NativeRetrievalModel`): in eval mode, on its device.
        teacher (`Teacher`): the index's.
        index (`DocumentIndex`): the documents.
        queries (`Dataset`): columns `_id`, `messages`, `rewrite`, as `data.load_task` gives them.
        methods: names from `METHODS`.
        batch_size: prompts in one batch of the backbone.

    Raises:
        `ValueError`: for a conversation that cannot become a prompt, naming the query.
    """

    def __init__(
        self,
        model: "NativeRetrievalModel",
        teacher: "Teacher",
        index: "DocumentIndex",
        queries: "Dataset",
        methods: Sequence[str] = METHODS,
        batch_size: int = 32,
    ):
        from .conversations import last_question

        self.model, self.teacher, self.index, self.queries = model, teacher, index, queries
        self.batch_size = batch_size
        self.query_ids: list[str] = list(queries["_id"])
        self.messages: list[list[dict]] = list(queries["messages"])
        self.prompts = self._build_prompts()  # first: it checks the conversations
        self.last_questions = [last_question(messages) for messages in self.messages]
        self.methods = {name: METHOD_CLASSES[name](name, self) for name in methods}
        self._parts: dict[str, Method] = {}

    def method(self, name: str) -> Method:
        """One of the methods, compared or not: some are made of others."""
        if name not in self._parts:
            self._parts[name] = self.methods.get(name) or METHOD_CLASSES[name](name, self)
        return self._parts[name]

    def runs(self) -> dict[str, "Run"]:
        """`{method: {query_id: {doc_id: score}}}`, with the best 1,000 documents of each query."""
        return {name: method.run() for name, method in self.methods.items()}

    def latencies(self, num_queries: int = 30) -> dict[str, list[float] | None]:
        """
        Milliseconds of each method on `num_queries` queries, evenly spaced over the split, one at a time; `None` for 0.

        The methods take turns query by query, so that a slow moment of the machine meets all of them. A method that reads
        the prompt gets its own prefill, outside the clock.
        """
        if num_queries == 0:
            return dict.fromkeys(self.methods)
        count = min(num_queries, len(self.query_ids))
        sample = np.linspace(0, len(self.query_ids) - 1, count).round().astype(int).tolist()
        times: dict[str, list[float] | None] = {name: [] for name in self.methods}
        rounds = [(i, False) for i in sample[:WARM_UP]] + [(i, True) for i in sample]
        for i, counts in tqdm(rounds, desc="Latency: one query at a time", unit="query"):
            for name, method in self.methods.items():
                cache = self.prefill(i) if method.reads_prompt else None
                begin = perf_counter()
                method.query(i, cache)  # ends on the CPU, and so waits for the GPU
                elapsed = perf_counter() - begin
                if counts:
                    times[name].append(1000 * elapsed)
        return times

    def _build_prompts(self) -> list[list[int]]:
        prompts = []
        tools = self.queries["tools"] if "tools" in self.queries.column_names else [None] * len(self.queries)
        for query_id, messages, its_tools in zip(self.query_ids, self.messages, tools, strict=True):
            try:
                prompts.append(self.model.processor.encode(messages, tools=its_tools or None))
            except ValueError as error:
                raise ValueError(f"query {query_id!r}: {error}") from error
        return prompts

    def prefill(self, i: int) -> "QueryCache":
        """The finished prefill of the prompt of query i."""
        cache = self.model.prefill(*self.model.processor.pad([self.prompts[i]]))
        cache.hidden_states[0, -1, 0, 0].item()  # waits for the GPU
        return cache

    def batches(self) -> list[list[int]]:
        """The queries in batches of prompts of similar length."""
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        return [order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size)]

    @cached_property
    def written(self) -> Written:
        vectors = np.empty((len(self.prompts), self.model.config.embedding_dim), np.float32)
        queries = [""] * len(self.prompts)
        with tqdm(total=len(self.prompts), desc="The backbone writes queries", unit="query") as bar:
            for rows in self.batches():
                cache = self.model.prefill(*self.model.processor.pad([self.prompts[i] for i in rows]))
                output = self.model.embed_prefilled(cache, "generated")
                vectors[rows] = output.query_embeddings.float().cpu().numpy()
                for i, tokens in zip(rows, output.query_ids, strict=True):
                    queries[i] = self.read_query(i, tokens)
                bar.update(len(rows))
        return Written(queries, vectors)

    @property
    def extracted(self) -> list[str]:
        """What `model.extract_query` gives."""
        return self.read[1]

    @cached_property
    def read(self) -> tuple[np.ndarray, list[str]]:
        """The context mode's vectors, and the texts of a head that selects words, by one pass over the prompts."""
        model, texts = self.model, [""] * len(self.prompts)
        vectors = np.empty((len(self.prompts), model.config.embedding_dim), np.float32)
        with tqdm(total=len(self.prompts), desc="The backbone reads", unit="query") as bar:
            for rows in self.batches():
                cache = model.prefill(*model.processor.pad([self.prompts[i] for i in rows]), use_cache=False)
                vectors[rows] = model.embed_prefilled(cache, "context").query_embeddings.float().cpu().numpy()
                if model.query_head.selection is not None:
                    found = model.extract_prefilled(cache, [self.messages[i] for i in rows])
                    for i, text in zip(rows, found, strict=True):
                        texts[i] = text
                bar.update(len(rows))
        return vectors, texts

    def read_query(self, i: int, tokens: list[int]) -> str:
        return read_query(self.model.tokenizer, tokens, self.last_questions[i])

    def search(self, vectors: np.ndarray) -> "Run":
        scores, rows = self.index.search(vectors, DEPTH)
        ids = self.index.ids
        return {
            query_id: {
                ids[row]: score for row, score in zip(its_rows.tolist(), its_scores.tolist(), strict=True) if row >= 0
            }
            for query_id, its_rows, its_scores in zip(self.query_ids, rows, scores, strict=True)
        }

    @cached_property
    def bm25(self) -> Any:
        import bm25s

        from .teacher import document_texts

        retriever = bm25s.BM25()
        with tqdm(total=1, desc="BM25: indexing", unit="corpus") as bar:
            retriever.index(self.words(document_texts(self.index.documents)), show_progress=False)
            bar.update()
        return retriever

    @cached_property
    def stemmer(self) -> Any:
        import Stemmer

        return Stemmer.Stemmer("english")

    def words(self, texts: list[str]) -> list[list[str]]:
        """The stems of each text's words, without stop words."""
        import bm25s

        return bm25s.tokenize(texts, stopwords="en", stemmer=self.stemmer, return_ids=False, show_progress=False)
