# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Zero-shot quality: a model on data sets of kinds that it was not trained on, beside ways that need no training.

    python benchmarks/zero_shot.py --model outputs/general --data ../shared/data --output results/zero-shot

Each set is evaluated as by eval.py, into `NAME.json`; sets that are there are kept. `summary.json` compares, for each set and
measure, our methods with the best one that could be deployed instead of them (so not the human rewrite), and has the mean
and the least of these ratios. `cast21+leads` is `cast21` with the documents of `topiocqa_lead` as distractors, and no part
of these two.
"""

import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from datasets import concatenate_datasets

from benchmarks import common
from native_retrieval.arguments import split_source
from native_retrieval.cache import atomic_write
from native_retrieval.cli import nearest, one_line_errors
from native_retrieval.data import Task, load_corpus, load_task
from native_retrieval.evaluation import cached_index, evaluate, usable_methods
from native_retrieval.methods import METHODS
from native_retrieval.metrics import paired_bootstrap, per_query
from native_retrieval.results import print_table, read_result, write_json

SETS = {
    "cast21": "zero_shot/cast21",
    "cast21+leads": "zero_shot/cast21",
    "apibank": "zero_shot/apibank",
    "abgcoqa": "zero_shot/abgcoqa",
    "toolink": "zero_shot/toolink",
    "topiocqa_lead": "topiocqa_lead",
}
DISTRACTORS = {"cast21+leads": "topiocqa_lead"}
COUNTED = tuple(name for name in SETS if name not in DISTRACTORS)  # in means: every query once
OURS = ("native-context", "selected-words", "hybrid")
RIVALS = ("last-question", "full-history", "teacher-mean", "rank-fusion", "bm25-last-question", "bm25-full-history")
RIVALS += ("generate-then-encode", "generate-then-encode+question")
MEASURES = ("recall@10", "mrr@10")
LATENCY_QUERIES = 0  # of methods on an idle machine, eval.py tells


def read_set(name: str, data: str, cache_dir: str) -> Task:
    """The test split of one of `SETS`; or of `NAME:SPLIT` that split of a folder in `data`."""
    if name not in SETS:
        return load_task(Path(data, split_source(name)[0]), split_source(name)[1] or "dev")
    source = Path(data, SETS[name])
    if name in DISTRACTORS:
        source = with_distractors(source, Path(data, DISTRACTORS[name]), Path(cache_dir, "zero-shot", name))
    return load_task(source, "test")


def with_distractors(source: Path, others: Path, folder: Path) -> Path:
    """Writes a data set whose corpus has the documents of another one, too. A folder, so that eval.py can read it as well."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for file in (*source.glob("queries.jsonl*"), *source.glob("qrels/*")):
        shutil.copyfile(file, folder / file.relative_to(source))
    renamed = load_corpus(others).map(lambda row: {"_id": f"{others.name}/{row['_id']}"}, load_from_cache_file=False)
    with atomic_write(folder / "corpus.jsonl") as partial:
        concatenate_datasets([load_corpus(source), renamed]).to_json(partial, force_ascii=False)
    return folder


def compare(result: dict, runs: dict, task: Task) -> list[dict]:
    """A row for each measure: the best of `RIVALS`, and ours beside it; native-context with an interval, query by query."""
    values = {name: per_query(run, task.qrels, result["query_ids"]) for name, run in runs.items()}
    rows = []
    for measure in MEASURES:
        means = {name: float(np.mean(its[measure])) for name, its in values.items()}
        best = max((name for name in RIVALS if name in means), key=means.get)
        row = {"measure": measure, "best": best, "best_value": round(means[best], 4)}
        for name in OURS:
            if name in means:
                row |= {name: round(means[name], 4), f"ratio_{name}": round(means[name] / (means[best] or 1e-4), 4)}
        if OURS[0] in means:
            its, other = values[OURS[0]][measure], values[best][measure]
            difference = paired_bootstrap(its, other, list(task.queries["conv"]))
            row["difference"] = [round(value, 4) for value in difference]
        rows.append(row)
    return rows


def summarise(folder: Path, command: str) -> dict:
    """`summary.json` of the sets that are there: means of all methods, the rows of [`compare`], and what they come to."""
    found = {name: folder / f"{name}.json" for name in SETS if (folder / f"{name}.json").is_file()}
    results = {name: read_result(path, "methods", "compared") for name, path in found.items()}
    means = {
        name: {method: {measure: round(its[measure], 4) for measure in MEASURES} for method, its in methods.items()}
        for name, methods in ((name, result["methods"]) for name, result in results.items())
    }
    rows = [{"set": name, **row} for name, result in results.items() for row in result["compared"]]
    for what, function in (("mean", np.mean), ("least", np.min)):
        for measure in MEASURES:
            counted = [row for row in rows if row["set"] in COUNTED and row["measure"] == measure]
            fields = [
                field for field in map("ratio_{}".format, OURS) if counted and all(field in row for row in counted)
            ]
            over = {field: round(float(function([row[field] for row in counted])), 4) for field in fields}
            rows.append({"set": f"{what} of {len(counted)}", "measure": measure, **over})
    return {"command": command, "counted": [name for name in COUNTED if name in found], "sets": means, "rows": rows}


def table(rows: list[dict]) -> str:
    """The rows of a summary as plain text."""
    lines = [f"{'':14} {'':10} {'the best of the others':36}" + "".join(f"{name:>22}" for name in OURS)]
    for row in rows:
        best = f"{row['best_value']:.3f} {row['best']}" if "best" in row else ""
        cells = []
        for name in OURS:
            value = f"{row[name]:.3f}  " if name in row else ""
            cells.append(f"{value}x {row[f'ratio_{name}']:.3f}" if f"ratio_{name}" in row else "–")
        end = "  {:+.3f} [{:+.3f}, {:+.3f}]".format(*row["difference"]) if "difference" in row else ""
        lines.append(f"{row['set']:14} {row['measure']:10} {best:36}" + "".join(f"{cell:>22}" for cell in cells) + end)
    return "\n".join(lines)


def check_names(flag: str, names: list[str], known) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"--{flag}: {name!r} is unknown{nearest(name, known)}; use {', '.join(known)}")


@one_line_errors("zero_shot.py")
def main() -> None:
    parser = common.parser("zero_shot.py", __doc__, "model", "data", "backbone", "teacher", "cache_dir")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help=f"some of {', '.join(SETS)} (default: all)")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), help="of eval.py (default: all that a set allows)"
    )
    parser.add_argument("--overwrite", action="store_true", help="evaluate again what is there")
    arguments = parser.parse_args()
    check_names("sets", arguments.sets, SETS)
    check_names("methods", arguments.methods, METHODS)
    if not set(RIVALS) & set(arguments.methods):
        raise ValueError(f"--methods has nothing to compare with; add one of {', '.join(RIVALS)}")
    command = shlex.join(["python", *sys.argv])
    wanted = [
        name for name in arguments.sets if arguments.overwrite or not (arguments.output / f"{name}.json").exists()
    ]
    if wanted:
        model, teacher = common.load(arguments)
    for name in wanted:
        task = read_set(name, arguments.data, arguments.cache_dir)
        methods = usable_methods(arguments.methods, task, model)
        index = cached_index(arguments.cache_dir, task, teacher)
        settings = {"latency_queries": LATENCY_QUERIES, "command": command}
        result, runs, _ = evaluate(model, teacher, index, task, methods, **settings)
        write_json(
            result | {"dataset": name, "compared": compare(result, runs, task)}, arguments.output / f"{name}.json"
        )
        print_table(result | {"dataset": name})
    summary = summarise(arguments.output, command)
    write_json(summary, arguments.output / "summary.json")
    print(table(summary["rows"]))
    print(f"Written: {arguments.output / 'summary.json'}")


if __name__ == "__main__":
    sys.exit(main())
