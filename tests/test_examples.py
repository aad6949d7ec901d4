"""The examples, as a reader would start them, with a tiny model."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

from native_retrieval.data import load_corpus
from native_retrieval.index import DocumentIndex


@pytest.fixture(scope="module")
def made(make_taught_model, beir_data, tmp_path_factory) -> list[str]:
    """A model's folder and its index's."""
    folder, (model, teacher) = tmp_path_factory.mktemp("made"), make_taught_model()
    model.save_pretrained(folder / "model")
    corpus = load_corpus(beir_data)
    DocumentIndex.build(corpus, teacher.documents(corpus), teacher.fingerprint, "tiny-teacher", folder / "index")
    return [str(folder / "model"), str(folder / "index")]


def run(name: str, words: list[str], said: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "examples" / name), *words]
    return subprocess.run(command, capture_output=True, text=True, input=said, timeout=120)


def test_quickstart_finds_three_documents(made):
    done = run("quickstart.py", made)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 3


def test_the_terminal_agent_answers_and_ends_with_an_empty_line(made):
    done = run("agent.py", made, "Who built it?\nAnd when?\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Found") == 2


def test_the_terminal_agent_says_what_is_missing(tmp_path):
    done = run("agent.py", [str(tmp_path / "nowhere"), str(tmp_path)])
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("agent.py: ")
    assert "Traceback" not in done.stderr


def test_the_langgraph_agent_loads_no_embedding_model(made):
    pytest.importorskip("langgraph")
    done = run("langgraph_agent.py", made)
    assert done.returncode == 0, done.stderr
    assert "Search results" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "Embedding models loaded in this process: none"
