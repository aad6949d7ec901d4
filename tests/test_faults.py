"""What a kill, a full disk, a damaged file and a second process leave; `tests/faults/kill.py` is the long version."""

import json
import os
import resource
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import kill
from filelock import FileLock

from native_retrieval import checkpoints
from native_retrieval.arguments import NativeRetrievalTrainingArguments
from native_retrieval.loading import load_head, load_model
from native_retrieval.trainer import NativeRetrievalTrainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="os.fork and SIGKILL are of Unix")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, kill.Step]:
    kill.own_locks()
    return {step.name: step for step in kill.make_steps(tmp_path_factory.mktemp("faults"), small=True)}


def test_what_is_killed_and_started_again_ends_as_if_undisturbed(tmp_path: Path):
    output = tmp_path / "faults.json"
    words = ["--kills", "5", "--seed", "1", "--small", "--steps", "features", "training", "saving", "index"]
    kill.main([*words, "--output", str(output)])
    report = json.loads(output.read_text())
    assert [row["step"] for row in report["rows"]] == words[6:]
    assert (report["kills"], report["lost"], report["differing"]) == (5, 0, 0)


def test_the_harness_sees_what_is_lost_and_what_differs(tmp_path: Path):
    def append(folder: Path) -> None:
        with open(folder / "file", "a") as file:
            file.write("half")
        time.sleep(0.05)

    def refuse_a_second_time(folder: Path) -> None:
        (folder / "file").touch(exist_ok=False)
        time.sleep(0.05)

    for name, run in (("differing", append), ("lost", refuse_a_second_time)):
        step = kill.Step(name, run, lambda folder: kill.files(folder, "file"))
        with kill.tqdm(disable=True) as bar:
            row = kill.try_step(step, 2, tmp_path / name, kill.random.Random(0), bar, runs=1)
        assert row["kills"] == 2 and row[name] and not row[{"lost": "differing", "differing": "lost"}[name]]


# -- two processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["features", "queries", "teacher vectors"])
def test_two_processes_that_cache_into_one_folder(steps: dict[str, kill.Step], tmp_path: Path, name: str):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    assert kill.ends_well(steps[name], alone)
    processes = [kill.start(steps[name], together) for _ in range(2)]
    assert [kill.wait(process, kill.PATIENCE) for process in processes] == [0, 0]
    assert kill.difference(steps[name].read(together), steps[name].read(alone)) == ""


def test_a_second_training_into_one_folder_is_refused(steps: dict[str, kill.Step], tmp_path: Path):
    with FileLock(tmp_path / "out" / "_training.lock") as lock:
        assert not kill.ends_well(steps["training"], tmp_path)
    assert f"another training is writing to output_dir {tmp_path}" in (tmp_path / "log").read_text().splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [Path(lock.lock_file).name]


# -- checkpoints (see also test_checkpoints.py) -----------------------------------------------------------------------


def test_the_order_of_an_epoch_is_the_same_after_resuming(tiny_model, tmp_path: Path):
    class Lengths(torch.utils.data.Dataset):
        lengths = list(range(1, 33))

        def __len__(self) -> int:
            return 32

        def __getitem__(self, i: int) -> int:
            return i

    args = NativeRetrievalTrainingArguments(
        **{"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "use_cpu": True, "data_seed": 5},
        **{"eval_strategy": "no", "load_best_model_at_end": False},
    )

    def sampler(epoch: float):
        trainer = NativeRetrievalTrainer(tiny_model, args, Lengths())
        sampler = trainer._get_train_sampler()
        trainer.state.epoch = epoch
        return trainer, sampler

    trainer, at_a_stretch = sampler(0)
    orders = []
    for epoch in range(3):
        trainer.state.epoch = float(epoch)
        orders.append(list(at_a_stretch))
        assert list(sampler(epoch + 0.5)[1]) == orders[-1]
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert len(set(map(tuple, orders))) == 3


# -- saved models, and a full disk ------------------------------------------------------------------------------------


def saved(model, folder: Path) -> Path:
    args = NativeRetrievalTrainingArguments(
        **{"output_dir": str(folder), "use_cpu": True, "eval_strategy": "no", "load_best_model_at_end": False}
    )
    NativeRetrievalTrainer(model, args).save_model()
    return folder


def test_a_model_whose_files_are_truncated_is_refused_in_one_line(make_taught_model, tmp_path: Path):
    folder = saved(make_taught_model()[0], tmp_path / "model")
    assert load_model(str(folder)).embed_query("Where is the bridge?").shape == (1, 32)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        whole = (folder / name).read_bytes()
        for kept in (0, 7, len(whole) // 2, len(whole) - 2):
            (folder / name).write_bytes(whole[:kept])
            with pytest.raises(ValueError, match=f"model {folder}") as error:
                load_model(str(folder))
            assert "\n" not in str(error.value), (name, kept)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_flipped_byte_in_the_weights_is_named(make_taught_model, tmp_path: Path, monkeypatch, max_shard_size: str):
    model, _ = make_taught_model()
    monkeypatch.setattr(model, "save_pretrained", partial(model.save_pretrained, max_shard_size=max_shard_size))
    folder = saved(model, tmp_path / "model")
    parts = sorted(folder.glob("*.safetensors"))
    assert (len(parts) > 1) == (max_shard_size == "20KB")
    whole = bytearray(parts[-1].read_bytes())
    whole[-1] ^= 1
    parts[-1].write_bytes(whole)
    for load in (load_model, load_head):
        with pytest.raises(ValueError, match=rf"model {folder}: {parts[-1].name} is not as it was saved") as error:
            load(folder)
        assert "\n" not in str(error.value)
    # One who has changed the weights says so.
    (folder / f"{parts[-1].name}.sha256").unlink()
    assert load_head(folder) is not None


def test_a_folder_of_another_kind_is_no_head(backbone_dir: Path):
    with pytest.raises(ValueError, match="'llama', wanted 'native_retrieval'"):
        load_head(backbone_dir)


def test_a_saved_model_replaces_all_of_the_one_before(make_taught_model, tmp_path: Path):
    folder = tmp_path / "model"
    make_taught_model()[0].save_pretrained(folder, max_shard_size="20KB")  # many files
    model, _ = make_taught_model(word_vocab_size=None)
    saved(model, folder)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]
    assert not [path.name for path in folder.iterdir() if path.name.startswith("_") or path.suffix == ".bin"]
    state = load_model(str(folder)).state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("step", "lexical", "what"), [("training", True, "word encoder"), ("checkpoints", False, "checkpoint of step 1")]
)
def test_a_full_disk_in_training_is_one_line_and_leaves_nothing_that_seems_whole(
    steps, tmp_path: Path, step: str, lexical: bool, what: str
):
    def fill_the_disk(*args, **kwargs):
        # What is written beyond fails, as on a full disk: the weights are larger.
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))

    def run(folder: Path) -> None:
        checkpoints.remove_checkpoints = fill_the_disk  # when all is prepared; in a process of its own
        if not lexical:
            checkpoints.kept_encoder = lambda *args: nullcontext(True)
        steps[step].run(folder)

    assert not kill.ends_well(kill.Step("full disk", run, kill.weights), tmp_path)
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("OSError") and what in last and "--resume goes on" in last
    assert checkpoints.last_whole_checkpoint(tmp_path / "out") is None
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_lock_goes_with_its_process(steps: dict[str, kill.Step], tmp_path: Path):
    process = kill.start(steps["checkpoints"], tmp_path)
    while not (tmp_path / "out" / "_training.lock").exists():
        assert kill.wait(process, 0.01) is None
    kill.kill(process)
    with checkpoints.alone_in(tmp_path / "out"):
        assert os.path.exists(tmp_path / "out" / "_training.lock")
