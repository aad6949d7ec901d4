"""The backbone's attention heads that point at the words which a question leaves out: copied, tried on rewrites, chosen.

python -m native_retrieval.heads --backbone LLM --data data/canard data/gecor --output heads.json --figure heads.png

Which heads do depends on the backbone alone, so one choice serves every index. A head is judged by how high it ranks, among
the words of earlier turns, those that a human put into the rewrite of the last question (average precision). Of several data
sets the mean rank counts: a head must hold on other kinds of conversation.

The command prints the chosen heads as `selection_heads` of a recipe takes them; train.py then tries no others.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from configuration_native_retrieval import NativeRetrievalConfig
from head_native_retrieval import Words, WordSelection
from processing_native_retrieval import NativeRetrievalProcessor, word_keys

from .cli import CommandParser, check_writable, one_line_errors

# What only the command needs is imported in it: train.py imports this module too.

NUM_HEADS = 8
MAX_TURNS = 400  # of a data set: more change nothing
ASKERS = ("question", "last tokens")  # whose attention counts, in the order of the features


class Maps:
    """
    The query and key maps of attention heads, as a [`WordSelection`] has them.

    Raises:
        `ValueError`: for a backbone whose attention is not of the usual kind.
    """

    def __init__(self, backbone: nn.Module):
        base = backbone.base_model
        self.base, self.config = base, backbone.config.get_text_config()
        first, kind = getattr(base, "layers", [None])[0], type(base).__name__
        try:
            _ = [(b.self_attn.q_proj.weight, b.self_attn.k_proj.weight, b.input_layernorm.weight) for b in base.layers]
        except AttributeError as error:
            raise ValueError(f"{kind} has no layers with q_proj, k_proj and input_layernorm") from error
        self.width = (
            getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        )
        if first.self_attn.q_proj.weight.shape[0] != self.config.num_attention_heads * self.width:
            raise ValueError(f"{kind} has other queries in q_proj than those of its attention heads")
        weight = first.input_layernorm.weight
        if first.input_layernorm(torch.eye(1, len(weight), dtype=weight.dtype, device=weight.device))[0, 1:].any():
            raise ValueError(f"{kind} does not divide states by their root mean square alone")
        self.qk_norm = getattr(first.self_attn, "q_norm", None) is not None

    @property
    def heads(self) -> list[list[int]]:
        """Layer and number of every head from a third to four fifths of the depth, in order: those behind need not run."""
        depth, count = self.config.num_hidden_layers, self.config.num_attention_heads
        return [[layer, head] for layer in range(depth // 3, 4 * depth // 5 + 1) for head in range(count)]

    @torch.no_grad()
    def copy_into(self, selection: WordSelection, heads: Sequence[Sequence[int]]) -> None:
        """Copies the maps of these heads, with the norms before them folded in."""
        depth, count = self.config.num_hidden_layers, self.config.num_attention_heads
        for place, (layer, head) in enumerate(heads):
            if not (0 <= layer < depth and 0 <= head < count):
                raise ValueError(
                    f"selection_heads has [{layer}, {head}]; the backbone has layers 0 to {depth - 1}, heads 0 to {count - 1}"
                )
            block = self.base.layers[layer]
            attention, device = block.self_attn, block.input_layernorm.weight.device
            gain = block.input_layernorm(torch.ones(1, self.config.hidden_size, device=device).to(self.base.dtype))[
                0
            ].float()
            own = head // (self.config.num_attention_heads // self.config.num_key_value_heads)
            order, frequencies = self._rotation(layer, attention)
            scale = getattr(attention, "scaling", self.width**-0.5) * self.width**0.5
            for which, (name, number) in enumerate((("q", head), ("k", own))):
                linear = getattr(attention, f"{name}_proj")
                rows = slice(number * self.width, (number + 1) * self.width)
                weight = linear.weight[rows].float() * gain
                bias = torch.zeros(self.width) if linear.bias is None else linear.bias[rows].float()
                factor = scale if which == 0 else 1.0
                if self.qk_norm:
                    norm = getattr(attention, f"{name}_norm")
                    own_gain = norm(torch.ones(self.width, device=device).to(self.base.dtype)).float()
                    selection.norm[which, place] = own_gain[order] * factor
                    factor = 1.0
                (selection.query, selection.key)[which][place] = weight[order] * factor
                selection.bias[which, place] = bias.to(weight.device)[order] * factor
            selection.frequencies[place] = frequencies.view(torch.int32)

    def _rotation(self, layer: int, attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of a head's rows that pairs the first half with the second, and how fast each pair turns."""
        rotary = getattr(self.base, "rotary_emb", None)
        order, frequencies = torch.arange(self.width), torch.zeros(self.width // 2)
        if rotary is None:
            return order, frequencies
        kind = (
            getattr(attention, "layer_type", None) or (getattr(self.config, "layer_types", None) or {layer: ""})[layer]
        )
        speed = getattr(rotary, f"{kind}_inv_freq", None)
        speed = getattr(rotary, "inv_freq", None) if speed is None else speed
        if speed is None:
            raise ValueError(f"{type(rotary).__name__} shows no inv_freq, so its heads cannot be copied")
        half = len(speed)
        frequencies[:half] = speed.float().cpu()
        rest = order[2 * half :]
        order = torch.cat((order[:half], rest[: len(rest) // 2], order[half : 2 * half], rest[len(rest) // 2 :]))
        return order, frequencies


class Calibration:
    """
    The words of earlier turns in conversations whose last question has a rewrite: their features, and whether the rewrite
    has them.

    Attributes:
        features (`np.ndarray` of shape `(words, features)`), labels (`np.ndarray` of shape `(words,)`).
    """

    def __init__(self, name: str, features: list[np.ndarray], labels: list[np.ndarray]):
        self.name, self.num_turns = name, len(labels)
        self.features, self.labels = np.concatenate(features), np.concatenate(labels)

    def with_features(self, columns: Sequence[int]) -> "Calibration":
        return Calibration(self.name, [self.features[:, columns]], [self.labels])

    def precisions(self, num_heads: int) -> np.ndarray:
        """Average precision of each head, as the question's pieces ask and as the last tokens do: `(2 * heads,)`."""
        return np.array([average_precision(self.labels, self.features[:, i]) for i in range(2 * num_heads)])


@torch.no_grad()
def calibrate(
    backbone: nn.Module,
    processor: NativeRetrievalProcessor,
    selection: WordSelection,
    layers: Sequence[int],
    name: str,
    rows,
) -> Calibration | None:
    """
    Reads conversations, at most `MAX_TURNS` turns.

    Args:
        selection ([`WordSelection`]): with the heads to try, which read `layers`.
        rows: with `messages` and `rewrite`; those without a rewrite are left out, as are those whose rewrite takes no word
            from earlier turns.

    Returns:
        `None` if no row is left.
    """
    wanted = [row for row in rows if row["rewrite"] and len(row["messages"]) > 1]
    step = max(1, len(wanted) // MAX_TURNS)
    features, labels = [], []
    for row in tqdm(wanted[::step][:MAX_TURNS], desc=f"Attention heads: {name}", unit="turn"):
        input_ids, mask = processor.pad([processor.encode(row["messages"])])
        words = processor.read_words(input_ids, mask)
        device = backbone.get_input_embeddings().weight.device
        states = backbone.base_model(
            input_ids=input_ids.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False
        ).hidden_states
        states = torch.stack([states[layer].to(device) for layer in layers], dim=2)
        found, selectable = selection.features(states, mask.to(device), words.to(device))
        wanted_keys = {key for key in word_keys(row["rewrite"]) if key}
        groups = selectable[0].nonzero().flatten().tolist()
        keys = _keys(processor, words)
        label = np.array([keys[group] in wanted_keys for group in groups], dtype=bool)
        if label.any():
            features.append(found[0, groups].float().cpu().numpy())
            labels.append(label)
    return Calibration(name, features, labels) if labels else None


def calibrate_all(
    backbone: nn.Module,
    processor: NativeRetrievalProcessor,
    maps: Maps,
    heads: Sequence[Sequence[int]],
    rewrites: Sequence[tuple[str, Sequence[dict]]],
) -> list[Calibration]:
    """[`calibrate`] with these heads, on each data set of `rewrites` (names and rows) that has a row for it."""
    config = NativeRetrievalConfig(
        **{name: getattr(maps.config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")},
        word_vocab_size=1,
        selection_heads=heads,
        selection_head_dim=maps.width,
        selection_qk_norm=maps.qk_norm,
    )
    selection = WordSelection(config)
    selection.reset_parameters()
    maps.copy_into(selection, config.selection_heads)
    selection = selection.to(maps.base.device, maps.base.dtype)
    parts = [calibrate(backbone, processor, selection, config.hidden_state_layers, *part) for part in rewrites]
    return [part for part in parts if part is not None]


def _keys(processor: NativeRetrievalProcessor, words: Words) -> dict[int, str]:
    """The key of each group of a single prompt, from where it is said first."""
    groups, pieces = words.groups[0].tolist(), {}
    for place, group in enumerate(groups):
        if group and (group not in pieces or pieces[group][-1] == place - 1):
            pieces.setdefault(group, []).append(place)
    texts = {group: processor.word_tokenizer.decode(words.ids[0, places]) for group, places in pieces.items()}
    return {group: next(iter(word_keys(text)), "") for group, text in texts.items()}


def choose(
    calibrations: Sequence[Calibration], heads: Sequence[Sequence[int]], count: int = NUM_HEADS
) -> tuple[list[list[int]], list[Calibration]]:
    """The heads of the best mean rank over data sets, whichever asks, in order; and the features of these alone."""
    ranks = np.mean([part.precisions(len(heads)).argsort().argsort() for part in calibrations], axis=0)
    best = np.sort(np.argsort(-ranks.reshape(-1, 2).max(1), kind="stable")[:count])
    columns = [
        *np.stack((2 * best, 2 * best + 1), axis=1).ravel(),
        *range(2 * len(heads), calibrations[0].features.shape[1]),
    ]
    return [list(heads[i]) for i in best], [part.with_features(columns) for part in calibrations]


def fit_score(selection: WordSelection, calibrations: Sequence[Calibration]) -> None:
    """Logistic regression of a word's being in the rewrite on its features. Every data set weighs the same."""
    features = np.concatenate([part.features for part in calibrations])
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    inputs = torch.tensor((features - mean) / deviation, dtype=torch.float32)
    labels = torch.tensor(np.concatenate([part.labels for part in calibrations]), dtype=torch.float32)
    shares = torch.cat([torch.full((len(part.labels),), 1 / len(part.labels)) for part in calibrations])
    linear = nn.Linear(inputs.shape[1], 1)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        errors = nn.functional.binary_cross_entropy_with_logits(linear(inputs).squeeze(1), labels, reduction="none")
        total = (shares * errors).sum() / len(calibrations) + 1e-3 * linear.weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        weight = linear.weight / torch.tensor(deviation)
        selection.score.weight.copy_(weight)
        selection.score.bias.copy_(linear.bias - (weight * torch.tensor(mean)).sum())


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """The mean, over what is relevant, of the precision down to it."""
    hits = labels[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def describe(calibrations: Sequence[Calibration], heads: Sequence[Sequence[int]]) -> dict[str, Any]:
    """
    What was measured, for `heads.json` and its figure. `heads` are those of [`Maps.heads`], all of each layer.

    Returns:
        `selection_heads`, the chosen ones as a recipe takes them; `rows`, their average precision, of the better asker in
        the mean; and by data set: `turns`, `chance` (the average precision of any order), and `average_precision`, for each
        asker a list of heads for each of `layers`.
    """
    layers = sorted({layer for layer, _ in heads})
    precisions = np.stack([part.precisions(len(heads)) for part in calibrations])
    precisions = precisions.reshape(len(calibrations), len(layers), -1, len(ASKERS)).round(4)
    rows = []
    for layer, head in choose(calibrations, heads)[0]:
        its = precisions[:, layers.index(layer), head]  # (data sets, askers)
        asker = int(its.mean(0).argmax())
        values = {part.name: float(value) for part, value in zip(calibrations, its[:, asker], strict=True)}
        mean = round(float(its[:, asker].mean()), 4)
        rows.append({"head": f"{layer}.{head}", "asker": ASKERS[asker], **values, "mean": mean})
    return {
        "selection_heads": [row["head"] for row in rows],
        "turns": {part.name: part.num_turns for part in calibrations},
        "chance": {part.name: round(float(part.labels.mean()), 4) for part in calibrations},
        "rows": rows,
        "layers": layers,
        "average_precision": {
            part.name: {asker: its[..., place].tolist() for place, asker in enumerate(ASKERS)}
            for part, its in zip(calibrations, precisions, strict=True)
        },
    }


@one_line_errors("heads")
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser("python -m native_retrieval.heads", __doc__)
    parser.add_argument("--backbone", required=True, help="a causal language model: folder or Hub id")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="folders or Hub ids with rewrites, as NAME or NAME:SPLIT (train, or all)",
    )
    parser.add_argument("--output", required=True, type=Path, help="the JSON file to write")
    parser.add_argument("--figure", type=Path, help="the map of heads, a PNG file to write")
    parser.add_argument("--max_prompt_tokens", type=int, default=1024, help="longest prompt (default: %(default)s)")
    words = parser.parse_args(argv)
    for flag in ("output", "figure"):
        if path := getattr(words, flag):  # before minutes of work
            check_writable(flag, path.parent)

    from .arguments import split_source
    from .data import load_queries, splits
    from .figures import plot_heads
    from .initialise import from_backbone
    from .results import write_json

    rewrites = []
    for source, split in map(split_source, words.data):
        split = split or ("train" if "train" in splits(source) else None)
        rewrites.append((Path(source).name, load_queries(source, split)))
    if len({name for name, _ in rewrites}) < len(rewrites):
        raise ValueError(
            f"--data names two data sets alike: {', '.join(name for name, _ in rewrites)}; rename a folder"
        )
    model = from_backbone(words.backbone, embedding_dim=1, max_prompt_tokens=words.max_prompt_tokens)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    maps = Maps(model.backbone)
    calibrations = calibrate_all(model.backbone, model.processor, maps, maps.heads, rewrites)
    if not calibrations:
        raise ValueError(
            "--data has no rewrite that takes a word from an earlier turn; give data sets with human rewrites"
        )
    command = shlex.join(["python", "-m", "native_retrieval.heads", *(sys.argv[1:] if argv is None else argv)])
    result = {"command": command, "backbone": Path(words.backbone).name, **describe(calibrations, maps.heads)}
    write_json(result, words.output)
    if words.figure:
        words.figure.parent.mkdir(parents=True, exist_ok=True)
        plot_heads(result, words.figure)
    # In quotes: YAML would read 21.10 as the number 21.1.
    print("selection_heads: [" + ", ".join(f'"{head}"' for head in result["selection_heads"]) + "]")


if __name__ == "__main__":
    sys.exit(main())
