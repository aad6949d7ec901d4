"""Looks for data files and recipes that end in anything but our own error, of one line for each bad row.

    python tests/fuzz.py                # ten minutes
    python tests/fuzz.py --minutes 2

`test_data.py` and `test_arguments.py` run a few examples of the same properties.
"""

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from messages_native_retrieval import ROLES  # noqa: E402
from native_retrieval import arguments, data  # noqa: E402

# Data: whole files, one of which is damaged or replaced

WHOLE = {
    "corpus.jsonl": '{"_id": "d1", "title": "Tea", "text": "A drink."}\n{"_id": "d2", "text": "Wet."}\n',
    "queries.jsonl": '{"_id": "q1", "messages": [{"role": "user", "content": "Tea?"}], "metadata": {"turn": 1}}\n',
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
}
FIELDS = ["_id", "title", "text", "messages", "role", "content", "rewrite", "metadata", "conv", "turn", "switch"]
LOADERS: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (data.load_task, ("test",)),
    (data.load_qrels, ("test",)),
    (data.load_queries, ()),
    (data.load_corpus, ()),
    (data.load_texts, ()),
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ROLES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=12,
)
rows = st.lists(json_values, max_size=4).map(lambda values: "\n".join(map(json.dumps, values)).encode())
lines = st.lists(st.lists(st.sampled_from(["q1", "d1", "d2", "1", "-1", "", "0x1"]) | st.text(max_size=4), max_size=4))
tables = lines.map(lambda cells: "\n".join("\t".join(row) for row in cells).encode("utf-8", "surrogatepass"))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with some of its bytes changed, cut out or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
    return bytes(content)


@st.composite
def folders(draw: st.DrawFn) -> dict[str, bytes]:
    """The files of a folder by name, of which one is bad."""
    files = {name: text.encode() for name, text in WHOLE.items()}
    name = draw(st.sampled_from(sorted(files)))
    files[name] = draw(damaged(files[name]) | rows | tables | st.binary(max_size=80))
    if name.endswith(".jsonl") and draw(st.booleans()):
        content = files.pop(name)
        content = gzip.compress(content) if draw(st.booleans()) else content
        files[f"{name}.gz"] = draw(damaged(content)) if draw(st.booleans()) else content
    return files


def check_folder(files: dict[str, bytes]) -> None:
    """A folder loads, or a `DataError` names every problem in one line each."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        for load, words in LOADERS:
            try:
                load(folder, *words)
            except data.DataError as error:
                assert error.problems and not any("\n" in problem for problem in error.problems), error.problems


# Recipes

# What would reach for a cluster, a device or an account is not for a fuzzer.
REACHING = ("local_rank", "ddp_", "deepspeed", "fsdp", "hub_", "push_", "torch_compile", "parallelism_config", "tf32")
GROUPS = (arguments.ModelArguments, arguments.DataArguments, arguments.RunArguments)
OURS = [name for group in GROUPS for name in group.__dataclass_fields__]
THEIRS = [name for name, f in arguments.NativeRetrievalTrainingArguments.__dataclass_fields__.items() if f.init]
NAMES = OURS + [name for name in THEIRS if not name.startswith(REACHING)]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["--help", "-1", "--resume", "no", "epoch", "steps", "1e-3", "context"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=2), max_leaves=5
)
fields = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), scalars | values, max_size=4)
whole_recipe = (REPOSITORY / "configs" / "demo.yaml").read_bytes()
tagged = st.sampled_from(
    ["!!int", "!!float", "!!bool", "!!timestamp", "!!binary", "!!set", "!!omap", "!x", "&a *a", "<<:"]
)
recipes = (
    (fields | values).map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace"))
    | damaged(whole_recipe)
    | st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
    | st.tuples(st.sampled_from(NAMES), tagged, st.text(max_size=6)).map(lambda t: f"{t[0]}: {t[1]} {t[2]}".encode())
)


def check_recipe(recipe: bytes) -> None:
    """A recipe is read, or a `ValueError` says in one line why not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_bytes(recipe)
        try:
            with mock.patch.dict(os.environ):  # transformers' arguments tell accelerate of a precision through these
                arguments.parse([str(path), "--output_dir", folder, "--use_cpu"])
        except ValueError as error:
            assert str(error) and "\n" not in str(error).strip(), str(error)


# Ten minutes of both


@contextmanager
def own_cache() -> Iterator[None]:
    """What is loaded does not stay."""
    with tempfile.TemporaryDirectory() as folder:
        before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, Path(folder)
        datasets.disable_progress_bars()
        yield
        datasets.config.HF_DATASETS_CACHE = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="(default: %(default)s)")
    end = time.monotonic() + 60 * parser.parse_args().minutes
    counts = {"folders": 0, "recipes": 0}
    often = settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    @often
    @given(folders())
    def fuzz_folders(files: dict[str, bytes]) -> None:
        counts["folders"] += 1
        with own_cache():
            check_folder(files)

    @often
    @given(recipes)
    def fuzz_recipes(recipe: bytes) -> None:
        counts["recipes"] += 1
        check_recipe(recipe)

    while time.monotonic() < end:
        fuzz_folders()
        fuzz_recipes()
        print(", ".join(f"{count:,} {name}" for name, count in counts.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
