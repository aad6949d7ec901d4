"""Several devices (two processes over gloo) train as one with the whole batch does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import REPOSITORY, write_beir_folder

# An even number of queries; last batches that fill one device in part, and both in part; changed conversations on one
# device alone. Weights: alignment, contrastive, rank, consistency.
CASES = {
    "all losses": (8, (2, 1, 1, 2)),
    "three losses, last batch of 3": (11, (2, 1, 1, 0)),
    "all losses, last batch of 3": (11, (2, 1, 1, 2)),
    "contrastive, last batch of 1": (9, (0, 1, 0, 0)),
    "alignment, last batch of 2": (10, (1, 0, 0, 0)),
    "rank": (12, (0, 0, 1, 0)),
    "three losses, one update of batches of 8 and 3": (11, (1, 1, 1, 0), 2),
}


# As accelerate sets it from configs/accelerate/fsdp2.yaml.
SPREAD = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def steps(processes: int, folder, *sources, cases=CASES, environment=()) -> dict[str, list[dict]]:
    folder.mkdir()
    # What `accelerate launch` starts on several GPUs; for CPUs it would want MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
    words = [*launch, "tests/distributed_step.py", *sources, folder / "steps.pt", 8 // processes, json.dumps(cases)]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **dict(environment)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "steps.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def runs(folder, backbone_dir, teacher_dir):
    """With one process and with two; two of the queries share their document, and lie in batches of different devices."""
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
    check_equal(one, two)


def check_equal(one: list[dict], two: list[dict]) -> None:
    for single, double in zip(one, two, strict=True):
        assert double["loss"].item() == pytest.approx(single["loss"].item(), rel=1e-4)
        assert single["gradients"].keys() == double["gradients"].keys()
        for name, gradient in single["gradients"].items():
            # Of a gradient that is a small difference of large sums, as `gain`'s, float32 rounds off some 1e-4; a mean over
            # the wrong number of queries, or negatives that are not gathered, differ by far more.
            scale = gradient.abs().max().clamp(min=1e-3)
            assert torch.allclose(double["gradients"][name] / scale, gradient / scale, atol=5e-4), name
    assert one[-1]["gradients"]


@pytest.mark.slow
def test_weights_that_are_spread_over_the_processes_change_nothing(runs, folder, backbone_dir, teacher_dir):
    case = "all losses, last batch of 3"
    spread = steps(
        2, folder / "fsdp", backbone_dir, teacher_dir, folder / "beir", cases={case: CASES[case]}, environment=SPREAD
    )
    check_equal(runs[0][case], spread[case])


@pytest.mark.parametrize("cache", ["teacher", "cache"])
def test_two_processes_write_the_files_that_one_writes(cache, runs, folder):
    one, two = ({path.name: path.read_bytes() for path in (folder / n / cache).iterdir()} for n in "12")
    kinds = {"teacher": {"vectors", "ranking"}, "cache": {"features", "queries"}}[cache]
    assert {name.partition("-")[0] for name in one} == kinds
    assert one == two


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_one_of_accelerates(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    options = {option.dest for option in launch_command_parser()._actions}
    assert not set(config.fsdp_config or config.deepspeed_config) - options
