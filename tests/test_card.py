"""The model card and the push: complete, valid for the Hub, and silent about their author's disk."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from huggingface_hub import ModelCard

from native_retrieval import card as card_module
from native_retrieval.card import published_files, published_source, push_model, write_model_card


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


def add_training_info(folder, **values) -> None:
    path = folder / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "path",
    [
        "/home/alice/m",
        "/home/al ice/m",
        "../alice/m",
        "alice/x/m",
        "~/alice/m",
        "C:\\alice y\\m",
        "\\\\alice\\x\\m",
        ".alice/m:dev",
    ],
)
def test_no_command_on_the_card_has_a_local_folder(saved, tmp_path, path):
    words = [
        "train.py",
        "configs/demo.yaml",
        "--backbone",
        path,
        "--teacher",
        "some/one",
        f"--dev_data={path}",
        "logs:dev",
    ]
    add_training_info(saved, command=shlex.join(words))
    judged = result(tmp_path)
    content = json.loads(judged.read_text())
    judged.write_text(json.dumps({**content, "command": shlex.join(["python", "eval.py", "--model", path])}))
    card = write_model_card(saved, [judged]).read_text()
    name = "m:dev" if path.endswith(":dev") else "m"
    assert f"train.py configs/demo.yaml --backbone {name} --teacher some/one --dev_data={name} logs:dev" in card
    assert f"python eval.py --model {name}" in card
    assert "alice" not in card and "al ice" not in card


def test_the_card_has_the_license_that_was_given(saved):
    add_training_info(saved, license="gemma", data_license="CC BY-SA 4.0")
    card = write_model_card(saved).read_text()
    assert "license: gemma" in card and "CC BY-SA 4.0" in card


def test_a_path_of_another_disk_is_no_repository(saved):
    add_training_info(saved, backbone=".cache/elsewhere/a-backbone")
    card = ModelCard(write_model_card(saved).read_text())
    assert card.data.base_model is None and "a-backbone" in card.text and "elsewhere" not in card.text
    assert "https://huggingface.co/someone/teacher" in card.text


def test_card_without_results_shows_dev(saved):
    assert "0.500" in write_model_card(saved).read_text()


def test_card_needs_a_trained_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="training.json"):
        write_model_card(tmp_path)


@pytest.mark.parametrize("name", ["m", "a/m"])
def test_a_name_that_the_model_keeps_as_a_base_name_is_a_local_folder(name):
    assert published_source(name, "m") == "m"
    assert published_source(name, name) == name
    assert published_source("/x/alice/m", None) == "m"


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_snippets_of_the_card_run(saved, monkeypatch, capsys):
    """From the folder in the place of the repository, whose name they have."""
    monkeypatch.chdir(saved.parent)
    add_training_info(saved, repository="me/model")
    (saved.parent / "me").mkdir()
    (saved.parent / "me" / "model").symlink_to(saved)
    blocks = python_blocks(write_model_card(saved).read_text())
    assert len(blocks) == 4
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["vector"].shape == (1, 32)
    assert namespace["answer"].shape[1] > namespace["prompt"].shape[1]


def test_the_snippets_pin_the_commit(saved):
    add_training_info(saved, repository="me/model", revision="0123abc")
    (load, *_) = python_blocks(write_model_card(saved).read_text())
    assert 'repo, revision = "me/model", "0123abc"' in load
    assert "revision=revision, code_revision=revision, trust_remote_code=True" in load


def test_a_push_sends_the_model_and_nothing_else(saved):
    write_model_card(saved)
    model = set(published_files(saved))
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "modeling_native_retrieval.py"} <= model
    assert {"processing_native_retrieval.py", "backbone/config.json", "backbone/model.safetensors"} <= model
    private = [
        "runs/events.out",
        "wandb/run.json",
        "checkpoint-5/model.safetensors",
        "checkpoint-5/README.md",
        "optimizer.pt",
    ]
    private += [
        "training_args.bin",
        "_local.json",
        "backbone/_local.json",
        "logs-test.json",
        "page.md",
        "trainer_state.json",
    ]
    private += [
        ".hidden",
        "figures/notes.txt",
        "global_step5/x.safetensors",
        "_saving/model.safetensors",
        "queries.jsonl",
    ]
    for name in private:
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_text("private")
    (saved / "figures" / "training.png").write_bytes(b"png")
    assert set(published_files(saved)) == model | {"figures/training.png"}


@pytest.mark.parametrize("name", ["my-backbone", "/home/alice/my-backbone", "models/alice/x"])
def test_a_model_that_nobody_else_could_load_is_not_pushed(saved, monkeypatch, name):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "store_backbone": False, "backbone_name_or_path": name}))
    monkeypatch.setattr(card_module.HfApi, "create_repo", lambda *_, **__: pytest.fail("a repository was made"))
    with pytest.raises(ValueError, match="store_backbone"):
        push_model(saved, "me/model")


INSTALLED = """
import sys
from native_retrieval.card import write_model_card
print(write_model_card(sys.argv[1]).read_text())
"""


def test_the_card_can_be_written_by_an_installed_package(saved, tmp_path):
    """As a wheel lays it out: the package, the flat modules and the template beside each other."""
    site = tmp_path / "site"
    shutil.copytree(
        REPOSITORY / "native_retrieval", site / "native_retrieval", ignore=shutil.ignore_patterns("__pycache__")
    )
    for module in REPOSITORY.glob("*_native_retrieval.py"):
        shutil.copy(module, site)
    shutil.copy(REPOSITORY / "model_card.md", site)
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED, str(saved)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "# model" in done.stdout
    assert Path(REPOSITORY, "native_retrieval", "py.typed").is_file()


def test_saving_over_a_trained_folder_removes_the_checksums_of_the_weights_before(saved):
    import torch

    from native_retrieval.cache import seal, sha256
    from native_retrieval.loading import load_model

    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps({**config, "teacher_name_or_path": "someone/teacher", "teacher_fingerprint": "0" * 64})
    )
    for weights in (saved / "model.safetensors", saved / "backbone" / "model.safetensors"):
        seal(weights, sha256(weights))
    model = load_model(saved)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.save_pretrained(saved)
    assert torch.equal(load_model(saved).embed_query("Who?"), model.embed_query("Who?"))

    for weights in (saved / "model.safetensors", saved / "backbone" / "model.safetensors"):
        seal(weights, sha256(weights))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="not as it was saved"):
            load_model(saved)
        content[-1] ^= 1
        weights.write_bytes(content)


@pytest.mark.parametrize("store", [True, False])
def test_no_published_file_holds_a_local_path(backbone_dir, teacher_dir, saved, tmp_path, store):
    from native_retrieval.initialise import from_backbone
    from native_retrieval.teacher import Teacher

    model = from_backbone(
        str(backbone_dir),
        Teacher(str(teacher_dir)),
        teacher_name_or_path=str(teacher_dir),
        store_backbone=store,
        head_dim=32,
        head_num_attention_heads=4,
    )
    shutil.copy(saved / "training.json", tmp_path)
    shutil.rmtree(saved)
    model.save_pretrained(saved)
    shutil.copy(tmp_path / "training.json", saved)
    add_training_info(
        saved, backbone=str(backbone_dir), teacher=str(teacher_dir), command=f"train.py --x {backbone_dir}"
    )
    write_model_card(saved)
    folders = {str(backbone_dir.parent).encode(), str(teacher_dir.parent).encode(), str(tmp_path).encode()}
    for name in published_files(saved):
        content = (saved / name).read_bytes()
        assert not [folder for folder in folders if folder in content], name
    assert backbone_dir.name in (saved / "README.md").read_text()


def test_a_missing_or_damaged_result_leaves_the_folder_as_it_was(saved, tmp_path):
    before = sorted(saved.rglob("*"))
    (tmp_path / "damaged.json").write_text("{")
    for name in ("nowhere.json", "damaged.json"):
        with pytest.raises((ValueError, OSError), match=name):
            write_model_card(saved, [tmp_path / name])
        assert sorted(saved.rglob("*")) == before
