# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""What passed through the backbone, and what came of it: one KV cache for the query vector, the answer and the next turn.

It knows token ids, and nothing of text or models. Ships to the Hub; imports torch and transformers only.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

# How `generate` fills a cache: whatever a backbone's own settings say, it goes on from ours.
FILLING = ("use_cache", "cache_implementation", "prefill_chunk_size")
# With another value of one of these, `generate` goes ways that one cache cannot follow.
FOLLOWED = {"num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "use_cache": True, "use_mtp": False}
FOLLOWED |= dict.fromkeys(("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "custom_generate"))
FOLLOWED |= dict.fromkeys(("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "token_healing"))
FOLLOWED |= dict.fromkeys((*FILLING[1:], "inputs_embeds", "position_ids"))  # the cache may lay the rows out otherwise


@dataclass
class NativeRetrievalOutput(ModelOutput):
    """
    query_embeddings (`torch.FloatTensor` of shape `(batch, embedding_dim)`): L2-normalised, in the teacher's space.
    attributions (`torch.FloatTensor` of shape `(batch, tokens)`, *optional*): each token's share in the vector.
    input_ids, attention_mask (`(batch, tokens)`): what the vectors were read from, padded on the left.
    past_key_values (`QueryCache`, *optional*): the prompts' cache, for `generate` and for the next turn. The field is
        `cache`, as transformers 5.24 calls it.
    query_ids (`list[list[int]]`, *optional*): in `generated` mode, the query that was written.
    """

    query_embeddings: torch.FloatTensor | None = None
    attributions: torch.FloatTensor | None = None
    input_ids: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    cache: Any = None
    query_ids: list[list[int]] | None = None

    @property
    def past_key_values(self) -> Any:
        return self.cache


@dataclass
class QueryCache:
    """
    Prompts that have passed through the backbone: `input_ids`, `attention_mask` `(batch, tokens)`, the `hidden_states`
    `(batch, tokens, layers, hidden_size)` that the head reads, the backbone's own cache (`past_key_values`, unless it was
    not kept), and the `words` that the processor has read of their turns.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    hidden_states: torch.FloatTensor | None = None
    past_key_values: Any = None
    words: dict = field(default_factory=dict)

    def fork(self) -> Any:
        """The backbone's cache, to go on from without changing this one."""
        fork = copy.copy(self.past_key_values)
        if fork is not None:  # layers replace their tensors; recurrent ones write into them
            fork.layers = [(copy.deepcopy if _is_recurrent(layer) else copy.copy)(layer) for layer in fork.layers]
        return fork

    def lay_out(self, prompts: list[list[int]], pad: Callable[[list[list[int]]], tuple[torch.Tensor, ...]]) -> None:
        """
        Lays prompts out in place: the columns that they all begin with stay, and the rest is padded on the left. At least
        one token of each is left to pass: from its state the next follows.

        Raises:
            `ValueError`: for another number of prompts than the cache holds.
        """
        ids, mask = self.input_ids.cpu(), self.attention_mask.cpu()
        if len(prompts) != len(ids):
            raise ValueError(f"the cache holds {len(ids)} conversations, and {len(prompts)} are to go on from it")
        columns = 0 if self.past_key_values is None else self.hidden_states.shape[1]
        for row, prompt in enumerate(prompts):
            at = mask[row, :columns].nonzero().flatten()
            count = min(len(at), len(prompt) - 1)
            same = (ids[row, at[:count]] == torch.tensor(prompt[:count])).long().cumprod(0).sum()
            columns = min(columns, int(at[same]) if same < len(at) else columns)
        counts = mask[:, :columns].sum(1).tolist()
        rest = [prompt[count:] for prompt, count in zip(prompts, counts, strict=True)]
        # Windows and recurrent states count columns, padding between the tokens of a row included.
        plain = all(type(layer).__name__ == "DynamicLayer" for layer in getattr(self.past_key_values, "layers", ()))
        if not any(counts) or not (plain or len({*map(len, rest)}) == 1) or not self._crop(columns):
            columns, rest, self.past_key_values = 0, prompts, None
        more, more_mask = (part.to(self.input_ids.device) for part in pad(rest))
        self.input_ids = torch.cat((self.input_ids[:, :columns], more), dim=1)
        self.attention_mask = torch.cat((self.attention_mask[:, :columns], more_mask), dim=1)
        self.hidden_states = self.hidden_states[:, :columns] if columns else None

    def _crop(self, columns: int) -> bool:
        """Keeps the first columns. False, if a window or a recurrent state has lost what that needs."""
        past, remove = self.past_key_values, self.past_key_values.get_seq_length() - columns
        for layer in past.layers if remove else ():
            window = min(layer.sliding_window - 1, columns) if getattr(layer, "is_sliding", False) else 0
            if _is_recurrent(layer) or (window and layer.keys.shape[-2] - remove < window):
                return False
        if remove:
            past.activate_past_recording()  # `generate` may switch it off, and windows then refuse to be cropped
            past.crop(-remove)
        return True


def _is_recurrent(layer: Any) -> bool:
    return hasattr(layer, "recurrent_states")


def token_rows(input_ids: Any, attention_mask: torch.Tensor | None, vocab_size: int) -> list[list[int]]:
    """
    Token ids `(batch, tokens)` without their padding.

    Raises:
        `ValueError`: for anything else, ids outside the vocabulary, a mask that does not fit, or several rows without one.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        seen = tuple(getattr(input_ids, "shape", ())) or type(input_ids).__name__
        raise ValueError(f"input_ids is {seen}; give a tensor of token ids (batch, tokens)")
    outside = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if len(outside):
        raise ValueError(f"input_ids holds {int(outside[0])}, outside the vocabulary of {vocab_size}")
    if attention_mask is None and len(input_ids) > 1:
        raise ValueError("token ids of several rows may hold padding; give attention_mask as well")
    mask = torch.ones_like(input_ids) if attention_mask is None else torch.as_tensor(attention_mask).to(input_ids)
    if mask.shape != input_ids.shape or not input_ids.numel() or not mask.any(1).all():
        shapes = f"{tuple(mask.shape)} and {tuple(input_ids.shape)}"
        raise ValueError(f"attention_mask and input_ids, {shapes}, need one shape and a token in each row")
    return [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]


def generation_settings(
    given: GenerationConfig | None, backbone: GenerationConfig, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """
    The settings of a generation from a cache: those given, else the backbone's, but for how it fills a cache; and what of
    `kwargs` is no setting.

    Raises:
        `ValueError`: for a way to generate that one cache cannot follow, such as beams.
    """
    settings, own = copy.deepcopy(given or GenerationConfig()), backbone.to_dict()
    settings.update(**{name: own[name] for name in own if name not in FILLING}, defaults_only=True)
    rest = settings.update(**kwargs)
    for name, plain in FOLLOWED.items():
        if rest.get(name, getattr(settings, name, None)) not in (None, plain):
            raise ValueError(f"generate cannot go on from a cache with {name}; leave {name} or past_key_values out")
    return settings, rest


__all__ = ["NativeRetrievalOutput", "QueryCache", "generation_settings", "token_rows"]
