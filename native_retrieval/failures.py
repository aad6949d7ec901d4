"""One page on where a native mode fails: by depth, change of topic, rare words and earlier documents, and its worst queries."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .data import Task
from .methods import Comparison
from .metrics import Run, ranking
from .report import BASELINE, CUTOFF, GREY, INK, NATIVE_COLOURS, PALE, TURN_BINS, failures

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
        path: of the Markdown file.
        result: as `report.build_result` makes it, with generate-then-encode and a native mode among its methods.
        runs: what `comparison.runs()` gave.
        method: the native mode to look at; the model's own default if absent, or else the first there is.
        figure: where the figure goes; by default beside the page, under its name.

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
        "Change of topic": _by_switch(task),
        "Rarest word of the question (stem, in how many documents)": _by_rarity(task, comparison),
    }
    splits = {name: groups for name, groups in splits.items() if groups}
    _draw(result, splits, method, figure_path)
    page = [
        f"# Where {method} fails: {result['dataset']}, {result['split']}",
        "",
        f"{result['num_queries']} queries, {result['num_documents']} documents. {BASELINE} is the two-model pipeline: the "
        f"language model writes a query, the embedding model encodes it. A hit is a relevant document among the first "
        f"{CUTOFF}; MRR is the mean of 1 / its rank, 0 past {CUTOFF}.",
        "",
        f"![Hits by group]({Path(os.path.relpath(figure_path, path.parent)).as_posix()})",
        "",
    ]
    for name, groups in splits.items():
        page += [f"## {name}", "", *_group_table(result, groups, method), ""]
    page += ["## Documents of earlier turns", "", _earlier(result, runs, task, method), ""]
    page += [f"## The {NUM_WORST} queries on which it loses most to {BASELINE}", ""]
    documents = {row["_id"]: _short(f"{row['title']} {row['text']}") for row in task.corpus}
    for row in failures(result, BASELINE, method, NUM_WORST):
        page += _one_failure(row, result, runs, task, comparison, documents, method)
    path.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    return [path, figure_path]


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


# Figures of each group


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
        figures = (values[mask].mean() for values in (hits, their_hits, reciprocal, their_reciprocal))
        lines.append(f"| {name} | {mask.sum()} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")
    return lines


def _draw(result: Mapping[str, Any], splits: Mapping[str, Groups], method: str, path: Path) -> None:
    hits, theirs = _scores(result, method)[0], _scores(result, BASELINE)[0]
    sizes = [len(groups) for groups in splits.values()]
    figure = Figure(figsize=(7.5, 0.9 * len(splits) + 0.42 * sum(sizes)), layout="constrained")
    panels = figure.subplots(len(splits), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (name, groups) in zip(panels, splits.items(), strict=True):
        places = np.arange(len(groups))
        ours = [hits[mask].mean() for mask in groups.values()]
        base = [theirs[mask].mean() for mask in groups.values()]
        axes.barh(places - 0.2, ours, 0.36, color=NATIVE_COLOURS[method], label=method)
        axes.barh(places + 0.2, base, 0.36, color=GREY, label=BASELINE)
        axes.set_yticks(places, [f"{label}  (n = {mask.sum()})" for label, mask in groups.items()])
        axes.set_title(name, loc="left", fontsize=10, color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
    panels[-1].set_xlabel(f"Queries with a hit among the first {CUTOFF}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def _earlier(result: Mapping[str, Any], runs: Mapping[str, Run], task: Task, method: str) -> str:
    """How often a document that an earlier turn wanted stands above this turn's."""
    wanted: dict[tuple[str, int], list[str]] = {}
    for conversation, turn, gold in zip(*(task.queries[column] for column in ("conv", "turn", "gold")), strict=True):
        wanted[conversation, turn] = gold
    above, total = Counter(), 0
    for row, (query_id, conversation, turn, gold) in enumerate(
        zip(*(task.queries[column] for column in ("_id", "conv", "turn", "gold")), strict=True)
    ):
        earlier = {d for (c, t), documents in wanted.items() if c == conversation and t < turn for d in documents}
        earlier -= set(gold)
        if not earlier:
            continue
        total += 1
        for name in (method, BASELINE):
            run, rank = runs[name][query_id], result["methods"][name]["ranks"][row]
            order = ranking(run)[: (rank or len(run) + 1) - 1]
            above[name] += not earlier.isdisjoint(order)
    if not total:
        return "No query of this split has an earlier turn in it."
    return (
        f"{total} queries come after a turn of the same conversation that wanted another document. That document stands "
        f"above the right one in {above[method]} of them for {method} ({above[method] / total:.0%}), in "
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
    for message in query["messages"][-3:]:
        lines.append(f"> **{message['role']}**: {_short(message['content'])}  ")
    lines += ["", f"- wanted: “{documents[query['gold'][0]]}”"]
    for name in (method, BASELINE):
        run = runs[name][query["_id"]]
        rank = result["methods"][name]["ranks"][row]
        wrote = f", which wrote “{_short(comparison.written.queries[row])}”" if name == BASELINE else ""
        first = ranking(run)[0]  # an index may hold more than the data's own documents
        lines.append(f"- {name}{wrote}: rank {rank or 'past 1,000'}; first: “{documents.get(first, first)}”")
    return [*lines, ""]


def _short(text: str, length: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rsplit(" ", 1)[0] + " …"
