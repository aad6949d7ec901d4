"""The model card: complete, valid for the Hub, and silent about its author's disk."""

import json

import pytest
from huggingface_hub import ModelCard

from native_retrieval.card import write_model_card


@pytest.fixture
def saved(tiny_model, tmp_path):
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    training_info = {
        "backbone": str(tmp_path),
        "teacher": "someone/teacher",
        "train_data": {"logs": 12},
        "plain_texts": 3,
        "query_modes": ["context"],
        "command": "train.py recipe.yaml",
        "recipe": {"learning_rate": 1e-3},
        "dev": [{"eval_recall@10": 0.5}],
    }
    (folder / "training.json").write_text(json.dumps(training_info))
    return folder


def result(folder):
    method = {"recall@10": 0.5, "mrr@10": 0.25, "ndcg@10": 0.3, "latency_ms": None, "delta": None, "ranks": [1, None]}
    content = {
        "dataset": "logs",
        "split": "test",
        "num_queries": 2,
        "num_documents": 5,
        "command": "eval.py ...",
        "baseline": "generate-then-encode",
        "methods": {"native-context": {**method, "wins_ties_losses": None}},
    }
    path = folder / "logs-test.json"
    path.write_text(json.dumps(content))
    return path


def test_card_holds_results_and_is_valid_metadata(saved, tmp_path):
    card = ModelCard(write_model_card(saved, [result(tmp_path)]).read_text())
    assert card.data.eval_results[0].metric_value == 0.5
    assert card.data.library_name == "transformers"
    assert "0.500" in card.text and "logs" in card.text and "{{" not in card.text
    assert str(tmp_path) not in str(card)


def test_card_has_the_figures_of_its_results_alone(saved, tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("logs-test-by-turn", "logs-test-2-by-turn", "logs-test-failures"):
        (tmp_path / "figures" / f"{name}.png").write_bytes(b"png")
    card = write_model_card(saved, [result(tmp_path)]).read_text()
    assert "figures/logs-test-by-turn.png" in card and "figures/logs-test-failures.png" in card
    assert "logs-test-2" not in card and not (saved / "figures" / "logs-test-2-by-turn.png").exists()


def test_card_of_a_result_in_the_models_own_folder(saved):
    (saved / "figures").mkdir()
    (saved / "figures" / "logs-test-by-turn.png").write_bytes(b"png")
    assert "figures/logs-test-by-turn.png" in write_model_card(saved, [result(saved)]).read_text()
    assert (saved / "figures" / "logs-test-by-turn.png").read_bytes() == b"png"


def test_the_card_tells_commands_without_folders_and_the_licence_that_was_given(saved, tmp_path):
    training_info = json.loads((saved / "training.json").read_text())
    training_info |= {
        "license": "gemma",
        "command": "train.py r.yaml --train_data /home/ann/logs:dev ../shared/x --dev_data=/home/ann/d",
    }
    (saved / "training.json").write_text(json.dumps(training_info))
    card = write_model_card(saved).read_text()
    assert "train.py r.yaml --train_data logs:dev ../shared/x --dev_data=d" in card and "ann" not in card
    assert "license: gemma" in card


def test_a_path_of_another_disk_is_no_repository(saved):
    training_info = json.loads((saved / "training.json").read_text())
    (saved / "training.json").write_text(json.dumps({**training_info, "backbone": ".cache/elsewhere/a-backbone"}))
    card = ModelCard(write_model_card(saved).read_text())
    assert card.data.base_model is None and "a-backbone" in card.text and "elsewhere" not in card.text
    assert "https://huggingface.co/someone/teacher" in card.text


def test_card_without_results_shows_dev(saved):
    assert "0.500" in write_model_card(saved).read_text()


def test_card_needs_a_trained_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="training.json"):
        write_model_card(tmp_path)
