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

from .files import cache_to_write, is_sealed, say_damaged, seal, sha256, written_whole

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

        What is on disk already is read; what a stopped run left half done is gone on with; a damaged file is computed
        anew, which a line on stderr says.

        Raises:
            `OSError`: if there is no room, or `cache_dir` cannot be written to.
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
        states = _open(path, shape)
        if states is None:
            # A second process waits here, and then finds the file.
            with cache_to_write(cache_dir), FileLock(path.with_suffix(".lock")):
                states = _open(path, shape)
                if states is None:
                    if path.exists():
                        say_damaged(path)
                    order = np.argsort(-lengths, kind="stable")  # longest first: memory runs out at once or never
                    whole_sequences = [sequences[i] for i in whole]
                    _fill(model, whole_sequences, begins, order, tokens_per_batch, path, shape, progress)
                    states = _mapped(path, shape)
        # A small one is kept in memory: some systems are quick to drop what they have read of a file.
        return cls(np.array(states) if states.nbytes < IN_MEMORY_BYTES else states, starts, own_lengths)


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array on disk, mapped; None if it is not there, or not as it was written."""
    return _mapped(path, shape) if is_sealed(path) else None


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        array = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None


def _batches(order: np.ndarray, lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Neighbours in an order by length, longest first, as many in each batch as `tokens_per_batch` allows."""
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_batch:
            batches.append([])
        batches[-1].append(int(i))
    return batches


def _fill(model, sequences, begins, order, tokens_per_batch: int, path: Path, shape: tuple, progress: str) -> None:
    partial, done_file = path.with_suffix(".partial.npy"), path.with_suffix(".partial.json")
    lengths = [len(sequence) for sequence in sequences]
    done = _sequences_done(done_file)
    states = _mapped(partial, shape) if done else None
    if states is None:
        done = 0
        done_file.unlink(missing_ok=True)  # first: it would say of the new file what was true of an old one
        needed, free = int(np.prod(shape)) * 2, shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(
                f"hidden states need {needed / 1e9:.1f} GB, {path.parent} has {free / 1e9:.1f} GB free; "
                "free some, set another cache_dir, or train with online_features"
            )
        states = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int16, shape=shape)
    start, token = states.offset, 2 * int(np.prod(shape[1:]))
    del states
    # Written, and not through a map: on a full disk, a map's pages would end the process without a word.
    with open(partial, "r+b") as file, tqdm(total=sum(lengths), desc=progress, unit="token", unit_scale=True) as bar:
        bar.update(sum(lengths[i] for i in order[:done]))
        for number, batch in enumerate(_batches(order[done:], lengths, tokens_per_batch), start=1):
            input_ids, mask = model.pad([list(sequences[i]) for i in batch])
            hidden = model.prefill(input_ids, mask, use_cache=False).hidden_states.to(torch.bfloat16).cpu()
            for row, i in zip(hidden, batch, strict=True):
                file.seek(start + token * int(begins[i]))
                file.write(row[-lengths[i] :].contiguous().view(torch.int16).numpy())
            done += len(batch)
            bar.update(sum(lengths[i] for i in batch))
            if number % 50 == 0:
                file.flush()
                os.fsync(file.fileno())
                with written_whole(done_file) as half_done:
                    half_done.write_text(json.dumps({"sequences": done}))
    seal(path, sha256(partial))
    os.replace(partial, path)
    done_file.unlink(missing_ok=True)


def _sequences_done(done_file: Path) -> int:
    """How many sequences, in the order in which they are computed, a stopped run has left in its half-done file."""
    try:
        return json.loads(done_file.read_text())["sequences"]
    except (FileNotFoundError, ValueError, KeyError):
        return 0


def cached_queries(model, prompts: Sequence[Sequence[int]], cache_dir: str | os.PathLike, batch_size: int = 32):
    """
    The search query, as token ids, that the frozen backbone writes after each prompt; kept on disk as it is written.

    Returns:
        `list[list[int]]`, in the order of `prompts`.
    """
    key = _key(model, prompts, str(model.backbone.dtype), model.config.query_prompt, model.config.max_query_tokens)
    path = Path(cache_dir) / f"queries-{key}.json"
    written = _written(path)
    if len(written) < len(prompts):
        with cache_to_write(cache_dir), FileLock(path.with_suffix(".lock")):
            written = _written(path)  # another process may have gone on meanwhile
            if not written and path.exists():
                say_damaged(path)
            order = [i for i in np.argsort([len(p) for p in prompts], kind="stable") if str(i) not in written]
            with tqdm(total=len(prompts), initial=len(written), desc="Queries by the backbone", unit="query") as bar:
                for begin in range(0, len(order), batch_size):
                    rows = order[begin : begin + batch_size]
                    prefill = model.prefill(*model.pad([list(prompts[i]) for i in rows]))
                    written.update(zip(map(str, rows), model.write_queries(prefill)[1], strict=True))
                    bar.update(len(rows))
                    if (begin // batch_size) % 10 == 9 or begin + batch_size >= len(order):
                        with written_whole(path, sealed=True) as partial:
                            partial.write_text(json.dumps(written))
    return [written[str(i)] for i in range(len(prompts))]


def _written(path: Path) -> dict[str, list[int]]:
    return json.loads(path.read_text()) if is_sealed(path) else {}


def _key(model, sequences, *settings) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, weight in model.backbone.state_dict().items():  # a sample of every weight tells backbones apart
        sample = weight.flatten()[:: max(1, weight.numel() // 64)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    for sequence in sequences:
        digest.update(np.asarray(sequence, dtype=np.int32).tobytes() + b"|")
    return digest.hexdigest()[:24]
