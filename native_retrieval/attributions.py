"""A figure of a conversation that shows which words the query vector is made of.

python -m native_retrieval.attributions --model outputs/qrecc --data data/handwritten --output words.png
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .cli import CommandParser, one_line_errors
from .conversations import Messages

LINE_CHARACTERS, FONT_SIZE = 100, 8
CHARACTER_WIDTH, LINE_HEIGHT = 0.602 * FONT_SIZE / 72, 1.75 * FONT_SIZE / 72  # inches, of DejaVu Sans Mono
TEMPLATE_ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython")
Word = tuple[str, float]


def word_weights(model: Any, messages: Messages) -> list[tuple[str, list[Word]]]:
    """
    The turns of a conversation's prompt: (role, [(word, weight), ...]).

    The weight of a word is the sum of the weights of its tokens; those of all tokens add up to 1.

    Raises:
        `ValueError`: if the model's head reads no words.
    """
    if model.query_head.encoder is None:
        raise ValueError(
            "this head reads no words (word_vocab_size=None), so they have no weights; use a model with a word encoder"
        )
    output = model.embed_query([messages], mode="context", return_attributions=True)
    ids, weights = output.input_ids[0].tolist(), output.attributions[0].float().tolist()
    total = sum(map(abs, weights)) or 1.0
    special = set(model.processor.special_ids)
    parts: list[list[Word]] = [[]]  # of the prompt, between special tokens
    for token, weight in zip(ids, weights, strict=True):
        words, text = parts[-1], model.tokenizer.decode([token])
        if token in special:
            parts.append([])
        elif words and not text.startswith((" ", "\n")) and not words[-1][0].endswith("\n"):
            words[-1] = (words[-1][0] + text, words[-1][1] + weight / total)
        else:
            words.append((text, weight / total))
    turns, role = [], ""
    for part in parts:
        words = [(word.strip(), weight) for word, weight in part if word.strip()]
        # A template writes the role as the first word of a turn, or between two special tokens of its own.
        if words and words[0][0] in TEMPLATE_ROLES:
            role, words = words[0][0], words[1:]
        if words:
            turns.append((role, words))
            role = ""
    return turns


def draw_attributions(model: Any, conversations: Sequence[Messages], path: str | os.PathLike[str]) -> None:
    """Draws conversations; the colour behind a word shows its weight."""
    blocks = [
        [turn for turn in word_weights(model, messages) if turn[0] != "system" and turn[1]]
        for messages in conversations
    ]
    lines = [[(role, line) for role, words in block for line in _wrap(words)] for block in blocks]
    height = LINE_HEIGHT * sum(len(block) + 1 for block in lines)
    width = CHARACTER_WIDTH * (LINE_CHARACTERS + 13)
    figure = Figure(figsize=(width, height))
    colours = matplotlib.colormaps["PuOr_r"]
    y = height
    for block in lines:
        strongest = max((abs(weight) for _, line in block for _, weight in line), default=1.0) or 1.0
        before = None
        for role, line in block:
            y -= LINE_HEIGHT
            if role != before:
                _write(figure, role, 0, y, "#6E6E6E", None)
            before = role
            x = 11 * CHARACTER_WIDTH
            for word, weight in line:
                share = np.clip(weight / strongest, -1, 1)
                ground = colours(0.5 + 0.3 * share) if abs(share) > 0.03 else None
                _write(figure, word, x, y, "#222222", ground)
                x += (len(word) + 1) * CHARACTER_WIDTH
        y -= LINE_HEIGHT
    figure.savefig(path, dpi=150)


def _wrap(words: list[Word]) -> list[list[Word]]:
    lines: list[list[Word]] = [[]]
    for word, weight in words:
        if sum(len(w) + 1 for w, _ in lines[-1]) + len(word) > LINE_CHARACTERS and lines[-1]:
            lines.append([])
        lines[-1].append((word[:LINE_CHARACTERS], weight))
    return lines


def _write(figure: Figure, text: str, x: float, y: float, colour: str, ground: Any) -> None:
    width, height = figure.get_size_inches()
    box = None if ground is None else {"facecolor": ground, "edgecolor": "none", "pad": 1.2}
    figure.text(
        x / width,
        y / height,
        text.replace("$", r"\$"),
        family="DejaVu Sans Mono",
        fontsize=FONT_SIZE,
        color=colour,
        bbox=box,
        va="bottom",
    )


@one_line_errors("attributions")
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("python -m native_retrieval.attributions", __doc__)
    parser.add_argument("--model", required=True, help="directory or Hub id of a trained model")
    parser.add_argument("--data", required=True, help="folder or Hub id in the BEIR layout with messages")
    parser.add_argument("--split", help="a split (default: all queries)")
    parser.add_argument("--ids", nargs="*", help="query ids (default: five, evenly spaced)")
    parser.add_argument("--output", required=True, help="the PNG file to write")
    arguments = parser.parse_args(argv)

    from .data import load_queries
    from .loading import load_model

    queries = load_queries(arguments.data, arguments.split)
    rows = {query_id: row for row, query_id in enumerate(queries["_id"])}
    unknown = [query_id for query_id in arguments.ids or () if query_id not in rows]
    if unknown:
        raise ValueError(f"--ids: {unknown[0]!r} is not in {arguments.data}; name ids of its queries.jsonl")
    chosen = arguments.ids or [list(rows)[i] for i in np.linspace(0, len(rows) - 1, min(5, len(rows))).astype(int)]
    model = load_model(arguments.model)
    draw_attributions(model, [queries[rows[query_id]]["messages"] for query_id in chosen], arguments.output)
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
