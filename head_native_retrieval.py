# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""The query head: hidden states and the words of a conversation in, query vectors out.

    hidden states ── WordSelection ──▶ the earlier words that the last question needs
                                             │
    words ── question; with 2 of them; with 6; all newest words ── WordEncoder ──▶ 4 vectors ── shares ──▶ query vector
    hidden states of the newest tokens ── ProjectionHead ──▶ vector, added if the head has one ──────────────┘

It takes tensors and knows nothing of tokenizers, chat templates or backbones; `layers` says which hidden states it reads.
Ships to the Hub; imports torch and transformers only.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

try:  # on the Hub these files form a package; in the repository they are plain modules
    from .configuration_native_retrieval import NativeRetrievalConfig
except ImportError:
    from configuration_native_retrieval import NativeRetrievalConfig


class Words(NamedTuple):
    """
    The word pieces of prompts, all `(batch, pieces)`, in the order of the prompt.

    ids: in the word tokenizer's vocabulary. positions: the prompt's token in which each ends. mask: False for padding.
    turn_ids: 1 for the user's last turn, 2 and more for the turns before it, 0 for what follows it. groups: the number of
    the word that a piece belongs to, the same wherever it is said; 0 for punctuation and function words.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    turn_ids: torch.Tensor
    groups: torch.Tensor

    def to(self, device: torch.device) -> "Words":
        return Words(*(part.to(device) for part in self))


class WordSelection(nn.Module):
    """
    Scores the words of earlier turns by how much the last question attends to them, in a few of the backbone's own
    attention heads: copies of their query and key maps, on the hidden states that go into their layers.

    A head that resolves "it" looks at what "it" is. `native_retrieval.heads` finds which do, once for each backbone.
    """

    NUM_PIECES, NUM_TOKENS = 48, 3  # what asks: the question's newest pieces; the last tokens, which have read it all

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        heads, width = len(config.selection_heads), config.selection_head_dim
        self.states = [config.hidden_state_layers.index(layer) for layer, _ in config.selection_heads]
        self.query = nn.Parameter(torch.empty(heads, width, config.hidden_size))
        self.key = nn.Parameter(torch.empty(heads, width, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(2, heads, width))
        self.norm = nn.Parameter(torch.empty(2, heads, width)) if config.selection_qk_norm else None
        # Of float32, as integers: `.half()` of a model would round them, and a thousand tokens away that is another angle.
        self.register_buffer("frequencies", torch.zeros(heads, width // 2, dtype=torch.int32))
        self.score = nn.Linear(2 * heads + 1, 1)

    def reset_parameters(self) -> None:
        for maps in (self.query, self.key):
            init.normal_(maps, std=0.02)
        init.zeros_(self.bias)
        if self.norm is not None:
            init.ones_(self.norm)
        attention = 2 * len(self.states)  # until it is fitted: by the mean of these; without any, by how new a word is
        init.copy_(self.score.weight, torch.tensor([[1 / max(attention, 1)] * attention + [float(not attention)]]))
        init.zeros_(self.score.bias)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, words: Words) -> torch.Tensor:
        """Scores of words by their group, `(batch, groups)`, and -inf for those that are not to be selected."""
        features, selectable = self.features(hidden_states, attention_mask, words)
        return self.score(features.to(self.score.weight.dtype)).squeeze(-1).float().masked_fill(~selectable, -torch.inf)

    def features(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, words: Words
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The features of each word, `(batch, groups, 2 * heads + 1)`: the logarithm of the attention that each head gives it,
        as either asks, and how new it is; and which may be selected, `(batch, groups)`: those that the question lacks.
        """
        mass = self.attention(hidden_states, attention_mask, words)
        groups = torch.zeros(attention_mask.shape, dtype=torch.long, device=mass.device)
        groups.scatter_reduce_(1, words.positions, words.groups * words.mask, "amax")  # a token counts once
        shape = len(mass), int(words.groups.max()) + 1
        at_words = mass.new_zeros(shape[0], mass.shape[1], shape[1]).scatter_add(
            2, groups[:, None].expand_as(mass), mass
        )
        turns = words.turn_ids.float().masked_fill(~words.mask, torch.inf)
        newest = mass.new_full(shape, torch.inf).scatter_reduce(1, words.groups, turns, "amin")
        asked = mass.new_zeros(shape).scatter_reduce(1, words.groups, (turns == 1).float(), "amax")
        selectable = newest.isfinite() & (asked == 0)
        selectable[:, 0] = False
        return torch.cat(((at_words + 1e-5).log().mT, -newest.clamp(max=99)[..., None].log1p()), dim=-1), selectable

    def attention(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, words: Words) -> torch.Tensor:
        """
        What each head gives each token, `(batch, 2 * heads, tokens)`: on the average of the question's pieces, and of the
        last tokens.
        """
        real, place = attention_mask.bool(), torch.arange(attention_mask.shape[1], device=attention_mask.device)
        pieces = torch.arange(1, words.ids.shape[1] + 1, device=place.device)
        newest, order = (pieces * (words.mask & (words.turn_ids == 1))).topk(min(self.NUM_PIECES, len(pieces)), dim=1)
        last, ends = ((place + 1) * real).topk(min(self.NUM_TOKENS, len(place)), dim=1)
        at = torch.cat((words.positions.gather(1, order), ends), dim=1)  # (batch, asking)
        shares = torch.stack((F.pad(newest > 0, (0, last.shape[1])), F.pad(last > 0, (newest.shape[1], 0))), dim=1)
        shares = shares / shares.sum(2, keepdim=True).clamp(min=1)
        positions, rows = (attention_mask.long().cumsum(1) - 1).clamp(min=0), torch.arange(len(at), device=at.device)
        seen = (real[:, None] & (place <= at[..., None]))[:, None]
        mass = [torch.zeros(len(at), 0, 2, len(place), device=place.device)]  # without a head
        for state in dict.fromkeys(self.states):
            heads = [head for head, own in enumerate(self.states) if own == state]
            states = hidden_states[:, :, state].to(self.query.dtype)
            states = states * (states.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(states.dtype)
            keys = self._map(states, self.key[heads], 1, heads, positions)
            queries = self._map(states[rows[:, None], at], self.query[heads], 0, heads, positions.gather(1, at))
            scores = (queries @ keys.mT).float() * keys.shape[-1] ** -0.5
            mass.append(shares[:, None] @ scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1))
        return torch.cat(mass, dim=1).flatten(1, 2)

    def _map(self, states: torch.Tensor, weight: torch.Tensor, which: int, heads: list[int], positions: torch.Tensor):
        """Queries or keys, `(batch, heads, tokens, width)`, turned by their positions as in RoFormer (arXiv 2104.09864)."""
        mapped = torch.einsum("bth,nwh->bntw", states, weight) + self.bias[which, heads][:, None]
        if self.norm is not None:
            mapped = F.rms_norm(mapped, mapped.shape[-1:], eps=1e-6) * self.norm[which, heads][:, None]
        angle = positions[:, None, :, None] * self.frequencies[heads][:, None].view(torch.float32)
        cos, sin = angle.cos().to(mapped.dtype), angle.sin().to(mapped.dtype)
        first, second = mapped.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class WordEncoder(nn.Module):
    """
    A few words to a vector in the teacher's space: the mean of a value each, plus transformer layers that read them in
    order. One code a piece serves both, as its value and as what the layers read.

    It learns from plain text alone, so it holds where no conversation was seen.
    """

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        width, dim = config.encoder_dim, config.embedding_dim
        self.codes = nn.Embedding(config.word_vocab_size, config.encoder_code_dim)
        self.value = nn.Linear(config.encoder_code_dim, dim)
        self.linear_in = nn.Linear(config.encoder_code_dim, width)
        self.positions = nn.Embedding(config.encoder_max_pieces, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = _layers(
            config.encoder_num_layers, width, width // 32, 4 * width, dropout=0.0, layer_norm_eps=1e-12
        )
        self.linear_out = nn.Linear(width, dim, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            ids, mask (`(texts, pieces)`): padded on either side; 1 to `encoder_max_pieces` True in each row.

        Returns:
            unit vectors in float32, `(texts, embedding_dim)`.
        """
        codes = self.codes(ids)
        states = self.norm(self.linear_in(codes) + self.positions((mask.cumsum(1) - 1).clamp(min=0)))
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=~mask)
        vectors = self.linear_out(_mean(states, mask)) + self.value(_mean(codes, mask))
        return F.normalize(vectors.float(), dim=-1)


def _layers(count: int, width: int, heads: int, inner: int, **settings) -> nn.ModuleList:
    settings |= {"activation": "gelu", "batch_first": True}
    return nn.ModuleList(nn.TransformerEncoderLayer(width, heads, inner, **settings) for _ in range(count))


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ((mask / mask.sum(1, keepdim=True)).to(states.dtype)[:, None] @ states).squeeze(1)


class ProjectionHead(nn.Module):
    """
    The paper's head, over several layers: linear in, learned positions, transformer encoder, masked mean, linear out.
    Positions count from the end, so that the newest token always has the same one.
    """

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        width = len(config.hidden_state_layers) * config.hidden_size
        self.num_positions = max(config.num_context_tokens, config.max_query_tokens)
        # Without scale and shift, which the next linear map could express too.
        self.norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)
        self.linear_in = nn.Linear(width, config.head_dim)
        self.positions = nn.Embedding(self.num_positions, config.head_dim)
        self.dropout = nn.Dropout(config.head_dropout)
        sizes = config.head_num_layers, config.head_dim, config.head_num_attention_heads, 2 * config.head_dim
        self.encoder = _layers(*sizes, dropout=config.head_dropout, norm_first=True)
        self.norm_out = nn.LayerNorm(config.head_dim)
        self.linear_out = nn.Linear(config.head_dim, config.embedding_dim)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States `(batch, tokens, layers, hidden_size)`, newest last, and their mask, to vectors `(batch, embedding_dim)`."""
        states = self.norm(hidden_states.to(self.linear_in.weight.dtype)).flatten(2)
        from_end = mask.flip(1).cumsum(1).flip(1) - 1
        encoded = self.linear_in(states) + self.positions(from_end.clamp(0, self.num_positions - 1))
        encoded = self.dropout(encoded)
        for layer in self.encoder:
            encoded = layer(encoded, src_key_padding_mask=~mask)
        return self.linear_out(_mean(self.norm_out(encoded), mask))


class NativeRetrievalHead(nn.Module):
    """Hidden states of prompts, and the words in them, to query vectors in the teacher's space."""

    NUM_SELECTED = (2, 6)  # few words rank first what is looked for, more find it where the question names nothing

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        self.layers: list[int] = list(config.hidden_state_layers)
        self.num_context_tokens = config.num_context_tokens
        self.max_pieces = config.encoder_max_pieces
        reads_words = config.word_vocab_size is not None
        self.projection = ProjectionHead(config) if config.head_num_layers else None
        self.selection = WordSelection(config) if reads_words else None
        self.encoder = WordEncoder(config) if reads_words else None
        self.shares = nn.Parameter(torch.empty(2 + len(self.NUM_SELECTED))) if reads_words else None

    def reset_parameters(self) -> None:
        if self.shares is not None:  # the best on sets that nothing was fitted to; see docs/research-log.md
            init.copy_(self.shares, torch.tensor([0.5, 0.5, 1.0, 0.5]))
        if self.shares is not None and self.projection is not None:  # training starts from the words
            init.zeros_(self.projection.linear_out.weight)
            init.zeros_(self.projection.linear_out.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        words: Words | None = None,
        readout_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, layers, hidden_size)`): at `layers`, in this order.
            attention_mask (`(batch, tokens)`): 0 for padding, on either side.
            words ([`Words`], *optional*): needed unless `word_vocab_size` is None.
            readout_mask (`(batch, tokens)`, *optional*): the tokens that the projection head reads: those of a written
                query, or by default each prompt's last `num_context_tokens`.

        Returns:
            the vectors, L2-normalised, `(batch, embedding_dim)`, and the share of each token in them, `(batch, tokens)`, or
            `None` without words.

        Raises:
            `ValueError`: if a row has no token to read.
        """
        vectors, attributions = 0.0, None
        if self.projection is not None:
            vectors = self.projection(*self._newest(hidden_states, attention_mask.bool(), readout_mask)).float()
        if self.encoder is not None:
            with torch.autocast(hidden_states.device.type, enabled=False):
                texts = self.texts(words, self.selection(hidden_states, attention_mask, words))
            parts = [self._encode(words, places) for places in texts]
            vectors = vectors + (self.shares.float()[:, None, None] * torch.stack(parts)).sum(0)
            attributions = self._attributions(words, texts, attention_mask.shape[1])
        return F.normalize(vectors, dim=-1), attributions

    def select(self, words: Words, scores: torch.Tensor, count: int) -> list[list[int]]:
        """The places of each prompt's `count` best words, in order: each once, where it was said first."""
        selected, best = [], scores.sort(dim=1, descending=True, stable=True)  # equal words in the order of the prompt
        chosen = best.indices.masked_fill(best.values == -torch.inf, 0)[:, :count].tolist()
        for groups, left in zip(words.groups.tolist(), map(set, chosen), strict=True):
            places, before = [], 0
            for place, group in enumerate(groups):
                before = group if group and (group in left or group == before) else 0
                left.discard(before)
                places += [place] if before else []
            selected.append(places)
        return selected

    def texts(self, words: Words, scores: torch.Tensor) -> list[list[list[int]]]:
        """What is encoded of each prompt: places of the question, of it with 2 and 6 selected words, of all newest words."""
        half, questions, newest = self.max_pieces // 2, [], []
        for turns, count in zip(words.turn_ids.tolist(), words.mask.sum(1).tolist(), strict=True):
            question = [place for place in range(count) if turns[place] == 1] or list(range(count))
            questions.append(question[-half:])
            newest.append(list(range(max(count - self.max_pieces, 0), count)))
        few = [self.select(words, scores, number) for number in self.NUM_SELECTED]
        longer = [[[*dict.fromkeys(a + b[:half])] for a, b in zip(questions, places, strict=True)] for places in few]
        return [questions, *longer, newest]

    def _encode(self, words: Words, places: list[list[int]]) -> torch.Tensor:
        """The vectors of these words of each prompt, `(prompts, embedding_dim)`."""
        width = max(1, *map(len, places))
        at = torch.tensor([row + [-1] * (width - len(row)) for row in places], device=words.ids.device)
        mask = at >= 0
        mask[:, 0] = True  # a prompt without a word
        return self.encoder(words.ids.gather(1, at.clamp(min=0)) * (at >= 0), mask)

    def _attributions(self, words: Words, texts: list[list[list[int]]], tokens: int) -> torch.Tensor:
        """Each text's share, spread over its words: `(batch, tokens)`, 1 in sum."""
        shares = (self.shares.float() / self.shares.float().sum()).tolist()
        spread = torch.zeros(words.ids.shape)
        for share, rows in zip(shares, texts, strict=True):
            for row, places in enumerate(rows):
                spread[row, places] += share / max(len(places), 1)
        spread = spread.to(words.ids.device)
        return spread.new_zeros(len(spread), tokens).scatter_add(1, words.positions, spread)

    def _newest(
        self, hidden_states: torch.Tensor, real: torch.Tensor, readout_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states that the projection head reads, in order, and their mask, whichever side the padding is on."""
        width = self.projection.num_positions
        if readout_mask is None:
            width = self.num_context_tokens
            readout_mask = real & (real.flip(1).cumsum(1).flip(1) <= width)
        if not readout_mask.any(1).all():
            raise ValueError("readout_mask leaves a row without a token to read; mark at least one in each")
        order = torch.where(readout_mask, torch.arange(real.shape[1], device=real.device), -1)
        order = order.topk(min(width, real.shape[1]), dim=1).values.flip(1)
        return hidden_states[torch.arange(len(order), device=order.device)[:, None], order.clamp(min=0)], order >= 0

    def lexical(self, words: Words) -> torch.Tensor:
        """Vectors of plain texts, L2-normalised, `(batch, embedding_dim)`. Raises `ValueError` if the head reads no words."""
        if self.encoder is None:
            raise ValueError("a vector from words alone needs a word encoder; this model has word_vocab_size=None")
        return self.encoder(words.ids, words.mask & (words.mask.cumsum(1) <= self.max_pieces))


__all__ = ["NativeRetrievalHead", "Words"]
