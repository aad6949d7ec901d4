"""A new model from a language model and a teacher: its head starts from the attention heads of one and layers of the other."""

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from configuration_native_retrieval import NativeRetrievalConfig
from head_native_retrieval import WordEncoder
from modeling_native_retrieval import NativeRetrievalModel
from processing_native_retrieval import NativeRetrievalProcessor

from .cli import nearest
from .heads import NUM_HEADS, Maps, calibrate_all, choose, fit_score

# The WordPiece vocabulary of BERT (uncased) and MiniLM: 30,522 pieces, for any teacher. Apache-2.0.
WORDPIECE = Path(__file__).with_name("wordpiece.json")


def from_backbone(
    backbone: str | PreTrainedModel,
    teacher: Any = None,
    *,
    tokenizer: Any = None,
    max_prompt_tokens: int | None = None,
    rewrites: Sequence[tuple[str, Sequence[dict]]] = (),
    **config_fields,
) -> NativeRetrievalModel:
    """
    A new, untrained model around an existing language model.

    Args:
        backbone (`str` or `PreTrainedModel`): a causal language model, or its path or Hub id.
        teacher (*optional*): the embedding model of the index: anything with `encode(list[str]) -> array (n, dim)`, such
            as a `SentenceTransformer`. The word encoder starts from its vectors of single pieces of words; from its own
            layers too, if it is a BERT of the encoder's width and vocabulary. Without a teacher, set `embedding_dim`.
        tokenizer (*optional*): the backbone's. Default: the one beside it.
        max_prompt_tokens (`int`, *optional*): longest prompt. Default: the backbone's context, less room for a query.
        rewrites (*optional*): names and rows, with `messages` and `rewrite`, of data sets. With them the selection of words
            is fitted: its attention heads are chosen, unless `selection_heads` names them, and its score is learned.
        **config_fields: fields of [`NativeRetrievalConfig`], `backbone_revision` among them. `word_vocab_size=None` gives
            the paper's head, which reads no words.

    Raises:
        `ValueError`: for a tokenizer larger than the backbone's embeddings, or a bad field.
        `OSError`: for a backbone that cannot be loaded.
    """
    known = {field.name for field in fields(NativeRetrievalConfig)}
    for name in config_fields:
        if name not in known:
            hint = nearest(name, known) or "; see NativeRetrievalConfig"
            raise ValueError(f"NativeRetrievalConfig has no field {name!r}{hint}")
    if isinstance(backbone, (str, os.PathLike)):
        source, revision = str(backbone), config_fields.get("backbone_revision")
        try:
            backbone = AutoModelForCausalLM.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"backbone {source!r} (revision {revision}) cannot be loaded: {reason}") from error
    else:
        source = backbone.name_or_path
    if source:  # absolute: the process may change its directory before it saves
        place = os.path.abspath(source) if os.path.isdir(source) else source
        config_fields.setdefault("backbone_name_or_path", place)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config_fields.get("backbone_revision"))
    text = backbone.config.get_text_config()
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the backbone embeds only {text.vocab_size}; give the backbone's own "
            "tokenizer"
        )
    config_fields |= {name: getattr(text, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    words = PreTrainedTokenizerFast(tokenizer_file=str(WORDPIECE))
    reads_words = config_fields.setdefault("word_vocab_size", len(words)) is not None
    if teacher is not None:
        dim = len(teacher.encode(["."])[0])
        if config_fields.setdefault("embedding_dim", dim) != dim:
            raise ValueError(
                f"the teacher's vectors have {dim} dimensions, embedding_dim is {config_fields['embedding_dim']}; leave "
                "embedding_dim out to take the teacher's"
            )
    if max_prompt_tokens is None:
        # A query prompt is a few words; 32 tokens are ample.
        context = getattr(text, "max_position_embeddings", None) or 2048
        max_prompt_tokens = max(context - config_fields.get("max_query_tokens", 32) - 32, 1)
    processor = NativeRetrievalProcessor(tokenizer, words, max_prompt_tokens)
    maps, calibrations = None, []
    if reads_words:
        maps = _maps(backbone)
    named = config_fields.pop("selection_heads", None)
    if named and reads_words and maps is None:
        raise ValueError(f"selection_heads={named} cannot be copied from this backbone; leave them out")
    if maps is not None:
        config_fields |= {"selection_head_dim": maps.width, "selection_qk_norm": maps.qk_norm}
        config_fields["selection_heads"] = named
        if rewrites:
            heads = sorted(map(list, named or maps.heads))
            calibrations = calibrate_all(backbone, processor, maps, heads, rewrites)
            if calibrations:
                count = len(heads) if named else NUM_HEADS
                config_fields["selection_heads"], calibrations = choose(calibrations, heads, count)
            elif not named:
                print(
                    "No data set has rewrites that take a word from earlier turns, so earlier words are chosen by how new they "
                    "are. Give data with rewrites, or selection_heads as `python -m native_retrieval.heads` finds them."
                )
    config = NativeRetrievalConfig(**config_fields)
    model = NativeRetrievalModel(config, backbone, processor)
    head = model.query_head
    if reads_words:
        if maps is not None:
            maps.copy_into(head.selection, config.selection_heads)
        if calibrations:
            fit_score(head.selection, calibrations)
        if teacher is not None:
            _start_encoder(head.encoder, teacher, words)
    return model.eval()


def _maps(backbone: PreTrainedModel) -> Maps | None:
    try:
        return Maps(backbone)
    except ValueError as error:
        print(f"The words of earlier turns are chosen without attention: {error}")
        return None


@torch.no_grad()
def _start_encoder(encoder: WordEncoder, teacher: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """
    Codes and values from the teacher's vectors of single pieces; with a BERT of the same width and vocabulary for a
    teacher, codes from its input embeddings too, and layers from its own, evenly spaced.
    """
    values = _piece_vectors(teacher, tokenizer)
    values = (values - values.mean(0)) / 2
    bert = getattr(teacher, "transformer", None)
    embeddings = getattr(bert, "embeddings", None)
    same = getattr(embeddings, "word_embeddings", None) is not None and hasattr(bert.encoder, "layer")
    if same and embeddings.word_embeddings.weight.shape == (len(tokenizer), encoder.linear_in.out_features):
        inputs = embeddings.word_embeddings.weight.float().cpu()
        scale = values.norm() / inputs.norm()
        both = torch.cat((inputs * scale, values), dim=1)
    else:
        bert, inputs, scale, both = None, None, 1.0, values
    left, strength, right = torch.svd_lowrank(both, min(encoder.codes.embedding_dim, *both.shape), niter=4)
    rank = len(strength)
    encoder.codes.weight[:, :rank] = left * strength
    encoder.value.weight[:, :rank] = right[-values.shape[1] :]
    encoder.value.bias.zero_()
    if bert is None:
        return
    encoder.linear_in.weight[:, :rank] = right[: inputs.shape[1]] / scale
    encoder.linear_in.bias.copy_(embeddings.token_type_embeddings.weight[0])
    count = min(len(encoder.positions.weight), len(embeddings.position_embeddings.weight))
    encoder.positions.weight[:count] = embeddings.position_embeddings.weight[:count]
    encoder.norm.load_state_dict(embeddings.LayerNorm.state_dict())
    for place, layer in enumerate(encoder.layers):
        own = bert.encoder.layer[place * len(bert.encoder.layer) // len(encoder.layers)]
        attention = own.attention.self
        parts = (attention.query, attention.key, attention.value)
        layer.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        for mine, its in (
            (layer.self_attn.out_proj, own.attention.output.dense),
            (layer.norm1, own.attention.output.LayerNorm),
            (layer.linear1, own.intermediate.dense),
            (layer.linear2, own.output.dense),
            (layer.norm2, own.output.LayerNorm),
        ):
            mine.load_state_dict(its.state_dict())
    if encoder.linear_out.weight.shape[0] == encoder.linear_out.weight.shape[1]:
        nn.init.eye_(encoder.linear_out.weight)


def _piece_vectors(teacher: Any, tokenizer: Any) -> torch.Tensor:
    """
    The teacher's vector of each piece of a vocabulary, `(pieces, dim)`.

    Raises:
        `ValueError`: for a vector that is zero or not finite.
    """
    # WordPiece marks the inside of a word.
    spellings = [re.sub("^##", "", tokenizer.decode([i]).strip()) or "." for i in range(len(tokenizer))]
    distinct = sorted(set(spellings))
    rows = {spelling: row for row, spelling in enumerate(distinct)}
    vectors = torch.as_tensor(teacher.encode(distinct)).float()[[rows[spelling] for spelling in spellings]]
    norms = vectors.norm(dim=1)
    bad = (~(torch.isfinite(norms) & (norms > 0))).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"the teacher gives token {i} ({spellings[i]!r}) a zero or non-finite vector; check it")
    return vectors
