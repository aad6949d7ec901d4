"""Retrieval measures over ir-measures, and the statistics that compare two methods.

A *run* is `{query_id: {doc_id: score}}`, *qrels* are `{query_id: {doc_id: relevance}}`; relevance 1 and above is relevant.

**Ties.** ir-measures hands `R` and `nDCG` to trec_eval (equal scores: larger document id first, scores compared in
float32) and `RR` with a cutoff to the MS MARCO script (equal scores: *smaller* document id first). Duplicate documents
do tie, so one run could have two orders. Every function here therefore fixes the order first, by score and then by
document id, both descending (trec_eval's rule), and hands out scores that are all different.
"""

import math
from collections.abc import Mapping, Sequence

import datasets
import evaluate
import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG
from scipy import stats

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]

MEASURES = {"recall@10": R @ 10, "mrr@10": RR @ 10, "ndcg@10": nDCG @ 10}


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Document ids, best first; equal scores are ordered by document id, descending."""
    return [doc_id for _, doc_id in sorted(((score, doc_id) for doc_id, score in scores.items()), reverse=True)]


def _check(run: Run, qrels: Qrels, query_ids: Sequence[str]) -> None:
    if repeated := len(query_ids) - len(set(query_ids)):
        raise ValueError(f"query_ids: {repeated} of {len(query_ids)} ids are repeated; pass every query id once.")
    for query_id in query_ids:
        if not any(relevance >= 1 for relevance in qrels.get(query_id, {}).values()):
            raise ValueError(
                f"Query {query_id!r} has no relevant document in the qrels, wanted at least one; "
                "add its judgement or leave the query out of query_ids."
            )
        for doc_id, score in run.get(query_id, {}).items():
            if math.isnan(score):
                raise ValueError(
                    f"Query {query_id!r}: the score of document {doc_id!r} is nan, wanted a number; "
                    "look for an empty or zero vector on the way to the index."
                )


def per_query(run: Run, qrels: Qrels, query_ids: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Recall@10, MRR@10 and nDCG@10 of every query.

    Args:
        run: scores of the retrieved documents; a query that is missing or empty here counts as 0.
        qrels: judgements; queries outside `query_ids` are ignored.
        query_ids: the queries, each once, which fix the order of the result; by default those of `qrels`.

    Returns:
        `{"recall@10": [...], "mrr@10": [...], "ndcg@10": [...]}`, each list aligned to `query_ids`.

    Raises:
        ValueError: a query without a relevant document, a repeated query id, or a score that is nan.
    """
    query_ids = list(qrels) if query_ids is None else query_ids
    _check(run, qrels, query_ids)
    if not query_ids:
        return {name: [] for name in MEASURES}
    ordered = {
        query_id: {doc_id: -float(position) for position, doc_id in enumerate(ranking(run[query_id]))}
        for query_id in query_ids
        if run.get(query_id)
    }
    judged = {query_id: dict(qrels[query_id]) for query_id in query_ids}
    values = {
        (str(metric.measure), metric.query_id): float(metric.value)
        for metric in ir_measures.iter_calc(list(MEASURES.values()), judged, ordered)
    }
    return {name: [values[str(measure), query_id] for query_id in query_ids] for name, measure in MEASURES.items()}


def ranks(run: Run, qrels: Qrels, query_ids: Sequence[str], cutoff: int = 1000) -> list[int | None]:
    """1-based rank of the best-ranked relevant document of every query, `None` past `cutoff`.

    Takes the arguments of `per_query`, raises what it raises, and breaks ties in the same way.
    """
    _check(run, qrels, query_ids)
    result: list[int | None] = []
    for query_id in query_ids:
        ranked = enumerate(ranking(run.get(query_id, {}))[:cutoff], start=1)
        result.append(next((position for position, doc_id in ranked if qrels[query_id].get(doc_id, 0) >= 1), None))
    return result


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    groups: Sequence[str] | None = None,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Difference `mean(a) - mean(b)` and its confidence interval, over the same queries.

    Whole groups are resampled, and with each query both of its values: the turns of one conversation go well or badly
    together, so queries drawn one by one would promise more than they know. The interval is the percentile one: BCa
    divides by the spread of the differences and gives nan where all of them are equal, which two methods that agree on
    every query do.

    Args:
        a, b: one value a query, aligned.
        groups: the conversation of each query, by default one each; a single conversation is resampled by its queries.

    Returns:
        `(difference, low, high)`.

    Raises:
        ValueError: lengths that differ, or fewer than 2 queries.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values and b has {len(b)}, wanted one a query in both; align them first.")
    if len(a) < 2:
        raise ValueError(f"An interval over {len(a)} queries does not exist, wanted at least 2; evaluate more queries.")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if groups is not None and len(groups) != len(a):
        raise ValueError(f"groups has {len(groups)} values for {len(a)} queries, wanted one a query.")
    group_of = np.arange(len(differences))
    if groups is not None and len(set(groups)) > 1:
        group_of = np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(group_of, differences), np.bincount(group_of)
    interval = stats.bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=1000,  # bounds the memory: 1000 x queries numbers at a time
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(differences.mean()), float(interval.low), float(interval.high)


def wins_ties_losses(a: Sequence[float], b: Sequence[float]) -> dict[str, int]:
    """On how many queries `a` is above, equal to and below `b`."""
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values and b has {len(b)}, wanted one a query in both; align them first.")
    signs = np.sign(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))
    return {"wins": int((signs > 0).sum()), "ties": int((signs == 0).sum()), "losses": int((signs < 0).sum())}


class RetrievalMetrics(evaluate.Metric):
    """Recall@10, MRR@10 and nDCG@10 as an `evaluate.Metric`. The Trainer's dev metrics and eval.py both come from here.

    It is constructed directly and downloads nothing. Grades are used as they are: nDCG gains are the relevances.

    Example:

        >>> metric = RetrievalMetrics()
        >>> metric.compute(run={"q1": {"d1": 0.9, "d2": 0.3}}, qrels={"q1": {"d2": 1}})["mrr@10"]
        0.5

    Predictions can also be added in batches, one row a query, as to any other metric of `evaluate`:

        >>> metric.add_batch(
        ...     predictions=[{"doc_ids": ["d1", "d2"], "scores": [0.9, 0.3]}],
        ...     references=[{"doc_ids": ["d2"], "relevances": [1]}],
        ... )
        >>> metric.compute()["mrr@10"]
        0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Recall@10, MRR@10 and nDCG@10 of a retrieval run, computed by ir-measures.",
            citation="",
            inputs_description=(
                "predictions: retrieved documents of a query, {'doc_ids': [...], 'scores': [...]}, in any order; "
                "references: its judged documents, {'doc_ids': [...], 'relevances': [...]}."
            ),
            features=datasets.Features(
                {
                    "predictions": {"doc_ids": strings, "scores": datasets.Sequence(datasets.Value("float64"))},
                    "references": {"doc_ids": strings, "relevances": datasets.Sequence(datasets.Value("int64"))},
                }
            ),
        )

    def compute(self, *, run: Run | None = None, qrels: Qrels | None = None, **rows) -> dict[str, float]:
        """Means over the queries of `qrels`; a query that is not in `run` counts as 0. See `per_query` for each value.

        Args:
            run: `{query_id: {doc_id: score}}`.
            qrels: `{query_id: {doc_id: relevance}}`.

        Raises:
            ValueError: only one of the two is given, there is no query, and what `per_query` raises.
        """
        if run is None and qrels is None:
            return super().compute(**rows)
        if run is None or qrels is None or rows:
            raise ValueError("compute takes run and qrels together, and nothing else with them; pass both.")
        return _means(per_query(run, qrels))

    def _compute(self, predictions: list[dict], references: list[dict]) -> dict[str, float]:
        run, qrels = {}, {}
        for row, (found, judged) in enumerate(zip(predictions, references, strict=True)):
            run[str(row)] = dict(zip(found["doc_ids"], found["scores"], strict=True))
            qrels[str(row)] = dict(zip(judged["doc_ids"], judged["relevances"], strict=True))
        return _means(per_query(run, qrels))


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    if not all(values.values()):
        raise ValueError("There are 0 queries to average over, wanted at least 1; pass the qrels of a split.")
    return {name: float(np.mean(column)) for name, column in values.items()}
