"""configs/accelerate/fsdp2.yaml with two processes on CPUs: slow, as every launch imports torch twice."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from native_retrieval.loading import load_model

pytestmark = pytest.mark.slow


def launch(folder, *words, **environment) -> subprocess.CompletedProcess:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml"]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    launcher += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "tests/fsdp_on_cpu.py"]
    fields = {
        **{"use_cpu": "true", "bf16": "true", "disable_tqdm": "true", "logging_steps": 1, "lexical_epochs": 1},
        **{"head_dim": 32, "head_num_attention_heads": 4, "max_prompt_tokens": 256, "num_train_epochs": 3},
        **{"per_device_train_batch_size": 4, "output_dir": folder / "out", "cache_dir": folder / "cache"},
    }
    words = [*launcher, *(word for name, value in fields.items() for word in (f"--{name}", value)), *words]
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize("online", ["false", "true"])
def test_trains_is_killed_goes_on_and_saves_one_model(online, backbone_dir, teacher_dir, beir_data, tmp_path):
    words = ["--backbone", backbone_dir, "--teacher", teacher_dir, "--train_data", beir_data, "--dev_data", beir_data]
    words += ["--plain_text", beir_data, "--online_features", online]
    done = launch(tmp_path, *words, STOP_AT_CHECKPOINT="1")
    checkpoints = list((tmp_path / "out").glob("checkpoint-*"))
    assert done.returncode != 0 and len(checkpoints) == 1, done.stderr[-4000:]
    saved = load_file(checkpoints[0] / "model.safetensors")
    assert saved and not any(name.startswith("backbone.") for name in saved)

    done = launch(tmp_path, *words, "--resume", "true")
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((tmp_path / "out" / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history] == list(range(1, len(history) + 1))
    assert float(history[-1]["loss"]) < float(history[0]["loss"])

    model = load_model(tmp_path / "out")
    assert type(model).__name__ == "NativeRetrievalModel"
    frozen = AutoModelForCausalLM.from_pretrained(backbone_dir).state_dict()
    for name, weight in model.backbone.state_dict().items():
        assert torch.equal(weight, frozen[name]), name
    # The vector that all devices together have stored is the one that comes out.
    cosine = torch.nn.functional.cosine_similarity(model.reference_embedding, model._reference(), dim=0)
    assert cosine.item() > 0.999
