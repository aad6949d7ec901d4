"""Every row of the table in bad_inputs.py: one line that names the thing and the way out, exit code 2, nothing left behind."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from bad_inputs import ROWS, Row, World, answer

from native_retrieval.data import load_corpus
from native_retrieval.index import DocumentIndex


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def world(make_taught_model, make_backbone, backbone_dir, teacher_dir, beir_data, folder) -> World:
    """Folders that are as they should be, in `folder`, and the objects that they hold."""
    for name, source in (("backbone", backbone_dir), ("teacher", teacher_dir), ("data", beir_data)):
        shutil.copytree(source, folder / name)
    model, teacher = make_taught_model()
    model.config.teacher_name_or_path = "teacher"
    model.save_pretrained(folder / "model")
    training_info = {
        "backbone": "tiny",
        "teacher": "tiny",
        "train_data": {},
        "query_modes": ["context"],
        "command": "train.py",
    }
    (folder / "model" / "training.json").write_text(json.dumps({**training_info, "plain_texts": 0, "recipe": {}}))
    shutil.copytree(folder / "model", folder / "stranger")
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"teacher_fingerprint": "0" * 64, "teacher_name_or_path": "another-teacher"}
    (folder / "stranger" / "config.json").write_text(json.dumps(config))
    corpus = load_corpus(folder / "data")
    vectors = teacher.documents(corpus)
    index = DocumentIndex.build(corpus, vectors, teacher.fingerprint, "teacher", folder / "index")
    return World(model, teacher, make_backbone("llama"), corpus, vectors, index)


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def files() -> dict[str, bytes]:
    """What is in the working directory, but for what is kept for the next run: the cache, and locks."""
    paths = (path for path in Path().rglob("*") if ".cache" not in path.parts and path.suffix != ".lock")
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.entry}: {row.input}")
def test_bad_input(row: Row, world: World, folder: Path, monkeypatch, capsys, record_property):
    monkeypatch.chdir(folder)
    made = {"bad", *(Path(name).parts[0] for name in row.files)}
    try:
        row.prepare()
        before = files()
        error, code = answer(row, world, lambda: capsys.readouterr().err)
        assert files() == before, "something was written"
    finally:
        for path in made:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
    lacking = [words for words in row.says if words not in error]
    assert not lacking, error
    error = error.replace(str(folder), "DIR")
    record_property("row", {"entry": row.entry, "input": row.input, "error": error, "exit_code": code})


def test_the_table_is_large_and_has_no_row_twice():
    names = [(row.entry, row.input, *row.files.items()) for row in ROWS]
    assert len(set(names)) == len(names) >= 60
