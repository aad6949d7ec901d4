"""A transformers Trainer for the head: the losses, retrieval metrics on the dev split, light checkpoints."""

import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate.utils import save_fsdp_optimizer
from huggingface_hub import CommitInfo
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import EvalPrediction, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import SAFE_WEIGHTS_NAME

from .cache import seal, sha256
from .card import push_model, write_model_card
from .dataset import PROMPT_KEYS, RetrievalExamples, collate
from .losses import alignment_loss, contrastive_loss, rank_distillation_loss
from .metrics import per_query
from .teacher import search

DEV_DEPTH = 100  # documents ranked for a dev query; the metrics look at 10


@dataclass
class NativeRetrievalTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, with defaults that train a head, and the weights of its losses."""

    alignment_weight: float = field(default=2.0, metadata={"help": "Weight of the cosine distance to the target."})
    contrastive_weight: float = field(
        default=1.0, metadata={"help": "Weight of InfoNCE against the batch's documents."}
    )
    rank_weight: float = field(default=1.0, metadata={"help": "Weight of the KL to the teacher's ranking."})
    consistency_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cosine distance that what stands around a conversation moves its vector by: more is found "
            "behind other topics, and ranked a little lower. 1 is a good one."
        },
    )
    contrastive_temperature: float = field(default=0.05, metadata={"help": "Temperature of InfoNCE."})
    rank_temperature: float = field(default=0.05, metadata={"help": "Temperature of the rank distillation."})

    output_dir: str | None = field(
        default=None, metadata={"help": "Where checkpoints and the trained model go (default: trainer_output)."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the head."})
    token_learning_rate: float | None = field(
        default=None, metadata={"help": "That of the copy path's token values and salience (default: a tenth of it)."}
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Queries a device; also the in-batch negatives."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Queries a device on the dev split."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the training queries."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate after warm-up."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimiser."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the share of all, of warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay, biases and norms left out."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length wastes little on padding; or random."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to measure retrieval on the dev split."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint (of the head alone)."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint on dev."})
    metric_for_best_model: str | None = field(default="ndcg@10", metadata={"help": "Dev metric that names the best."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of that metric is better."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two log lines."})
    report_to: str = field(default="none", metadata={"help": "none, tensorboard, trackio, wandb ..."})
    hub_strategy: str = field(
        default="end", metadata={"help": "When to push; checkpoints hold the head alone, so only the end will do."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: batches carry vectors."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin batches in memory (for GPUs)."})

    def __post_init__(self):
        super().__post_init__()
        weights = (self.alignment_weight, self.contrastive_weight, self.rank_weight)
        if min(*weights, self.consistency_weight) < 0 or not any(weights):
            raise ValueError(
                f"loss weights {weights} and consistency_weight={self.consistency_weight} must not be negative, and at least "
                "one of the first three must be above 0"
            )
        for name in ("contrastive_temperature", "rank_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.hub_strategy != "end":
            raise ValueError(f"hub_strategy={self.hub_strategy!r} would push checkpoints without a backbone; use 'end'")


class StageProgress(ProgressCallback):
    """transformers' progress bar with the stage's name, the loss and the speed on it; dev metrics on lines of their own."""

    def __init__(self, stage: str):
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.stage)
            self.training_bar.unit = "step"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "loss" not in logs:
            return super().on_log(args, state, control, logs, **kwargs)
        self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {logs['queries_per_second']} queries/s")


class NativeRetrievalTrainer(Trainer):
    """
    Trains a `NativeRetrievalModel`'s head by a weighted sum of alignment, contrastive and rank-distillation losses, and, on
    request, of consistency: a conversation's vector should not move by what an agent or an earlier topic puts around it.

    Each part is logged under its own name. Dev metrics are those of retrieval in the whole dev corpus. In-batch
    negatives are shared among devices; only queries carry gradients, so each device's own share is exact.

    Gradient accumulation equals the larger batch for alignment and rank distillation. InfoNCE sees the negatives of one
    step only; with cached states a large `per_device_train_batch_size` costs little memory.

    Args:
        model (`NativeRetrievalModel`)
        args (`NativeRetrievalTrainingArguments`)
        train_dataset (`RetrievalExamples`, or a `ConcatDataset` of several)
        eval_dataset (`RetrievalExamples` or `dict[str, RetrievalExamples]`, *optional*): dev queries with documents.
        training_info (`dict`, *optional*): what the model card says of data and recipe.
        stage (`str`): what the progress bar calls this training.
    """

    def __init__(
        self,
        model,
        args,
        train_dataset=None,
        eval_dataset=None,
        training_info: dict | None = None,
        stage="Training",
        **kwargs,
    ):
        use_cache = model.backbone.config.use_cache
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=kwargs.pop("data_collator", collate),
            compute_metrics=kwargs.pop("compute_metrics", self._retrieval_metrics),
            **kwargs,
        )
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StageProgress(stage))
        # The Trainer switches the cache off; pushed like that, the model would generate without one.
        model.backbone.config.use_cache = use_cache
        model.config.text_config.use_cache = use_cache
        self.training_info = training_info or {}
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
        """As in transformers, with a learning rate of their own for the vectors of the vocabulary."""
        for parameter in self.model.parameters():
            # accelerate tells the parameters of a model that a stage before has sharded by their addresses, and a shard that
            # is empty on this device has none.
            if isinstance(parameter, DTensor) and not parameter._local_tensor.numel():
                parameter._local_tensor.data_ptr = partial(id, parameter)
        optimizer = super().create_optimizer(*args, **kwargs)
        copy_path = self.accelerator.unwrap_model(self.model).copy_path
        tokens = [] if copy_path is None else [copy_path.token_values.weight, copy_path.token_salience.weight]
        tokens = [token for token in tokens if token.requires_grad]
        if tokens:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if not any(p is token for token in tokens)]
            rate = self.args.token_learning_rate
            rate = 0.1 * self.args.learning_rate if rate is None else rate
            optimizer.add_param_group({"params": tokens, "lr": rate, "weight_decay": 0.0})
        return optimizer

    # -- the loss -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs, share = self._without_repeats(inputs) if model.training else (inputs, 1.0)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            readout_mask=inputs["readout_mask"],
            hidden_states=inputs.get("hidden_states"),
            words_only=inputs["mode"] == "words",
            use_probe=inputs["mode"] == "probe",
        )
        vectors = outputs.query_embeddings
        parts = self.loss_parts(vectors, inputs)
        if model.training and self.args.consistency_weight and self._has_changed:
            parts["consistency"] = self._consistency(model, vectors, inputs)
        parts = {name: share * part for name, part in parts.items()}
        loss = sum(getattr(self.args, f"{name}_weight") * part for name, part in parts.items())
        if not torch.isfinite(loss):
            seen = {name: str(part.item()) for name, part in parts.items()}
            path = Path(self.args.output_dir, "_batch-not-finite.json")  # `_*` is never pushed
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": self.state.global_step, **seen, "queries": inputs["query"]}) + "\n")
            raise FloatingPointError(
                f"the loss is {loss.item()} ({', '.join(f'{k} {v}' for k, v in seen.items())}); the batch's queries are "
                f"named in {path}; lower the learning rate or raise the temperatures"
            )
        if model.training:
            self._num_queries += len(inputs["input_ids"]) * self.args.world_size
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

    def get_batch_samples(self, *args, **kwargs):
        batches, count = super().get_batch_samples(*args, **kwargs)
        for batch in batches[:-1]:  # an update's batches are fetched ahead: the loader's end is that of the last alone
            batch["may_be_last"] = False
        return batches, count

    def loss_parts(self, vectors: torch.Tensor, inputs: dict) -> dict[str, torch.Tensor]:
        """The losses whose weight is not 0, by name. `vectors` is `(batch, dim)`."""
        parts = {}
        if self.args.alignment_weight:
            parts["alignment"] = alignment_loss(vectors, inputs["targets"])
        if self.args.contrastive_weight:
            positives, ids = inputs["positives"], inputs["positive_ids"][:, 0]
            if "other_positives" in inputs:  # of the other devices
                positives = torch.cat((positives, inputs["other_positives"]))
                ids = torch.cat((ids, inputs["other_positive_ids"]))
            parts["contrastive"] = contrastive_loss(
                vectors,
                positives,
                positive_ids=ids,
                negatives=inputs.get("negatives"),
                negative_ids=inputs.get("negative_ids"),
                known_positives=inputs["positive_ids"],
                temperature=self.args.contrastive_temperature,
            )
        if self.args.rank_weight:
            parts["rank"] = vectors.sum() * 0.0
            if "ranking" in inputs:
                rows = inputs["ranking_mask"].sum(1) > 1
                if rows.any():
                    documents, mask = inputs["ranking"][rows], inputs["ranking_mask"][rows]
                    teacher = torch.einsum("bd,bkd->bk", inputs["targets"][rows], documents)
                    student = torch.einsum("bd,bkd->bk", vectors[rows], documents)
                    low = torch.finfo(student.dtype).min / 1e4  # padding takes no part on either side
                    kl = rank_distillation_loss(
                        student.masked_fill(~mask, low),
                        teacher.masked_fill(~mask, low),
                        temperature=self.args.rank_temperature,
                    )
                    # The mean is over the whole batch: a row without a ranking counts as one that is right.
                    parts["rank"] = kl * rows.float().mean()
        return parts

    def _without_repeats(self, inputs: dict) -> tuple[dict, float]:
        """
        On several devices: the batch with the other devices' positives, and without the rows that accelerate repeats so
        that every device's last batch is full; and the factor that makes the devices' mean that of all real rows.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if world == 1:
            return inputs, 1.0
        size, progress = len(inputs["input_ids"]), self.accelerator.gradient_state
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
        return _GroupedByLength(
            batch,
            lengths,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            lambda: int(self.state.epoch or 0),
        )

    # -- dev metrics --------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            means = {}
            for name in ("recall@10", "mrr@10", "ndcg@10"):  # the mean of the data sets names the best checkpoint
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
        scores, best = search(examples.documents, np.asarray(prediction.predictions), depth)
        run, qrels = {}, {}
        for query, rows, values in zip(prediction.label_ids.ravel(), best, scores, strict=True):
            run[str(query)] = dict(zip(map(str, rows), map(float, values), strict=True))
            qrels[str(query)] = {str(row): 1 for row in examples.positives[query]}
        metrics = per_query(run, qrels, list(qrels))
        return {name: float(np.mean(values)) for name, values in metrics.items()}

    # -- what is saved ------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves a whole model; but checkpoints hold the head alone, as the backbone never changes.

        Stopped at any moment, the folder holds the model of before, or one without a `config.json`, which nothing takes
        for a model, or the new one.
        """
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call and output_dir is not None:
            return self._save_head(folder)
        aside = folder / "_saving"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        with _room_for(f"the model {folder}"):
            super().save_model(str(aside), _internal_call=True)  # a push is a step of its own
        if self.args.should_save:
            (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle, and with the Hub's token in it
            for weights in aside.glob("*.safetensors"):
                seal(weights, sha256(weights))
            _replace_model(aside, folder)

    def _save_head(self, folder: Path) -> None:
        if self.is_deepspeed_enabled:
            super().save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                (folder / "training_args.bin").unlink(missing_ok=True)
            return
        state = self.accelerator.unwrap_model(self.model).state_dict()
        state = {k: v for k, v in state.items() if not k.startswith("backbone.")}
        # Under FSDP each device has a part of a weight, and all of them take part in putting it together.
        state = {k: (v.full_tensor() if isinstance(v, DTensor) else v).contiguous() for k, v in state.items()}
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(state, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        sharded = type(model)
        if isinstance(model, FSDPModule):  # FSDP's class, whose name and code would be saved for the model's
            model.__class__ = sharded.__bases__[-1]
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__class__ = sharded

    def _save_checkpoint(self, model, trial):
        with _room_for(f"the checkpoint of step {self.state.global_step} in {self.args.output_dir}"):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # As in transformers, without the whole model beside them.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        results: Sequence[str | os.PathLike] = (),
    ) -> CommitInfo | None:
        """
        Saves the model with its card and pushes both; see [`card.push_model`], which waits until all is sent.

        Args:
            results: result files of eval.py, for the card.
        """
        self.save_model()
        self.create_model_card(results=results)
        if not self.is_world_process_zero():
            return None
        return push_model(
            self.args.output_dir,
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            results,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_head(self.state.best_model_checkpoint)

    def _load_head(self, checkpoint: str) -> None:
        path = Path(checkpoint) / SAFE_WEIGHTS_NAME
        try:
            state = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"checkpoint {path} cannot be read ({error}); resume from an older one") from error
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled:
            options = StateDictOptions(full_state_dict=True, strict=False)
            missing, unexpected = set_model_state_dict(model, state, options=options)
        else:
            missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.startswith("backbone.")]
        if missing or unexpected:
            raise ValueError(
                f"checkpoint {path} is of another head (missing {missing[:3]}, unexpected {unexpected[:3]}); "
                "use the configuration it was trained with, or another output_dir"
            )

    def create_model_card(self, *args, results: Sequence[str | os.PathLike] = (), **kwargs) -> None:
        """Writes `README.md` into `output_dir` from the template `model_card.md`, with `results` of eval.py if given."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        training_info = {
            **self.training_info,
            "recipe": {
                name: getattr(self.args, name)
                for name in (
                    "alignment_weight",
                    "contrastive_weight",
                    "rank_weight",
                    "consistency_weight",
                    "contrastive_temperature",
                    "rank_temperature",
                    "learning_rate",
                    "per_device_train_batch_size",
                    "gradient_accumulation_steps",
                    "num_train_epochs",
                    "warmup_steps",
                    "weight_decay",
                    "seed",
                )
            },
            "dev": [entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry)],
            "history": [entry for entry in self.state.log_history if "loss" in entry],
            "repository": self.args.hub_model_id,
        }
        (folder / "training.json").write_text(json.dumps(training_info, indent=2) + "\n")
        write_model_card(folder, results)


class _GroupedByLength(LengthGroupedSampler):
    """Draws an epoch's order from the seed and the epoch's number, so that a resumed run has the orders of one at a stretch."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed)
        for _ in range(self.epoch()):
            torch.randperm(len(self.lengths), generator=self.generator)  # what an epoch before has drawn
        return super().__iter__()


@contextmanager
def _room_for(what: str) -> Iterator[None]:
    """A full disk comes as the error of whichever library was writing."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{what} could not be written ({reason}); free some space, and --resume goes on") from error


def _replace_model(new: Path, folder: Path) -> None:
    """Moves a saved model's files in the place of another's. `config.json`, which makes it a model, goes first and comes last."""
    (folder / "config.json").unlink(missing_ok=True)
    for weights in folder.glob("model*.safetensors*"):  # another number of files would leave some of them
        weights.unlink()
    for part in sorted(new.iterdir(), key=lambda part: part.name == "config.json"):
        if part.is_dir():
            shutil.rmtree(folder / part.name, ignore_errors=True)
        os.replace(part, folder / part.name)
    new.rmdir()
