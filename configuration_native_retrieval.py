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

    The head:
        hidden_state_layers (`list[int]`, *optional*):
            Layers that it reads (0 = embeddings). Default: five, the last at seven tenths of the depth.
        head_dim, head_num_layers, head_num_attention_heads, head_dropout: transformer encoder of the projection head.
        head_skip (`bool`, defaults to `True`): whether a linear path runs beside the encoder. The paper has none.
        copy_num_heads (`int`, defaults to 8): attention heads of the copy path; 0 gives the paper's head, without it.
        copy_head_dim (`int`, defaults to 64): width of their queries and keys.
        copy_vocab_size (`int`, *optional*): size of the copy path's vocabulary. Default: the backbone's vocabulary.
        copy_layer (`int`, *optional*): layer of the copy path's keys, one of `hidden_state_layers`. Default: the middle one.
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

    hidden_state_layers: list[int] | None = None
    head_dim: int = 384
    head_num_layers: int = 1
    head_num_attention_heads: int = 8
    head_dropout: float = 0.1
    head_skip: bool = True
    copy_num_heads: int = 8
    copy_head_dim: int = 64
    copy_vocab_size: int | None = None
    copy_layer: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_state_layers is None:
            shares = (0.1, 0.25, 0.4, 0.55, 0.7)
            self.hidden_state_layers = sorted({round(self.num_hidden_layers * share) for share in shares})
        if self.copy_layer is None and self.hidden_state_layers:
            self.copy_layer = self.hidden_state_layers[len(self.hidden_state_layers) // 2]
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
        at_least_one += ("max_query_tokens", "head_dim", "head_num_attention_heads", "copy_head_dim", "copy_vocab_size")
        for name in (*at_least_one, "head_num_layers", "copy_num_heads"):
            value, least = getattr(self, name), int(name in at_least_one)
            whole = isinstance(value, int) and value >= least or (value is None and name == "copy_vocab_size")
            need(whole, f"{name}={value!r} must be a whole number, at least {least}")
        need(0.0 <= self.head_dropout < 1.0, f"head_dropout={self.head_dropout} must lie in [0, 1)")
        need(
            self.head_dim % self.head_num_attention_heads == 0,
            f"head_dim={self.head_dim} must be a multiple of head_num_attention_heads={self.head_num_attention_heads}",
        )
        need(len(layers) > 0, "hidden_state_layers is empty; name at least one layer")
        outside = [layer for layer in layers if not 0 <= layer <= depth]
        need(not outside, f"hidden_state_layers {outside} lie outside 0..{depth}, the backbone's depth")
        need(self.copy_layer in layers, f"copy_layer={self.copy_layer} must be one of hidden_state_layers={layers}")
        need(
            self.store_backbone or bool(self.backbone_name_or_path),
            "store_backbone=False needs backbone_name_or_path, which says where the backbone is",
        )


NativeRetrievalConfig.register_for_auto_class()
__all__ = ["NativeRetrievalConfig", "QUERY_MODES"]
