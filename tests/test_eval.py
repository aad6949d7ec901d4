"""`eval.py` end to end on a tiny model, and what it says to bad input."""

import json
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, StubTeacher, write_beir_folder

from native_retrieval.data import load_corpus
from native_retrieval.index import DocumentIndex
from native_retrieval.methods import METHODS

MEASURES = ("recall@10", "mrr@10", "ndcg@10")
SCRIPT = runpy.run_path(str(REPOSITORY / "eval.py"), run_name="eval.py")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, make_model) -> Path:
    model = make_model(teacher_name_or_path="stub-teacher", teacher_fingerprint=StubTeacher().fingerprint)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, tiny_tokenizer, model_dir) -> None:
    """A working directory with `data` and `model` in it, and the stub wherever a teacher is loaded."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("native_retrieval.teacher.Teacher", lambda *args, **kwargs: StubTeacher(tiny_tokenizer))
    monkeypatch.chdir(tmp_path)
    write_beir_folder(tmp_path / "data")
    (tmp_path / "model").symlink_to(model_dir)


def run(arguments: str) -> int:
    return SCRIPT["main"](shlex.split(arguments))


def edit_json(path: str, **changes) -> None:
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**content, **changes}))


def copy_model(model_dir: Path, name: str) -> Path:
    return Path(shutil.copytree(model_dir, name))


def test_end_to_end(capsys):
    arguments = "--model model --data data --output results/test.json --latency_queries 2 --figures figures --report page.md --save_queries"
    assert run(arguments) == 0
    result = json.loads(Path("results/test.json").read_text())
    assert result["command"] == f"python eval.py {arguments}"
    assert (result["dataset"], result["split"], result["num_queries"], result["num_documents"]) == (
        "data",
        "test",
        6,
        30,
    )
    assert list(result["methods"]) == list(METHODS)
    for values in result["methods"].values():
        assert all(0 <= values[name] <= 1 and len(values["delta"][name]) == 3 for name in MEASURES)
        assert len(values["ranks"]) == 6
        assert values["latency_ms"]["p50"] > 0
    assert len(result["methods"]["generate-then-encode"]["queries"]) == 6
    assert result["methods"]["human-rewrite"]["recall@10"] == 1.0
    assert result["environment"]["dtype"] == "float32"
    figures = ["test-by-turn.png", "test-failures.png", "test-quality-latency.png"]
    assert sorted(path.name for path in Path("figures").iterdir()) == figures
    page = Path("page.md").read_text()
    assert "Where native-" in page and "(figures/test-failures.png)" in page
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)
    assert "index search, the same for all vectors, is left out" in printed


def test_a_page_that_cannot_be_written_costs_no_result(monkeypatch, capsys):
    def full(*arguments, **settings):
        raise OSError("No space left on device")

    monkeypatch.setattr("native_retrieval.failures.write_failure_report", full)
    arguments = "--model model --data data --output results/test.json --latency_queries 0 --report page.md"
    assert run(f"{arguments} --methods generate-then-encode native-context") == 2
    assert "No space left" in capsys.readouterr().err
    assert json.loads(Path("results/test.json").read_text())["num_queries"] == 6


def test_the_built_index_is_used_again_and_a_damaged_one_built_again(monkeypatch, capsys):
    arguments = "--model model --data data --output a.json --methods native-context --latency_queries 0"
    assert run(arguments) == 0
    build = DocumentIndex.build
    monkeypatch.setattr(DocumentIndex, "build", pytest.fail)
    assert run(arguments) == 0
    result = json.loads(Path("a.json").read_text())
    assert result["methods"]["native-context"]["latency_ms"] is None
    assert "queries" not in result["methods"]["native-context"]

    monkeypatch.setattr(DocumentIndex, "build", build)
    file = next(Path(".cache/native_retrieval").glob("index-*/index.faiss"))
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert run(arguments) == 0
    assert "damaged" in capsys.readouterr().err
    assert file.read_bytes() == whole


def test_an_index_of_ones_own(stub_teacher, monkeypatch):
    corpus = load_corpus("data")
    DocumentIndex.build(corpus, stub_teacher.documents(corpus), stub_teacher.fingerprint, "stub-teacher", "index")
    monkeypatch.setattr(DocumentIndex, "build", pytest.fail)
    methods = "--methods last-question native-context --latency-queries 0"
    assert run(f"--model model --data data --index index --output a.json {methods}") == 0


def test_human_rewrite_is_left_out_unless_all_queries_have_one(capsys):
    path = Path("data/queries.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    next(row for row in rows if row["_id"] == "q6_2").pop("rewrite")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = "--model model --data data --output a.json --latency_queries 0 --methods human-rewrite"
    assert run(f"{arguments} last-question") == 0
    assert "human-rewrite is left out: 1 of the 6 queries" in capsys.readouterr().err
    assert list(json.loads(Path("a.json").read_text())["methods"]) == ["last-question"]
    assert run(arguments) == 2
    assert "no other method" in capsys.readouterr().err


def test_selected_words_are_left_out_for_a_head_that_selects_none(capsys, make_model):
    fields = {"teacher_name_or_path": "stub-teacher", "teacher_fingerprint": StubTeacher().fingerprint}
    make_model(word_vocab_size=None, **fields).save_pretrained("wordless")
    arguments = "--model wordless --data data --output a.json --latency_queries 0 --methods"
    assert run(f"{arguments} hybrid selected-words bm25-selected-words native-context") == 0
    assert list(json.loads(Path("a.json").read_text())["methods"]) == ["native-context"]
    said = capsys.readouterr().err
    for name in ("hybrid", "selected-words", "bm25-selected-words"):
        assert f"\n{name} is left out: the model selects no words\n" in f"\n{said}"
    assert run(f"{arguments} hybrid") == 2
    assert "no other method" in capsys.readouterr().err


GOOD = "--model model --data data --output out.json --latency_queries 0"


def fails(capsys, arguments: str, *words: str) -> None:
    """Exit code 2, one line on stderr with these words in it, and nothing written."""
    capsys.readouterr()
    assert run(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    # Progress bars of transformers and datasets go to stderr too, and are not what is meant here.
    said = [line for line in lines if line.startswith("eval.py: ")]
    assert said == lines[-1:], lines
    assert not any("Traceback" in line for line in lines)
    for word in words:
        assert word in said[0]
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--modle model --data data --output out.json", ["--modle", "did you mean --model?"]),
        (f"{GOOD} --batchsize 3", ["--batchsize", "--batch_size"]),
        (f"{GOOD} --sp dev", ["unknown flag --sp"]),
        (f"{GOOD} stray", ["'stray'"]),
        ("--model model --data data", ["required", "--output"]),
        (f"{GOOD} --batch_size many", ["--batch_size", "'many'"]),
        (f"{GOOD} --batch_size 0", ["--batch_size is 0"]),
        (f"{GOOD} --latency_queries -1", ["--latency_queries is -1"]),
        (f"{GOOD} --methods native-contxt", ["native-contxt", "did you mean native-context?"]),
        (f"{GOOD} --methods native-context --save_queries", ["--save_queries", "generate-then-encode"]),
        ("--model model --data data --output out.txt", ["'out.txt'", ".json"]),
        ("--model model --data data --output data/corpus.jsonl/out.json", ["--output", "is a file"]),
        (f"{GOOD} --figures data/corpus.jsonl", ["--figures", "is a file"]),
        (f"{GOOD} --report page.md --methods native-context", ["--report", "generate-then-encode"]),
        (f"{GOOD} --report data", ["--report: data is a directory", "data/failures.md"]),
        (GOOD.replace("model model", "model modle"), ["model modle is no folder", "no Hub id"]),
        (GOOD.replace("model model", "model ./modle"), ["./modle", "no Hub id"]),
        (GOOD.replace("model model", "model data/modle"), ["data/modle", "no Hub id"]),
        (GOOD.replace("model model", "model 'C:\\my models\\m'"), ["no Hub id"]),
    ],
)
def test_bad_arguments_are_named_before_anything_is_loaded(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("native_retrieval.data.load_task", pytest.fail)
    fails(capsys, arguments, *words)


def test_bad_data(capsys):
    fails(capsys, GOOD.replace("data data", "data nowhere"), "nowhere", "no such folder")
    fails(capsys, f"{GOOD} --split tset", "tset")
    with Path("data/qrels/test.tsv").open("a") as file:
        file.write("q6_1\tnothing\t1\n")
    fails(capsys, GOOD, "qrels/test.tsv:8", "'nothing'")
    Path("data/qrels/one.tsv").write_text("query-id\tcorpus-id\tscore\nq0_1\td0_1\t1\n")
    fails(capsys, f"{GOOD} --split one", "'one'", "1 queries")


def test_bad_model(capsys, model_dir, make_backbone):
    fails(capsys, GOOD.replace("model model", "model nowhere"), "nowhere")
    Path("empty").mkdir()
    fails(capsys, GOOD.replace("model model", "model empty"), "empty")
    make_backbone("llama").save_pretrained("backbone")
    fails(capsys, GOOD.replace("model model", "model backbone"), "'llama'", "native_retrieval")
    Path("backbone/config.json").unlink()
    fails(capsys, GOOD.replace("model model", "model backbone"), "type None", "native_retrieval")

    damaged = copy_model(model_dir, "damaged")
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    fails(capsys, GOOD.replace("model model", "model damaged"), "damaged")
    (damaged / "model.safetensors").unlink()
    fails(capsys, GOOD.replace("model model", "model damaged"), "damaged")
    (damaged / "model.safetensors").write_bytes(weights)
    (damaged / "tokenizer.json").write_text((damaged / "tokenizer.json").read_text()[:1000])
    fails(capsys, GOOD.replace("model model", "model damaged"), "damaged")

    untaught = copy_model(model_dir, "untaught")
    edit_json("untaught/config.json", teacher_fingerprint=None)
    fails(capsys, GOOD.replace("model model", f"model {untaught}"), "teacher_fingerprint")
    edit_json("untaught/config.json", teacher_fingerprint="0" * 64, teacher_name_or_path="another")
    fails(capsys, GOOD.replace("model model", f"model {untaught}"), "'another'", "--teacher")


def test_bad_index(capsys, stub_teacher):
    fails(capsys, f"{GOOD} --index nowhere", "nowhere", "index.json")
    corpus = load_corpus("data")
    vectors = stub_teacher.documents(corpus)
    DocumentIndex.build(corpus, vectors, "0" * 64, "another", "theirs")
    fails(capsys, f"{GOOD} --index theirs", "'another'", "'stub-teacher'")
    half = corpus.select(range(15))
    DocumentIndex.build(half, vectors[:15], stub_teacher.fingerprint, "stub-teacher", "half")
    fails(capsys, f"{GOOD} --index half", "6 of the 6 documents", "'d6_1'")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="--batch_size"):
        run(f"{GOOD} --batch_size 0 --debug")


def test_help_teaches_without_loading_torch():
    code = (
        "import runpy, sys\nsys.argv = ['eval.py', '--help']\n"
        "try:\n    runpy.run_path('eval.py', run_name='__main__')\n"
        "finally:\n    print('heavy:', {'torch', 'faiss', 'datasets', 'sentence_transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "heavy: set()" in done.stdout
    for argument in ("--model outputs/qrecc \\", *METHODS, "--cache_dir", "(default:"):
        assert argument in done.stdout
