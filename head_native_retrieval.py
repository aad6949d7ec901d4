# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""The query head: hidden states and the words of a conversation in, query vectors out.

    hidden states of the prompt ── ProjectionHead ──▶ vector ──┐
                                └▶ summary, asks for words     ├──▶ HistoryRepulsion ──▶ query vector
    words of the prompt, hidden states ── CopyPath ──▶ vector ─┘

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
    The tokens that the copy path reads, all `(batch, words)`, in the order of the prompt.

    ids: in the copy path's vocabulary. positions: the prompt's token in which each ends. mask: False for padding.
    turn_ids: 1 for the user's last turn, 2 and more for the turns before it, 0 for what follows it.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    turn_ids: torch.Tensor

    def to(self, device: torch.device) -> "Words":
        return Words(*(part.to(device) for part in self))


class ZeroInitLinear(nn.Linear):
    """
    A linear layer that starts at zero, so that training starts from what is beside it.

    Its output is divided by its width (as in muP, arXiv 2203.03466): Adam moves every weight by the learning rate, and
    thousands of them that agree would drown a unit vector in the first step.
    """

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output = F.linear(states.to(self.weight.dtype), self.weight) / self.in_features
        return output if self.bias is None else output + self.bias


class ProjectionHead(nn.Module):
    """
    The paper's head, over several layers: linear in, learned positions, transformer encoder, masked mean, linear out. A
    linear skip path runs beside the encoder. Positions count from the end, so that the newest token always has the same one.
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
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.head_dim,
                config.head_num_attention_heads,
                dim_feedforward=2 * config.head_dim,
                dropout=config.head_dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.head_num_layers)
        )
        self.norm_out = nn.LayerNorm(config.head_dim)
        # Beside a copy path, training starts from the words and learns what to add to them.
        self.linear_out = (ZeroInitLinear if config.copy_num_heads else nn.Linear)(
            config.head_dim, config.embedding_dim
        )
        self.skip = ZeroInitLinear(2 * width, config.embedding_dim) if config.head_skip else None

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, layers, hidden_size)`): in order, newest last.
            mask (`torch.BoolTensor` of shape `(batch, tokens)`): False for padding; at least one True in each row.

        Returns:
            the vector, not yet normalised, `(batch, embedding_dim)`, and a summary of what was read,
            `(batch, 2 * head_dim)`: the mean over the tokens beside the newest token.
        """
        states = self.norm(hidden_states.to(self.linear_in.weight.dtype)).flatten(2)
        from_end = mask.flip(1).cumsum(1).flip(1) - 1
        encoded = self.linear_in(states) + self.positions(from_end.clamp(0, self.num_positions - 1))
        encoded = self.dropout(encoded)
        for layer in self.encoder:
            encoded = layer(encoded, src_key_padding_mask=~mask)
        encoded = self.norm_out(encoded)
        mean, newest = _mean_and_newest(encoded, mask)
        vectors = self.linear_out(mean)
        if self.skip is not None:
            vectors = vectors + self.skip(self.dropout(torch.cat(_mean_and_newest(states, mask), dim=-1)))
        return vectors, torch.cat((mean, newest), dim=-1)


def _mean_and_newest(states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = mask.to(states.dtype)
    mean = ((weights / weights.sum(1, keepdim=True))[:, None] @ states).squeeze(1)
    newest = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return mean, states[torch.arange(len(states), device=states.device), newest]


class HistoryRepulsion(nn.Module):
    """
    Turns a query vector away from earlier turns, as far as it is nearer to them than a threshold: an agent searches for
    what has not been said yet. Learned gates choose the turns, from their states and from the summary of the question.

    It is the ridge regression of that excess on the turns' vectors, so that what several turns share, the topic, is not
    taken away once for each of them (maximal marginal relevance, Carbonell and Goldstein 1998, in the query itself).
    """

    GATE_SCALE = 50.0  # a gate opens or closes within an epoch, and not before the head knows what to ask

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        self.turn_gate = ZeroInitLinear(config.hidden_size, 1)
        self.question_gate = ZeroInitLinear(2 * config.head_dim, 1, bias=False)
        self.threshold = nn.Parameter(torch.empty(1))  # FSDP2 takes no scalars
        self.log_ridge = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        init.constant_(self.threshold, 0.45)
        init.constant_(self.log_ridge, -1.0)

    def forward(
        self, vectors: torch.Tensor, summary: torch.Tensor, turn_words: torch.Tensor, turn_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            vectors, summary (`(batch, embedding_dim)`, `(batch, 2 * head_dim)`): of the question.
            turn_words, turn_states (`(batch, turns, embedding_dim)`, `(batch, turns, hidden_size)`): sums over each
                turn's tokens, of any scale; 0 for a turn that is not there.

        Returns:
            the vectors, `(batch, embedding_dim)`, and how much of each turn's words was taken away, `(batch, turns)`.
        """
        length = vectors.norm(dim=-1, keepdim=True)
        turn_length = turn_words.norm(dim=-1).clamp(min=1e-6)
        turn_states = F.layer_norm(turn_states, turn_states.shape[-1:])
        gate = self.turn_gate(turn_states).float().squeeze(-1) + self.question_gate(summary).float()
        gate = (gate * self.GATE_SCALE).sigmoid()
        turns = (gate / turn_length)[..., None] * turn_words
        excess = F.relu((turns @ vectors[..., None]).squeeze(-1) - gate * self.threshold.float() * length)
        ridge = self.log_ridge.float().exp() * torch.eye(turns.shape[1], device=turns.device)
        away = torch.linalg.solve(turns @ turns.mT + ridge, excess)
        return vectors - (away[:, None] @ turns).squeeze(1), away * gate / turn_length


class Antecedents(nn.Module):
    """
    What the last question refers to: each of its words attends over the words of earlier turns, or over nothing. The
    newest tokens, which the copy path's other heads ask from, have read the question as a whole; "they" or "that album"
    knows best whom it means. How much each word's finding counts is learned.
    """

    NUM_WORDS = 24  # of the question, the newest

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        heads, width = config.copy_num_heads, config.copy_head_dim
        self.query = nn.Linear(config.hidden_size, heads * width)
        self.key = nn.Parameter(torch.empty(heads, width, config.hidden_size))
        self.share = nn.Linear(config.hidden_size, heads)
        self.nothing = nn.Parameter(torch.empty(heads))
        self.dropout = nn.Dropout(config.head_dropout)

    def reset_parameters(self) -> None:
        init.normal_(self.key, std=0.02)
        init.zeros_(self.nothing)

    def forward(self, states: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, words: Words) -> torch.Tensor:
        """
        Args:
            states (`(batch, tokens, hidden_size)`), words: as of [`CopyPath`].
            scale (`(batch, tokens)`): what makes each state one of root mean square 1.
            bias (`(batch, heads, words)`): added to the score of each word.

        Returns:
            the weight of each word of the turns before the last question, `(batch, heads, words)`, at most 1 in sum.
        """
        batch, num_words = words.positions.shape
        heads, width, _ = self.key.shape
        mask = words.mask & (words.turn_ids > 0)
        last = words.turn_ids.masked_fill(~mask, CopyPath.NUM_TURNS).amin(1, keepdim=True)
        earlier = mask & (words.turn_ids > last)
        asking = (mask & (words.turn_ids == last)) * torch.arange(1, num_words + 1, device=mask.device)
        longest = int((asking > 0).sum(1).amax())
        asking, order = asking.topk(min(max(longest, 1), self.NUM_WORDS), dim=1)
        at, rows = words.positions.gather(1, order), torch.arange(batch, device=mask.device)[:, None]
        question = (states[rows, at] * scale[rows, at][..., None]).to(self.query.weight.dtype)

        queries = self.dropout(self.query(question).float()).view(batch, -1, heads, width).transpose(1, 2)
        queries = queries @ self.key.float() * width**-0.5
        scores = (queries.flatten(1, 2) @ states.mT).view(batch, heads, -1, states.shape[1]) * scale[:, None, None]
        scores = scores.gather(3, words.positions[:, None, None].expand(-1, heads, scores.shape[2], -1))
        low = torch.finfo(scores.dtype).min
        scores = (scores + bias[:, :, None]).masked_fill(~earlier[:, None, None], low)
        nothing = self.nothing.float()[:, None, None].expand(batch, -1, scores.shape[2], 1)
        found = torch.cat((scores, CopyPath.BIAS_SCALE * nothing), dim=-1).softmax(-1)[..., :-1]
        shares = self.share(question).float().mT.masked_fill((asking == 0)[:, None], low).softmax(-1)
        return (shares[:, :, None] @ found).squeeze(2)


class CopyPath(nn.Module):
    """
    Attends over the words of the conversation, which deep states of a language model lose, and adds their values: a
    learned vector for each token, in the teacher's space, plus a projection of the hidden state there.

    Neither keys nor values are formed for each token: linear maps commute with the weighted sum, so the query is moved
    into the states' space, and the sum is moved out of it. It adds up in float32, whatever the precision of its weights.
    """

    NUM_TURNS = 33  # turns further back count as the last of these
    BIAS_SCALE = 20.0  # biases are logits: at a head's learning rate they would hardly move by one in an epoch
    TOPIC_DECAY = 0.36  # of a turn's words, for each turn that lies between

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        heads, width, hidden_size = config.copy_num_heads, config.copy_head_dim, config.hidden_size
        vocab_size = config.copy_vocab_size or config.vocab_size
        self.num_heads = heads
        self.query = nn.Linear(2 * config.head_dim, heads * width)
        self.key = nn.Parameter(torch.empty(heads, width, hidden_size))
        self.turn_bias = nn.Embedding(self.NUM_TURNS, heads)
        self.topic_threshold = nn.Parameter(torch.empty(heads))
        self.topic_slope = nn.Parameter(torch.empty(heads))
        self.token_values = nn.Embedding(vocab_size, config.embedding_dim)
        self.token_salience = nn.Embedding(vocab_size, 1)
        self.antecedents = Antecedents(config)
        self.gain = nn.Parameter(torch.empty(2 * heads))
        self.state_value = ZeroInitLinear(heads * hidden_size, config.embedding_dim, bias=False)
        self.antecedent_value = nn.Parameter(torch.empty(heads, hidden_size, width))
        self.antecedent_output = ZeroInitLinear(heads * width, config.embedding_dim, bias=False)
        self.repulsion = HistoryRepulsion(config)
        self.dropout = nn.Dropout(config.head_dropout)

    def reset_parameters(self) -> None:
        init.normal_(self.key, std=0.02)
        init.normal_(self.antecedent_value, std=self.antecedent_value.shape[1] ** -0.5)
        gains = torch.tensor([1.0, 0.5]) / self.num_heads  # antecedents have the words beside them
        init.copy_(self.gain, gains.repeat_interleave(self.num_heads))
        init.zeros_(self.turn_bias.weight)
        init.constant_(self.topic_threshold, 0.6)
        init.constant_(self.topic_slope, 0.4)
        init.zeros_(self.token_salience.weight)

    def forward(
        self, vectors: torch.Tensor, summary: torch.Tensor, states: torch.Tensor, words: Words
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            vectors, summary (`(batch, embedding_dim)`, `(batch, 2 * head_dim)`): from the projection head. The summary
                asks for words, and these are added to the vectors.
            states (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`): of the prompt, at `copy_layer`.
            words ([`Words`]): the tokens to copy from.

        Returns:
            the vectors `(batch, embedding_dim)`, and the weight of each of the prompt's tokens in them
            `(batch, tokens)`: below 0, they are turned away from it.
        """
        words = words._replace(turn_ids=words.turn_ids.clamp(max=self.NUM_TURNS - 1))
        scale = (torch.linalg.vector_norm(states, dim=-1).square() / states.shape[-1] + 1e-6).rsqrt()
        salience = self.BIAS_SCALE * self.token_salience(words.ids).float().squeeze(-1)
        starts, shares = _turn_starts(words), self._salience_weights(salience, words.mask)
        turn_words = _bags(words.ids, self.token_values.weight, shares, starts)
        count = turn_words.shape[1]
        turns = count - 1 - words.turn_ids  # the oldest first

        queries = self.query(summary).view(len(states), self.num_heads, 1, -1).float()
        queries = self.dropout(queries @ self.key.float()).squeeze(2) * self.key.shape[1] ** -0.5
        scores = queries @ states.mT * scale[:, None]
        scores = scores.gather(2, words.positions[:, None].expand(-1, self.num_heads, -1))
        bias = salience[:, None] + self._turn_bias(turn_words).gather(2, turns[:, None].expand_as(scores))
        scores = (scores + bias).masked_fill(~words.mask[:, None], torch.finfo(scores.dtype).min)
        # A row with nothing to copy would otherwise spread its weight over padding.
        weights = scores.softmax(-1) * words.mask.any(1)[:, None, None]
        weights = torch.cat((weights, self.antecedents(states, scale, bias.detach(), words)), dim=1)
        gain = self.gain.float()

        vectors = vectors + self._copied(gain @ weights, weights, states, scale, words)
        token_rows = states.shape[1] * torch.arange(len(states), device=states.device)[:, None]
        turn_scale = shares * scale.gather(1, words.positions)
        turn_states = _bags(words.positions + token_rows, states.flatten(0, 1), turn_scale, starts)
        vectors, away = self.repulsion(vectors, summary, turn_words, turn_states)

        attributions = torch.zeros_like(scale).scatter_add(1, words.positions, gain @ weights)
        return vectors, attributions.scatter_add(1, words.positions, -away.gather(1, turns) * shares)

    def _copied(
        self, copied: torch.Tensor, weights: torch.Tensor, states: torch.Tensor, scale: torch.Tensor, words: Words
    ) -> torch.Tensor:
        """The values of the words and of the states there, summed by these weights: `(batch, embedding_dim)`."""
        at_tokens = weights.new_zeros(*weights.shape[:2], states.shape[1])
        at_tokens = at_tokens.scatter_add(2, words.positions[:, None].expand_as(weights), weights)
        mixed = self.dropout(at_tokens * scale[:, None] @ states)
        dtype = self.antecedent_value.dtype
        found = torch.einsum("bnh,nhd->bnd", mixed[:, self.num_heads :].to(dtype), self.antecedent_value)
        sums = _bags(words.ids, self.token_values.weight, copied).squeeze(1)
        sums = sums + self.state_value(mixed[:, : self.num_heads].flatten(1)).float()
        return sums + self.antecedent_output(found.flatten(1)).float()

    def _turn_bias(self, turn_words: torch.Tensor) -> torch.Tensor:
        """
        What each head adds to the words of a turn, `(batch, heads, turns)`: by the turn's number, and less for a turn on
        another topic, by the cosine of its words, with its neighbours', to the last question's with its own.
        """
        words = turn_words.detach().clone()
        words[:, -1] = 0  # what an agent has said and called since
        number = torch.arange(words.shape[1], device=words.device)
        blurred = F.normalize(self.TOPIC_DECAY ** (number[:, None] - number).abs() @ words, dim=-1)
        related = (blurred @ blurred[:, -1, :, None]).squeeze(-1)
        off_topic = F.relu(self.topic_threshold.float()[:, None] - related[:, None])
        by_number = self.turn_bias.weight[: words.shape[1]].float().flip(0).T
        return self.BIAS_SCALE * (by_number - self.topic_slope.float()[:, None] * off_topic)

    @staticmethod
    def _salience_weights(salience: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Positive weights `(batch, words)` that the softmax of salience would give, up to a factor; 0 for padding."""
        scores = salience.masked_fill(~mask, torch.finfo(salience.dtype).min)
        return (scores - scores.amax(1, keepdim=True)).exp() * mask

    def lexical(self, words: Words) -> torch.Tensor:
        """
        The sum of token values weighted by salience alone, `(batch, embedding_dim)`. It needs no hidden states, so it can
        be trained on a hundred thousand texts in minutes.
        """
        salience = self.BIAS_SCALE * self.token_salience(words.ids).float().squeeze(-1)
        weights = salience.masked_fill(~words.mask, torch.finfo(salience.dtype).min).softmax(-1)
        return _bags(words.ids, self.token_values.weight, weights).squeeze(1)


def _turn_starts(words: Words) -> torch.Tensor:
    """Where each turn's words begin, `(batch, turns)`, in the words of all rows. Words are in order, so turns are too."""
    count = int(words.turn_ids.max()) + 1
    rows = count * torch.arange(len(words.ids), device=words.ids.device)[:, None]
    turns = torch.arange(count, device=rows.device)
    return torch.searchsorted((count - 1 - words.turn_ids + rows).flatten(), (rows + turns).flatten()).view(-1, count)


def _bags(
    indices: torch.Tensor, table: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted sums of a table's rows, `(batch, bags, dim)` in float32: a bag from each of `starts` on, or one a row."""
    batch, width = indices.shape
    if starts is None:
        starts = width * torch.arange(batch, device=indices.device)[:, None]
    if table.dtype != torch.float32:  # only the rows that are read are converted
        table = F.embedding(indices.flatten(), table).float()
        indices = torch.arange(len(table), device=indices.device)
    sums = F.embedding_bag(indices.flatten(), table, starts.flatten(), per_sample_weights=weights.flatten(), mode="sum")
    return sums.view(batch, -1, table.shape[1])


class NativeRetrievalHead(nn.Module):
    """Hidden states of prompts, and the words in them, to query vectors in the teacher's space."""

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        self.layers: list[int] = list(config.hidden_state_layers)
        self.num_context_tokens = config.num_context_tokens
        self.copy_state = self.layers.index(config.copy_layer)
        self.projection = ProjectionHead(config)
        self.copy_path = CopyPath(config) if config.copy_num_heads else None

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
            words ([`Words`], *optional*): what the copy path reads; needed unless `copy_num_heads` is 0.
            readout_mask (`(batch, tokens)`, *optional*): the tokens that the projection head reads: those of a written
                query, or by default each prompt's last `num_context_tokens`.

        Returns:
            the vectors, L2-normalised, `(batch, embedding_dim)`, and the weight of each token in the copy path,
            `(batch, tokens)`, or `None` without one.

        Raises:
            `ValueError`: if a row has no token to read.
        """
        real, width = attention_mask.bool(), self.projection.num_positions
        if readout_mask is None:
            width = self.num_context_tokens
            readout_mask = real & (real.flip(1).cumsum(1).flip(1) <= width)
        if not readout_mask.any(1).all():
            raise ValueError("readout_mask leaves a row without a token to read; mark at least one in each")
        # The newest `width` tokens to read, in order, whichever side the padding is on.
        order = torch.where(readout_mask, torch.arange(real.shape[1], device=real.device), -1)
        order = order.topk(min(width, real.shape[1]), dim=1).values.flip(1)
        read = hidden_states[torch.arange(len(order), device=order.device)[:, None], order.clamp(min=0)]
        vectors, summary = self.projection(read, order >= 0)

        attributions = None
        if self.copy_path is not None:
            states = hidden_states[:, :, self.copy_state].float().contiguous()  # once, for several passes over them
            with torch.autocast(states.device.type, enabled=False):  # it adds up in full precision
                summary = summary.to(self.copy_path.query.weight.dtype)
                vectors, attributions = self.copy_path(vectors.float(), summary, states, words)
        return F.normalize(vectors.float(), dim=-1), attributions

    def lexical(self, words: Words) -> torch.Tensor:
        """
        Vectors of plain texts from their words alone, L2-normalised, `(batch, embedding_dim)`.

        Raises:
            `ValueError`: without a copy path.
        """
        if self.copy_path is None:
            raise ValueError("a vector from words alone needs a copy path; this model has copy_num_heads=0")
        return F.normalize(self.copy_path.lexical(words), dim=-1)


__all__ = ["NativeRetrievalHead", "Words"]
