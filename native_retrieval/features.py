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


def shared_prefixes(sequences: Sequence[Sequence[int]]) -> tuple[list[int], np.ndarray]:
    """
    The sequences that are no prefix of another, and for each sequence the place, among those, of one that it begins.

    Sorted, a prefix stands right before a sequence that it begins.
    """
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
        start = self.starts[i]
        # A copy: torch does not accept a read-only map.
        return torch.from_numpy(self.states[start : start + self.lengths[i]].copy()).view(torch.bfloat16)

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
        path = Path(cache_dir) / f"features-{_key(model, sequences)}.npy"
        if not path.exists():
            batches = _batches(lengths, tokens_per_batch)
            path.parent.mkdir(parents=True, exist_ok=True)
            needed = int(np.prod(shape)) * 2
            free = shutil.disk_usage(path.parent).free
            if needed > free:
                raise OSError(
                    f"hidden states need {needed / 1e9:.1f} GB, {path.parent} has {free / 1e9:.1f} GB free; "
                    "free some, set another cache_dir, or train with online_features"
                )
            with FileLock(path.with_suffix(".lock")):  # a second process waits here, and then finds the file
                if not path.exists():
                    _fill(model, [sequences[i] for i in whole], begins, batches, path, shape, progress)
        return cls(np.load(path, mmap_mode="r"), starts, own_lengths)


def _batches(lengths: np.ndarray, tokens_per_batch: int) -> list[list[int]]:
    """Neighbours in length, longest first (so that memory runs out at once or never)."""
    batches: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable"):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_batch:
            batches.append([])
        batches[-1].append(int(i))
    return batches


def _fill(model, sequences, begins, batches, path: Path, shape: tuple, progress: str) -> None:
    done = 0
    if partial.exists() and done_file.exists():
        done = json.loads(done_file.read_text())["batches"]
        states = np.lib.format.open_memmap(partial, mode="r+")
    else:
        states = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int16, shape=shape)
    total = sum(len(sequences[i]) for batch in batches for i in batch)
    with tqdm(total=total, desc=progress, unit="token", unit_scale=True) as bar:
        bar.update(sum(len(sequences[i]) for batch in batches[:done] for i in batch))
        for number, batch in enumerate(batches[done:], start=done + 1):
            input_ids, mask = model._pad([list(sequences[i]) for i in batch])
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


def _key(model, sequences) -> str:
    digest = hashlib.sha256(json.dumps([model.config.hidden_state_layers, str(model.backbone.dtype)]).encode())
    for name, weight in model.backbone.state_dict().items():  # a sample of every weight tells backbones apart
        sample = weight.flatten()[:: max(1, weight.numel() // 64)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    for sequence in sequences:
        digest.update(np.asarray(sequence, dtype=np.int32).tobytes() + b"|")
    return digest.hexdigest()[:24]
