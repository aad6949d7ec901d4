"""What is costly is computed in shards, by any number of processes, and comes out the same."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from native_retrieval import cache as cache_module
from native_retrieval.cache import Shard, cached_rows, num_rows, slices
from native_retrieval.features import FeatureStore, cached_queries

ROWS = 53
WHOLE = np.arange(2 * ROWS, dtype=np.float32).reshape(ROWS, 2)
# Each of two slices, of which the later comes first: a shard's rows may lie anywhere.
SHARDS = [[slice(rows.start + 2, rows.stop), slice(rows.start, rows.start + 2)] for rows in slices(ROWS, 5)]


def compute(folder: Path, at: Callable[[int], object] = lambda start: None) -> np.ndarray:
    """The array by way of the cache in `folder`; every shard that is computed leaves its first row in `computed`."""

    def shard(rows_of_it: Shard, advance: Callable) -> Iterator[np.ndarray]:
        start = min(rows.start for rows in rows_of_it)
        at(start)
        with (folder / "computed").open("a") as file:
            file.write(f"{start}\n")
        for rows in rows_of_it:
            advance(num_rows(rows))
            yield WHOLE[rows]

    return cached_rows(folder, "name", WHOLE.shape, WHOLE.dtype, SHARDS, shard, desc="Rows")


def computed(folder: Path) -> list[int]:
    return sorted(map(int, (folder / "computed").read_text().split()))


def forked(*calls: Callable[[], object]) -> list[int]:
    """Runs each in a process of its own, all at once; their exit codes."""
    processes = [multiprocessing.get_context("fork").Process(target=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_the_rows_are_in_order_and_nothing_else_is_left(tmp_path: Path):
    np.testing.assert_array_equal(compute(tmp_path), WHOLE)
    assert {path.name for path in tmp_path.iterdir()} == {"computed", "name.lock", "name.npy", "name.npy.sha256"}
    np.save(tmp_path / "saved.npy", WHOLE)
    assert (tmp_path / "name.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


@pytest.mark.parametrize("kept", [True, False])
def test_no_rows_are_an_array_too(tmp_path: Path, kept: bool):
    array = cached_rows(tmp_path if kept else None, "name", (0, 3), np.float32, [], lambda shard, advance: [])
    assert array.shape == (0, 3) and array.dtype == np.float32


def test_a_cached_array_is_mapped_and_read_only(tmp_path: Path):
    for _ in range(2):
        array = compute(tmp_path)
        assert isinstance(array, np.memmap) and not array.flags.writeable


def test_a_computation_that_fails_leaves_no_array(tmp_path: Path):
    def fail(start: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, fail)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_write_that_fails_leaves_no_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seal = cache_module.seal

    def fail(path: Path, checksum: str) -> None:
        if path.suffix == ".npy":
            raise OSError("No space left on device")
        seal(path, checksum)

    with monkeypatch.context() as patch:
        patch.setattr("native_retrieval.cache.seal", fail)
        with pytest.raises(OSError, match="No space"):
            compute(tmp_path)
    assert not list(tmp_path.glob("name.npy*"))
    np.testing.assert_array_equal(compute(tmp_path), WHOLE)
    assert computed(tmp_path) == list(range(0, ROWS, 5))


def test_a_killed_run_is_gone_on_with(tmp_path: Path):
    def die(start: int) -> None:
        if start == 25:
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(lambda: compute(tmp_path, die)) == [-signal.SIGKILL]
    assert not (tmp_path / "name.npy").exists()
    np.testing.assert_array_equal(compute(tmp_path), WHOLE)
    assert computed(tmp_path) == list(range(0, ROWS, 5))  # none of them twice


def test_processes_that_know_nothing_of_each_other_share_the_work(tmp_path: Path):
    def check() -> None:
        np.testing.assert_array_equal(compute(tmp_path, lambda start: barrier.wait(30) if start < 10 else None), WHOLE)

    barrier = multiprocessing.get_context("fork").Barrier(2)  # holds both at a first shard until the other has one too
    assert forked(check, check) == [0, 0]
    assert computed(tmp_path) == list(range(0, ROWS, 5))


def test_a_shard_whose_process_dies_is_taken_over(tmp_path: Path):
    def die(start: int) -> None:
        barrier.wait(30)
        os.kill(os.getpid(), signal.SIGKILL)

    def go_on(start: int) -> None:
        if start == 5:
            barrier.wait(30)

    barrier = multiprocessing.get_context("fork").Barrier(2)
    codes = forked(lambda: compute(tmp_path, die), lambda: compute(tmp_path, go_on))
    assert sorted(codes) == [-signal.SIGKILL, 0]
    np.testing.assert_array_equal(np.load(tmp_path / "name.npy"), WHOLE)


def flip_the_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("damaged", [".name.npy.partial", "name.000003.shard"])
def test_a_damaged_shard_is_computed_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str):
    def stop(start: int) -> None:
        if start == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, stop)
    flip_the_last_byte(tmp_path / damaged)
    np.testing.assert_array_equal(compute(tmp_path), WHOLE)
    assert computed(tmp_path) == sorted([*range(0, ROWS, 5), 15])
    said = [line for line in capsys.readouterr().err.splitlines() if "computed again" in line]
    assert len(said) == 1 and str(tmp_path / "name.000003.shard") in said[0]


def test_rows_that_are_gone_are_computed_anew(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, lambda start: signal.raise_signal(signal.SIGINT) if start == 20 else None)
    (tmp_path / ".name.npy.partial").unlink()
    np.testing.assert_array_equal(compute(tmp_path), WHOLE)


@pytest.mark.parametrize(("rank", "bars"), [("0", 1), ("1", 0)])
def test_the_first_process_shows_one_bar_for_all(tmp_path, rank, bars, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    compute(tmp_path)
    shown = capsys.readouterr().err
    assert shown.count(f"{ROWS}/{ROWS}") == bars and ("Rows" in shown) == bool(bars)


# -- what the backbone computes ---------------------------------------------------------------------------------------


class Backbone:
    """
    A tiny model in bfloat16, where a prompt's last bits depend on its batch, and the files that it computes for some
    prompts.

    `run(folder, at)` calls `at` with the number of each batch, from 0, and leaves a line in `folder/batches` for each.
    """

    def __init__(self, model, what: str):
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(3, 400, rng.integers(5, 60)).tolist() for _ in range(40)]
        self.model, self.prefill, self.what = model, model.prefill, what

    def run(self, folder: Path, at: Callable[[int], object] = lambda number: None) -> None:
        folder.mkdir(exist_ok=True)
        batches = 0

        def prefill(*args, **kwargs):
            nonlocal batches
            at(batches)
            batches += 1
            with (folder / "batches").open("a") as file:
                file.write("\n")
            return self.prefill(*args, **kwargs)

        self.model.prefill = prefill
        if self.what == "hidden states":
            FeatureStore.build(self.model, self.prompts, folder / "cache", tokens_per_batch=100)
        else:
            cached_queries(self.model, self.prompts, folder / "cache", batch_size=2)


def cache(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}


def batches(folder: Path) -> int:
    return (folder / "batches").read_text().count("\n")


@pytest.fixture(params=["hidden states", "written queries"])
def backbone(request, make_backbone, make_model, monkeypatch) -> Iterator[Backbone]:
    monkeypatch.setattr("native_retrieval.features.SHARD_TOKENS", 250)
    monkeypatch.setattr("native_retrieval.features.SHARD_QUERIES", 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of a pool are not forked
    yield Backbone(make_model(backbone=make_backbone("llama", dtype=torch.bfloat16)), request.param)
    torch.set_num_threads(threads)


def stop(number: int) -> None:
    if number == 12:
        raise KeyboardInterrupt


def test_two_processes_write_the_file_that_one_writes(tmp_path: Path, backbone: Backbone):
    def wait(number: int) -> None:
        if number == 0:
            barrier.wait(30)  # holds both at a first shard until the other has one too

    barrier = multiprocessing.get_context("fork").Barrier(2)
    backbone.run(tmp_path / "one")
    assert forked(*[lambda: backbone.run(tmp_path / "two", wait)] * 2) == [0, 0]
    assert cache(tmp_path / "two") == cache(tmp_path / "one") and len(cache(tmp_path / "one")) == 3
    assert batches(tmp_path / "two") == batches(tmp_path / "one") > 12


def test_a_killed_run_is_gone_on_with_to_the_same_file(tmp_path: Path, backbone: Backbone):
    def die(number: int) -> None:
        if number == 12:
            os.kill(os.getpid(), signal.SIGKILL)

    backbone.run(tmp_path / "whole")
    assert forked(lambda: backbone.run(tmp_path / "killed", die)) == [-signal.SIGKILL]
    backbone.run(tmp_path / "killed")
    assert cache(tmp_path / "killed") == cache(tmp_path / "whole")
    assert batches(tmp_path / "killed") < batches(tmp_path / "whole") + 4  # of one shard at most, a part twice


def test_a_damaged_shard_of_the_backbones_is_computed_anew(
    tmp_path: Path, backbone: Backbone, capsys: pytest.CaptureFixture[str]
):
    backbone.run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        backbone.run(tmp_path / "damaged", stop)
    note = next((tmp_path / "damaged" / "cache").glob("*.000001.shard"))
    note.write_text(note.read_text().replace("1", "2"))
    backbone.run(tmp_path / "damaged")
    assert cache(tmp_path / "damaged") == cache(tmp_path / "whole")
    said = [line for line in capsys.readouterr().err.splitlines() if "computed again" in line]
    assert len(said) == 1 and str(note) in said[0]
