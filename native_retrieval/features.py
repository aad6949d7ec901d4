"""Hidden states of the frozen backbone, computed once and memory-mapped from disk, and the queries that it writes.

The backbone never changes in training, so neither do its states. A turn's prompt is a prefix of the next turn's, and in
a causal model so are its states: each conversation is computed once, whole, and every turn reads a part of it.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from .cache import Advance, Shard, atomic_write, cached_rows, make_in_shards, num_rows, slices

IN_MEMORY_BYTES = 2**30
# What a process computes at a time, and a killed one loses: on two cores half a minute's work, on a GPU a second's, and
# still far more than it takes to find the next. The same for any number of processes: what else is in a batch moves
# the last bits of a prompt's states.
SHARD_TOKENS = 2**15
SHARD_QUERIES = 128
# Entries of a backbone's configuration that do not change its states.
NO_SETTINGS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")

_digests: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, list]] = weakref.WeakKeyDictionary()


def shared_prefixes(sequences: Sequence[Sequence[int]]) -> tuple[list[int], np.ndarray]:
    """
    The sequences that are no prefix of another, and for each sequence the place, among those, of one that it begins.

    Sorted, a prefix stands right before a sequence that it begins.
    """
    if not sequences:
        return [], np.empty(0, dtype=np.int64)
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i]))
    whole: list[int] = []
    host = np.empty(len(sequences), dtype=np.int64)
    for here, after in zip(reversed(order), [None, *reversed(order[1:])], strict=True):
        if after is not None and list(sequences[after][: len(sequences[here])]) == list(sequences[here]):
            host[here] = host[after]
        else:
            host[here] = len(whole)
            whole.append(here)
    return whole, host


class FeatureStore:
    """
    Hidden states of token sequences at `config.hidden_state_layers`, 2 bytes a value (bfloat16), memory-mapped.

    `store[i]` is a `torch.bfloat16` tensor `(tokens, layers, hidden_size)` for the i-th sequence it was built for.
    """

    def __init__(self, states: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
        self.states, self.starts, self.lengths = states, starts, lengths

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> torch.Tensor:
        start, stop = int(self.starts[i]), int(self.starts[i] + self.lengths[i])
        if isinstance(self.states, np.memmap):  # read, and not through the map, whose pages would stay resident
            token = int(np.prod(self.states.shape[1:]))
            offset = self.states.offset + 2 * token * start
            states = np.fromfile(self.states.filename, np.int16, token * (stop - start), offset=offset)
            states = states.reshape(stop - start, *self.states.shape[1:])
        else:
            states = self.states[start:stop].copy()
        return torch.from_numpy(states).view(torch.bfloat16)

    @classmethod
    def build(
        cls,
        model,
        sequences: Sequence[Sequence[int]],
        cache_dir: str | os.PathLike,
        *,
        tokens_per_batch: int | None = None,
        progress: str = "Hidden states",
    ) -> "FeatureStore":
        """
        The states of `sequences` (token ids without padding) under a `NativeRetrievalModel`'s backbone.

        What is on disk already is read. The rest is computed in shards, by all processes that ask for it; what a
        stopped run has finished is gone on with; a damaged file is computed anew, which a line on stderr says.

        Args:
            tokens_per_batch (`int`, *optional*): by default 4,096 on an accelerator, and 1,024 on a CPU, which a few
                prompts at a time keep busy.

        Raises:
            `OSError`: if there is no room, or `cache_dir` cannot be written to.
        """
        if tokens_per_batch is None:
            tokens_per_batch = 1024 if model.backbone.device.type == "cpu" else 4096
        whole, host = shared_prefixes(sequences)
        lengths = np.array([len(sequences[i]) for i in whole])
        begins = np.concatenate(([0], lengths.cumsum()))
        starts = begins[host]
        own_lengths = np.array([len(sequence) for sequence in sequences])

        shape = (int(begins[-1]), len(model.query_head.layers), model.config.hidden_size)
        if not len(whole):
            return cls(np.empty(shape, dtype=np.int16), starts, own_lengths)
        sequence_at = dict(zip(begins[:-1].tolist(), whole, strict=True))
        # Longest first: memory runs out at once or never.
        order = [slice(int(begins[i]), int(begins[i + 1])) for i in np.argsort(-lengths, kind="stable")]

        def compute(shard: Shard, advance: Advance) -> Iterator[np.ndarray]:
            for batch in _batches(shard, tokens_per_batch):
                input_ids, mask = model.processor.pad([list(sequences[sequence_at[rows.start]]) for rows in batch])
                hidden = model.prefill(input_ids, mask, use_cache=False).hidden_states.to(torch.bfloat16).cpu()
                for row, rows in zip(hidden, batch, strict=True):
                    yield row[-num_rows(rows) :].contiguous().view(torch.int16).numpy()
                advance(sum(map(num_rows, batch)))

        states = cached_rows(
            Path(cache_dir),
            f"features-{_key(model, sequences, model.query_head.layers, str(model.backbone.dtype))}",
            shape,
            np.int16,
            _batches(order, SHARD_TOKENS),
            compute,
            otherwise=", or train with online_features",
            desc=progress,
            unit="token",
            unit_scale=True,
        )
        # A small one is kept in memory: some systems are quick to drop what they have read of a file.
        return cls(np.array(states) if states.nbytes < IN_MEMORY_BYTES else states, starts, own_lengths)


def _batches(order: Sequence[slice], num_tokens: int) -> list[list[slice]]:
    """Neighbours in an order by length, longest first; in each batch at most `num_tokens`, padding included, or one."""
    batches: list[list[slice]] = []
    for rows in order:
        if not batches or (len(batches[-1]) + 1) * num_rows(batches[-1][0]) > num_tokens:
            batches.append([])
        batches[-1].append(rows)
    return batches


def cached_queries(model, prompts: Sequence[Sequence[int]], cache_dir: str | os.PathLike, batch_size: int = 32):
    """
    The search query, as token ids, that the frozen backbone writes after each prompt; kept on disk, and computed in
    shards, as [`FeatureStore.build`] does.

    Returns:
        `list[list[int]]`, in the order of `prompts`.

    Raises:
        `OSError`: if `cache_dir` cannot be written to.
    """
    key = _key(model, prompts, str(model.backbone.dtype), model.config.query_prompt, model.config.max_query_tokens)
    path = Path(cache_dir) / f"queries-{key}.json"
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist()
    shards = [order[places] for places in slices(len(order), SHARD_QUERIES)]

    def write(number: int, advance: Advance) -> str:
        written = {}
        for places in slices(len(shards[number]), batch_size):
            rows = shards[number][places]
            prefill = model.prefill(*model.processor.pad([list(prompts[i]) for i in rows]))
            written.update(zip(map(str, rows), model.write_queries(prefill)[1], strict=True))
            advance(len(rows))
        return json.dumps(written)

    def join(parts: list[str]) -> list[int]:
        written = dict(item for part in parts for item in json.loads(part).items())
        with atomic_write(path, sealed=True) as partial:
            partial.write_text(json.dumps(written))
        return []

    make_in_shards(path, list(map(len, shards)), write, join, desc="Queries by the backbone", unit="query")
    written = json.loads(path.read_text())
    return [written[str(i)] for i in range(len(prompts))]


def _key(model, sequences, *settings) -> str:
    digest = hashlib.sha256(json.dumps([_digest(model.backbone), *settings]).encode())
    for sequence in sequences:
        digest.update(np.asarray(sequence, dtype=np.int32).tobytes() + b"|")
    return digest.hexdigest()[:24]


def _digest(backbone: torch.nn.Module) -> str:
    """
    A hash of all that the states of a backbone depend on: every weight, and its configuration.

    The weights are read once per model, and again after they have been changed or moved.
    """
    weights = {name: weight for name, weight in backbone.state_dict().items() if isinstance(weight, torch.Tensor)}
    as_they_are = [(weight.data_ptr(), weight._version) for weight in weights.values()]
    if _digests.get(backbone, ("", None))[1] != as_they_are:
        digest = hashlib.blake2b(digest_size=16)
        for name, weight in weights.items():
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            digest.update(weight.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy())
        _digests[backbone] = digest.hexdigest(), as_they_are
    return _digests[backbone][0] + json.dumps(_settings(backbone.config.to_dict()), sort_keys=True, default=str)


def _settings(config: dict) -> dict:
    """A configuration without the entries that say where a model comes from and how it generates."""
    return {
        key: _settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in NO_SETTINGS and not str(key).endswith("_token_id")
    }
