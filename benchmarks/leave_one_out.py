# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
What each part of a trained head is worth: parts are switched off, one at a time, and nothing is trained.

    python benchmarks/leave_one_out.py --model outputs/general --data ../shared/data --dev qrecc:dev doc2dial:dev \
        --output results/zero-shot/leave-one-out.json

On the sets of zero_shot.py and on dev sets. The backbone reads each conversation once, for all rows. A part that is worth
something on dev alone fits the data that it was trained on.
"""

import copy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks import common
from benchmarks.zero_shot import COUNTED, SETS, check_names, read_set
from head_native_retrieval import NativeRetrievalHead, Words, WordSelection
from native_retrieval.arguments import split_source
from native_retrieval.cli import one_line_errors
from native_retrieval.data import Task, load_task
from native_retrieval.evaluation import cached_index
from native_retrieval.methods import Comparison
from native_retrieval.metrics import MEASURES, paired_bootstrap, per_query
from native_retrieval.results import write_json

AS_IT_IS, METHOD, JUDGED = "as it is", "native-context", "ndcg@10"
NO_PROJECTION = "without the projection head"  # a row of heads that have one


def drop(*places: int) -> Callable[[NativeRetrievalHead], object]:
    """Without the vectors of some texts: 0 the question, 1 and 2 with few and with more selected words, 3 the whole context."""
    return lambda head: head.shares.index_fill_(0, torch.tensor(places, device=head.shares.device), 0.0)


def recency(head: NativeRetrievalHead) -> None:
    """The words that were said last."""
    selection = head.selection

    def forward(hidden_states: torch.Tensor, attention_mask: torch.Tensor, words: Words) -> torch.Tensor:
        selectable = WordSelection.features(selection, hidden_states, attention_mask, words)[1]
        said = torch.where(words.mask, words.positions, -1).float()
        last = torch.full_like(selectable, -1, dtype=torch.float32).scatter_reduce(1, words.groups, said, "amax")
        return last.masked_fill(~selectable, -torch.inf)

    selection.forward = forward


def strongest_head(head: NativeRetrievalHead) -> int:
    """The place of the attention head with the largest weights in the learned score."""
    weights = head.selection.score.weight[0, : -WordSelection.NUM_COUNTS]
    return int(weights.unflatten(0, (-1, 2)).sum(1).argmax())


def one_head(head: NativeRetrievalHead) -> None:
    place, weights = strongest_head(head), head.selection.score.weight[0, : -WordSelection.NUM_COUNTS]
    weights[: 2 * place], weights[2 * place + 2 :] = 0, 0


def mean_attention(head: NativeRetrievalHead) -> None:
    weights = head.selection.score.weight[0]
    weights[: -WordSelection.NUM_COUNTS], weights[-WordSelection.NUM_COUNTS :] = 1, 0


ROWS: dict[str, Callable[[NativeRetrievalHead], object]] = {
    AS_IT_IS: lambda head: None,
    "question alone": drop(1, 2, 3),
    "question and history": drop(1, 2),
    "no 2 words": drop(1),
    "no 6 words": drop(2),
    "without the whole context": drop(3),
    "recency instead of attention": recency,
    "one head instead of eight": one_head,
    "without the learned score (mean log attention)": mean_attention,
    "values alone (no layers)": lambda head: head.encoder.linear_out.weight.zero_(),
    "layers alone (no values)": lambda head: [part.zero_() for part in head.encoder.value.parameters()],
}


@torch.no_grad()
def variants(head: NativeRetrievalHead) -> dict[str, NativeRetrievalHead]:
    """A copy of the head for each row. Raises `ValueError` for one that reads no words."""
    if head.encoder is None:
        raise ValueError("--model has a head that reads no words, so it has no such parts; name another")
    heads = {name: copy.deepcopy(head) for name in ROWS}
    for name, change in ROWS.items():
        change(heads[name])
    if head.projection is not None:
        heads[NO_PROJECTION] = copy.deepcopy(head)
        heads[NO_PROJECTION].projection = None
    return heads


@torch.no_grad()
def judge(comparison: Comparison, heads: dict[str, NativeRetrievalHead], task: Task) -> Iterator[dict]:
    """A row for each head: the means of the measures on the task, and the difference to the first, query by query."""
    model, prompts = comparison.model, comparison.prompts
    vectors = {name: np.empty((len(prompts), model.config.embedding_dim), np.float32) for name in heads}
    for batch in tqdm(comparison.batches(), desc=task.name, unit="batch"):
        cache = model.prefill(*model.processor.pad([prompts[i] for i in batch]), use_cache=False)
        words = model.processor.read_words(cache.input_ids, cache.attention_mask)
        device = next(model.query_head.parameters()).device
        inputs = (cache.hidden_states.to(device), cache.attention_mask.to(device), words.to(device))
        for name, head in heads.items():
            vectors[name][batch] = head(*inputs)[0].cpu().numpy()
    base = None
    for name, its in vectors.items():
        values = per_query(comparison.search(its), task.qrels, comparison.query_ids)
        base = base or values
        difference = paired_bootstrap(values[JUDGED], base[JUDGED], list(task.queries["conv"]))
        means = {measure: round(float(np.mean(values[measure])), 4) for measure in MEASURES}
        yield {"row": name, **means, f"difference_{JUDGED}": [round(value, 4) for value in difference]}


def mean_rows(rows: list[dict], sets: dict[str, list[str]]) -> list[dict]:
    """For each part the mean of its differences over kinds of sets, such as the unseen ones."""
    found = []
    for name in dict.fromkeys(row["row"] for row in rows):
        seen = {row["set"]: row[f"difference_{JUDGED}"][0] for row in rows if row["row"] == name}
        means = {kind: [seen[one] for one in names if one in seen] for kind, names in sets.items()}
        found.append({"row": name} | {kind: round(float(np.mean(own)), 4) for kind, own in means.items() if own})
    return found


@one_line_errors("leave_one_out.py")
def main() -> None:
    parser = common.parser("leave_one_out.py", __doc__, "model", "data", "backbone", "teacher", "cache_dir")
    parser.add_argument("--dev", nargs="*", default=[], help="sets in --data, as NAME:SPLIT (dev)")
    parser.add_argument("--sets", nargs="*", default=list(SETS), help=f"some of {', '.join(SETS)} (default: all)")
    parser.add_argument("--output", required=True, type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    check_names("sets", arguments.sets, SETS)
    model, teacher = common.load(arguments)
    heads, rows = variants(model.query_head), []
    layer, number = model.config.selection_heads[strongest_head(model.query_head)]
    result = {"command": shlex.join(["python", *sys.argv]), "one_head": f"{layer}.{number}"}
    kinds = {"unseen": [name for name in arguments.sets if name in COUNTED], "dev": arguments.dev}
    for name in (*arguments.sets, *arguments.dev):
        source, split = split_source(name)
        known = name in arguments.sets
        task = (
            read_set(name, arguments.data, arguments.cache_dir)
            if known
            else load_task(Path(arguments.data, source), split or "dev")
        )
        comparison = Comparison(
            model, teacher, cached_index(arguments.cache_dir, task, teacher), task.queries, [METHOD]
        )
        rows += [{"set": name, **row} for row in judge(comparison, heads, task)]
        write_json(result | {"rows": mean_rows(rows, kinds), "sets": rows}, arguments.output)
    print(
        f"{JUDGED + ', mean difference first':48}"
        + "".join(f"{name:>15}" for name in (*kinds, *arguments.sets, *arguments.dev))
    )
    for mean in mean_rows(rows, kinds):
        cells = [f"{mean[kind]:+.4f}" if kind in mean else "–" for kind in kinds]
        cells += [f"{row[JUDGED]:.3f}" for row in rows if row["row"] == mean["row"]]
        print(f"{mean['row']:48}" + "".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
