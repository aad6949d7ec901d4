"""Several devices (two processes over gloo) train as one with the whole batch does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, write_beir_folder

# An even number of queries; last batches that fill one device in part, and both in part. Weights: alignment, contrastive,
# rank.
CASES = {
    "all losses": (8, (2, 1, 1)),
    "all losses, last batch of 3": (11, (2, 1, 1)),
    "contrastive, last batch of 1": (9, (0, 1, 0)),
    "alignment, last batch of 2": (10, (1, 0, 0)),
    "rank": (12, (0, 0, 1)),
}


def steps(processes: int, folder, *sources) -> dict[str, list[dict]]:
    folder.mkdir()
    # What `accelerate launch` starts on several GPUs; for CPUs it would want MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
    words = [*launch, "tests/distributed_step.py", *sources, folder / "steps.pt", 8 // processes, json.dumps(CASES)]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "steps.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(backbone_dir, teacher_dir, tmp_path_factory):
    """With one process and with two; two of the queries share their document, and lie in batches of different devices."""
    folder = tmp_path_factory.mktemp("distributed")
    data = write_beir_folder(folder / "beir")
    qrels = data / "qrels" / "train.tsv"
    lines = qrels.read_text().splitlines()
    lines[6] = "\t".join((lines[6].split("\t")[0], lines[1].split("\t")[1], "1"))
    qrels.write_text("\n".join(lines) + "\n")
    return [steps(n, folder / f"{n}", backbone_dir, teacher_dir, data) for n in (1, 2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_the_whole_batch(case, runs):
    one, two = (run[case] for run in runs)
    assert len(one) == len(two) == -(-CASES[case][0] // 8)
    for single, double in zip(one, two, strict=True):
        assert double["loss"].item() == pytest.approx(single["loss"].item(), rel=1e-4)
        assert single["gradients"].keys() == double["gradients"].keys() and single["gradients"]
        for name, gradient in single["gradients"].items():
            scale = gradient.abs().max().clamp(min=1e-6)
            assert torch.allclose(double["gradients"][name] / scale, gradient / scale, atol=1e-4), name
