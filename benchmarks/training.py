# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
What training costs: cached hidden states against online ones, the probe against LoRA through the prompt, the teacher's
ranking against FAISS alone, and the memory of a process over fifty thousand cached queries.

    python benchmarks/training.py --backbone .cache/demo/SmolLM2-135M-Instruct --teacher .cache/demo/all-MiniLM-L6-v2 \\
        --data .cache/demo/data/synthetic --output results/bench-training.json
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faiss
import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_native_retrieval import NativeRetrievalModel
from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.data import load_task
from native_retrieval.dataset import RetrievalExamples, build_examples, collate
from native_retrieval.features import FeatureStore
from native_retrieval.losses import alignment_loss
from native_retrieval.report import environment
from native_retrieval.teacher import Teacher
from native_retrieval.trainer import NativeRetrievalTrainer, NativeRetrievalTrainingArguments

LORA_BATCH, LORA_STEPS = 16, 2
RANKED, RANKING_K = 50_000, 128
CACHED_QUERIES, CACHED_TOKENS, MEMORY_STEPS = 50_000, 40, 40


def train_epoch(model, examples, folder: str, **settings) -> float:
    """Seconds of one pass of stage b over the examples."""
    args = NativeRetrievalTrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        **settings,
    )
    trainer = NativeRetrievalTrainer(model, args, examples)
    begin = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begin


def frozen_features(model, teacher, task, folder: str, count: int) -> list[dict]:
    """An epoch that computes hidden states as it goes, and one that finds them on disk."""
    rows = []
    queries = task.queries.select(range(min(count, len(task.queries))))
    wanted = {document for gold in queries["gold"] for document in gold}
    corpus = task.corpus.select([i for i, document in enumerate(task.corpus["_id"]) if document in wanted])
    for what, online in (("an epoch, hidden states online", True), ("an epoch, hidden states cached", False)):
        examples = build_examples(model, teacher, queries, corpus, "context", cache_dir=folder, online_features=online)
        seconds = train_epoch(model, examples, folder)
        rows.append({"what": what, "seconds": round(seconds, 2), "queries_per_s": round(len(queries) / seconds, 1)})
    rows[1]["of_online"] = round(rows[1]["seconds"] / rows[0]["seconds"], 4)
    return rows


def probe_against_lora(model, backbone: str, prompts: list[list[int]]) -> list[dict]:
    """Steps of the probe (prefill without gradients) and of peft's LoRA through the whole prompt, same rank and batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(backbone, dtype=model.backbone.dtype),
        LoraConfig(r=model.config.adapter_rank, target_modules="all-linear"),
    ).train()
    projection = torch.nn.Linear(model.config.text_config.hidden_size, model.config.embedding_dim)
    model.requires_grad_(False)
    model.probe.requires_grad_(True)
    model.train()

    def probe_step(input_ids, mask, target):
        return alignment_loss(model(input_ids, mask, use_probe=True).query_embeddings, target)

    def lora_step(input_ids, mask, target):
        states = lora.base_model.model.base_model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return alignment_loss(projection(states[:, -1].float()), target)

    ways = {
        "the probe": (probe_step, [p for p in model.parameters() if p.requires_grad]),
        "LoRA through the prompt (peft)": (
            lora_step,
            [p for p in lora.parameters() if p.requires_grad] + list(projection.parameters()),
        ),
    }
    optimizers = {name: torch.optim.AdamW(weights) for name, (_, weights) in ways.items()}
    seconds = dict.fromkeys(ways, 0.0)
    for step in tqdm(range(1 + LORA_STEPS), desc="The probe, and LoRA", unit="step"):
        batch = prompts[step * LORA_BATCH : (step + 1) * LORA_BATCH if step else 2]  # the first only warms up
        input_ids, mask = model.pad(batch)
        target = torch.nn.functional.normalize(torch.randn(len(batch), model.config.embedding_dim), dim=-1)
        for name, (loss_of, _) in ways.items():
            begin = time.perf_counter()
            loss_of(input_ids, mask, target).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if step:
                seconds[name] += time.perf_counter() - begin
    rows = [
        {"what": name, "seconds": round(value, 2), "queries_per_s": round(LORA_STEPS * LORA_BATCH / value, 2)}
        for name, value in seconds.items()
    ]
    rows[0]["of_lora"] = round(rows[0]["queries_per_s"] / rows[1]["queries_per_s"], 3)
    return rows


def ranking(teacher: Teacher) -> list[dict]:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2 * RANKED, teacher.dimension), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, documents = vectors[:RANKED], vectors[RANKED:]
    begin = time.perf_counter()
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    index.search(queries, RANKING_K)
    alone = time.perf_counter() - begin
    begin = time.perf_counter()
    teacher.ranking(queries, documents, RANKING_K)
    ours = time.perf_counter() - begin
    names = ("FAISS alone: 50,000 queries, 50,000 documents", "the teacher's ranking, kept on disk")
    rows = [
        {"what": name, "seconds": round(seconds, 2), "queries_per_s": round(RANKED / seconds, 1)}
        for name, seconds in zip(names, (alone, ours), strict=True)
    ]
    rows[1]["of_faiss"] = round(ours / alone, 3)
    return rows


def memory(backbone: str) -> None:
    """Trains over many cached queries, whose states are a sparse file of zeros, and prints the peak memory in MiB."""
    model = NativeRetrievalModel.from_backbone(backbone, embedding_dim=384)
    text = model.config.text_config
    with tempfile.TemporaryDirectory() as folder:
        shape = (CACHED_QUERIES * CACHED_TOKENS, len(model.config.hidden_state_layers), text.hidden_size)
        path = Path(folder) / "states.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=np.int16, shape=shape).flush()
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((CACHED_QUERIES, 384), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        sequences = [rng.integers(5, 1000, CACHED_TOKENS).tolist() for _ in range(CACHED_QUERIES)]
        starts = np.arange(CACHED_QUERIES) * CACHED_TOKENS
        examples = RetrievalExamples(
            sequences,
            [4] * CACHED_QUERIES,
            vectors,
            vectors,
            [[i] for i in range(CACHED_QUERIES)],
            store=FeatureStore(np.load(path, mmap_mode="r"), starts, np.full(CACHED_QUERIES, CACHED_TOKENS)),
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        begin = time.perf_counter()
        for _ in range(MEMORY_STEPS):
            batch = collate([examples[i] for i in rng.integers(CACHED_QUERIES, size=64).tolist()])
            output = model(
                batch["input_ids"], batch["attention_mask"], batch["readout_mask"], batch["hidden_states"].float()
            )
            alignment_loss(output.query_embeddings, batch["targets"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - begin
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def shown(rows: list[dict]) -> list[dict]:
    for row in rows:
        ratio = "".join(
            f"  {value:.3f} {name.replace('_', ' ')}" for name, value in row.items() if name.startswith("of_")
        )
        peak = f"  peak {row['peak_rss_mb']} MiB" if "peak_rss_mb" in row else ""
        print(
            f"{row['what']:45} {row['seconds']:8.1f} s  {row['queries_per_s']:9.1f} queries/s{ratio}{peak}", flush=True
        )
    return rows


@one_line_errors("training.py")
def main() -> None:
    parser = CommandParser("training.py", __doc__)
    parser.add_argument("--backbone", required=True, help="path or Hub id")
    parser.add_argument("--teacher", help="path or Hub id")
    parser.add_argument("--data", help="folder or Hub id in the BEIR layout with messages, with a train split")
    parser.add_argument("--queries", type=int, default=384, help="of an epoch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", help="the JSON file to write")
    parser.add_argument("--memory", action="store_true", help="only the process whose memory is measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        return memory(arguments.backbone)
    if not (arguments.teacher and arguments.data and arguments.output):
        parser.error("--teacher, --data and --output are needed")
    # First: its peak starts at the one of this process.
    done = subprocess.run(
        [sys.executable, __file__, "--backbone", arguments.backbone, "--memory"], capture_output=True, text=True
    )
    if done.returncode:  # it has said why, in one line
        raise ValueError(done.stderr.strip().rpartition("\n")[2].removeprefix("training.py: "))
    *_, seconds, peak = done.stdout.split()
    seconds, peak = float(seconds), int(peak)
    row = {
        "what": f"{MEMORY_STEPS} steps over 50,000 cached queries",
        "seconds": round(seconds, 1),
        "queries_per_s": round(64 * MEMORY_STEPS / seconds, 1),
        "peak_rss_mb": peak,
    }
    rows = shown([row])
    with tempfile.TemporaryDirectory() as folder:
        teacher = Teacher(arguments.teacher, cache_dir=folder)
        rng = np.random.default_rng(0)
        words = SimpleNamespace(  # what they stand for takes no time, but to compute
            encode=lambda words: rng.standard_normal((len(words), teacher.dimension)), tokenizer=teacher.tokenizer
        )
        model = NativeRetrievalModel.from_backbone(
            arguments.backbone, words, num_probe_tokens=8, num_context_tokens=4, max_prompt_tokens=1024
        )
        task = load_task(arguments.data, "train")
        prompts = [model.build_prompt(messages) for messages in task.queries["messages"][:256]]
        rows += shown(probe_against_lora(model, arguments.backbone, prompts))
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        model.copy_path.requires_grad_(True)
        rows += shown(frozen_features(model, teacher, task, folder, arguments.queries))
        rows += shown(ranking(teacher))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "threads": arguments.threads,
        "rows": [{"peak_rss_mb": None, **row} for row in rows],
    }
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written: {output}")


if __name__ == "__main__":
    sys.exit(main())
