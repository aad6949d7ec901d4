"""Where a training goes on, and what it must not replace."""

import json
from pathlib import Path

import pytest
from conftest import assert_one_line

from native_retrieval.arguments import NativeRetrievalTrainingArguments, RunArguments
from native_retrieval.checkpoints import (
    alone_in,
    checkpoint_to_resume,
    checkpoints_of,
    is_finished,
    last_whole_checkpoint,
    remove_checkpoints,
    write_local_paths,
)


def checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def resumed(folder: Path, named: object = None, **run) -> str | None:
    training = NativeRetrievalTrainingArguments(
        output_dir=str(folder), use_cpu=True, resume_from_checkpoint=None if named is None else str(named)
    )
    return checkpoint_to_resume(folder, RunArguments(**run), training)


def test_an_empty_folder_is_trained_into_whatever_the_flags(tmp_path):
    for run in ({}, {"resume": True}, {"overwrite_output_dir": True}):
        assert resumed(tmp_path / "new", **run) is None
    assert resumed(tmp_path, named="true") is None and resumed(tmp_path, named="False") is None


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1'])
def test_a_checkpoint_whose_state_is_not_whole_is_passed_over(tmp_path, state):
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 100, state)
    (tmp_path / "checkpoint-best").mkdir()  # of someone else
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert resumed(tmp_path, resume=True) == resumed(tmp_path, named="true") == str(tmp_path / "checkpoint-10")
    assert last_whole_checkpoint(tmp_path / "nothing") is None


def test_a_stopped_training_is_not_replaced_without_a_word(tmp_path):
    checkpoint(tmp_path, 10)
    with pytest.raises(ValueError, match="checkpoint-10 is of a training that was stopped.*--resume") as error:
        resumed(tmp_path)
    assert_one_line(error)
    assert resumed(tmp_path, overwrite_output_dir=True) is None
    assert resumed(tmp_path, resume=True, overwrite_output_dir=True) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("model_type", ["native_retrieval", "llama"])
@pytest.mark.parametrize("run", [{}, {"resume": True}])
def test_a_model_is_not_replaced_without_a_word(tmp_path, model_type, run):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match="holds a model; .*--overwrite_output_dir") as error:
        resumed(tmp_path, **run)
    assert_one_line(error)
    assert resumed(tmp_path, overwrite_output_dir=True, **run) is None


def test_a_model_beside_a_checkpoint_is_of_a_training_that_is_not_finished(tmp_path):
    """A training that is killed before it removes its checkpoints goes on from the last."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training.json").write_text("{}")
    assert is_finished(tmp_path)
    last = checkpoint(tmp_path, 3)
    assert not is_finished(tmp_path) and resumed(tmp_path, resume=True) == str(last)


def test_any_checkpoint_may_be_named(tmp_path):
    first, second = checkpoint(tmp_path / "out", 5), checkpoint(tmp_path / "out", 10)
    elsewhere = checkpoint(tmp_path / "other", 7)
    assert resumed(tmp_path / "out", named=first) == str(first)
    assert resumed(tmp_path / "out", named=second, resume=True) == str(second)
    assert resumed(tmp_path / "new", named=elsewhere) == str(elsewhere)
    with pytest.raises(ValueError, match="checkpoint-10 is of a training that was stopped"):
        resumed(tmp_path / "out", named=elsewhere)
    assert resumed(tmp_path / "out", named=elsewhere, overwrite_output_dir=True) == str(elsewhere)


@pytest.mark.parametrize("state", [None, '{"epoch": 1', "nothing at all"])
def test_a_named_checkpoint_that_is_not_whole_is_refused_in_one_line(tmp_path, state):
    path = tmp_path / "checkpoint-4" if state == "nothing at all" else checkpoint(tmp_path, 4, state)
    with pytest.raises(ValueError, match="no whole checkpoint .* --resume") as error:
        resumed(tmp_path, named=path)
    assert_one_line(error)


def test_checkpoints_that_are_half_removed_are_passed_over(tmp_path, monkeypatch):
    for step in (5, 10):
        checkpoint(tmp_path, step)

    def killed(path: Path, **kwargs) -> None:
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoints(tmp_path)
    assert last_whole_checkpoint(tmp_path) is None


def test_the_whole_checkpoints_of_a_training_that_goes_on_are_kept(tmp_path):
    elsewhere, out = checkpoint(tmp_path / "other", 7), tmp_path / "out"
    whole = checkpoint(out, 5)
    checkpoint(out, 10, None)
    remove_checkpoints(out, resumed=str(whole))
    assert checkpoints_of(out) == [whole]
    remove_checkpoints(out, resumed=str(elsewhere))
    assert checkpoints_of(out) == [], "of another training: a later --resume would take them for its own"


def test_two_trainings_do_not_share_a_folder(tmp_path):
    first, second = alone_in(tmp_path / "out"), alone_in(tmp_path / "out")
    with first, pytest.raises(ValueError, match="another training") as error, second:
        pass
    assert_one_line(error)
    with alone_in(tmp_path / "out"):
        pass


def test_paths_of_this_machine_are_in_a_file_that_is_never_pushed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("llm").mkdir()
    write_local_paths(tmp_path, backbone="llm", teacher="BAAI/bge-small-en-v1.5")
    paths = json.loads((tmp_path / "_local.json").read_text())
    assert paths == {"backbone": str(tmp_path / "llm"), "teacher": "BAAI/bge-small-en-v1.5"}
