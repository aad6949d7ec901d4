"""
One epoch without learning for each case: writes the steps' losses and gradients, averaged over the devices, and the
teacher's vectors and rankings, hidden states and written queries, which the devices share.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from native_retrieval import features as features_module
from native_retrieval import teacher as teacher_module
from native_retrieval.arguments import DataArguments, NativeRetrievalTrainingArguments
from native_retrieval.data import load_task
from native_retrieval.dataset import QuerySet, RetrievalExamples, build_examples
from native_retrieval.features import cached_queries
from native_retrieval.initialise import from_backbone
from native_retrieval.teacher import Teacher
from native_retrieval.trainer import NativeRetrievalTrainer

if "ACCELERATE_USE_FSDP" in os.environ:
    import fsdp_on_cpu  # noqa: F401

backbone_dir, teacher_dir, data, output, batch_size, cases = sys.argv[1:]


class Recorder(NativeRetrievalTrainer):
    """Keeps the loss and the gradients of every step, which the wrapped model has averaged over the devices."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        named = self.accelerator.unwrap_model(model).named_parameters()
        if not self.accelerator.sync_gradients:  # not averaged yet
            named = []
        gradients = {name: whole(p.grad) for name, p in named if p.grad is not None}
        steps.append({"loss": self.accelerator.reduce(loss.detach(), "mean"), "gradients": gradients})
        return loss


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


steps: list[dict] = []
torch.manual_seed(0)
folder, result = Path(output).parent, {}
# Enough shards for both.
teacher_module.SHARD_ROWS = features_module.SHARD_QUERIES = 4
features_module.SHARD_TOKENS = 512
teacher = Teacher(teacher_dir, cache_dir=folder / "teacher")
model = from_backbone(
    AutoModelForCausalLM.from_pretrained(backbone_dir),
    teacher,
    tokenizer=AutoTokenizer.from_pretrained(backbone_dir),
    head_dim=32,
    head_num_attention_heads=4,
    head_dropout=0.0,
    head_num_layers=1,
    encoder_dim=32,
    encoder_code_dim=16,
    selection_heads=[[1, 0], [2, 1]],
    max_query_tokens=8,
)
task = load_task(data, "train")
cached_queries(model, [model.processor.encode(messages) for messages in task.queries["messages"]], folder / "cache")


def build(count: int, changed=None, unchanged=None) -> RetrievalExamples:
    queries = QuerySet("train", task.queries.select(range(count)), task.corpus, changed=changed)
    settings = DataArguments(cache_dir=str(folder / "cache"), num_hard_negatives=2)
    examples = build_examples(model, teacher, queries, settings, unchanged)
    examples.num_hard_negatives = examples.hard_negatives.shape[1]  # all of the pool: which are drawn must not differ
    return examples


for name, (count, (alignment, contrastive, rank, consistency), *accumulated) in json.loads(cases).items():
    examples = build(count)
    if consistency:  # the second half is of the first's conversations, after a system message
        plain, half = build(-(-count // 2)), count // 2
        seen = [[{"role": "system", "content": "Be brief."}, *m] for m in task.queries[:half]["messages"]]
        examples = ConcatDataset([plain, build(half, seen, plain)])
    arguments = NativeRetrievalTrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=accumulated[0] if accumulated else 1,
        num_train_epochs=1,
        learning_rate=0.0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        use_cpu=True,
        disable_tqdm=True,
        alignment_weight=alignment,
        contrastive_weight=contrastive,
        rank_weight=rank,
        consistency_weight=consistency,
    )
    steps.clear()
    trainer = Recorder(model, arguments, examples)
    trainer.train()
    result[name] = list(steps)
    main_process = trainer.is_world_process_zero()
if main_process:
    torch.save(result, output)
if torch.distributed.is_initialized():
    # Who still holds the group keeps its threads alive, and they abort a process that ends before them.
    del trainer, examples, model
    gc.collect()
    torch.distributed.destroy_process_group()
