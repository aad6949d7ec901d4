# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
r"""
Train a query head for your language model and your index.

The recipe is a YAML file. Every field in it can be set on the command line too, which then wins.

    # your conversations (BEIR layout with messages), your backbone, your index's embedding model, the recipe of `make demo`
    accelerate launch train.py configs/demo.yaml \
        --backbone Qwen/Qwen3-0.6B \
        --teacher BAAI/bge-small-en-v1.5 \
        --train_data my_logs \
        --dev_data my_logs:dev \
        --plain_text my_logs \
        --output_dir outputs/mine

    # without a GPU, one process with all cores; after an interruption, --resume goes on
    accelerate launch --cpu --num_processes 1 train.py configs/demo.yaml ... --resume

    # the paper's setting, on 8 GPUs, pushed to the Hub
    accelerate launch --num_processes 8 train.py configs/paper.yaml --train_data my_logs --dev_data my_logs:dev \
        --push_to_hub --hub_model_id me/my-model

Three stages: the backbone's attention heads that choose words are found on rewrites, the word encoder learns from plain
text, and both from conversations. What is costly (teacher
vectors, written queries, hidden states) is computed once and kept in `--cache_dir`. The trained model is in `--output_dir`:
weights, code, tokenizers, model card. Judge it with `eval.py`.
"""

import dataclasses
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from transformers import set_seed
from transformers.utils import logging

from native_retrieval import checkpoints
from native_retrieval.arguments import lexical_arguments, parse
from native_retrieval.cli import one_line_errors
from native_retrieval.dataset import QuerySet, build_examples, build_texts
from native_retrieval.initialise import from_backbone
from native_retrieval.preflight import check, check_backbone, check_batch, check_push
from native_retrieval.teacher import Teacher
from native_retrieval.trainer import NativeRetrievalTrainer
from native_retrieval.training_data import build_training_examples, load_data, training_info, training_sets

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked


def main(argv: list[str]) -> None:
    started = time.monotonic()
    model_args, data_args, run_args, args = parse(argv, __doc__)
    check(model_args, data_args, args)
    output_dir, is_main = Path(args.output_dir), args.process_index == 0
    if run_args.resume and not run_args.overwrite_output_dir and checkpoints.is_finished(output_dir):
        return print(f"{output_dir} holds a finished model: nothing to resume. Replace it with --overwrite_output_dir")
    checkpoint = checkpoints.checkpoint_to_resume(output_dir, run_args, args)
    with checkpoints.alone_in(output_dir) if is_main else nullcontext():
        check_backbone(model_args)
        data = load_data(data_args)
        trains = args.max_steps > 0 or args.num_train_epochs > 0  # on conversations; plain text alone gives a head, too
        sets, texts = training_sets(data, data_args) if trains else [], [*data.texts, *data.questions]
        if checkpoint or not model_args.read_words or not data_args.lexical_epochs:
            texts = []  # no lexical pre-training
        if trains:
            check_batch(args, sum(len(queries) * queries.passes for queries in sets))
        lexical_args = lexical_arguments(args, data_args)
        if texts:
            check_batch(lexical_args, len(texts), "lexical_batch_size")
        if args.push_to_hub and is_main:
            check_push(model_args, args)

        logging.set_verbosity_error()
        datasets.disable_progress_bars()
        if args.device.type == "cpu" and args.world_size == 1 == torch.get_num_threads() < os.cpu_count():
            print("One thread only: start with `accelerate launch --cpu --num_processes 1`, or set OMP_NUM_THREADS")
        teacher = Teacher(model_args.teacher, model_args.teacher_revision, cache_dir=data_args.cache_dir)
        set_seed(args.seed)  # the Trainer does it too, but the head is initialised before
        model = new_model(model_args, teacher, data.train).to(args.device)
        # All that runs the backbone comes before training, which may shard its weights.
        examples = (
            build_training_examples(model, teacher, sets, data_args, bool(args.consistency_weight)) if trains else None
        )
        dev = {
            f"{queries.name}_{mode}": build_examples(model, teacher, dataclasses.replace(queries, mode=mode), data_args)
            for entry, queries in zip(data_args.dev_data, data.dev, strict=True)
            for mode in data_args.modes_of(entry)
        }
        if is_main:  # what a stopped run has left unfinished, or what is to be overwritten
            checkpoints.remove_checkpoints(output_dir, resumed=checkpoint)

        if texts:
            words = build_texts(model.processor, teacher, texts, "plain texts", data_args.augmentation_share)
            with checkpoints.kept_encoder(model, lexical_args, words, data_args.cache_dir) as is_kept:
                if not is_kept:
                    print(f"The word encoder learns from {len(words)} plain texts", flush=True)
                    train_only(model, model.query_head.encoder)
                    NativeRetrievalTrainer(model, lexical_args, words, stage="Word encoder").train()

        info = training_info(argv, model_args, data_args, args, data)
        trainer = NativeRetrievalTrainer(model, args, examples, dev or None, info, "Conversations", started)
        if trains:
            print(f"Training on {len(examples)} examples: conversations, and some plain text", flush=True)
            train_only(model, model.query_head.projection, model.query_head.encoder)
            trainer.train(resume_from_checkpoint=checkpoint)
        for weight in model.query_head.parameters():  # the saved head takes half of the bytes
            weight.data.copy_(weight.data.bfloat16())
        if dev:
            trainer.log_metrics("dev", trainer.evaluate())

        if is_main:
            checkpoints.write_local_paths(output_dir, backbone=model_args.backbone, teacher=model_args.teacher)
        trainer.save_model()
        trainer.create_model_card()
        if is_main:
            checkpoints.remove_checkpoints(output_dir)  # the best of them is the saved model
        print(f"Saved. Judge it: python eval.py --model {output_dir} --data ... --split test", flush=True)
        if args.push_to_hub:
            trainer.push_to_hub()


def new_model(model_args, teacher: Teacher, train: list[QuerySet]):
    """An untrained model, whose words are chosen as in the rewrites of these data sets."""
    vocabulary = SimpleNamespace(
        encode=lambda words: np.array(teacher.cached(words, "query", "Teacher: vocabulary", half_precision=True)),
        transformer=teacher.transformer,
    )
    return from_backbone(
        model_args.backbone,
        vocabulary,
        max_prompt_tokens=model_args.max_prompt_tokens,
        rewrites=[(queries.name, queries.rows) for queries in train],
        teacher_name_or_path=model_args.teacher,
        teacher_fingerprint=teacher.fingerprint,
        **model_args.config_fields,
    )


def train_only(model, *parts) -> None:
    """Freezes all but these parts (several devices wait for every gradient that is asked for)."""
    model.requires_grad_(False)
    for part in parts:
        if part is not None:
            part.requires_grad_(True)


if __name__ == "__main__":
    try:
        code = one_line_errors("train.py")(main)(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command with --resume goes on")
    if code == 0 and torch.distributed.is_initialized():  # its threads may abort a process that ends before them
        torch.distributed.destroy_process_group()
    sys.exit(code)
