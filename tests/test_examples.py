"""The examples, as a reader would start them, with a tiny model."""

import io
import subprocess
import sys

import pytest
from conftest import REPOSITORY, run_here

from native_retrieval.data import load_corpus
from native_retrieval.index import DocumentIndex


@pytest.fixture(scope="module")
def made(make_taught_model, beir_data, tmp_path_factory) -> list[str]:
    """The folders of a model and of its teacher's index."""
    folder, (model, teacher) = tmp_path_factory.mktemp("made"), make_taught_model()
    model.save_pretrained(folder / "model")
    corpus = load_corpus(beir_data)
    DocumentIndex.build(corpus, teacher.documents(corpus), teacher.fingerprint, "tiny-teacher", folder / "index")
    return [str(folder / "model"), str(folder / "index")]


def run(name: str, words: list[str]) -> int | str | None:
    return run_here([str(REPOSITORY / "examples" / name), *words])


def test_quickstart_finds_three_documents(made, capsys):
    assert run("quickstart.py", made) in (0, None)
    assert len(capsys.readouterr().out.strip().splitlines()) == 3


def test_the_terminal_agent_answers_and_ends_with_an_empty_line(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who built it?\nAnd when?\n\n"))
    assert run("agent.py", made) in (0, None)
    assert capsys.readouterr().out.count("Found") == 2


def test_the_terminal_agent_says_what_is_missing(tmp_path, capsys):
    assert run("agent.py", [str(tmp_path / "nowhere"), str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("agent.py: ")


def test_the_langgraph_agent_loads_no_embedding_model(made):
    pytest.importorskip("langgraph")
    # In a process of its own: the other tests load one.
    command = [sys.executable, str(REPOSITORY / "examples" / "langgraph_agent.py"), *made]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Search results" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "Embedding models loaded in this process: none"
