# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
A recipe with each of its data sets left out in turn, judged on the one that was left out: what the head knows of
conversations whose like it has not seen.

    python benchmarks/left_out.py configs/best.yaml --results results --output results/left-out.json \
        --num_train_epochs 1 --augmentation_share 0

`--results` holds the evaluations of the recipe's own model (`NAME-test.json`, by eval.py), whose generate-then-encode and
native-context the figures are compared with. Neither the conversations nor the plain text of what is left out is trained
on. Rows that are in the output already are not run again. Further words go to train.py.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import train
from eval import EvalArguments, cached_index, load_teacher
from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.data import load_task
from native_retrieval.loading import load_model
from native_retrieval.methods import Comparison
from native_retrieval.metrics import paired_bootstrap, per_query
from native_retrieval.results import read_result

METHOD, BASELINE = "native-context", "generate-then-encode"


def without(recipe: str, name: str, extra: list[str]) -> tuple[list[str], str]:
    """The words for train.py, and the source of the data set that is left out (its relatives share its name's start)."""
    _, data_args, _, _ = train.parse([recipe, *extra])
    family = name.split("_")[0]
    related = {"qrecc": ("qrecc", "canard")}.get(
        family, (family,)
    )  # CANARD's rewrites are of QReCC's conversations' kind

    def others(sources: list[str]) -> list[str]:
        return [source for source in sources if not Path(source).name.startswith(related)]

    words = [recipe, *extra, "--train_data", *others(data_args.train_data), "--dev_data", *others(data_args.dev_data)]
    words += ["--plain_text", *others(data_args.plain_text), "--query_modes", "context"]
    if data_args.train_weights:
        weights = dict(zip(data_args.train_data, map(str, data_args.train_weights), strict=True))
        words += ["--train_weights", *(weights[source] for source in others(data_args.train_data))]
    return words, next(source for source in data_args.dev_data if Path(source).name == name)


def judge(model_dir: str, source: str, own: dict, cache_dir: str) -> dict:
    """Test figures of a model on a data set that it has not seen, beside what `own` says of others."""
    task, model = load_task(source, "test"), load_model(model_dir)
    settings = EvalArguments(model=model_dir, data=source, output="left-out.json", cache_dir=cache_dir)
    index = cached_index(cache_dir, task, load_teacher(settings, model))
    comparison = Comparison(model, None, index, task.queries, [METHOD])
    seen = per_query(comparison.runs()[METHOD], task.qrels, comparison.query_ids)
    row = {}
    for metric in ("recall@10", "mrr@10"):
        row[metric] = round(float(np.mean(seen[metric])), 4)
        row[f"trained_on_it_{metric}"] = round(own["methods"][METHOD][metric], 4)
        row[f"{BASELINE}_{metric}"] = round(own["methods"][BASELINE][metric], 4)
        row[f"ratio_{metric}"] = round(row[metric] / own["methods"][BASELINE][metric], 3)
    ranks = dict(zip(own["query_ids"], own["methods"][BASELINE]["ranks"], strict=True))
    ranks = [ranks[query_id] for query_id in comparison.query_ids]
    reciprocal = [1 / rank if rank and rank <= 10 else 0.0 for rank in ranks]
    row["difference_mrr@10"] = [round(x, 4) for x in map(float, paired_bootstrap(seen["mrr@10"], reciprocal))]
    return row


@one_line_errors("left_out.py")
def main() -> None:
    parser = CommandParser("left_out.py", __doc__)
    parser.add_argument("recipe", help="a YAML for train.py, with several data sets")
    parser.add_argument("--results", required=True, help="folder of the evaluations of the recipe's own model")
    parser.add_argument("--output", required=True, help="the JSON file to write, and to go on with")
    arguments, extra = parser.parse_known_args()
    output = Path(arguments.output)
    result = read_result(output, "rows") if output.exists() else {"rows": []}
    result["command"] = " ".join(["python", *sys.argv])
    _, data_args, _, _ = train.parse([arguments.recipe, *extra])
    done = {row["left_out"] for row in result["rows"]}
    for name in [Path(source).name for source in data_args.dev_data]:
        if name in done:
            continue
        own = read_result(Path(arguments.results) / f"{name}-test.json", "methods", "query_ids")
        words, source = without(arguments.recipe, name, extra)
        print(f"== without {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            train.main([*words, "--output_dir", folder, "--save_total_limit", "1"])
            with torch.no_grad():
                row = judge(folder, source, own, data_args.cache_dir)
        result["rows"].append({"left_out": name, **row})
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, output)
    for row in result["rows"]:
        print(
            f"{row['left_out']:16} {row['recall@10']:.3f} / {row['mrr@10']:.3f}, trained on it "
            f"{row['trained_on_it_recall@10']:.3f} / {row['trained_on_it_mrr@10']:.3f}, {BASELINE} "
            f"{row[f'{BASELINE}_recall@10']:.3f} / {row[f'{BASELINE}_mrr@10']:.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
