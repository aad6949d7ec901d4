"""The commands in benchmarks/, with tiny models: what they run and what they write, not the numbers."""

import importlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ablation, common, latency, left_out, robustness, training
from benchmarks import index as index_benchmark
from messages_native_retrieval import check_messages
from native_retrieval.arguments import parse

CONVERSATIONS = [
    [{"role": "user", "content": "Where is Arnwick Lighthouse?"}],
    [
        {"role": "user", "content": "Who founded Belford Museum?"},
        {"role": "assistant", "content": "Jonas Pike."},
        {"role": "user", "content": "And what is shown there?"},
    ],
]


@pytest.mark.parametrize("name", sorted(ablation.ROWS))
def test_every_row_of_an_ablation_is_a_recipe_of_its_own(name):
    rows = ablation.ROWS[name]()
    seen = {tuple(ablation.words_of(row)) for row in rows}
    assert len(seen) == len(rows) == len({row["name"] for row in rows}) >= 10
    for row in rows:
        parse(["benchmarks/configs/ablation.yaml", *ablation.words_of(row)])


@pytest.mark.parametrize("name", ["qrecc", "doc2dial", "topiocqa_lead"])
def test_what_is_left_out_is_trained_on_in_no_form(name):
    words, source = left_out.without("benchmarks/configs/best.yaml", name, [])
    _, data, _, _ = parse(words)
    assert source.endswith(name)
    for sources in (data.train_data, data.dev_data, data.plain_text):
        assert sources and not any(name.split("_")[0] in other for other in sources)
    assert len(data.train_weights) == len(data.train_data)


@pytest.mark.parametrize("name", list(robustness.VARIANTS))
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_variant_is_a_conversation_that_keeps_its_question(name, messages):
    changed = robustness.VARIANTS[name]([dict(m) for m in messages], CONVERSATIONS, random.Random(0))
    check_messages(changed)
    if name != "typos in the last turn":
        assert [m for m in changed if m["role"] == "user"][-1] == messages[-1]
    if name.startswith("at least"):
        assert sum(message["role"] == "user" for message in changed) == int(name.split()[2])
    if name != "as they are":
        assert changed != messages


# -- speed ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(
    make_taught_model, backbone_dir: Path, teacher_dir: Path, beir_data: Path, tmp_path_factory
) -> SimpleNamespace:
    """What `make bench` measures, tiny: paths of a model, its index, its backbone, its teacher and data."""
    from native_retrieval.checkpoints import write_local_paths
    from native_retrieval.data import load_corpus
    from native_retrieval.index import DocumentIndex

    folder = tmp_path_factory.mktemp("made")
    model, teacher = make_taught_model()
    model.save_pretrained(folder / "model")
    write_local_paths(folder / "model", teacher=str(teacher_dir))
    corpus = load_corpus(beir_data)
    DocumentIndex.build(corpus, teacher.documents(corpus), teacher.fingerprint, "tiny", folder / "index")
    paths = {"model": folder / "model", "index": folder / "index", "backbone": backbone_dir, "teacher": teacher_dir}
    return SimpleNamespace(**paths, data=beir_data, queries=beir_data / "queries.jsonl")


COMMANDS = {
    "latency": (("model", "index"), "--lengths 100 --rounds 2 --dtypes float32"),
    "turn": (("model", "index"), "--lengths 100 150 --rounds 1"),
    "throughput": (("model", "data"), "--conversations 20"),
    "training": (("backbone", "teacher", "data"), "--queries 8"),
    "index": (("index",), "--vectors 3000 --queries 5"),
    "load": (("model", "queries"), "--requests 400 --threads 2"),
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_benchmark_writes_its_result_and_the_command_that_made_it(name, made, tmp_path, monkeypatch):
    # Processes of their own, and sizes that a test has no time for.
    monkeypatch.setattr(latency, "peak_memory", lambda *arguments: {})
    monkeypatch.setattr(training, "memory_row", lambda backbone: training.row_of("steps", 1, 1.0))
    monkeypatch.setattr(training, "RANKED", 300)
    monkeypatch.setattr(index_benchmark, "KINDS", {"Flat": [""], "HNSW32,SQfp16": ["efSearch=128"]})
    paths, words = COMMANDS[name]
    words = [word for path in paths for word in (f"--{path}", str(getattr(made, path)))] + words.split()
    output = tmp_path / "results" / f"bench-{name}.json"
    monkeypatch.setattr("sys.argv", [f"benchmarks/{name}.py", *words, "--output", str(output)])
    threads = torch.get_num_threads()
    try:
        assert not importlib.import_module(f"benchmarks.{name}").main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads(output.read_text())
    assert result["rows"] and result["command"].startswith(f"python benchmarks/{name}.py --")
    if name not in ("throughput", "training"):
        assert (tmp_path / "results" / "figures" / f"bench-{name}.png").is_file()
    if name == "load":
        assert result["requests"] == 400 and result["wrong"] == 0


def test_robustness_measures_every_variant(made, tmp_path, monkeypatch):
    output = tmp_path / "results" / "robustness.json"
    words = ["--model", str(made.model), "--data", str(made.data), "--cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr("sys.argv", ["benchmarks/robustness.py", *words, "--output", str(output)])
    assert not robustness.main()
    result = json.loads(output.read_text())
    assert list(result["variants"]) == list(robustness.VARIANTS) and result["num_queries"] == 6
    assert result["variants"]["as they are"]["difference"] == [0.0, 0.0, 0.0]
    assert (output.parent / "figures" / "robustness.png").is_file()


def test_a_left_out_set_is_compared_query_by_query(made, tmp_path):
    ids = [f"q{conversation}_{turn}" for conversation in (6, 7) for turn in (1, 2, 3)]
    values = {"recall@10": 0.5, "mrr@10": 0.5, "ranks": [1, None, 2, 1, 1, 20]}
    own = {"query_ids": ids, "methods": {left_out.METHOD: values, left_out.BASELINE: values}}
    row = left_out.judge(str(made.model), str(made.data), own, str(tmp_path))
    difference, low, high = row["difference_mrr@10"]
    assert low <= difference <= high
    assert difference == pytest.approx(row["mrr@10"] - (1 + 0.5 + 1 + 1) / 6, abs=1e-3)


def test_an_ablation_goes_on_where_it_stopped_and_checks_every_row_first(tmp_path, monkeypatch):
    calls = []

    def train(words, folder):
        calls.append(words)
        if len(calls) == 4:
            raise ValueError("train.py has failed")
        dev = [{"eval_recall@10": 0.5, "eval_mrr@10": 0.25, "eval_ndcg@10": 0.3}]
        recipe = {"learning_rate": 1e-3, "num_train_epochs": 1, "seed": 0}
        Path(folder, "training.json").write_text(json.dumps({"dev": dev, "recipe": recipe}))

    monkeypatch.setattr(ablation, "train", train)
    output = tmp_path / "ablation.json"
    words = ["ablation.py", "losses", "benchmarks/configs/ablation.yaml", "--output", str(output)]
    monkeypatch.setattr("sys.argv", [*words, "--sede", "3"])
    assert ablation.main() == 2 and not calls
    monkeypatch.setattr("sys.argv", [*words, "--seed", "3"])
    assert ablation.main() == 2 and len(json.loads(output.read_text())["rows"]) == 3
    assert not ablation.main() and len(calls) == len(ablation.loss_rows()) + 1
    rows = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in rows] == [row["name"] for row in ablation.loss_rows()]
    assert (tmp_path / "figures" / "ablation.png").is_file()


@pytest.mark.parametrize("tokens", [90, 256, 2000])
def test_a_prompt_has_the_length_that_is_asked_for(make_taught_model, tokens: int):
    processor = make_taught_model()[0].processor
    processor.max_prompt_tokens = 4000
    prompt = common.prompt_of(processor, tokens)
    assert tokens - 20 < len(prompt) <= tokens
    assert common.QUESTION in processor.tokenizer.decode(prompt)


def test_a_length_that_no_conversation_has_is_refused(make_taught_model):
    with pytest.raises(ValueError, match="asked for 5; name a longer one"):
        common.prompt_of(make_taught_model()[0].processor, 5)
