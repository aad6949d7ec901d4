# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: flags, the result file with its figure, and conversations of a given length."""

import bisect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from native_retrieval.cli import CommandParser
from native_retrieval.loading import load_model, local_paths, model_folder

TEXT = (
    "The lighthouse stands on the northern cape and was first lit in 1874, after two ships had been lost in one winter. Its "
    "keeper lived there with his family until the lamp became electric, and the house is now a small museum of the coast. "
)
QUESTION = "When was the museum in it opened, and who runs it today?"
WORDS_A_TURN = 160
FLAGS = {
    "model": {"required": True, "help": "directory or Hub id of a trained model"},
    "index": {"required": True, "help": "index directory of its teacher"},
    "queries": {"required": True, "help": "a queries.jsonl with messages"},
    "data": {"required": True, "help": "the folder of the data sets"},
    "backbone": {"help": "folder of the model's backbone, if it is not where it was"},
    "teacher": {"help": "folder or Hub id of its teacher, if it is not where it was"},
    "cache_dir": {"default": ".cache/native_retrieval", "help": "of vectors and indexes (default: %(default)s)"},
    "threads": {"type": int, "default": torch.get_num_threads(), "help": "of the processor (default: %(default)s)"},
    "output": {"required": True, "help": "the JSON file to write; a figure goes into figures/ beside it"},
}


def parser(name: str, description: str | None, *flags: str) -> CommandParser:
    parser = CommandParser(name, description)
    for flag in flags:
        parser.add_argument(f"--{flag}", **FLAGS[flag])
    return parser


def write(result: dict[str, Any], output: str, draw: Callable[[dict, Path], None] | None = None) -> None:
    """Writes the command and its result as JSON, and a figure of it."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": " ".join(["python", *sys.argv]), **result}, indent=1) + "\n")
    if draw:
        (path.parent / "figures").mkdir(exist_ok=True)
        draw(result, path.parent / "figures" / f"{path.stem}.png")


def teacher_for(config, model: str, **settings):
    """The teacher that the model of this name or path was trained towards."""
    from native_retrieval.teacher import teacher_of  # not in the processes whose memory is measured

    return teacher_of(config, local_paths(model_folder(model)).get("teacher"), **settings)


def load(arguments):
    """The model and the teacher of the flags `model`, `backbone`, `teacher` and `cache_dir`."""
    from native_retrieval.teacher import teacher_of

    model = load_model(arguments.model, **({"backbone": arguments.backbone} if arguments.backbone else {}))
    name = arguments.teacher or local_paths(model_folder(arguments.model)).get("teacher")
    return model, teacher_of(model.config, name, cache_dir=arguments.cache_dir)


@contextmanager
def plot(path: Path, title: str = "", xlabel: str = "") -> Iterator:
    """The axes to draw on; the figure is written when the block ends."""
    from matplotlib.figure import Figure  # not in the processes whose memory is measured

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def prompt_of(processor, tokens: int) -> list[int]:
    """The prompt of a conversation, of this many tokens, or one or two fewer. Long ones have several turns."""
    words = TEXT.split()

    def prompt(count: int) -> list[int]:
        turns = []
        for begin in range(0, count, WORDS_A_TURN):
            said = " ".join(words[i % len(words)] for i in range(begin, min(begin + WORDS_A_TURN, count)))
            # Numbered: a turn that is there twice is read once.
            turns += [{"role": "user", "content": "Tell me more."}, {"role": "assistant", "content": f"{begin} {said}"}]
        return processor.encode([*turns, {"role": "user", "content": QUESTION}])

    fits = bisect.bisect_right(range(tokens), tokens, key=lambda count: len(prompt(count))) - 1
    if fits < 0:
        raise ValueError(
            f"a conversation takes {len(prompt(0))} tokens at least, asked for {tokens}; name a longer one"
        )
    return prompt(fits)
