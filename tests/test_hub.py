"""The Hub: pushed by the real client to a server on the loopback, and loaded back in a fresh process."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PLACES, REPOSITORY
from hub_server import Hub, serve

TOKEN = "hf_secret0123456789"
REPO = "me/tiny"


def environment(hub: Hub, home: Path) -> dict[str, str]:
    offline = ("HF_HUB_OFFLINE", "HF_TOKEN", "PYTHONPATH")
    return {
        **{name: value for name, value in os.environ.items() if name not in offline},
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(words: list, hub: Hub, home: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env=environment(hub, home) | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbone_dir, teacher_dir, beir_data):
    """train.py with --push_to_hub, on a Hub whose connection breaks in the middle of the first upload."""
    folder = tmp_path_factory.mktemp("hub")
    broken = []

    def drop(method: str, path: str) -> bool:
        if method == "PUT" and not broken:
            broken.append(path)
            return True
        return False

    with serve(Hub(drop)) as hub:
        words = ["train.py", "--backbone", backbone_dir, "--teacher", teacher_dir, "--train_data", beir_data]
        words += ["--dev_data", beir_data, "--plain_text", beir_data, "--output_dir", folder / "out", "--use_cpu"]
        words += ["--cache_dir", folder / "cache", "--head_dim", "32", "--encoder_dim", "32", "--disable_tqdm", "1"]
        words += [
            "--max_prompt_tokens",
            "256",
            "--num_train_epochs",
            "1",
            "--lexical_epochs",
            "1",
            "--logging_steps",
            "1",
            "--debug_errors",
        ]
        words += ["--report_to", "trackio", "--project", "tiny"]
        (folder / "out" / "runs").mkdir(parents=True)
        (folder / "out" / "runs" / "events").write_text("what a logger has written")
        words += ["--push_to_hub", "--hub_model_id", REPO, "--hub_token", TOKEN]
        process = run(words, hub, folder / "home", TRACKIO_DIR=str(folder / "trackio"))
        assert process.returncode == 0, process.stderr
        assert broken, "nothing was uploaded"
        yield hub, folder, process


def test_everything_is_pushed_and_the_card_pins_it(trained):
    hub, folder, process = trained
    pinned, files = hub.commits[REPO][1][0], hub.files(REPO)[1]
    modules = {f"{name}_native_retrieval.py" for name in ("configuration", "processing", "head", "modeling")}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "figures/training.png"} | modules <= set(
        files
    )
    assert {"backbone/config.json", "backbone/model.safetensors", "backbone/generation_config.json"} <= set(files)
    private = (".bin", "training.json", "_local.json", ".lock")
    assert not [name for name in files if name.endswith(private) or name.startswith(("checkpoint-", "runs/", "logs/"))]
    card = files["README.md"].decode()
    assert f'"{pinned}"' in card and "code_revision=revision" in card
    assert hub.metadata_problems == []
    assert "Pushed: " in process.stdout
    model = files["model.safetensors"]
    assert len(model) == (folder / "out" / "model.safetensors").stat().st_size
    assert b"backbone." not in model[:100_000], "the backbone was pushed twice"


def test_the_card_has_results_that_the_hub_draws(trained):
    from huggingface_hub import ModelCard

    card = ModelCard(trained[0].files(REPO)[1]["README.md"].decode())
    assert {entry.metric_type for entry in card.data.eval_results} == {"recall@10", "mrr@10", "ndcg@10"}
    assert {entry.dataset_split for entry in card.data.eval_results} == {"dev"}


def test_trackio_has_loss_parts_dev_metrics_and_throughput(trained):
    logged = sqlite3.connect(trained[1] / "trackio" / "tiny.db").execute("select metrics from metrics").fetchall()
    names = {name for (row,) in logged for name in json.loads(row)}
    wanted = {"train/alignment_loss", "train/rank_loss", "train/queries_per_second", "eval/recall@10", "eval/mrr@10"}
    assert wanted <= names


def test_the_token_is_sent_and_written_nowhere(trained):
    hub, folder, process = trained
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in process.stdout + process.stderr
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert written and not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not [name for name, content in hub.files(REPO)[1].items() if TOKEN.encode() in content]


def test_what_was_said_is_in_no_log_card_or_name(trained):
    """Nor the documents: of the training data, only vectors leave the caches."""
    hub, folder, process = trained
    private = [word for place, founder, *_ in PLACES for word in (place, founder)]
    assert not [word for word in private if word in process.stdout + process.stderr]
    kept = [path for part in ("out", "trackio") for path in (folder / part).rglob("*") if path.is_file()]
    contents = [*hub.files(REPO)[1].items(), *((str(path), path.read_bytes()) for path in kept)]
    assert len(contents) > 20
    assert not [(name, word) for name, content in contents for word in private if word.encode() in content]
    names = [*hub.files(REPO)[1], *(str(path.relative_to(folder)) for path in folder.rglob("*"))]
    assert not [name for name in names if any(word.split()[0].lower() in name.lower() for word in private)]


LOAD = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
repo, revision = sys.argv[1:]
pins = {"revision": revision, "code_revision": revision, "trust_remote_code": True}
model = AutoModel.from_pretrained(repo, **pins)
question = [{"role": "user", "content": "When was Arnwick Lighthouse founded?"}]
prompt = torch.tensor([AutoProcessor.from_pretrained(repo, **pins).encode(question)])
plain = AutoModelForCausalLM.from_pretrained(repo, subfolder="backbone", revision=revision)
settings = {"max_new_tokens": 5, "do_sample": False}
assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))
print(json.dumps(model.embed_query(question)[0].tolist()))
"""


def test_it_loads_back_in_a_fresh_process(trained, tmp_path):
    import torch

    from modeling_native_retrieval import NativeRetrievalModel

    hub, folder, _ = trained
    process = run(["-c", LOAD, REPO, hub.commits[REPO][1][0]], hub, tmp_path / "home")
    assert process.returncode == 0, process.stderr
    vector = torch.tensor(json.loads(process.stdout.splitlines()[-1]))
    here = NativeRetrievalModel.from_pretrained(folder / "out").embed_query("When was Arnwick Lighthouse founded?")
    assert torch.allclose(vector, here[0], atol=1e-5)


DAMAGED = """
import sys
from native_retrieval.loading import load_model, model_folder
load_model(sys.argv[1])
weights = model_folder(sys.argv[1]) / "model.safetensors"
content = bytearray(weights.read_bytes())
content[-1] ^= 1
weights.unlink()  # it is a link to what the Hub's client keeps
weights.write_bytes(content)
load_model(sys.argv[1])
"""


def test_weights_from_the_hub_are_compared_with_their_checksum(trained, tmp_path):
    process = run(["-c", DAMAGED, REPO], trained[0], tmp_path / "home")
    assert "ValueError: model me/tiny: model.safetensors is not as it was saved" in process.stderr, process.stderr


def test_a_push_that_fails_loses_nothing_and_can_be_gone_on_with(trained, tmp_path):
    import shutil

    _, folder, _ = trained
    copy = tmp_path / "model"
    shutil.copytree(folder / "out", copy)
    words = ["-m", "native_retrieval.card", copy, "--push_to_hub", "me/again"]
    down = {"on": True}
    with serve(Hub(lambda method, path: down["on"] and path.endswith("/commit/main"))) as hub:
        process = run(words, hub, tmp_path / "home", HF_TOKEN=TOKEN)
        assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr
        assert process.stderr.strip().splitlines()[-1].startswith("card: ")
        assert hub.files("me/again")[1] == {}, "half a repository was published"
        down["on"], sent = False, len(hub.objects)
        process = run(words, hub, tmp_path / "home", HF_TOKEN=TOKEN)
        assert process.returncode == 0, process.stderr
        uploads = [path for method, path in hub.requests if method == "PUT"]
        assert len(uploads) == len(set(uploads)) == sent, "what the Hub had already was sent again"
        assert "model.safetensors" in hub.files("me/again")[1]


def test_the_whole_model_is_saved_though_checkpoints_hold_the_head(tiny_model, tmp_path):
    from native_retrieval.trainer import NativeRetrievalTrainer, NativeRetrievalTrainingArguments

    arguments = NativeRetrievalTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="no", load_best_model_at_end=False
    )
    trainer = NativeRetrievalTrainer(tiny_model, arguments)
    trainer.save_model(_internal_call=True)  # as the Trainer does before it pushes
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "backbone" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="hub_strategy"):
        NativeRetrievalTrainingArguments(output_dir=str(tmp_path), hub_strategy="every_save")
