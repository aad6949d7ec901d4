"""Unseen sets, the parts of a head, and the map of heads: the commands, with a tiny model."""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_here, write_beir_folder

from benchmarks import leave_one_out, zero_shot
from native_retrieval.data import load_corpus, load_queries
from native_retrieval.heads import Maps, calibrate_all, describe
from native_retrieval.methods import METHODS

HEADS = [[1, 0], [2, 3]]


@pytest.fixture(scope="module")
def world(make_taught_model, teacher_dir: Path, tmp_path_factory) -> SimpleNamespace:
    """A model that reads words, and a folder with all the sets."""
    from native_retrieval.checkpoints import write_local_paths

    folder = tmp_path_factory.mktemp("zero-shot")
    model, _ = make_taught_model(selection_heads=HEADS, encoder_dim=32, encoder_code_dim=16, encoder_num_layers=1)
    with torch.no_grad():
        model.query_head.projection.linear_out.weight.normal_()  # as after training
        model.query_head.selection.score.weight[0, :4] = torch.tensor([0.1, 0.1, 0.5, 0.2])
    model.save_pretrained(folder / "model")
    write_local_paths(folder / "model", teacher=str(teacher_dir))
    for source in (*zero_shot.SETS.values(), "known"):
        if not (folder / "data" / source).exists():
            write_beir_folder(folder / "data" / source)
    return SimpleNamespace(model=model, folder=folder, data=folder / "data")


@pytest.fixture
def words(world, tmp_path) -> list[str]:
    return ["--model", str(world.folder / "model"), "--data", str(world.data), "--cache_dir", str(tmp_path / "cache")]


def test_unseen_sets_are_evaluated_once_and_compared(world, words, tmp_path, capsys):
    output = tmp_path / "results" / "zero-shot"
    words = ["benchmarks/zero_shot.py", *words, "--output", str(output), "--methods"]
    words += ["native-context", "selected-words", "last-question", "teacher-mean", "bm25-full-history", "human-rewrite"]
    assert not run_here([*words, "--sets", "cast21", "cast21+leads"])
    first = (output / "cast21.json").read_text()
    assert not run_here([*words, "--sets", "cast21", "toolink"])
    assert (output / "cast21.json").read_text() == first

    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["sets"]) == ["cast21", "cast21+leads", "toolink"] and summary["counted"] == [
        "cast21",
        "toolink",
    ]
    *rows, mean, _, _, least = summary["rows"]
    assert [row["set"] for row in rows] == ["cast21"] * 2 + ["cast21+leads"] * 2 + ["toolink"] * 2
    for row in rows:
        own, measure = summary["sets"][row["set"]], row["measure"]
        rivals = {name: own[name][measure] for name in own if name in zero_shot.RIVALS}
        assert row["best_value"] == rivals[row["best"]] == max(rivals.values())
        assert row["native-context"] == own["native-context"][measure] and "hybrid" not in row
        assert row["ratio_native-context"] == pytest.approx(row["native-context"] / row["best_value"], abs=1e-3)
        difference, low, high = row["difference"]
        assert low <= difference <= high
        assert difference == pytest.approx(row["native-context"] - row["best_value"], abs=2e-4)
    ratios = [row["ratio_native-context"] for row in (rows[0], rows[4])]
    assert (mean["set"], least["set"]) == ("mean of 2", "least of 2")
    assert mean["ratio_native-context"] == pytest.approx(sum(ratios) / 2, abs=1e-4)
    assert "mean of 2" in capsys.readouterr().out
    sizes = [json.loads((output / f"{name}.json").read_text())["num_documents"] for name in ("cast21", "cast21+leads")]
    assert sizes == [30, 60]


def test_all_methods_are_compared_by_default(words, tmp_path, capsys):
    assert not run_here(["benchmarks/zero_shot.py", *words, "--sets", "apibank", "--output", str(tmp_path)])
    result, summary = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("apibank", "summary"))
    assert set(summary["sets"]["apibank"]) == set(METHODS)
    assert result["dataset"] == "apibank" and set(result["methods"]) == set(METHODS)
    assert all(f"ratio_{name}" in row for name in zero_shot.OURS for row in summary["rows"])
    assert "hybrid" in capsys.readouterr().out


def test_distractors_do_not_take_the_place_of_documents(world, tmp_path):
    source, others = world.data / "zero_shot" / "cast21", world.data / "topiocqa_lead"
    folder = zero_shot.with_distractors(source, others, tmp_path / "both")
    corpus = load_corpus(folder)
    assert corpus["_id"][:30] == load_corpus(source)["_id"][:] and len(set(corpus["_id"])) == 60
    assert load_queries(folder, "test")["gold"] == load_queries(source, "test")["gold"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--sets cast22", "did you mean cast21"),
        ("--methods native-kontext", "did you mean native-context"),
        ("--methods native-context human-rewrite", "nothing to compare with"),
    ],
)
def test_a_bad_name_is_one_line(words, wanted, capsys):
    assert run_here(["benchmarks/zero_shot.py", *["--model", "m", "--data", "d", "--output", "o"], *words.split()]) == 2
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1


def test_each_part_of_a_head_is_switched_off_by_itself(world, words, tmp_path, capsys):
    output = tmp_path / "leave-one-out.json"
    words = [*words, "--sets", "cast21", "--dev", "known:dev", "--output", str(output)]
    assert not run_here(["benchmarks/leave_one_out.py", *words])
    result = json.loads(output.read_text())
    rows = [*leave_one_out.ROWS, leave_one_out.NO_PROJECTION]
    assert [row["row"] for row in result["rows"]] == rows and result["one_head"] == "2.3"
    assert [row["set"] for row in result["sets"]] == ["cast21"] * len(rows) + ["known:dev"] * len(rows)
    base = result["rows"][0]
    assert base["unseen"] == base["dev"] == 0
    for row in result["rows"]:
        for name, kind in (("cast21", "unseen"), ("known:dev", "dev")):
            assert row[name] - base[name] == pytest.approx(row[kind], abs=2e-4)
    assert "recency instead of attention" in capsys.readouterr().out


def test_what_is_switched_off_leaves_the_head_as_it_was(world):
    head, model = world.model.query_head, world.model
    before = {name: value.clone() for name, value in head.state_dict().items()}
    heads = leave_one_out.variants(head)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())

    rows = load_queries(world.data / "known", "test")["messages"]
    cache = model.prefill(*model.processor.pad([model.processor.encode(messages) for messages in rows]))
    tokens = model.processor.read_words(cache.input_ids, cache.attention_mask)
    with torch.no_grad():
        vectors = {name: its(cache.hidden_states, cache.attention_mask, tokens)[0] for name, its in heads.items()}
    wanted = model.embed_prefilled(cache).query_embeddings
    torch.testing.assert_close(vectors.pop("as it is"), wanted)
    assert not any(torch.allclose(its, wanted) for name, its in vectors.items() if "head instead" not in name)

    scores = heads["recency instead of attention"].selection(cache.hidden_states, cache.attention_mask, tokens)
    for row in range(len(scores)):
        groups = scores[row].isfinite().nonzero().flatten().tolist()
        last = [int(tokens.positions[row][tokens.groups[row] == group].max()) for group in groups]
        assert scores[row, groups].tolist() == last


# -- the map of heads ---------------------------------------------------------------------------------------------------


def test_heads_are_chosen_on_rewrites_and_drawn(world, backbone_dir, tmp_path, capsys):
    shutil.copytree(world.data / "known", tmp_path / "other")
    output, figure = tmp_path / "out" / "heads.json", tmp_path / "out" / "heads.png"
    words = ["--backbone", str(backbone_dir), "--data", str(world.data / "known"), f"{tmp_path / 'other'}:dev"]
    assert not run_here(["-m", "native_retrieval.heads", *words, "--output", str(output), "--figure", str(figure)])
    result = json.loads(output.read_text())
    assert list(result["turns"]) == ["known", "other"] and result["layers"] == [1, 2, 3]
    # Turns whose rewrite takes a word from before: the second and third of 4 and 2 conversations.
    assert result["turns"] == {"known": 8, "other": 4}
    assert len(result["selection_heads"]) == 8 and figure.stat().st_size > 10_000
    for row in result["rows"]:
        layer, head = map(int, row["head"].split("."))
        for name in ("known", "other"):
            asker = result["average_precision"][name][row["asker"]]
            assert row[name] == asker[result["layers"].index(layer)][head] and 0 < row[name] <= 1
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert printed == "selection_heads: " + json.dumps(result["selection_heads"])


def test_the_map_agrees_with_the_heads_one_by_one(world):
    maps = Maps(world.model.backbone)
    rewrites = [("known", load_queries(world.data / "known", "train"))]
    parts = calibrate_all(world.model.backbone, world.model.processor, maps, maps.heads, rewrites)
    shown = describe(parts, maps.heads)["average_precision"]["known"]
    alone = calibrate_all(world.model.backbone, world.model.processor, maps, [[2, 3]], rewrites)[0].precisions(1)
    assert [shown["question"][1][3], shown["last tokens"][1][3]] == pytest.approx(alone, abs=1e-4)


def test_data_without_rewrites_chooses_no_heads(world, backbone_dir, tmp_path, capsys):
    folder = tmp_path / "plain"
    folder.mkdir()
    rows = [json.loads(line) for line in (world.data / "known" / "queries.jsonl").read_text().splitlines()]
    with gzip.open(folder / "queries.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row | {"rewrite": ""}) + "\n" for row in rows)
    words = ["--backbone", str(backbone_dir), "--data", str(folder), "--output", str(tmp_path / "heads.json")]
    assert run_here(["-m", "native_retrieval.heads", *words]) == 2
    assert "give data sets with human rewrites" in capsys.readouterr().err
