"""configs/accelerate/fsdp2.yaml on the real small backbone, with two processes on CPUs: slow."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_native_retrieval import NativeRetrievalModel
from native_retrieval import assets

pytestmark = pytest.mark.slow

LOAD = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
vector = model.embed_query([{"role": "user", "content": "When was Arnwick Lighthouse founded?"}])
print(type(model).__name__, tuple(vector.shape), round(vector.norm().item(), 3))
"""


def launch(folder, data, *words, **environment) -> subprocess.CompletedProcess:
    fetched = assets.fetch(REPOSITORY / assets.FOLDER)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml"]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    launcher += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "tests/fsdp_on_cpu.py"]
    fields = [
        "--backbone",
        fetched / assets.BACKBONE,
        "--teacher",
        fetched / assets.TEACHER,
        "--use_cpu",
        "--bf16",
        "true",
    ]
    fields += [
        "--train_data",
        data,
        "--dev_data",
        data,
        "--plain_text",
        data,
        "--lexical_epochs",
        "1",
        "--augmentation_share",
        "0.2",
    ]
    fields += ["--output_dir", folder / "out", "--cache_dir", ".cache/demo/cache", "--disable_tqdm", "true"]
    fields += ["--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", *words]
    return subprocess.run(
        [sys.executable, *map(str, launcher + fields)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize("online", ["false", "true"])
def test_trains_is_killed_goes_on_and_saves_one_model(online, beir_data, tmp_path):
    words = ["--online_features", online]
    done = launch(tmp_path, beir_data, *words, STOP_AT_CHECKPOINT="1")
    checkpoints = list((tmp_path / "out").glob("checkpoint-*"))
    assert done.returncode != 0 and len(checkpoints) == 1, done.stderr[-4000:]
    saved = load_file(checkpoints[0] / "model.safetensors")
    assert saved and not any(name.startswith("backbone.") for name in saved)

    done = launch(tmp_path, beir_data, *words, "--resume", "true")
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((tmp_path / "out" / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history] == list(range(1, len(history) + 1))
    assert float(history[-1]["loss"]) < float(history[0]["loss"])

    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "NativeRetrievalModel (1, 384) 1.0", done.stderr[-4000:]
    model = NativeRetrievalModel.from_pretrained(tmp_path / "out")
    frozen = AutoModelForCausalLM.from_pretrained(REPOSITORY / assets.FOLDER / assets.BACKBONE).state_dict()
    for name, weight in model.backbone.state_dict().items():
        assert torch.equal(weight, frozen[name]), name
