"""Every code block of the README and of docs/ runs: Python as it stands, commands with tiny models in the place of real ones."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_here, write_beir_folder
from markdown_it import MarkdownIt
from test_synthesis import make_corpus

from native_retrieval.data import load_corpus
from native_retrieval.index import DocumentIndex

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
LINKED = [*PAGES, "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "results/README.md", "results/speed.md"]
LANGUAGES = ("python", "bash", "text")
# Run by continuous integration as it stands (`make demo` as `make smoke`), or needing what no test has.
ELSEWHERE = ("make ", "source ", "python benchmarks/", "pip install", "git clone", "cd ")


def blocks(page: str) -> list:
    return [token for token in MarkdownIt().parse((REPOSITORY / page).read_text()) if token.type == "fence"]


def commands(block: str) -> list[str]:
    joined = block.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def small_world(tmp_path_factory, make_taught_model, backbone_dir, teacher_dir):
    """A folder as the pages assume it, and the names in them that stand for something smaller here."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("train.py", "eval.py", "configs", "examples", "benchmarks", "data"):
        (folder / name).symlink_to(REPOSITORY / name)
    write_beir_folder(folder / "my_data")
    with (folder / "my_data" / "corpus.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_corpus() if row["text"])
    model, teacher = make_taught_model(max_prompt_tokens=300)
    corpus = load_corpus(folder / "my_data")
    vectors = teacher.documents(corpus)
    for model_dir in ("pretrained/smollm2-135m-minilm", "outputs/mine", "outputs/best", "outputs/paper"):
        model.save_pretrained(folder / model_dir)
        config = json.loads((folder / model_dir / "config.json").read_text())
        config["teacher_name_or_path"] = str(teacher_dir)  # as a Hub id would be: it can be loaded by this name
        (folder / model_dir / "config.json").write_text(json.dumps(config))
        training_info = {
            "backbone": "tiny",
            "teacher": "tiny",
            "train_data": {},
            "plain_texts": 0,
            "query_modes": ["context"],
        }
        (folder / model_dir / "training.json").write_text(
            json.dumps({**training_info, "command": "train.py", "recipe": {}})
        )
    DocumentIndex.build(corpus, vectors, teacher.fingerprint, "tiny-teacher", folder / ".cache/demo/index")

    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(folder / "my_index.faiss"))
    qdrant = pytest.importorskip("qdrant_client")
    client = qdrant.QdrantClient(path=str(folder / "my_qdrant"))
    cosine = qdrant.models.VectorParams(size=vectors.shape[1], distance=qdrant.models.Distance.COSINE)
    client.create_collection("documents", vectors_config=cosine)
    points = [
        qdrant.models.PointStruct(id=row, vector=vector.tolist(), payload={"title": corpus[row]["title"]})
        for row, vector in enumerate(vectors)
    ]
    client.upsert("documents", points)
    client.close()
    names = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(backbone_dir),
        "sentence-transformers/all-MiniLM-L6-v2": str(teacher_dir),
        "Qwen/Qwen3-Embedding-8B": str(teacher_dir),
        "Qwen/Qwen3-8B": str(backbone_dir),
    }
    return folder, names


def smaller(command: str) -> list[str]:
    """The command with what a tiny model needs, and one epoch."""
    words = shlex.split(command)
    if "train.py" in words:
        at = words.index("train.py")
        words = [*words[at:], "--use_cpu", "--num_train_epochs", "1", "--lexical_epochs", "1"]
        words += ["--max_prompt_tokens", "300", "--num_plain_texts", "50", "--disable_tqdm", "true", "--bf16", "false"]
        words += (
            ["--hidden_state_layers", "1", "4", "--backbone", "Qwen/Qwen3-8B"] if "configs/paper.yaml" in words else []
        )
        words += ["--teacher", "Qwen/Qwen3-Embedding-8B"] if "configs/paper.yaml" in words else []
        words += [] if "--resume" in words else ["--overwrite_output_dir"]  # pages train into the same folder
    elif words[0] == "python":
        words = words[1:]
    return words


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, small_world, monkeypatch, capsys):
    folder, names = small_world
    monkeypatch.chdir(folder)
    found = blocks(page)
    assert found, "no code at all"
    namespace: dict = {"__name__": "page"}
    for block in found:
        assert block.info in LANGUAGES, f"{page}, line {block.map[0] + 1}: say which language this is"
        if block.info == "python":
            source = block.content
            if "import mteb" in source and not find_spec("mteb"):  # needs Python 3.11
                continue
            for name, here in names.items():
                source = source.replace(name, here)
            exec(compile(source, f"{page}:{block.map[0] + 2}", "exec"), namespace)
        elif block.info == "bash":
            for command in commands(block.content):
                if command.startswith(ELSEWHERE):
                    continue
                status = run_here([names.get(word, word) for word in smaller(command)])
                said = capsys.readouterr().err
                assert status in (0, None), f"{page}, line {block.map[0] + 1}: {command}\n{said[-3000:]}"


@pytest.mark.parametrize("page", LINKED)
def test_links_and_pictures_are_there(page):
    targets = re.findall(r"\]\(([^)#\s]+)", (REPOSITORY / page).read_text())
    missing = [t for t in targets if "://" not in t and not ((REPOSITORY / page).parent / Path(t)).exists()]
    assert not missing
