# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a query head for a causal language model. Ships to the Hub; imports transformers only."""

import os
import re
from typing import Any

from transformers import PreTrainedConfig

QUERY_MODES = ("context", "generated")


class NativeRetrievalConfig(PreTrainedConfig):
    r"""
    Configuration of a [`NativeRetrievalModel`]. A value that cannot work raises `ValueError`, naming what is wanted.

    The backbone (its own configuration stays in its own checkpoint):
        hidden_size, num_hidden_layers, vocab_size (`int`): the backbone's sizes.
        backbone_name_or_path, backbone_revision (`str`, *optional*): the Hub id and revision of the backbone.
        store_backbone (`bool`, defaults to `True`):
            Whether `save_pretrained` writes the backbone to `backbone/`. If not, `from_pretrained` fetches it by its name.

    The teacher, which is the embedding model of the document index:
        embedding_dim (`int`, defaults to 384): width of its vectors, and of the query vectors.
        teacher_name_or_path, teacher_revision (`str`, *optional*): its Hub id and revision.
        teacher_fingerprint (`str`, *optional*):
            256 bits, hexadecimal, of the teacher's vectors of fixed sentences; model and index must have the same.

    Queries:
        query_mode (`"context"` or `"generated"`, defaults to `"context"`):
            The head reads hidden states of the prompt, or of a query that the backbone writes (arXiv 2603.08429).
        num_context_tokens (`int`, defaults to 16): the last prompt tokens that the projection head reads.
        query_prompt (`str`): how the assistant's turn begins when the backbone writes a query.
        max_query_tokens (`int`, defaults to 32): longest written query, in tokens.

    The word path of the head:
        word_vocab_size (`int`, defaults to 30522): size of the word tokenizer's vocabulary. None gives the paper's head, without it.
        encoder_dim, encoder_num_layers, encoder_code_dim: width and depth of the word encoder, and of its word codes.
        encoder_max_pieces (`int`, defaults to 256): longest text that it reads, in word pieces.
        selection_heads (`list[list[int]]`): layer and number of each of the backbone's attention heads that choose words.
        selection_head_dim, selection_qk_norm: their width, and whether queries and keys are normalised in them.

    The projection head:
        head_num_layers (`int`, defaults to 0): depth of its transformer encoder. 0: without a projection head.
        head_dim, head_num_attention_heads, head_dropout: width, attention heads and dropout of this encoder.
        hidden_state_layers (`list[int]`, *optional*):
            Layers that the head reads (0 = embeddings). Default: those of `selection_heads`, and for a projection head
            five more, the last at seven tenths of the depth.
    """

    model_type = "native_retrieval"

    hidden_size: int = 576
    num_hidden_layers: int = 30
    vocab_size: int = 49152
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    store_backbone: bool = True

    embedding_dim: int = 384
    teacher_name_or_path: str | None = None
    teacher_revision: str | None = None
    teacher_fingerprint: str | None = None

    query_mode: str = "context"
    num_context_tokens: int = 16
    query_prompt: str = "Search query:"
    max_query_tokens: int = 32

    word_vocab_size: int | None = 30522
    encoder_dim: int = 384
    encoder_num_layers: int = 2
    encoder_code_dim: int = 192
    encoder_max_pieces: int = 256
    selection_heads: list[list[int]] | None = None
    selection_head_dim: int = 64
    selection_qk_norm: bool = False

    head_num_layers: int = 0
    head_dim: int = 384
    head_num_attention_heads: int = 8
    head_dropout: float = 0.1
    hidden_state_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.selection_heads = sorted(map(list, self.selection_heads or ()))
        if self.hidden_state_layers is None:
            shares = (0.1, 0.25, 0.4, 0.55, 0.7) if self.head_num_layers or not self.selection_heads else ()
            layers = {round(self.num_hidden_layers * share) for share in shares}
            self.hidden_state_layers = sorted(layers | {layer for layer, _ in self.selection_heads})
        self._check()

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, but a local folder's path is cut to its name: the rest concerns nobody else."""
        fields = super().to_dict()
        for name in ("backbone_name_or_path", "teacher_name_or_path"):
            value = fields.get(name)
            if value and (os.path.isdir(value) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", value)):
                fields[name] = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return fields

    def _check(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"NativeRetrievalConfig: {message}")

        depth, layers = self.num_hidden_layers, self.hidden_state_layers
        need(self.query_mode in QUERY_MODES, f"query_mode={self.query_mode!r} is unknown; choose one of {QUERY_MODES}")
        at_least_one = ("hidden_size", "num_hidden_layers", "vocab_size", "embedding_dim", "num_context_tokens")
        at_least_one += ("max_query_tokens", "head_dim", "head_num_attention_heads", "encoder_dim", "encoder_code_dim")
        at_least_one += ("encoder_max_pieces", "selection_head_dim", "word_vocab_size")
        for name in (*at_least_one, "head_num_layers", "encoder_num_layers"):
            value, least = getattr(self, name), int(name in at_least_one)
            whole = isinstance(value, int) and value >= least or (value is None and name == "word_vocab_size")
            need(whole, f"{name}={value!r} must be a whole number, at least {least}")
        reads = self.word_vocab_size is not None or self.head_num_layers > 0
        need(reads, "word_vocab_size=None and head_num_layers=0 leave the head nothing to read; set one of them")
        need(
            self.encoder_dim % 32 == 0,
            f"encoder_dim={self.encoder_dim} must be a multiple of 32, an attention head's width",
        )
        need(0.0 <= self.head_dropout < 1.0, f"head_dropout={self.head_dropout} must lie in [0, 1)")
        need(
            self.head_dim % self.head_num_attention_heads == 0,
            f"head_dim={self.head_dim} must be a multiple of head_num_attention_heads={self.head_num_attention_heads}",
        )
        need(len(layers) > 0, "hidden_state_layers is empty; name at least one layer")
        outside = [layer for layer in layers if not 0 <= layer <= depth]
        need(not outside, f"hidden_state_layers {outside} lie outside 0..{depth}, the backbone's depth")
        unread = [head for head in self.selection_heads if head[0] not in layers]
        need(not unread, f"selection_heads {unread} are of layers that hidden_state_layers={layers} leaves out")
        need(
            self.store_backbone or bool(self.backbone_name_or_path),
            "store_backbone=False needs backbone_name_or_path, which says where the backbone is",
        )


NativeRetrievalConfig.register_for_auto_class()
__all__ = ["NativeRetrievalConfig", "QUERY_MODES"]
