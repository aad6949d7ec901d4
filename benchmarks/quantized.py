# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
What 8-bit and 4-bit weights of the backbone cost: cosine to the vectors of the unquantized model, and retrieval quality.

    python benchmarks/quantized.py --model outputs/mine --data my_data --split test --output results/quantised.json

The head stays in float32. It needs `pip install torchao bitsandbytes`; both run on a CPU.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from common import parser, teacher_for, write
from transformers import BitsAndBytesConfig, TorchAoConfig

from native_retrieval.cli import one_line_errors
from native_retrieval.data import load_task
from native_retrieval.evaluation import cached_index
from native_retrieval.loading import load_model
from native_retrieval.methods import Comparison
from native_retrieval.metrics import MEASURES, RetrievalMetrics


def int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def int4() -> TorchAoConfig:
    from torchao.quantization import IntxWeightOnlyConfig

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4))


KINDS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: None,
    "torchao int8 weights": int8,
    "torchao int4 weights": int4,
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


@one_line_errors("quantized")
def main(argv: list[str] | None = None) -> None:
    flags = parser("benchmarks/quantized.py", __doc__, "model", "output")
    flags.add_argument("--data", required=True, help="folder or Hub id of corpus, queries and qrels")
    flags.add_argument("--split", default="test", help="the split (default: %(default)s)")
    flags.add_argument(
        "--cache_dir", default=".cache/native_retrieval", help="where teacher vectors and indexes are kept"
    )
    arguments = flags.parse_args(argv)
    task = load_task(arguments.data, arguments.split)
    rows, index, teacher, reference = [], None, None, None
    for name, quantization in KINDS.items():
        model = load_model(arguments.model, dtype=torch.bfloat16, quantization_config=quantization())
        if index is None:
            teacher = teacher_for(model.config, arguments.model, cache_dir=arguments.cache_dir)
            index = cached_index(arguments.cache_dir, task, teacher)
        comparison = Comparison(model, teacher, index, task.queries, ["native-context"])
        vectors = torch.from_numpy(comparison.methods["native-context"].vectors())
        reference = vectors if reference is None else reference
        cosines = (vectors * reference).sum(-1)
        found = RetrievalMetrics().compute(run=comparison.search(vectors.numpy()), qrels=task.qrels)
        row = {"backbone": name, **{measure: round(found[measure], 4) for measure in MEASURES}}
        row |= {"mean_cosine": round(float(cosines.mean()), 5), "least_cosine": round(float(cosines.min()), 5)}
        rows.append(row)
        print(row, flush=True)
    write({"dataset": task.name, "split": task.split, "queries": len(task.queries), "rows": rows}, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
