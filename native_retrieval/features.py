"""Hidden states of the frozen backbone, computed once and memory-mapped from disk.

The backbone never changes in training, so neither do its states. A turn's prompt is a prefix of the next turn's, and in
a causal model so are its states: each conversation is computed once, whole, and every turn reads a part of it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

IN_MEMORY_BYTES = 2**30


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
        tokens_per_batch: int = 4096,
        progress: str = "Hidden states",
    ) -> "FeatureStore":
        """
        The states of `sequences` (token ids without padding) under a `NativeRetrievalModel`'s backbone.

        What is on disk already is read; what a stopped run left half done is gone on with.
        """
        whole, host = shared_prefixes(sequences)
        lengths = np.array([len(sequences[i]) for i in whole])
        begins = np.concatenate(([0], lengths.cumsum()))
        starts = begins[host]
        own_lengths = np.array([len(sequence) for sequence in sequences])

        text = model.config.text_config.get_text_config()
        shape = (int(begins[-1]), len(model.config.hidden_state_layers), text.hidden_size)
        key = _key(model, sequences, model.config.hidden_state_layers, str(model.backbone.dtype))
        path = Path(cache_dir) / f"features-{key}.npy"
        if not len(whole):
            return cls(np.empty(shape, dtype=np.int16), starts, own_lengths)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # a second process waits here, and then finds the file
            states = _open(path, shape)
            if states is None:
                needed, free = int(np.prod(shape)) * 2, shutil.disk_usage(path.parent).free
                if needed > free:
                    raise OSError(
                        f"hidden states need {needed / 1e9:.1f} GB, {path.parent} has {free / 1e9:.1f} GB free; "
                        "free some, set another cache_dir, or train with online_features"
                    )
                batches = _batches(lengths, tokens_per_batch)
                _fill(model, [sequences[i] for i in whole], begins, batches, path, shape, progress)
                states = _open(path, shape)
        # A small one is kept in memory: some systems are quick to drop what they have read of a file.
        return cls(np.array(states) if states.nbytes < IN_MEMORY_BYTES else states, starts, own_lengths)


def _open(path: Path, shape: tuple[int, ...], mode: str = "r") -> np.ndarray | None:
    """The array on disk, mapped; None if it is not there or not whole."""
    try:
        array = np.load(path, mmap_mode=mode)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None


def _batches(lengths: np.ndarray, tokens_per_batch: int) -> list[list[int]]:
    """Neighbours in length, longest first (so that memory runs out at once or never)."""
    batches: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable"):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_batch:
            batches.append([])
        batches[-1].append(int(i))
    return batches


def _fill(model, sequences, begins, batches, path: Path, shape: tuple, progress: str) -> None:
    partial, done_file = path.with_suffix(".partial.npy"), path.with_suffix(".partial.json")
    done = 0
    states = _open(partial, shape, "r+") if done_file.exists() else None
    if states is not None:
        done = json.loads(done_file.read_text())["batches"]
    else:
        states = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int16, shape=shape)
    total = sum(len(sequences[i]) for batch in batches for i in batch)
    with tqdm(total=total, desc=progress, unit="token", unit_scale=True) as bar:
        bar.update(sum(len(sequences[i]) for batch in batches[:done] for i in batch))
        for number, batch in enumerate(batches[done:], start=done + 1):
            input_ids, mask = model.pad([list(sequences[i]) for i in batch])
            hidden = model.prefill(input_ids, mask, use_cache=False).hidden_states.to(torch.bfloat16).cpu()
            for row, i in zip(hidden, batch, strict=True):
                states[begins[i] : begins[i + 1]] = row[-len(sequences[i]) :].contiguous().view(torch.int16).numpy()
            bar.update(sum(len(sequences[i]) for i in batch))
            if number % 50 == 0:
                states.flush()
                _write_atomically(done_file, json.dumps({"batches": number}))
    states.flush()
    os.replace(partial, path)
    done_file.unlink(missing_ok=True)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def cached_queries(model, prompts: Sequence[Sequence[int]], cache_dir: str | os.PathLike, batch_size: int = 32):
    """
    The search query, as token ids, that the frozen backbone writes after each prompt; kept on disk as it is written.

    Returns:
        `list[list[int]]`, in the order of `prompts`.
    """
    key = _key(model, prompts, str(model.backbone.dtype), model.config.query_prompt, model.config.max_query_tokens)
    path = Path(cache_dir) / f"queries-{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            written: dict[str, list[int]] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            written = {}
        order = [i for i in np.argsort([len(prompt) for prompt in prompts], kind="stable") if str(i) not in written]
        with tqdm(total=len(prompts), initial=len(written), desc="Queries by the backbone", unit="query") as bar:
            for begin in range(0, len(order), batch_size):
                rows = order[begin : begin + batch_size]
                prefill = model.prefill(*model.pad([list(prompts[i]) for i in rows]))
                written.update(zip(map(str, rows), model.write_queries(prefill)[1], strict=True))
                bar.update(len(rows))
                if (begin // batch_size) % 10 == 9 or begin + batch_size >= len(order):
                    _write_atomically(path, json.dumps(written))
    return [written[str(i)] for i in range(len(prompts))]


def _key(model, sequences, *settings) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, weight in model.backbone.state_dict().items():  # a sample of every weight tells backbones apart
        sample = weight.flatten()[:: max(1, weight.numel() // 64)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    for sequence in sequences:
        digest.update(np.asarray(sequence, dtype=np.int32).tobytes() + b"|")
    return digest.hexdigest()[:24]
