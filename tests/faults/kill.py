"""
Kills the steps of the recipe at random moments (SIGKILL), starts them again, and compares with an undisturbed run.

    python tests/faults/kill.py --output results/faults.json

Each run is a process of its own, forked from this one, which has imported everything and made tiny random models. In a
trial, a run is killed once or twice, at moments drawn uniformly from the duration of an undisturbed run; then it is started
once more and left alone. The trial is `lost` if this last run does not end well or its result cannot be read. It is
`differing` if its result is not the undisturbed run's, bit by bit (weights: within 1e-6), or if a reader right after a kill
finds anything but the whole old result, the whole new one, or a refusal.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (2, 1)]

import datasets
import faiss
import numpy as np
import torch
from conftest import SENTENCES, make_tokenizer, write_beir_folder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import train
from native_retrieval import features
from native_retrieval.arguments import NativeRetrievalTrainingArguments
from native_retrieval.features import FeatureStore, cached_queries
from native_retrieval.index import DocumentIndex
from native_retrieval.initialise import from_backbone
from native_retrieval.loading import load_model
from native_retrieval.teacher import Teacher
from native_retrieval.trainer import NativeRetrievalTrainer

KILLS = 64
TOLERANCE = 1e-6
PATIENCE = 120.0  # seconds after which a run counts as one that never ends

Result = dict[str, bytes | np.ndarray]


@dataclass
class Step:
    """
    One step of the recipe, in a folder.

    Args:
        run: what is killed.
        read: what it has made, by name; raises if that cannot be read.
        before: makes what is there before the first run.
        glance: what a reader finds right after a kill; None if nothing, or if it is refused, as it should be.
    """

    name: str
    run: Callable[[Path], object]
    read: Callable[[Path], Result]
    before: Callable[[Path], object] = lambda folder: None
    glance: Callable[[Path], Result | None] = lambda folder: None


# -- runs in processes of their own -----------------------------------------------------------------------------------


def own_locks() -> None:
    """Before the first fork: no thread of tqdm's, and a lock that is not shared, which one that is killed would keep."""
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())


def start(step: Step, folder: Path) -> int:
    """Starts a run, and returns its process id. Its output goes to `folder/log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        sys.stdout = sys.stderr = open(folder / "log", "a", buffering=1)  # noqa: SIM115
        os.dup2(sys.stderr.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        torch.set_num_threads(1)  # the threads of a pool are not forked
        faiss.omp_set_num_threads(1)
        step.run(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """Its exit code, or None if it still runs by then."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(min(0.001, seconds))


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def ends_well(step: Step, folder: Path) -> bool:
    process = start(step, folder)
    code = wait(process, PATIENCE)
    if code is None:
        kill(process)
    return code == 0


# -- trials -----------------------------------------------------------------------------------------------------------


def difference(result: Result, wanted: Result) -> str:
    """How a result differs from the wanted one, in words; empty if it does not."""
    if result.keys() != wanted.keys():
        return f"other parts: {sorted(result.keys() ^ wanted.keys())}"
    for name, value in result.items():
        if isinstance(value, bytes):
            if value != wanted[name]:
                return f"{name} has other bytes"
        elif not (apart := np.abs(value - wanted[name]).max(initial=0)) <= TOLERANCE:
            return f"{name} is {apart} off"
    return ""


def undisturbed(step: Step, folder: Path, runs: int) -> tuple[Result, float]:
    """The result of a run that is left alone, and its seconds."""
    results, seconds = [], []
    for number in range(runs):
        place = folder / f"undisturbed-{number}"
        place.mkdir(parents=True)
        step.before(place)
        began = time.monotonic()
        if not ends_well(step, place):
            raise RuntimeError(f"{step.name} fails undisturbed:\n{(place / 'log').read_text()[-2000:]}")
        seconds.append(time.monotonic() - began)
        results.append(step.read(place))
        shutil.rmtree(place)
    for result in results:
        if apart := difference(result, results[0]):
            raise RuntimeError(f"{step.name} makes something else each time, there is nothing to compare with: {apart}")
    return results[0], statistics.median(seconds)


def trial(step: Step, wanted: Result, seconds: float, folder: Path, rng: random.Random, kills: int) -> dict:
    """One folder: at most so many kills, then a run that is left alone."""
    folder.mkdir(parents=True)
    step.before(folder)
    old = step.glance(folder)
    killed, lost, apart = 0, "", ""
    for _ in range(kills):
        process = start(step, folder)
        if wait(process, rng.uniform(0, seconds)) is not None:  # quicker than the others; an error shows below, too
            break
        kill(process)
        killed += 1
        seen = step.glance(folder)
        if seen is not None and (old is None or difference(seen, old)) and (found := difference(seen, wanted)):
            apart = f"right after a kill, {found}"
    if not ends_well(step, folder):
        lost = "the last run does not come to an end"
    else:
        try:
            apart = apart or difference(step.read(folder), wanted)
        except Exception as error:
            lost = f"what it has made cannot be read: {error}"
    if lost or apart:
        tqdm.write(f"{step.name}: {lost or apart}\n{(folder / 'log').read_text()[-3000:]}")
    shutil.rmtree(folder)
    return {"kills": killed, "lost": int(bool(lost)), "differing": int(bool(apart))}


def try_step(step: Step, kills: int, folder: Path, rng: random.Random, bar: tqdm, runs: int) -> dict:
    bar.set_description(f"{step.name}, undisturbed")
    wanted, seconds = undisturbed(step, folder / "undisturbed", runs)
    bar.set_description(step.name)
    row = {"step": step.name, "seconds": round(seconds, 2), "kills": 0, "lost": 0, "differing": 0}
    for number in range(100 * kills):  # a run that ends before its moment counts for nothing
        if row["kills"] == kills:
            break
        done = trial(step, wanted, seconds, folder / str(number), rng, min(rng.choice((1, 1, 2)), kills - row["kills"]))
        for name, count in done.items():
            row[name] += count
        bar.update(done["kills"])
    return row


# -- the steps --------------------------------------------------------------------------------------------------------


def files(folder: Path, pattern: str) -> Result:
    found = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()
    }
    if not found:
        raise FileNotFoundError(f"{folder} has no {pattern}")
    return found


def weights(folder: Path) -> Result:
    model = load_model(str(folder))
    return {name: weight.float().numpy() for name, weight in model.state_dict().items()}


def refused(read: Callable[[], Result]) -> Result | None:
    """What a reader finds, or None if it is told in one line that there is nothing whole."""
    try:
        return read()
    except (ValueError, OSError) as error:
        if "\n" in str(error):
            raise
        return None


class World:
    """Tiny random models and data in a folder, and what the steps do with them."""

    def __init__(self, place: Path, small: bool) -> None:
        self.place, self.small = place, small
        part = 0.2 if small else 1
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.15,
            max_position_embeddings=512,
            **tokens,
        )
        LlamaForCausalLM(config).save_pretrained(place / "backbone")
        tokenizer.save_pretrained(place / "backbone")
        words = StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=32)
        encoder = SentenceTransformer(modules=[words, Normalize()], device="cpu")
        encoder.save(str(place / "teacher"), create_model_card=False)
        self.data = write_beir_folder(place / "beir")
        self.teacher = Teacher(str(place / "teacher"))
        self.model = self.new_model()
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(3, 400, rng.integers(5, 60)).tolist() for _ in range(int(600 * part))]
        self.texts = [f"{sentence} {number}" for number in range(int(2000 * part)) for sentence in SENTENCES]
        self.rows = int(20_000 * part)
        vectors = rng.normal(size=(self.rows, 32)).astype(np.float32)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        columns = {"_id": [f"d{i}" for i in range(self.rows)], "title": [""] * self.rows}
        self.documents = datasets.Dataset.from_dict({**columns, "text": self.texts[: self.rows]})
        other = self.new_model()
        with torch.no_grad():
            for parameter in other.query_head.parameters():
                parameter.add_(1.0)
        other.save_pretrained(place / "other")
        arguments = NativeRetrievalTrainingArguments(
            **{"output_dir": str(place / "out"), "use_cpu": True},
            **{"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False},
        )
        self.trainer = NativeRetrievalTrainer(self.model, arguments)

    def new_model(self):
        return from_backbone(
            str(self.place / "backbone"),
            self.teacher,
            teacher_name_or_path=str(self.place / "teacher"),
            teacher_fingerprint=self.teacher.fingerprint,
            head_dim=32,
            head_num_attention_heads=4,
            max_query_tokens=8,
        )

    def hidden_states(self, folder: Path) -> None:
        features.SHARD_TOKENS = 1024  # in a process of its own; a kill should come between shards, too
        FeatureStore.build(self.model, self.prompts, folder, tokens_per_batch=128)

    def queries(self, folder: Path) -> None:
        features.SHARD_QUERIES = 16
        cached_queries(self.model, self.prompts[: len(self.prompts) * 4 // 15], folder, batch_size=2)

    def teacher_in(self, folder: Path) -> Teacher:
        self.teacher.cache_dir = folder
        return self.teacher

    def train(self, folder: Path, cache: Path, epochs: int, *more: str) -> None:
        words = ["--backbone", self.place / "backbone", "--teacher", self.place / "teacher", "--cache_dir", cache]
        words += ["--train_data", self.data, "--dev_data", self.data, "--plain_text", self.data]
        words += ["--output_dir", folder / "out", "--query_modes", "context", "generated", "--max_query_tokens", 8]
        words += ["--head_dim", 32, "--head_num_attention_heads", 4, "--rank_top_k", 8, "--max_prompt_tokens", 100]
        words += ["--per_device_train_batch_size", 8, "--lexical_epochs", 1, "--num_plain_texts", 20]
        words += ["--num_train_epochs", epochs, "--use_cpu", "true", "--seed", 3, "--resume", *more]
        train.main([str(word) for word in words])

    def build(self, folder: Path, rows: int, **options) -> None:
        documents, fingerprint = self.documents.select(range(rows)), self.teacher.fingerprint
        DocumentIndex.build(documents, self.vectors[:rows], fingerprint, "tiny", folder / "index", **options)


def index_files(folder: Path) -> Result:
    DocumentIndex.load(folder / "index")
    return files(folder / "index", "**/*")


def make_steps(place: Path, small: bool = False) -> list[Step]:
    world = World(place, small)
    epochs = 1 if small else 2
    each_step = ("--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1")
    trained = {
        "read": lambda folder: weights(folder / "out"),
        "glance": lambda folder: refused(lambda: weights(folder / "out")),
    }
    return [
        Step("features", world.hidden_states, lambda folder: files(folder, "features-*.npy")),
        Step("queries", world.queries, lambda folder: files(folder, "queries-*.json")),
        Step(
            "teacher vectors",
            lambda folder: world.teacher_in(folder).cached(world.texts, "document", "Vectors"),
            lambda folder: files(folder, "vectors-*.npy"),
        ),
        Step(
            "teacher ranking",
            lambda folder: world.teacher_in(folder).ranking(world.vectors, world.vectors[:4000]),
            lambda folder: files(folder, "ranking-*.npy"),
        ),
        Step("training", lambda folder: world.train(folder, folder / "cache", epochs + 1), **trained),
        Step("checkpoints", lambda folder: world.train(folder, place / "cache", epochs, *each_step), **trained),
        Step(
            "saving",
            lambda folder: world.trainer.save_model(str(folder / "model")),
            lambda folder: weights(folder / "model"),
            before=lambda folder: shutil.copytree(place / "other", folder / "model"),
            glance=lambda folder: refused(lambda: weights(folder / "model")),
        ),
        Step(
            "index",
            lambda folder: world.build(folder, world.rows, overwrite=True),
            index_files,
            before=lambda folder: world.build(folder, 100),
            glance=lambda folder: refused(lambda: index_files(folder)),
        ),
    ]


# -- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS, help="in all, spread over the steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a fifth of the work, and one undisturbed run, for tests")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="some of the steps only")
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args(argv)

    own_locks()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, Path(scratch, "datasets")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            steps = make_steps(Path(scratch, "made"), arguments.small)
            steps = [step for step in steps if not arguments.steps or step.name in arguments.steps]
            shares = [
                arguments.kills * (i + 1) // len(steps) - arguments.kills * i // len(steps) for i in range(len(steps))
            ]
            with tqdm(total=arguments.kills, unit="kill") as bar:
                rows = [
                    try_step(
                        step,
                        share,
                        Path(scratch, step.name.replace(" ", "-")),
                        random.Random(arguments.seed),
                        bar,
                        1 if arguments.small else 3,
                    )
                    for step, share in zip(steps, shares, strict=True)
                ]
        finally:
            torch.set_num_threads(threads)
            datasets.config.HF_DATASETS_CACHE = cache
    report = {
        "command": " ".join(["python", "tests/faults/kill.py", *argv]),
        **{name: sum(row[name] for row in rows) for name in ("kills", "lost", "differing")},
        "rows": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    report = main(sys.argv[1:])
    for row in report["rows"]:
        print("{step:<18} {seconds:>6} s, {kills:>3} kills, {lost} lost, {differing} differing".format(**row))
    sys.exit(bool(report["lost"] or report["differing"]))
