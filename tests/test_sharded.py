"""Costly arrays are computed in shards, by any number of processes, and come out the same."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from native_retrieval import teacher as teacher_module
from native_retrieval.teacher import cached_rows

ROWS = 53
WHOLE = np.arange(2 * ROWS, dtype=np.float32).reshape(ROWS, 2)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "SHARD_ROWS", 5)


def compute(folder: Path, at: Callable[[slice], object] = lambda rows: None) -> np.ndarray:
    """The array by way of the cache in `folder`; every shard that is computed leaves a line in `computed`."""

    def shard(rows: slice, advance: Callable) -> np.ndarray:
        at(rows)
        with (folder / "computed").open("a") as file:
            file.write(f"{rows.start}\n")
        advance(rows.stop - rows.start)
        return WHOLE[rows]

    return cached_rows(folder, "name", WHOLE.shape, WHOLE.dtype, shard, "Rows")


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
    np.testing.assert_array_equal(np.load(tmp_path / "name.npy"), WHOLE)


def test_a_killed_run_is_gone_on_with(tmp_path: Path):
    def die(rows: slice) -> None:
        if rows.start == 25:
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(lambda: compute(tmp_path, die)) == [-signal.SIGKILL]
    assert not (tmp_path / "name.npy").exists()
    np.testing.assert_array_equal(compute(tmp_path), WHOLE)
    assert computed(tmp_path) == list(range(0, ROWS, 5))  # none of them twice


def test_processes_that_know_nothing_of_each_other_share_the_work(tmp_path: Path):
    def check() -> None:
        np.testing.assert_array_equal(
            compute(tmp_path, lambda rows: barrier.wait(30) if rows.start < 10 else None), WHOLE
        )

    barrier = multiprocessing.get_context("fork").Barrier(2)  # holds both at a first shard until the other has one too
    assert forked(check, check) == [0, 0]
    assert computed(tmp_path) == list(range(0, ROWS, 5))


def test_a_shard_whose_process_dies_is_taken_over(tmp_path: Path):
    def die(rows: slice) -> None:
        barrier.wait(30)
        os.kill(os.getpid(), signal.SIGKILL)

    def go_on(rows: slice) -> None:
        if rows.start == 5:
            barrier.wait(30)

    barrier = multiprocessing.get_context("fork").Barrier(2)
    codes = forked(lambda: compute(tmp_path, die), lambda: compute(tmp_path, go_on))
    assert sorted(codes) == [-signal.SIGKILL, 0]
    np.testing.assert_array_equal(np.load(tmp_path / "name.npy"), WHOLE)


def test_a_damaged_shard_is_computed_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def stop(rows: slice) -> None:
        if rows.start == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, stop)
    shards = sorted(tmp_path.glob("name.[0-9]*.npy"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    np.testing.assert_array_equal(compute(tmp_path), WHOLE)
    assert computed(tmp_path) == sorted([*range(0, ROWS, 5), 5])
    said = [line for line in capsys.readouterr().err.splitlines() if str(shards[1]) in line]
    assert len(said) == 1 and "computed again" in said[0]


@pytest.mark.parametrize(("rank", "bars"), [("0", 1), ("1", 0)])
def test_the_first_process_shows_one_bar_for_all(tmp_path, rank, bars, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    compute(tmp_path)
    shown = capsys.readouterr().err
    assert shown.count(f"{ROWS}/{ROWS}") == bars and ("Rows" in shown) == bool(bars)
