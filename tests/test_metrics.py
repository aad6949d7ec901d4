"""The measures against brute force, ties, and the statistics that compare two methods."""

import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, R, nDCG

from native_retrieval.metrics import (
    RetrievalMetrics,
    paired_bootstrap,
    per_query,
    ranking,
    ranks,
    wins_ties_losses,
)

DOC_IDS = [f"d{number:02d}" for number in range(30)]

# Scores from few values, so that ties are common.
runs = st.dictionaries(
    st.sampled_from(["q0", "q1", "q2"]),
    st.dictionaries(st.sampled_from(DOC_IDS), st.sampled_from([-1.5, 0.0, 0.25, 0.5, 1.0, 3.0]), max_size=25),
)
qrels_of_three = st.fixed_dictionaries(
    {
        query_id: st.dictionaries(st.sampled_from(DOC_IDS), st.integers(0, 2), min_size=1, max_size=4).filter(
            lambda judged: max(judged.values()) >= 1
        )
        for query_id in ("q0", "q1", "q2")
    }
)


def brute_force(scores: dict[str, float], judged: dict[str, int]) -> tuple[float, float, float]:
    """Recall@10, MRR@10 and nDCG@10 (gain = relevance) from their definitions."""
    order = sorted(scores, key=lambda doc_id: (scores[doc_id], doc_id), reverse=True)[:10]
    gains = [judged.get(doc_id, 0) for doc_id in order]
    recall = sum(gain >= 1 for gain in gains) / sum(relevance >= 1 for relevance in judged.values())
    mrr = next((1 / position for position, gain in enumerate(gains, start=1) if gain >= 1), 0.0)
    dcg = sum(gain / math.log2(position + 1) for position, gain in enumerate(gains, start=1))
    ideal = sorted(judged.values(), reverse=True)[:10]
    return recall, mrr, dcg / sum(gain / math.log2(position + 1) for position, gain in enumerate(ideal, start=1))


@settings(max_examples=150, deadline=None)
@given(run=runs, qrels=qrels_of_three)
def test_per_query_equals_brute_force_ties_included(run, qrels):
    query_ids = ["q2", "q0", "q1"]
    values = per_query(run, qrels, query_ids)
    for row, query_id in enumerate(query_ids):
        expected = brute_force(run.get(query_id, {}), qrels[query_id])
        seen = (values["recall@10"][row], values["mrr@10"][row], values["ndcg@10"][row])
        assert seen == pytest.approx(expected, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    order=st.lists(st.sampled_from(DOC_IDS), min_size=1, unique=True),
    judged=st.dictionaries(st.sampled_from(DOC_IDS), st.integers(1, 3), min_size=1),
)
def test_without_ties_per_query_is_ir_measures(order, judged):
    run, qrels = {"q": {doc_id: -float(position) for position, doc_id in enumerate(order)}}, {"q": judged}
    theirs = {str(m.measure): m.value for m in ir_measures.iter_calc([R @ 10, RR @ 10, nDCG @ 10], qrels, run)}
    ours = per_query(run, qrels, ["q"])
    assert [ours["recall@10"], ours["mrr@10"], ours["ndcg@10"]] == [
        pytest.approx([theirs[name]]) for name in ("R@10", "RR@10", "nDCG@10")
    ]


@settings(max_examples=100, deadline=None)
@given(run=runs, qrels=qrels_of_three)
def test_ranks_agree_with_reciprocal_ranks(run, qrels):
    query_ids = ["q0", "q1", "q2"]
    reciprocal = [
        1 / position if position is not None and position <= 10 else 0.0 for position in ranks(run, qrels, query_ids)
    ]
    assert reciprocal == pytest.approx(per_query(run, qrels, query_ids)["mrr@10"])


@settings(max_examples=50, deadline=None)
@given(run=runs, qrels=qrels_of_three, scale=st.sampled_from([0.5, 4.0]), shift=st.sampled_from([-8.0, 2.0]))
def test_only_the_order_of_scores_counts(run, qrels, scale, shift):
    query_ids = ["q0", "q1", "q2"]
    moved = {
        query_id: {doc_id: scale * score + shift for doc_id, score in reversed(scores.items())}
        for query_id, scores in run.items()
    }
    assert per_query(moved, qrels, query_ids) == per_query(run, qrels, query_ids)
    assert ranks(moved, qrels, query_ids) == ranks(run, qrels, query_ids)


def test_scores_closer_than_float32_keep_their_order():
    run = {"q": {"a": 1.0 + 1e-12, "b": 1.0, "c": 1.0}}
    assert ranking(run["q"]) == ["a", "c", "b"]
    assert per_query(run, {"q": {"a": 1}}, ["q"])["ndcg@10"] == [1.0]
    assert ranks(run, {"q": {"b": 1}}, ["q"]) == [3]


def test_rank_past_the_cutoff_is_none():
    run = {"q": {f"x{position:04d}": -float(position) for position in range(1200)}}
    assert ranks(run, {"q": {"x0999": 1}}, ["q"]) == [1000]
    assert ranks(run, {"q": {"x1000": 1}}, ["q"]) == [None]
    assert ranks(run, {"q": {"x0005": 1}}, ["q"], cutoff=5) == [None]


def test_no_queries_no_values():
    assert per_query({}, {}, []) == {"recall@10": [], "mrr@10": [], "ndcg@10": []}


@pytest.mark.parametrize("judged", [{}, {"q": {}}, {"q": {"d": 0}}])
def test_query_without_relevant_document_is_named(judged):
    with pytest.raises(ValueError, match=r"'q' has no relevant document.*leave the query out"):
        per_query({"q": {"d": 1.0}}, judged, ["q"])


def test_nan_score_is_named():
    with pytest.raises(ValueError, match="'q'.*'d'.*nan"):
        ranks({"q": {"d": math.nan}}, {"q": {"d": 1}}, ["q"])


def test_repeated_query_id_is_refused():
    with pytest.raises(ValueError, match="1 of 2 ids are repeated"):
        per_query({}, {"q": {"d": 1}}, ["q", "q"])


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_evaluate_metric_equals_per_query(keep_in_memory, tmp_path):
    generator = np.random.default_rng(0)
    query_ids = [f"q{number}" for number in range(12)]
    run = {
        query_id: dict(zip(generator.permutation(DOC_IDS)[:15].tolist(), generator.random(15).tolist(), strict=True))
        for query_id in query_ids[1:]
    }
    qrels = {query_id: {str(generator.choice(DOC_IDS)): 1} for query_id in query_ids}

    metric = RetrievalMetrics(keep_in_memory=keep_in_memory, cache_dir=str(tmp_path))
    for batch in (query_ids[:5], query_ids[5:]):
        metric.add_batch(
            predictions=[
                {"doc_ids": list(run.get(query_id, {})), "scores": list(run.get(query_id, {}).values())}
                for query_id in batch
            ],
            references=[
                {"doc_ids": list(qrels[query_id]), "relevances": list(qrels[query_id].values())} for query_id in batch
            ],
        )
    expected = {name: np.mean(values) for name, values in per_query(run, qrels, query_ids).items()}
    assert metric.compute() == pytest.approx(expected)
    assert metric.compute(run=run, qrels=qrels) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(run=runs, qrels=qrels_of_three)
def test_the_metric_is_the_mean_of_the_definitions_with_graded_relevance(run, qrels):
    means = RetrievalMetrics().compute(run=run, qrels=qrels)
    expected = np.mean([brute_force(run.get(query_id, {}), judged) for query_id, judged in qrels.items()], axis=0)
    assert [means["recall@10"], means["mrr@10"], means["ndcg@10"]] == pytest.approx(list(expected), abs=1e-9)


def test_grades_count():
    qrels = {"q": {"a": 3, "b": 1}}
    low, high = ({"q": scores} for scores in ({"b": 2.0, "a": 1.0}, {"a": 2.0, "b": 1.0}))
    metric = RetrievalMetrics()
    assert metric.compute(run=low, qrels=qrels)["ndcg@10"] < metric.compute(run=high, qrels=qrels)["ndcg@10"] == 1.0


def test_the_metric_downloads_nothing(monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asks the network"))
    assert RetrievalMetrics().compute(run={}, qrels={"q": {"d": 1}})["recall@10"] == 0.0


@pytest.mark.parametrize("arguments", [{"run": {}}, {"qrels": {"q": {"d": 1}}}, {"run": {}, "qrels": {}}])
def test_the_metric_needs_a_run_and_judged_queries(arguments):
    with pytest.raises(ValueError, match=r"pass (both|the qrels)"):
        RetrievalMetrics().compute(**arguments)


def test_bootstrap_covers_the_difference_and_changes_sign():
    generator = np.random.default_rng(1)
    a, b = generator.random(200), generator.random(200) * 0.7
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert 0 < low < difference < high
    assert paired_bootstrap(b, a) == pytest.approx((-difference, -high, -low), abs=0.01)
    assert paired_bootstrap(a, b) == (difference, low, high), "the same seed gives the same interval"
    normal = 1.96 * (a - b).std(ddof=1) / math.sqrt(200)
    assert (high - low) / 2 == pytest.approx(normal, rel=0.1)


pairs = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30)


@settings(max_examples=50, deadline=None)
@given(pairs, st.floats(-3, 3))
def test_an_interval_lies_among_the_differences_and_moves_with_them(pairs, shift):
    a, b = np.array(pairs).T
    difference, low, high = paired_bootstrap(a, b, resamples=200)
    assert (a - b).min() - 1e-9 <= low <= high + 1e-9 <= (a - b).max() + 2e-9
    assert paired_bootstrap(a + shift, b, resamples=200) == pytest.approx(
        (difference + shift, low + shift, high + shift), abs=1e-9
    )
    assert paired_bootstrap(b, a, resamples=200) == pytest.approx((-difference, -high, -low), abs=1e-9)


def test_bootstrap_is_paired():
    """A spread that both methods share does not widen the interval."""
    generator = np.random.default_rng(2)
    shared = generator.normal(scale=100, size=100)
    noise = generator.normal(scale=0.01, size=100)
    _, low, high = paired_bootstrap(shared + 1 + noise, shared)
    assert 0.99 < low <= high < 1.01


def test_bootstrap_resamples_whole_conversations():
    """Turns that say the same thing are one observation, however often it is repeated and in whatever order."""
    generator = np.random.default_rng(4)
    values, zeros = generator.random(40), np.zeros(40)
    alone = paired_bootstrap(values, zeros)
    order = generator.permutation(200)
    conversations = [f"c{i}" for i in np.repeat(np.arange(40), 5)[order]]
    turns = np.repeat(values, 5)[order]
    together = paired_bootstrap(turns, np.zeros(200), conversations)
    assert together == pytest.approx(alone, abs=0.01)
    _, low, high = paired_bootstrap(turns, np.zeros(200))
    assert high - low < 0.6 * (together[2] - together[1])
    assert paired_bootstrap(values, zeros, [f"c{i}" for i in range(40)]) == pytest.approx(alone, abs=0.01)
    assert paired_bootstrap(values, zeros, ["c"] * 40) == alone, "one conversation: its queries are all that there is"


@pytest.mark.parametrize("constant", [0.0, 0.25])
def test_bootstrap_of_equal_differences_is_a_point(constant):
    b = np.array([0.0, 0.5, 0.25, 0.0])
    assert paired_bootstrap(b + constant, b) == (constant, constant, constant)


def test_bootstrap_narrows_with_confidence_and_queries():
    values, zeros = np.tile([0.0, 1.0], 50), np.zeros(100)
    _, low, high = paired_bootstrap(values, zeros)
    _, low50, high50 = paired_bootstrap(values, zeros, confidence=0.5)
    assert low < low50 < high50 < high
    _, low4, high4 = paired_bootstrap(np.tile(values, 4), np.tile(zeros, 4))
    assert high4 - low4 == pytest.approx((high - low) / 2, rel=0.15)


@pytest.mark.parametrize(("a", "b", "message"), [([1.0], [1.0], "1 queries"), ([1.0, 2.0], [1.0], "2 values.*1")])
def test_bootstrap_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b)
    with pytest.raises(ValueError, match="groups has 1 values for 2 queries"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0], ["c"])


def test_a_95_percent_interval_holds_the_true_difference_95_times_of_100():
    generator = np.random.default_rng(3)
    held = []
    for _ in range(300):
        b = generator.random(60)
        a = b + generator.normal(0.2, 1.0, size=60)
        _, low, high = paired_bootstrap(a, b, resamples=1000)
        held.append(low <= 0.2 <= high)
    assert 0.91 < np.mean(held) < 0.98


def test_wins_ties_losses():
    assert wins_ties_losses([1, 0, 1, 0.5], [0, 1, 1, 0.25]) == {"wins": 2, "ties": 1, "losses": 1}
    with pytest.raises(ValueError, match="align"):
        wins_ties_losses([1.0], [])
