# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
What each part of a trained head is worth: parts are switched off, one at a time, and nothing is trained.

    python benchmarks/leave_one_out.py --model outputs/general --data ../shared/data --dev qrecc:dev doc2dial:dev \
        --output results/zero-shot/leave-one-out.json

On the sets of zero_shot.py, and on dev sets. The backbone reads each conversation once, for all rows.
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
from native_retrieval.cli import one_line_errors
from native_retrieval.data import Task
from native_retrieval.evaluation import cached_index
from native_retrieval.methods import Comparison
from native_retrieval.metrics import MEASURES, paired_bootstrap, per_query
from native_retrieval.results import write_json

AS_IT_IS, METHOD, JUDGED, DELTA = "as it is", "native-context", "ndcg@10", "difference_ndcg@10"
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


def attention_weights(head: NativeRetrievalHead) -> torch.Tensor:
    """Of the learned score: those of each attention head, `(heads, 2)`, as the question and as the last tokens ask."""
    return head.selection.score.weight[0, : 2 * len(head.selection.states)].unflatten(0, (-1, 2))


def one_head(head: NativeRetrievalHead) -> None:
    """The one with the largest weights."""
    weights = attention_weights(head)
    weights[torch.arange(len(weights)) != weights.sum(1).argmax().cpu()] = 0


def mean_attention(head: NativeRetrievalHead) -> None:
    head.selection.score.weight.zero_()
    attention_weights(head).fill_(1)


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
    rows = ROWS | ({NO_PROJECTION: lambda head: setattr(head, "projection", None)} if head.projection else {})
    heads = {name: copy.deepcopy(head) for name in rows}
    for name, change in rows.items():
        change(heads[name])
    return heads


@torch.no_grad()
def judge(comparison: Comparison, heads: dict[str, NativeRetrievalHead], task: Task) -> Iterator[dict]:
    """A row for each head: the means of the measures on the task, and the difference to the first, query by query."""
    model, prompts = comparison.model, comparison.prompts
    vectors = {name: np.empty((len(prompts), model.config.embedding_dim), np.float32) for name in heads}
    for batch in tqdm(comparison.batches(), desc=task.name, unit="batch"):
        cache = model.prefill(*model.processor.pad([prompts[i] for i in batch]), use_cache=False)
        words = model.processor.read_words(cache.input_ids, cache.attention_mask)
        inputs = (cache.hidden_states, cache.attention_mask, words.to(cache.hidden_states.device))
        for name, head in heads.items():
            vectors[name][batch] = head(*inputs)[0].cpu().numpy()
    base = None
    for name, its in vectors.items():
        values = per_query(comparison.search(its), task.qrels, comparison.query_ids)
        base = base or values
        difference = paired_bootstrap(values[JUDGED], base[JUDGED], list(task.queries["conv"]))
        means = {measure: round(float(np.mean(values[measure])), 4) for measure in MEASURES}
        yield {"row": name, **means, DELTA: [round(value, 4) for value in difference]}


@one_line_errors("leave_one_out.py")
def main() -> None:
    parser = common.parser("leave_one_out.py", __doc__, "model", "data", "backbone", "teacher", "cache_dir")
    parser.add_argument("--dev", nargs="*", default=[], help="sets in --data, as NAME:SPLIT (dev)")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help=f"some of {', '.join(SETS)} (default: all)")
    parser.add_argument("--output", required=True, type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    check_names("sets", arguments.sets, SETS)
    model, teacher = common.load(arguments)
    heads, judged, command = variants(model.query_head), [], shlex.join(["python", *sys.argv])
    one = model.config.selection_heads[attention_weights(model.query_head).sum(1).argmax()]
    rows = {name: {"row": name} for name in heads}
    for name in (*arguments.sets, *arguments.dev):
        task = read_set(name, arguments.data, arguments.cache_dir)
        index = cached_index(arguments.cache_dir, task, teacher)
        comparison = Comparison(model, teacher, index, task.queries, [METHOD])
        judged += [{"set": name, **row} for row in judge(comparison, heads, task)]
        for kind, names in {"unseen": COUNTED, "dev": arguments.dev}.items():
            for row in rows.values():
                own = [its[DELTA][0] for its in judged if its["row"] == row["row"] and its["set"] in names]
                row |= {kind: round(float(np.mean(own)), 4)} if own else {}
        for its in judged[-len(rows) :]:
            rows[its["row"]][name] = its[JUDGED]
        result = {"command": command, "one_head": "{}.{}".format(*one), "rows": list(rows.values()), "sets": judged}
        write_json(result, arguments.output)
    names = [name for name in rows[AS_IT_IS] if name != "row"]
    print(f"{JUDGED}; unseen and dev: mean differences".ljust(48), *(f"{name:>14}" for name in names))
    for row in rows.values():
        print(row["row"].ljust(48), *(f"{row[name]:14.4f}" for name in names))


if __name__ == "__main__":
    sys.exit(main())
