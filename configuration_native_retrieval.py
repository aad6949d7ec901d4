# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a causal language model whose hidden states are search queries.

Ships to the Hub beside `modeling_native_retrieval.py`; imports transformers only.
"""

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

QUERY_MODES = ("context", "generated", "probe")


class NativeRetrievalConfig(PreTrainedConfig):
    r"""
    What a [`NativeRetrievalModel`] is made of. Every field is checked at construction; a combination that cannot work
    raises `ValueError` with the value seen and the value wanted.

    The backbone:

        text_config (`PreTrainedConfig` or `dict`):
            The configuration of the causal language model, any architecture that `AutoModelForCausalLM` knows.
        backbone_name_or_path, backbone_revision (`str`, *optional*):
            Where the backbone came from. Needed when `store_backbone=False`.
        tokenizer_fingerprint (`str`, *optional*):
            Tells whether tokenizer and chat template are those of the training; another one is warned of.
        store_backbone (`bool`, defaults to `True`):
            Whether `save_pretrained` writes the backbone's weights too. If not, it writes the head alone (a few MB) and
            `from_pretrained` fetches the backbone from `backbone_name_or_path` at `backbone_revision`.

    The teacher, that is the embedding model of the document index:

        embedding_dim (`int`, defaults to 384): width of the teacher's vectors, and of ours.
        teacher_name_or_path, teacher_revision (`str`, *optional*): which model it is.
        teacher_fingerprint (`str`, *optional*):
            256 bits, hexadecimal, taken from the teacher's vectors of fixed sentences. An index carries the same, and a
            model and an index whose fingerprints differ refuse each other.

    From the conversation to the vector:

        query_mode (`"context"`, `"generated"` or `"probe"`, defaults to `"context"`):
            What the head reads. `"context"`: the last `num_context_tokens` tokens of the prompt, which the prefill has
            computed anyway, so that no query is ever written. `"generated"` (arXiv 2603.08429): the tokens of a query
            that the backbone writes first. `"probe"`: besides the context, `num_probe_tokens` learned tokens that go
            through the backbone behind the prompt, with an adapter that acts on them alone.
        num_probe_tokens (`int`, defaults to 0): learned tokens of `"probe"` mode; 0 leaves the mode out.
        adapter_rank (`int`, defaults to 32): rank of the adapter (LoRA) of `"probe"` mode.
        adapter_num_layers (`int`, defaults to 2):
            How many of the backbone's layers it acts in, on every linear map: the last ones that are read. Each costs
            time in every query.
        num_context_tokens (`int`, defaults to 16): tokens that the head reads in `"context"` mode.
        query_prompt (`str`): how the assistant's turn begins when the backbone is made to write a query.
        max_query_tokens (`int`, defaults to 32): tokens of a written query at most.
        max_prompt_tokens (`int`, *optional*):
            Longest prompt, in tokens; older turns are dropped beyond it. Defaults to the backbone's context less the
            room for a written query.

    The head:

        hidden_state_layers (`list[int]`, *optional*):
            The layers it reads, as indices into `hidden_states` (0 = embeddings, `num_hidden_layers` = after the final
            norm). Defaults to five, the last at seven tenths of the depth: those behind cost time, and won nothing.
        head_dim, head_num_layers, head_num_attention_heads, head_dropout:
            The transformer encoder of the projection head.
        head_skip (`bool`, defaults to `True`): whether a linear path runs beside the encoder. The paper has none.
        copy_num_heads (`int`, defaults to 8):
            Heads of the copy path, which picks words out of the conversation; 0 leaves the path out, and gives the
            paper's head.
        copy_head_dim (`int`, defaults to 64): width of a copy head's queries and keys.
        copy_vocab_size (`int`, *optional*):
            Tokens that the copy path has values for: the teacher's, whose tokenizer is then saved beside the weights. By
            default those of the backbone.
        copy_layer (`int`, *optional*):
            The layer, one of `hidden_state_layers`, that gives the copy path its keys. Defaults to the middle one.
    """

    model_type = "native_retrieval"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: dict | PreTrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    tokenizer_fingerprint: str | None = None
    store_backbone: bool = True

    embedding_dim: int = 384
    teacher_name_or_path: str | None = None
    teacher_revision: str | None = None
    teacher_fingerprint: str | None = None

    query_mode: str = "context"
    num_probe_tokens: int = 0
    adapter_rank: int = 32
    adapter_num_layers: int = 2
    num_context_tokens: int = 16
    query_prompt: str = "Search query:"
    max_query_tokens: int = 32
    max_prompt_tokens: int | None = None

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
        text = self.text_config.get_text_config()
        depth = text.num_hidden_layers
        # One truth about tying: what the backbone does.
        self.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", False))
        if self.hidden_state_layers is None:
            self.hidden_state_layers = sorted({round(depth * share) for share in (0.1, 0.25, 0.4, 0.55, 0.7)})
        if self.copy_layer is None and self.hidden_state_layers:
            self.copy_layer = self.hidden_state_layers[len(self.hidden_state_layers) // 2]
        # A query prompt is a few words; 32 tokens are ample.
        room = max(self.max_query_tokens + 32, self.num_probe_tokens)
        longest = max((getattr(text, "max_position_embeddings", None) or 2048) - room, 1)
        if self.max_prompt_tokens is None:
            self.max_prompt_tokens = longest
        self._check(depth, longest)

    def _check(self, depth: int, longest: int) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"NativeRetrievalConfig: {message}")

        need(
            self.query_mode in QUERY_MODES,
            f"query_mode={self.query_mode!r} is unknown; choose one of {', '.join(QUERY_MODES)}",
        )
        for name in (
            "embedding_dim",
            "adapter_rank",
            "adapter_num_layers",
            "num_context_tokens",
            "max_query_tokens",
            "max_prompt_tokens",
            "head_dim",
            "head_num_attention_heads",
            "copy_head_dim",
        ):
            value = getattr(self, name)
            need(isinstance(value, int) and value >= 1, f"{name}={value!r} must be a whole number, at least 1")
        need(
            self.copy_vocab_size is None or self.copy_vocab_size >= 1,
            f"copy_vocab_size={self.copy_vocab_size} must be at least 1",
        )
        need(
            self.max_prompt_tokens <= longest,
            f"max_prompt_tokens={self.max_prompt_tokens} leaves no room for a query of {self.max_query_tokens} tokens in "
            f"the backbone's context; at most {longest}",
        )
        for name in ("head_num_layers", "copy_num_heads", "num_probe_tokens"):
            need(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        need(
            self.query_mode != "probe" or self.num_probe_tokens > 0,
            "query_mode='probe' needs probe tokens; set num_probe_tokens, 8 for example",
        )
        need(0.0 <= self.head_dropout < 1.0, f"head_dropout={self.head_dropout} must lie in [0, 1)")
        need(
            self.head_dim % self.head_num_attention_heads == 0,
            f"head_dim={self.head_dim} must be a multiple of head_num_attention_heads={self.head_num_attention_heads}",
        )
        need(len(self.hidden_state_layers) > 0, "hidden_state_layers is empty; name at least one layer")
        outside = [layer for layer in self.hidden_state_layers if not 0 <= layer <= depth]
        need(not outside, f"hidden_state_layers {outside} lie outside 0..{depth}, the backbone's depth")
        need(
            self.copy_layer in self.hidden_state_layers,
            f"copy_layer={self.copy_layer} must be one of hidden_state_layers={self.hidden_state_layers}",
        )
        need(
            self.store_backbone or bool(self.backbone_name_or_path),
            "store_backbone=False needs backbone_name_or_path, or the saved head could never find its backbone",
        )


NativeRetrievalConfig.register_for_auto_class()
__all__ = ["NativeRetrievalConfig", "QUERY_MODES"]
