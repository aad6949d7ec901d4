"""Results, tables and figures of made-up runs."""

import json
import re
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import REPOSITORY
from rich.console import Console

from native_retrieval.failures import worst_queries
from native_retrieval.figures import plot_by_turn, plot_map, plot_quality_latency, plot_training
from native_retrieval.methods import METHODS
from native_retrieval.results import (
    build_result,
    environment,
    fill_tables,
    main,
    markdown_table,
    print_table,
    write_json,
)

NUM_QUERIES = 24


def make_run(positions: list[int | None]) -> dict[str, dict[str, float]]:
    """A run in which query i finds its document at positions[i]; `None`: not at all."""
    run = {}
    for number, place in enumerate(positions):
        run[f"q{number}"] = {f"x{other:03d}": -float(other) for other in range(1, 41) if other != place}
        if place is not None:
            run[f"q{number}"][f"d{number}"] = -float(place)
    return run


def make_result(**positions: list[int | None]) -> dict:
    generator = np.random.default_rng(0)
    if not positions:
        positions = {name: generator.integers(1, 25, NUM_QUERIES).tolist() for name in reversed(METHODS)}
    num_queries = len(next(iter(positions.values())))
    return build_result(
        dataset="slice",
        split="test",
        query_ids=[f"q{number}" for number in range(num_queries)],
        turns=[1 + number % 10 for number in range(num_queries)],
        conversations=[f"c{number}" for number in range(num_queries)],
        num_documents=4000,
        command="python eval.py --data [slice]",
        runs={name: make_run(its) for name, its in positions.items()},
        qrels={f"q{number}": {f"d{number}": 1} for number in range(num_queries)},
        latencies={name: [1.0, 2.0, 30.0] for name in positions if name != "human-rewrite"},
    )


def test_numbers_follow_from_the_ranks():
    positions = {"generate-then-encode": [1, 11, None, 4], "native-context": [2, 10, 30, None]}
    result = make_result(**positions)
    ours, baseline = result["methods"]["native-context"], result["methods"]["generate-then-encode"]
    assert {name: values["ranks"] for name, values in result["methods"].items()} == positions
    assert ours["recall@10"] == 0.5
    assert ours["mrr@10"] == pytest.approx((1 / 2 + 1 / 10) / 4)
    assert ours["wins_ties_losses"] == {"wins": 1, "ties": 2, "losses": 1}
    difference, low, high = ours["delta"]["recall@10"]
    assert low <= difference == ours["recall@10"] - baseline["recall@10"] <= high
    assert baseline["delta"] == {name: [0.0, 0.0, 0.0] for name in ("recall@10", "mrr@10", "ndcg@10")}
    assert ours["latency_ms"] == {"p50": 2.0, "p95": pytest.approx(27.2)}
    assert result["turns"] == [1, 2, 3, 4]


def test_methods_stand_in_one_order_and_new_ones_last():
    result = make_result(mine=[1, 2], **{"native-context": [1, 2], "human-rewrite": [1, 1]})
    assert list(result["methods"]) == ["human-rewrite", "native-context", "mine"]
    assert list(make_result()["methods"]) == list(METHODS)


def test_without_baseline_there_is_no_comparison():
    result = make_result(**{"native-context": [1, 2]})
    assert result["methods"]["native-context"]["delta"] is None
    assert result["methods"]["native-context"]["wins_ties_losses"] is None
    assert "native-context" in markdown_table(result)


def test_turns_must_match():
    with pytest.raises(ValueError, match="1 turns for 2 queries"):
        build_result("d", "test", ["a", "b"], [1], ["c", "c"], 1, "", {}, {}, {})


def test_environment_names_no_machine():
    seen = json.dumps(environment())
    assert "/" not in seen.replace("sentence-transformers", "")
    assert set(environment()) >= {"python", "torch", "transformers", "sentence-transformers", "faiss", "cpu_count"}


def test_json_round_trip_with_lists_on_one_line(tmp_path: Path):
    result, path = make_result(), tmp_path / "results" / "slice.json"
    write_json(result, path)
    write_json(result, path)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == result
    assert len(re.findall(r'^ +"ranks": \[.*\],?$', text, flags=re.MULTILINE)) == len(METHODS)
    assert re.search(r'^  "query_ids": \["q0", .*\],$', text, flags=re.MULTILINE)
    assert [file.name for file in path.parent.iterdir()] == ["slice.json"]


def test_json_leaves_strings_alone_and_refuses_nan(tmp_path: Path):
    awkward = {"a": ["[\n 1,\n 2\n]", "x ]"], "b": [[1, 2], [3]], "c": [], "d": "[ 1 ]"}
    write_json(awkward, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == awkward
    with pytest.raises(ValueError, match="JSON"):
        write_json({"a": float("nan")}, tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("columns", ["100", "120"])
def test_printed_table_is_plain_and_whole(capsys: pytest.CaptureFixture[str], monkeypatch, columns: str):
    monkeypatch.setenv("COLUMNS", columns)
    result = make_result()
    print_table(result)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 120
    positions = [printed.index(f"\n {method} ") for method in METHODS]
    assert positions == sorted(positions)
    for values in result["methods"].values():
        assert f"{values['recall@10']:.3f}" in printed


def test_printed_table_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr("native_retrieval.results.Console", partial(Console, force_terminal=True, width=100))
    print_table(make_result())
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in printed
    assert "+question" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_markdown_table_bolds_the_best_deployable_value():
    result = make_result(
        **{
            "human-rewrite": [1, 1],
            "generate-then-encode": [1, 30],
            "native-generated": [3, 2],
            "native-context": [2, 2],
        }
    )
    lines = markdown_table(result).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    rows = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert "**" not in rows["human-rewrite"]
    assert rows["native-context"].count("| **1.000** |") == 1, "ties are bold in both rows"
    assert rows["native-generated"].count("| **1.000** |") == 1
    assert "| **0.500** |" in rows["generate-then-encode"], "its MRR is the best"
    assert rows["generate-then-encode"].count("| – ") == 3


def test_the_worst_queries_lose_most_and_come_first():
    result = make_result(**{"generate-then-encode": [1, 1, 5, 2, None], "native-context": [2, None, 5, 3, 1]})
    assert worst_queries(result, "native-context", 20) == [1, 0, 3]
    assert worst_queries(result, "native-context", 1) == [1]
    assert worst_queries(result, "native-context", 20, baseline="native-context") == []


@pytest.mark.parametrize("plot", [plot_by_turn, plot_quality_latency])
@pytest.mark.parametrize("one_method", [False, True])
def test_figures_are_pngs_and_leave_matplotlib_alone(tmp_path: Path, plot, one_method: bool):
    before = dict(matplotlib.rcParams)
    plot(make_result(**{"native-context": [1, 20]}) if one_method else make_result(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


def test_other_figures_are_pngs(tmp_path: Path):
    history = [{"epoch": epoch, "alignment_loss": 1 / epoch, "rank_loss": 0.5} for epoch in (1, 2, 3)]
    plot_training(history, tmp_path / "training.png")
    vectors = np.eye(5, dtype=np.float32)
    documents = {f"$doc {row} " + 40 * "x": (vectors[row], "#6E6E6E") for row in range(2, 5)}
    plot_map({"a": vectors[0], "b": vectors[1]}, documents).savefig(tmp_path / "map.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_page_takes_the_table_of_an_evaluation(tmp_path):
    result = make_result()
    result["command"] = "python eval.py --model outputs/mine --data '/home/alice/my data' --split test"
    write_json(result, tmp_path / "test.json")
    page = tmp_path / "README.md"
    page.write_text("# Results\n\n<!-- table: test.json -->\n<!-- end -->\n\nText.\n")
    for _ in range(2):
        assert main([str(page)]) == 0
        text = page.read_text()
        assert markdown_table(result).rstrip() in text and text.endswith("<!-- end -->\n\nText.\n")
        assert "`python eval.py --model outputs/mine --data 'my data' --split test`" in text


def test_a_damaged_result_is_named(tmp_path, capsys):
    (tmp_path / "test.json").write_text('{"methods": ')
    (tmp_path / "README.md").write_text("<!-- table: test.json -->\n<!-- end -->")
    assert main([str(tmp_path / "README.md")]) == 2
    assert "test.json is no JSON file" in capsys.readouterr().err


def test_a_page_takes_columns_and_rows_of_a_benchmark(tmp_path):
    rows = [
        {"way": "a|b".replace("|", "/"), "tokens": 64, "ms": 1234.5, "default": True},
        {"way": "b", "tokens": 256, "ms": None, "default": False},
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"command": "python bench.py", "rows": rows}))
    filled = fill_tables("<!-- rows: bench.json way ms default -->\nold\n<!-- end -->", tmp_path)
    assert filled.splitlines()[1:5] == [
        "| way | ms | default |",
        "|---|---:|---:|",
        "| a/b | 1,234.5 | yes |",
        "| b |  |  |",
    ]
    assert fill_tables(filled, tmp_path) == filled and "`python bench.py`" in filled
    some = fill_tables("<!-- rows: bench.json way tokens=64 -->\n<!-- end -->", tmp_path)
    assert "| a/b |" in some and "| b |" not in some
    assert (
        fill_tables("<!-- rows: none.json way -->x<!-- end -->", tmp_path)
        == "<!-- rows: none.json way -->x<!-- end -->"
    )


def test_the_page_of_results_is_filled_from_its_files():
    page = REPOSITORY / "results" / "README.md"
    text = page.read_text()
    assert text.count("<!-- table:") >= 5 and fill_tables(text, page.parent) == text, "run make readme"
