r"""
Compares ways from a conversation to documents on one split of a data set: what each finds, and how long it takes.

Evaluate a model that `train.py` wrote. The index is built from the data's corpus and kept in the cache:

    python eval.py \
        --model outputs/qrecc \
        --data data/qrecc \
        --split test \
        --output results/qrecc-test.json

With your own index, figures, a page on the failures, and the queries that the backbone wrote:

    python eval.py \
        --model outputs/qrecc \
        --data data/qrecc \
        --split test \
        --index indexes/qrecc \
        --output results/qrecc-test.json \
        --figures results/figures \
        --report results/failures-qrecc.md \
        --save_queries

Only some methods, without timing:

    python eval.py \
        --model outputs/qrecc \
        --data data/qrecc \
        --split dev \
        --output results/qrecc-dev.json \
        --methods generate-then-encode native-context \
        --latency_queries 0

The methods:

    human-rewrite                  the teacher on a stand-alone question that a human wrote: the upper bound
    last-question                  the teacher on the last user message
    full-history                   the teacher on as many of the newest turns as its context takes
    teacher-mean                   the unit mean of the teacher's vectors of these two
    rank-fusion                    reciprocal rank fusion of these two
    selected-words                 the teacher on the last question and the earlier words that extract_query adds
    generate-then-encode           the backbone writes a query, the teacher encodes it: the baseline, two models
    generate-then-encode+question  the same, with the last question appended
    bm25-last-question             BM25 on the last user message
    bm25-full-history              BM25 on the whole conversation
    bm25-selected-words            BM25 on the last question and the earlier words that extract_query adds
    native-generated               the head on the hidden states of the query that the backbone writes: one model
    native-context                 the head on the hidden states of the prompt: one model, no query is written
    hybrid                         rank fusion of native-context and bm25-selected-words

Latency runs from the end of the prefill to the query vector (for BM25: scoring), one query at a time. The search in the
index is the same for every vector and is not included.

The result (`--output`) holds for every method: the measures, the difference to the baseline with a 95% interval (10,000
resamples of whole conversations), the latency, and the rank of the first relevant document of each query. An error is
one line on stderr and exit code 2.
"""

import shlex
import sys
from pathlib import Path

from native_retrieval.eval_arguments import EvalArguments, parse

# Modules that take seconds to import are imported where they are used: --help and a mistyped flag answer at once.


def run(arguments: EvalArguments, command: str) -> None:
    """Evaluates, and writes what was asked for."""
    from transformers.utils import logging

    from native_retrieval import evaluation
    from native_retrieval.data import load_task
    from native_retrieval.failures import write_failure_report
    from native_retrieval.figures import plot_by_turn, plot_quality_latency
    from native_retrieval.loading import load_model, local_paths
    from native_retrieval.results import print_table, write_json
    from native_retrieval.teacher import teacher_of

    logging.set_verbosity_error()
    task = load_task(arguments.data, arguments.split)
    if len(task.queries) < 2:
        raise ValueError(f"{arguments.data}, split {arguments.split!r}: {len(task.queries)} queries, wanted at least 2")
    model = load_model(arguments.model)
    methods = evaluation.usable_methods(arguments.methods, task, model)
    arguments.check_report(methods)
    # The index is opened before the teacher is loaded, which can take long.
    index = evaluation.open_index(arguments.index, task, model.config) if arguments.index else None
    name = arguments.teacher or local_paths(arguments.model).get("teacher")
    teacher = teacher_of(model.config, name, cache_dir=arguments.cache_dir)
    if index is None:
        index = evaluation.cached_index(arguments.cache_dir, task, teacher)
    settings = {"batch_size": arguments.batch_size, "latency_queries": arguments.latency_queries, "command": command}
    result, runs, comparison = evaluation.evaluate(model, teacher, index, task, methods, **settings)
    if arguments.save_queries:
        result["methods"]["generate-then-encode"]["queries"] = comparison.written.queries
    write_json(result, arguments.output)  # before the page, which takes memory on a large corpus
    print_table(result)
    if arguments.latency_queries:
        print(
            "Milliseconds run from the end of the prefill to the query vector, one query at a time. The index search, the "
            "same for all vectors, is left out; BM25's number is its scoring."
        )
    written = [arguments.output]
    figures, stem = Path(arguments.figures or ""), Path(arguments.output).stem
    if arguments.report:
        figure = figures / f"{stem}-failures.png" if arguments.figures else None
        written += write_failure_report(arguments.report, result, runs, task, comparison, figure=figure)
    if arguments.figures:
        figures.mkdir(parents=True, exist_ok=True)
        plots = {"by-turn": plot_by_turn} | (
            {"quality-latency": plot_quality_latency} if arguments.latency_queries else {}
        )
        for name, plot in plots.items():
            written.append(figures / f"{stem}-{name}.png")
            plot(result, written[-1])
    for path in written:
        print(f"Written: {path}")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 2 after one line on stderr."""
    try:
        run(parse(argv, __doc__), shlex.join(["python", "eval.py", *argv]))
    except (ValueError, OSError) as error:
        if "--debug" in argv:
            raise
        # An error in data has a line for each bad row.
        lines = str(error) if hasattr(error, "problems") else " ".join(str(error).split())
        print(f"eval.py: {lines}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted; what the teacher has encoded is kept")
