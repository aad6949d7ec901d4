"""A transformers Trainer for the head: its losses, and retrieval metrics on the dev split."""

import json
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import EvalPrediction, ProgressCallback

from head_native_retrieval import Words

from .arguments import NativeRetrievalTrainingArguments
from .checkpoints import HeadCheckpoints
from .dataset import PROMPT_KEYS, GroupedByLength, RetrievalExamples, collate
from .losses import alignment_loss, loss_parts
from .metrics import MEASURES, RetrievalMetrics
from .preflight import check_batch
from .progress import StageProgress
from .teacher import search

DEV_DEPTH = 100  # documents ranked for a dev query; the metrics look at 10


class NativeRetrievalTrainer(HeadCheckpoints):
    """
    Trains the head of a `NativeRetrievalModel` by a weighted sum of losses: alignment, contrastive, rank distillation, and
    on request consistency (a conversation's vector should not change when unrelated context is added).

    Each part is logged under its own name. Dev metrics are those of retrieval in the whole dev corpus, with its grades.
    In-batch negatives are shared among devices; only queries carry gradients, so each device's own share is exact.

    Gradient accumulation equals the larger batch for alignment and rank distillation. InfoNCE sees the negatives of one
    step only; with cached states a large `per_device_train_batch_size` costs little memory.

    Args:
        model (`NativeRetrievalModel`)
        args (`NativeRetrievalTrainingArguments`)
        train_dataset (`RetrievalExamples`, or a `ConcatDataset` of several)
        eval_dataset (`RetrievalExamples` or `dict[str, RetrievalExamples]`, *optional*): dev queries with documents.
        training_info (`dict`, *optional*): what the model card says of data and recipe.
        stage (`str`): what the progress bar calls this training.
        started (`float`, *optional*): when the work began, by `time.monotonic()`; by default now.
    """

    def __init__(
        self,
        model,
        args: NativeRetrievalTrainingArguments,
        train_dataset=None,
        eval_dataset=None,
        training_info: dict | None = None,
        stage: str = "Training",
        started: float | None = None,
        **kwargs,
    ):
        if train_dataset is not None:
            check_batch(args, len(train_dataset))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=kwargs.pop("data_collator", collate),
            compute_metrics=kwargs.pop("compute_metrics", self._retrieval_metrics),
            **kwargs,
        )
        vars(model.config).pop("use_cache", None)  # which the Trainer sets to False, and saves
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StageProgress(stage))
        self.training_info = training_info or {}
        self.started = time.monotonic() if started is None else started
        parts = getattr(train_dataset, "datasets", [train_dataset])
        self._has_changed = any(getattr(part, "unchanged", None) is not None for part in parts)
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._num_queries, self._last_log = 0, time.perf_counter()
        self._evaluated: RetrievalExamples | None = None
        # A Trainer would otherwise read the loss's normalisation off forward's signature.
        self.model_accepts_loss_kwargs = False
        if self.is_fsdp_enabled:  # which would round the query vectors too; autocast does what it does on one device
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def create_optimizer(self, *args, **kwargs):
        """As in transformers, with a learning rate of their own for the word codes."""
        for parameter in self.model.parameters():
            # accelerate tells the parameters of a model that a stage before has sharded by their addresses, and a shard that
            # is empty on this device has none.
            if isinstance(parameter, DTensor) and not parameter._local_tensor.numel():
                parameter._local_tensor.data_ptr = partial(id, parameter)
        optimizer = super().create_optimizer(*args, **kwargs)
        encoder = self.accelerator.unwrap_model(self.model).query_head.encoder
        if encoder is not None and (codes := encoder.codes.weight).requires_grad:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not codes]
            rate = self.args.code_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            optimizer.add_param_group({"params": [codes], "lr": rate, "weight_decay": 0.0})
        return optimizer

    # -- the loss -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs, share = self._without_repeats(inputs) if model.training else (inputs, 1.0)
        if inputs["mode"] == "words":
            ids = inputs["word_ids"]
            nowhere = torch.zeros_like(ids)  # a plain text has no prompt and one turn
            outputs = model(words=Words(ids, nowhere, inputs["word_mask"], nowhere, nowhere))
        else:
            outputs = model(**{name: inputs[name] for name in PROMPT_KEYS if name in inputs})
        vectors = outputs.query_embeddings
        parts = loss_parts(vectors, inputs, self.args)
        if model.training and self.args.consistency_weight and self._has_changed:
            parts["consistency"] = self._consistency(model, vectors, inputs)
        parts = {name: share * part for name, part in parts.items()}
        loss = sum(getattr(self.args, f"{name}_weight") * part for name, part in parts.items())
        if not torch.isfinite(loss):
            self._stop_at(loss, parts, inputs)
        if model.training:
            self._num_queries += len(inputs["targets"]) * self.args.world_size
            for name, part in parts.items():
                self._parts[f"{name}_loss"].append(part.detach())
        return (loss, outputs) if return_outputs else loss

    def _consistency(self, model, vectors: torch.Tensor, inputs: dict) -> torch.Tensor:
        """
        How far the vectors of the batch's changed conversations are from those of the same ones unchanged, which are taken
        as they are: no gradient makes these follow. A row that was not changed counts as one that is right.
        """
        changed, prompts = inputs["changed"], inputs.get("unchanged")
        if prompts is None and self.accelerator.num_processes == 1:
            return vectors.sum() * 0.0
        # Several devices pass together, so that one without a changed row passes another, which counts for nothing.
        prompts = prompts or {name: inputs[name][:1] for name in PROMPT_KEYS if name in inputs}
        model.eval()  # without dropout
        with torch.no_grad():
            unchanged = model(**prompts).query_embeddings
        model.train()
        if not changed.any():
            return vectors.sum() * 0.0
        return alignment_loss(vectors[changed], unchanged[: changed.sum()]) * changed.float().mean()

    def _stop_at(self, loss: torch.Tensor, parts: dict[str, torch.Tensor], inputs: dict) -> None:
        seen = {name: str(part.item()) for name, part in parts.items()}
        path = Path(self.args.output_dir, "_batch-not-finite.json")  # `_*` is never pushed
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": self.state.global_step, **seen, "queries": inputs["query"]}) + "\n")
        raise FloatingPointError(
            f"the loss is {loss.item()} ({', '.join(f'{k} {v}' for k, v in seen.items())}); the batch's queries are "
            f"named in {path}; lower the learning rate or raise the temperatures"
        )

    def get_batch_samples(self, *args, **kwargs):
        batches, count = super().get_batch_samples(*args, **kwargs)
        for batch in batches[:-1]:  # an update's batches are fetched ahead: the loader's end is that of the last alone
            batch["may_be_last"] = False
        return batches, count

    def _without_repeats(self, inputs: dict) -> tuple[dict, float]:
        """
        On several devices: the batch with the other devices' positives, and without the rows that accelerate repeats so
        that every device's last batch is full; and the factor that makes the devices' mean that of all real rows.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if world == 1:
            return inputs, 1.0
        size, progress = len(inputs["targets"]), self.accelerator.gradient_state
        total = world * size
        if inputs.get("may_be_last", True) and progress.end_of_dataloader and progress.remainder > 0:
            total = progress.remainder
        real = min(max(total - rank * size, 0), size)
        positives = self.accelerator.gather(inputs["positives"])
        ids = self.accelerator.gather(inputs["positive_ids"][:, 0].contiguous())
        place = torch.arange(world * size, device=ids.device)
        others = (place < total) & ((place < rank * size) | (place >= (rank + 1) * size))
        # A device with repeats alone keeps one, which counts for nothing: it must take part in the step.
        kept = {k: v[: max(real, 1)] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return {**kept, "other_positives": positives[others], "other_positive_ids": ids[others]}, real * world / total

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._parts:
            logs |= {name: round(torch.stack(values).mean().item(), 5) for name, values in self._parts.items()}
            self._parts.clear()
            now = time.perf_counter()
            logs["queries_per_second"] = round(self._num_queries / (now - self._last_log), 1)
            self._num_queries, self._last_log = 0, now
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        parts = getattr(dataset, "datasets", [dataset])
        lengths = [length for part in parts for length in part.lengths]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(batch, lengths, seed, lambda: int(self.state.epoch or 0))

    # -- dev metrics --------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset=None):
        """Of every dev query: `dataloader_drop_last` is about training."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            means = {}
            for name in MEASURES:  # the mean of the data sets names the best checkpoint
                values = [metrics[f"{metric_key_prefix}_{part}_{name}"] for part in dataset]
                means[f"{metric_key_prefix}_{name}"] = float(np.mean(values))
            self.log(means)
            return metrics | means
        self._evaluated = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.query_embeddings.float(), inputs["index"]

    def _retrieval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        examples = self._evaluated
        depth = min(DEV_DEPTH, len(examples.documents))
        scores, rows = search(examples.documents, np.asarray(prediction.predictions), depth)
        documents, numbers = examples.document_ids(rows), prediction.label_ids.ravel().tolist()
        run = {
            examples.ids[number]: dict(zip(found, map(float, values), strict=True))
            for number, found, values in zip(numbers, documents, scores, strict=True)
        }
        qrels = {examples.ids[number]: examples.qrels[number] for number in numbers}
        return RetrievalMetrics().compute(run=run, qrels=qrels)
