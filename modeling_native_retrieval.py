# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""A causal language model whose hidden states are search queries (after arXiv 2603.08429).

    messages ── processor ──▶ prompt ── backbone prefill ──▶ hidden states ── head ──▶ query vector
                                                         └▶ KV cache ── generate ──▶ the same tokens as the backbone alone

Ships to the Hub beside the configuration, the processor and the head; imports torch and transformers only.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

try:  # on the Hub these files form a package; in the repository they are plain modules
    from .cache_native_retrieval import NativeRetrievalOutput, QueryCache, generation_settings, token_rows
    from .checkpoint_native_retrieval import ComposedModel
    from .configuration_native_retrieval import QUERY_MODES, NativeRetrievalConfig
    from .head_native_retrieval import NativeRetrievalHead, Words
    from .messages_native_retrieval import as_conversations, is_one, last_question
    from .processing_native_retrieval import NativeRetrievalProcessor
except ImportError:
    from cache_native_retrieval import NativeRetrievalOutput, QueryCache, generation_settings, token_rows
    from checkpoint_native_retrieval import ComposedModel
    from configuration_native_retrieval import QUERY_MODES, NativeRetrievalConfig
    from head_native_retrieval import NativeRetrievalHead, Words
    from messages_native_retrieval import as_conversations, is_one, last_question
    from processing_native_retrieval import NativeRetrievalProcessor

NO_BACKBONE = "this model was loaded without its backbone; load it with one, or give hidden_states"


class NativeRetrievalModel(ComposedModel, GenerationMixin):
    """
    A causal language model and a head that turns its hidden states into query vectors for an existing index.

    The backbone's weights are frozen, and `generate` is its own.

    Example:

    ```python
    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True)
    vector = model.embed_query([{"role": "user", "content": "Who wrote Dune?"}])  # (1, embedding_dim)
    ```

    Without a `backbone`, the model takes hidden states only.
    """

    config_class = NativeRetrievalConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _auto_class = "AutoModel"

    def __init__(self, config, backbone: PreTrainedModel | None = None, processor=None):
        super().__init__(config)
        self.backbone = None
        self.processor: NativeRetrievalProcessor | None = processor
        self.query_head = NativeRetrievalHead(config)
        self.register_buffer("reference_embedding", torch.zeros(config.embedding_dim))
        self.post_init()
        self._passed: tuple = ()  # the module whose first pass is done
        if backbone is not None:
            self._set_backbone(backbone)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if type(module).__module__ == NativeRetrievalHead.__module__ and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _set_backbone(self, backbone: PreTrainedModel) -> None:
        for name in ("hidden_size", "num_hidden_layers"):
            seen, wanted = getattr(backbone.config.get_text_config(), name), getattr(self.config, name)
            if seen != wanted:
                raise ValueError(
                    f"the backbone has {name}={seen}, this head needs {wanted}; give the one of its training"
                )
        self.backbone = backbone.requires_grad_(False).eval()
        self.generation_config = backbone.generation_config
        self.query_head.to(self._device())

    def _device(self) -> torch.device:
        """Where prompts go: the backbone's first device that holds weights."""
        weights = (self.backbone or self.query_head).parameters()
        return next((weight.device for weight in weights if weight.device.type != "meta"), torch.device("cpu"))

    # -- load and save --------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self):
        """The backbone's tokenizer, `processor.tokenizer`."""
        return self.processor.tokenizer

    def get_input_embeddings(self) -> nn.Module | None:
        return self.backbone and self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone and self.backbone.get_output_embeddings()

    def train(self, mode: bool = True) -> "NativeRetrievalModel":
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()  # frozen: dropout in it would only blur the states
        return self

    # -- prompts to hidden states to vectors ----------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        readout_mask: torch.BoolTensor | None = None,
        hidden_states: torch.Tensor | None = None,
        words: Words | None = None,
    ) -> NativeRetrievalOutput:
        """
        Prompts to query vectors. Gradients reach the head only.

        Args:
            input_ids, attention_mask (`(batch, tokens)`): prompts, padded on either side.
            readout_mask (`(batch, tokens)`, *optional*): the tokens that the projection head reads: those of a written
                query, or by default each prompt's last `num_context_tokens`.
            hidden_states (`(batch, tokens, layers, hidden_size)`, *optional*): the backbone's, at `query_head.layers`, if
                they are known; the backbone is then not run.
            words ([`Words`], *optional*): the words of the prompts, if they are known. Without `input_ids`: plain texts,
                whose vectors come from these words alone.

        Raises:
            `ValueError`: for shapes that do not fit, or without a backbone for what needs one.
        """
        device = next(self.query_head.parameters()).device
        if input_ids is None and words is None:
            raise ValueError("there is nothing to embed; give input_ids, or words alone")
        if input_ids is None:
            return NativeRetrievalOutput(query_embeddings=self.query_head.lexical(words.to(device)))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if hidden_states is None:
            hidden_states = self.prefill(input_ids, attention_mask, use_cache=False).hidden_states
        if hidden_states.shape[:2] != input_ids.shape:
            raise ValueError(
                f"hidden_states cover {tuple(hidden_states.shape[:2])} (batch, tokens), input_ids {tuple(input_ids.shape)}; "
                "give both for the same tokens"
            )
        if words is None and self.query_head.encoder is not None:
            words = self.processor.read_words(input_ids, attention_mask)
        vectors, attributions = self.query_head(
            hidden_states.to(device),
            attention_mask.to(device),
            None if words is None else words.to(device),
            None if readout_mask is None else readout_mask.to(device),
        )
        return NativeRetrievalOutput(vectors, attributions, input_ids, attention_mask)

    def prefill(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None, use_cache: bool = True
    ) -> QueryCache:
        """
        One pass of prompts `(batch, tokens)` through the backbone, without its language-model head.

        Raises:
            `ValueError`: for a prompt that is longer than the backbone's context.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self._pass(QueryCache(input_ids.to(self._device()), mask.to(self._device())), use_cache)

    @torch.no_grad()
    def _pass(self, cache: QueryCache, use_cache: bool = True) -> QueryCache:
        """Passes those columns of the prompts that are not in the cache yet; fills it in place."""
        if self.backbone is None:
            raise ValueError(NO_BACKBONE)
        ids, mask = cache.input_ids, cache.attention_mask
        longest = getattr(self.backbone.config.get_text_config(), "max_position_embeddings", None)
        if longest and ids.shape[1] > longest and (tokens := int(mask.sum(1).max())) > longest:
            raise ValueError(
                f"a prompt of {tokens} tokens is longer than the backbone's context of {longest}; lower the processor's "
                "max_prompt_tokens"
            )
        past, cache.past_key_values = cache.past_key_values, None  # what interrupts a pass leaves no half of it
        if past is None and use_cache:
            past = DynamicCache(config=self.backbone.config)
            past.activate_past_recording()  # sliding windows could not be cropped otherwise
        known = past.get_seq_length() if use_cache else 0
        output = self._reading_part(not use_cache)(
            input_ids=ids[:, known:],
            attention_mask=mask,
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)[:, known:],
            past_key_values=past,
            use_cache=use_cache,
            output_hidden_states=True,
        )
        states = self._stacked(output.hidden_states)
        cache.hidden_states = torch.cat((cache.hidden_states[:, :known], states), dim=1) if known else states
        cache.past_key_values = past
        return cache

    def _stacked(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The states that the head reads, `(batch, tokens, layers, hidden_size)`, on one device."""
        return torch.stack([hidden_states[i].to(hidden_states[0].device) for i in self.query_head.layers], dim=2)

    def _reading_part(self, embeds_only: bool) -> nn.Module:
        """The backbone without its language-model head; for a vector alone, a view of it without the layers not read."""
        base, depth = self.backbone.base_model, max(self.query_head.layers) + 1
        # transformers prepares the layers in their first pass; in a view's it would do so once more.
        ready, self._passed = bool(self._passed) and self._passed[0] is base, (base,)
        if not (embeds_only and ready) or depth >= self.config.num_hidden_layers:
            return base
        part = copy.copy(base)
        part.config = copy.copy(base.config)
        part.config.num_hidden_layers = depth
        return part

    @torch.no_grad()
    def embed_prefilled(self, cache: QueryCache, mode: str | None = None) -> NativeRetrievalOutput:
        """The query vectors of prompts that have been prefilled; their cache stays as it is."""
        readout_mask, queries, prompt = None, None, cache.input_ids.shape[1]
        if self._check_mode(mode) == "generated":
            cache, queries = self.write_queries(cache)
            readout_mask = cache.attention_mask.bool().clone()
            readout_mask[:, : prompt + len(self._query_prompt())] = False
        words = None
        if self.query_head.encoder is not None:
            words = self.processor.read_words(cache.input_ids, cache.attention_mask, cache.words)
        output = self(cache.input_ids, cache.attention_mask, readout_mask, cache.hidden_states, words)
        output.query_ids = queries
        return output

    @torch.no_grad()
    def write_queries(self, cache: QueryCache) -> tuple[QueryCache, list[list[int]]]:
        """
        Lets the backbone write a search query after each prompt, greedily. The prompts' cache stays as it is.

        Returns:
            the states of prompts, `query_prompt` and queries, and each query's tokens, without the line end.
        """
        start = torch.tensor([self._query_prompt()], device=cache.input_ids.device).expand(len(cache.input_ids), -1)
        ends = self.backbone.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, (list, tuple)) else [ends]), *self.processor.query_ends} - {None}
        settings = GenerationConfig(
            # One more than is kept: a token's state exists once the token after it is asked for.
            max_new_tokens=self.config.max_query_tokens + 1,
            min_new_tokens=1,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(ends),
            pad_token_id=self.processor.pad_token_id,
        )
        mask = torch.cat((cache.attention_mask, torch.ones_like(start)), dim=1)
        copied = QueryCache(torch.cat((cache.input_ids, start), dim=1), mask, cache.hidden_states, cache.fork())
        self._generate(copied, settings)
        begin, end = mask.shape[1], mask.shape[1] + self.config.max_query_tokens
        written = copied.input_ids[:, begin:end]
        real = (~torch.isin(written, torch.tensor(sorted(ends), device=written.device))).long().cumprod(1)
        queries = [row[keep.bool()].tolist() for row, keep in zip(written, real, strict=True)]
        mask, states = torch.cat((mask, real), dim=1), copied.hidden_states[:, :end]
        return QueryCache(copied.input_ids[:, :end], mask, states, None, dict(cache.words)), queries

    def _query_prompt(self) -> list[int]:
        return self.tokenizer(self.config.query_prompt, add_special_tokens=False)["input_ids"]

    # -- generation -----------------------------------------------------------------------------------------------------

    def generate(
        self, input_ids: torch.LongTensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ):
        """
        The backbone's own `generate`. With `past_key_values` from `embed_query(..., return_cache=True)`, the tokens that
        the cache and `input_ids` begin with do not pass again; the cache then holds the generated tokens too.

        Raises:
            `ValueError`: with a cache, for several rows without `attention_mask`, and for ways to generate that one cache
                cannot follow, such as beams.
        """
        if self.backbone is None:
            raise ValueError(NO_BACKBONE)
        input_ids = kwargs.pop("inputs", input_ids)  # transformers' own name for them
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, QueryCache):
            return self.backbone.generate(input_ids, generation_config, **kwargs)
        del kwargs["past_key_values"]
        rows = token_rows(input_ids, kwargs.pop("attention_mask", None), self.config.vocab_size)
        settings, kwargs = generation_settings(generation_config, self.backbone.generation_config, kwargs)
        cache.lay_out(rows, self.processor.pad)
        laid_out, shift = cache.input_ids.shape[1], cache.input_ids.shape[1] - input_ids.shape[1]
        for name in ("max_length", "min_length"):  # both count columns
            if getattr(settings, name) is not None:
                setattr(settings, name, getattr(settings, name) + shift)
        wants, returns_dict = settings.output_hidden_states, settings.return_dict_in_generate
        output = self._generate(cache, settings, **kwargs)
        output.sequences = torch.cat((input_ids.to(output.sequences.device), output.sequences[:, laid_out:]), dim=1)
        if not wants:
            output.hidden_states = None
        return output if returns_dict else output.sequences

    def _generate(self, cache: QueryCache, settings: GenerationConfig, **kwargs) -> ModelOutput:
        """Generates after `cache.input_ids`, whose first columns have passed, by these settings alone; keeps what passes."""
        past, cache.past_key_values = cache.past_key_values, None  # what interrupts it leaves no half of a pass
        if past is None:
            past = DynamicCache(config=self.backbone.config)
        known = past.get_seq_length()
        settings.update(use_cache=True, return_dict_in_generate=True, output_hidden_states=True)
        backbone = copy.copy(self.backbone)  # a view of it without its own settings
        backbone.generation_config = settings
        prompt = {"attention_mask": cache.attention_mask, "past_key_values": past}
        output = backbone.generate(cache.input_ids, settings, **prompt, **kwargs)
        before = [cache.hidden_states[:, :known]] if known else []
        cache.hidden_states = torch.cat(before + [self._stacked(step) for step in output.hidden_states], dim=1)
        cache.input_ids = output.sequences[:, : cache.hidden_states.shape[1]]
        generated = cache.input_ids.shape[1] - cache.attention_mask.shape[1]
        cache.attention_mask = F.pad(cache.attention_mask, (0, generated), value=1)
        cache.past_key_values = past
        return output

    # -- conversations to vectors ---------------------------------------------------------------------------------------

    def embed_query(
        self,
        queries: Any,
        *,
        tools: list | None = None,
        mode: str | None = None,
        batch_size: int | None = None,
        past_key_values: QueryCache | None = None,
        return_cache: bool = False,
        return_attributions: bool = False,
        attention_mask: torch.LongTensor | None = None,
        **template_kwargs,
    ) -> torch.Tensor | NativeRetrievalOutput:
        """
        Query vectors in the teacher's space.

        Args:
            queries: a question, a conversation (OpenAI's messages, ending on any role), a row with `messages` and `tools`,
                or a sequence of these; or token ids `(batch, tokens)`, with their `attention_mask`.
            tools, template_kwargs (*optional*): for the backbone's chat template.
            mode (`"context"` or `"generated"`, *optional*): default `config.query_mode`.
            batch_size (`int`, *optional*): prompts in one pass; see [`embed_prompts`].
            past_key_values (`QueryCache`, *optional*): from an earlier call with `return_cache=True`: what it and these
                prompts begin with does not pass again.
            return_cache (`bool`): also return the prompts' cache, token ids and mask, for `generate` and the next turn.
            return_attributions (`bool`): also return each token's share in the vector.

        Returns:
            `torch.FloatTensor` of shape `(queries, embedding_dim)`, L2-normalised, on the CPU; or, with a cache or
            attributions, for which all prompts go through in one batch, a [`NativeRetrievalOutput`].

        Raises:
            `ValueError`: for malformed input, naming it.
        """
        mode = self._check_mode(mode)
        if past_key_values is not None and not isinstance(past_key_values, QueryCache):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values is a {kind}; give what embed_query(..., return_cache=True) returned")
        if isinstance(queries, torch.Tensor):
            prompts = token_rows(queries, attention_mask, self.config.vocab_size)
        else:
            pairs = as_conversations(queries, tools)
            prompts = [self.processor.encode(messages, tools=own, **template_kwargs) for messages, own in pairs]
        if past_key_values is None and not return_cache and not return_attributions:
            return self.embed_prompts(prompts, mode=mode, batch_size=batch_size)
        if not prompts:
            raise ValueError("queries is empty; a cache or attributions need at least one conversation")
        if (cache := past_key_values) is None:
            cache = self.prefill(*self.processor.pad(prompts))
        else:
            cache.lay_out(prompts, self.processor.pad)
            self._pass(cache)
        output = self.embed_prefilled(cache, mode)
        if output.attributions is not None:  # not those of a written query
            output.attributions = output.attributions[:, : cache.input_ids.shape[1]]
        output.input_ids, output.attention_mask = cache.input_ids, cache.attention_mask
        output.cache = cache if return_cache else None
        return output

    def extract_query(
        self, queries: Any, *, tools: list | None = None, num_words: int = 6, **template_kwargs
    ) -> str | list[str]:
        """
        The last question and the earlier words that it needs, as text: for BM25, hybrid search, a search API, or an
        embedding model that no head was trained for. Nothing is generated.

        Takes what [`embed_query`] takes; at most `num_words` are added. Returns `str` for one query, `list[str]` for several.
        Raises `ValueError` for malformed input, or a head that selects no words.
        """
        pairs, texts = as_conversations(queries, tools), []
        for messages, own in pairs:
            prompt = self.processor.encode(messages, tools=own, **template_kwargs)
            texts += self.extract_prefilled(
                self.prefill(*self.processor.pad([prompt]), use_cache=False), [messages], num_words
            )
        return texts[0] if is_one(queries) else texts

    @torch.no_grad()
    def extract_prefilled(self, cache: QueryCache, conversations: list[list[dict]], num_words: int = 6) -> list[str]:
        """The same of conversations whose prompts have been prefilled; their cache stays as it is."""
        head = self.query_head
        if head.selection is None:
            raise ValueError("this head selects no words (word_vocab_size=None); use a model with a word encoder")
        if not isinstance(num_words, int) or num_words < 0:
            raise ValueError(f"num_words={num_words!r} must be a whole number, 0 or more")
        words = self.processor.read_words(cache.input_ids, cache.attention_mask, cache.words)
        device = next(head.parameters()).device
        scores = head.selection(cache.hidden_states.to(device), cache.attention_mask.to(device), words.to(device))
        selected = head.select(words, scores, num_words)
        return [
            " ".join((last_question(messages), *self.processor.spell(words, row, places, messages)))
            for row, (messages, places) in enumerate(zip(conversations, selected, strict=True))
        ]

    def embed_prompts(
        self, prompts: list[list[int]], *, mode: str | None = None, batch_size: int | None = None
    ) -> torch.FloatTensor:
        """
        Prompts, as `processor.encode` makes them, to query vectors `(prompts, embedding_dim)`, on the CPU.

        Args:
            batch_size (`int`, *optional*): prompts in one pass, sorted by length. Default: 32 on an accelerator, 1 on a
                CPU. In bfloat16 a prompt's vector depends a little on the others in its batch.

        Raises:
            `ValueError`: for an empty prompt, a batch size below 1, or an unknown mode.
        """
        mode = self._check_mode(mode)
        if batch_size is None:
            batch_size = 1 if self._device().type == "cpu" else 32
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number, at least 1")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty; give at least one token")
        vectors = torch.empty(len(prompts), self.config.embedding_dim)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            cache = self.prefill(*self.processor.pad([prompts[i] for i in rows]), use_cache=mode != "context")
            vectors[rows] = self.embed_prefilled(cache, mode).query_embeddings.float().cpu()
        return vectors

    def _check_mode(self, mode: str | None) -> str:
        mode = self.config.query_mode if mode is None else mode
        if mode not in QUERY_MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(QUERY_MODES)}")
        return mode


NativeRetrievalModel.register_for_auto_class("AutoModel")
__all__ = ["NativeRetrievalModel", "NativeRetrievalOutput", "QueryCache"]
