# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Zero-shot quality: a recipe is trained without each of its data sets in turn, and evaluated on the one that was left out.

    python benchmarks/left_out.py benchmarks/configs/best.yaml --results results --output results/left-out.json \
        --num_train_epochs 1 --augmentation_share 0

`--results` holds the evaluations of the recipe's own model (`NAME-test.json`, by eval.py); their generate-then-encode and
native-context are the comparison. Neither conversations nor plain text of the left-out data set are trained on. Rows that
the output already has are not run again. Other flags are passed to train.py.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.ablation import train
from native_retrieval.arguments import parse
from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.data import load_task
from native_retrieval.evaluation import cached_index
from native_retrieval.loading import load_model, local_paths
from native_retrieval.methods import Comparison
from native_retrieval.metrics import paired_bootstrap, per_query
from native_retrieval.results import read_result, write_json
from native_retrieval.teacher import teacher_of

METHOD, BASELINE = "native-context", "generate-then-encode"


def without(recipe: str, name: str, extra: list[str]) -> tuple[list[str], str]:
    """The command line for train.py and the source of the left-out data set; data sets of its family are left out, too."""
    _, data_args, _, _ = parse([recipe, *extra])
    family = name.split("_")[0]
    # The rewrites of CANARD are of conversations that QReCC took over.
    related = {"qrecc": ("qrecc", "canard")}.get(family, (family,))

    def others(sources: list[str]) -> list[str]:
        return [source for source in sources if not Path(source).name.startswith(related)]

    words = [recipe, *extra, "--train_data", *others(data_args.train_data), "--dev_data", *others(data_args.dev_data)]
    words += ["--plain_text", *others(data_args.plain_text), "--query_modes", "context"]
    if data_args.train_weights:
        weights = dict(zip(data_args.train_data, map(str, data_args.train_weights), strict=True))
        words += ["--train_weights", *(weights[source] for source in others(data_args.train_data))]
    return words, next(source for source in data_args.dev_data if Path(source).name == name)


def judge(model_dir: str, source: str, own: dict, cache_dir: str) -> dict:
    """Measures a model on the test split of a data set that it has not seen, beside `own`, the recipe's own model."""
    task, model = load_task(source, "test"), load_model(model_dir)
    index = cached_index(
        cache_dir, task, teacher_of(model.config, local_paths(model_dir).get("teacher"), cache_dir=cache_dir)
    )
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
    difference = paired_bootstrap(seen["mrr@10"], reciprocal, list(task.queries["conv"]))
    row["difference_mrr@10"] = [round(float(value), 4) for value in difference]
    return row


@one_line_errors("left_out.py")
def main() -> None:
    parser = CommandParser("left_out.py", __doc__)
    parser.add_argument("recipe", help="a YAML for train.py with several data sets")
    parser.add_argument("--results", required=True, help="folder of the evaluations of the recipe's own model")
    parser.add_argument("--output", required=True, help="the JSON file to write, or to resume")
    arguments, extra = parser.parse_known_args()
    output = Path(arguments.output)
    result = read_result(output, "rows") if output.exists() else {"rows": []}
    result["command"] = " ".join(["python", *sys.argv])
    _, data_args, _, _ = parse([arguments.recipe, *extra])
    done = {row["left_out"] for row in result["rows"]}
    for name in [Path(source).name for source in data_args.dev_data]:
        if name in done:
            continue
        own = read_result(Path(arguments.results) / f"{name}-test.json", "methods", "query_ids")
        words, source = without(arguments.recipe, name, extra)
        print(f"== without {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            train(words, folder)
            with torch.no_grad():
                row = judge(folder, source, own, data_args.cache_dir)
        result["rows"].append({"left_out": name, **row})
        write_json(result, output)
    for row in result["rows"]:
        print(
            f"{row['left_out']:16} {row['recall@10']:.3f} / {row['mrr@10']:.3f}, trained on it "
            f"{row['trained_on_it_recall@10']:.3f} / {row['trained_on_it_mrr@10']:.3f}, {BASELINE} "
            f"{row[f'{BASELINE}_recall@10']:.3f} / {row[f'{BASELINE}_mrr@10']:.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
