"""A page on where a native mode fails: by depth, topic shift, rare words and earlier documents, with its worst queries."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from messages_native_retrieval import clean_messages

from .data import Task
from .figures import GREY, INK, NATIVE_COLOURS, PALE, TURN_BINS
from .methods import Comparison
from .metrics import Run, ranking
from .results import BASELINE, CUTOFF

NUM_WORST = 20
RARITY_BINS = (("in no document", 0, 0), ("in 1–3 documents", 1, 3), ("in 4–20", 4, 20), ("in more", 21, np.inf))
Groups = dict[str, np.ndarray]  # label -> mask over the queries


def write_failure_report(
    path: str | os.PathLike[str],
    result: Mapping[str, Any],
    runs: Mapping[str, Run],
    task: Task,
    comparison: Comparison,
    method: str | None = None,
    figure: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """
    Writes a page of Markdown and its figure, and returns both paths.

    Args:
        path: the Markdown file.
        result: from `results.build_result`, with generate-then-encode and a native mode among its methods.
        runs: from `comparison.runs()`.
        method: the native mode to look at; by default the model's own `query_mode`, if it was run, or the first one.
        figure: the PNG file; by default beside the page, with its name.

    Raises:
        `ValueError`: if either method is not in the result.
    """
    native = [name for name in result["methods"] if name.startswith("native-")]
    if BASELINE not in result["methods"] or not native:
        raise ValueError(f"a failure report needs {BASELINE} and a native mode among the methods")
    default = f"native-{comparison.model.config.query_mode}"
    method = method or (default if default in native else native[0])
    path = Path(path)
    figure_path = Path(figure or path.with_suffix(".png"))
    for file in (path, figure_path):
        file.parent.mkdir(parents=True, exist_ok=True)
    splits = {
        "Depth of the conversation (user turns so far)": _by_depth(result),
        "Topic shift": _by_switch(task),
        "Rarest word of the question (stem, in how many documents)": _by_rarity(task, comparison),
    }
    splits = {name: groups for name, groups in splits.items() if groups}
    _draw(result, splits, method, figure_path)
    page = [
        f"# Where {method} fails: {result['dataset']}, {result['split']}",
        "",
        f"{result['num_queries']} queries, {result['num_documents']} documents. {BASELINE} uses two models: the language "
        f"model writes a query, the embedding model encodes it. A hit is a relevant document in the top {CUTOFF}; MRR is "
        f"the mean of 1 / its rank, or 0 outside the top {CUTOFF}.",
        "",
        f"![Hits by group]({Path(os.path.relpath(figure_path, path.parent)).as_posix()})",
        "",
    ]
    for name, groups in splits.items():
        page += [f"## {name}", "", *_group_table(result, groups, method), ""]
    page += ["## Documents of earlier turns", "", _earlier(result, runs, task, method), ""]
    page += [f"## The {NUM_WORST} queries on which it loses most to {BASELINE}", ""]
    documents = {row["_id"]: _short(f"{row['title']} {row['text']}") for row in task.corpus}
    for row in worst_queries(result, method, NUM_WORST):
        page += _one_failure(row, result, runs, task, comparison, documents, method)
    path.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    return [path, figure_path]


def worst_queries(result: Mapping[str, Any], method: str, n: int, baseline: str = BASELINE) -> list[int]:
    """
    Positions in `query_ids` of the queries on which `method` loses most reciprocal rank to `baseline`, worst first.

    At most `n`, and fewer if it loses on fewer. A relevant document past rank 1000 counts as 0.
    """
    theirs, ours = (
        np.array([1.0 / rank if rank else 0.0 for rank in result["methods"][name]["ranks"]])
        for name in (baseline, method)
    )
    losses = theirs - ours
    return [int(row) for row in np.argsort(-losses, kind="stable")[:n] if losses[row] > 0]


# Groups of queries


def _by_depth(result: Mapping[str, Any]) -> Groups:
    turns = np.asarray(result["turns"])
    return _filled({name: (turns >= first) & (turns <= (last or np.inf)) for name, first, last in TURN_BINS})


def _by_switch(task: Task) -> Groups:
    switch, turns = task.queries["switch"], np.asarray(task.queries["turn"])
    if all(value is None for value in switch):
        return {}
    changed = np.array([bool(value) for value in switch])
    known = np.array([value is not None for value in switch])
    return _filled({"same topic": known & ~changed & (turns > 1), "new topic": changed, "first turn": turns == 1})


def _by_rarity(task: Task, comparison: Comparison) -> Groups:
    from .teacher import document_texts

    frequency = Counter(stem for words in comparison.words(document_texts(task.corpus)) for stem in set(words))
    rewrites = task.queries["rewrite"]
    questions = [rewrite or last for rewrite, last in zip(rewrites, comparison.last_questions, strict=True)]
    rarest = np.array([min((frequency[word] for word in words), default=0) for words in comparison.words(questions)])
    return _filled({name: (rarest >= low) & (rarest <= high) for name, low, high in RARITY_BINS})


def _filled(groups: Groups) -> Groups:
    return {name: mask for name, mask in groups.items() if mask.any()}


# Numbers of each group


def _scores(result: Mapping[str, Any], method: str) -> tuple[np.ndarray, np.ndarray]:
    ranks = np.array([rank or np.inf for rank in result["methods"][method]["ranks"]])
    return ranks <= CUTOFF, np.where(ranks <= CUTOFF, 1 / ranks, 0)


def _group_table(result: Mapping[str, Any], groups: Groups, method: str) -> list[str]:
    (hits, reciprocal), (their_hits, their_reciprocal) = _scores(result, method), _scores(result, BASELINE)
    lines = [
        f"| | queries | hits, {method} | hits, {BASELINE} | MRR, {method} | MRR, {BASELINE} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, mask in groups.items():
        means = (values[mask].mean() for values in (hits, their_hits, reciprocal, their_reciprocal))
        lines.append(f"| {name} | {mask.sum()} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return lines


def _draw(result: Mapping[str, Any], splits: Mapping[str, Groups], method: str, path: Path) -> None:
    hits, theirs = _scores(result, method)[0], _scores(result, BASELINE)[0]
    sizes = [len(groups) for groups in splits.values()]
    figure = Figure(figsize=(7.5, 0.9 * len(splits) + 0.42 * sum(sizes)), layout="constrained")
    panels = figure.subplots(len(splits), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (name, groups) in zip(panels, splits.items(), strict=True):
        rows = np.arange(len(groups))
        ours = [hits[mask].mean() for mask in groups.values()]
        base = [theirs[mask].mean() for mask in groups.values()]
        axes.barh(rows - 0.2, ours, 0.36, color=NATIVE_COLOURS[method], label=method)
        axes.barh(rows + 0.2, base, 0.36, color=GREY, label=BASELINE)
        axes.set_yticks(rows, [f"{label}  (n = {mask.sum()})" for label, mask in groups.items()])
        axes.set_title(name, loc="left", fontsize=10, color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
    panels[-1].set_xlabel(f"Share of queries with a hit in the top {CUTOFF}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def _earlier(result: Mapping[str, Any], runs: Mapping[str, Run], task: Task, method: str) -> str:
    """How often a document that is relevant to an earlier turn ranks above those of this turn."""
    relevant: dict[str, list[tuple[int, list[str]]]] = defaultdict(list)
    for conversation, turn, gold in zip(*(task.queries[column] for column in ("conv", "turn", "gold")), strict=True):
        relevant[conversation].append((turn, gold))
    above, total = Counter(), 0
    for row, (query_id, conversation, turn, gold) in enumerate(
        zip(*(task.queries[column] for column in ("_id", "conv", "turn", "gold")), strict=True)
    ):
        earlier = {document for t, documents in relevant[conversation] if t < turn for document in documents}
        earlier -= set(gold)
        if not earlier:
            continue
        total += 1
        for name in (method, BASELINE):
            run, rank = runs[name][query_id], result["methods"][name]["ranks"][row]
            order = ranking(run)[: (rank or len(run) + 1) - 1]
            above[name] += not earlier.isdisjoint(order)
    if not total:
        return "No query of this split has an earlier turn in the split."
    return (
        f"{total} queries come after a turn of the same conversation that has another relevant document. That document "
        f"ranks above the right one in {above[method]} of them for {method} ({above[method] / total:.0%}), in "
        f"{above[BASELINE]} for {BASELINE} ({above[BASELINE] / total:.0%})."
    )


# One failed query


def _one_failure(
    row: int,
    result: Mapping[str, Any],
    runs: Mapping[str, Run],
    task: Task,
    comparison: Comparison,
    documents: Mapping[str, str],
    method: str,
) -> list[str]:
    query = task.queries[row]
    lines = [f"### `{query['_id']}`", ""]
    for message in clean_messages(query["messages"])[-3:]:
        lines.append(f"> **{message['role']}**: {_short(message['content'])}  ")
    lines += ["", f"- relevant: “{documents[query['gold'][0]]}”"]
    for name in (method, BASELINE):
        run = runs[name][query["_id"]]
        rank = result["methods"][name]["ranks"][row]
        wrote = f", which wrote “{_short(comparison.written.queries[row])}”" if name == BASELINE else ""
        first = next(iter(ranking(run)), "nothing")  # a given index may hold more documents than this corpus
        lines.append(f"- {name}{wrote}: rank {rank or 'past 1,000'}; first: “{documents.get(first, first)}”")
    return [*lines, ""]


def _short(text: str, length: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rsplit(" ", 1)[0] + " …"
