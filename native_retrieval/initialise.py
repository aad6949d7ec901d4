"""A new model from a language model and a teacher: an untrained head whose copy path starts from the teacher's vectors."""

import copy
import os
import re
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from configuration_native_retrieval import NativeRetrievalConfig
from modeling_native_retrieval import NativeRetrievalModel
from processing_native_retrieval import NativeRetrievalProcessor

from .cli import nearest


def from_backbone(
    backbone: str | PreTrainedModel,
    teacher: Any = None,
    *,
    tokenizer: Any = None,
    max_prompt_tokens: int | None = None,
    **config_fields,
) -> NativeRetrievalModel:
    """
    A new, untrained model around an existing language model.

    Args:
        backbone (`str` or `PreTrainedModel`): a causal language model, or its path or Hub id.
        teacher (*optional*): the embedding model of the index: anything with `encode(list[str]) -> array (n, dim)`, such
            as a `SentenceTransformer`. Its vectors of single tokens start the copy path: those of its own `tokenizer`, if
            it has a fast one, and else of the backbone's. Without it, set `embedding_dim`.
        tokenizer (*optional*): the backbone's. Default: the one beside it.
        max_prompt_tokens (`int`, *optional*): longest prompt. Default: the backbone's context, less room for a query.
        **config_fields: fields of [`NativeRetrievalConfig`], `backbone_revision` among them.

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
    word_tokenizer = _word_tokenizer(teacher)
    config_fields |= {name: getattr(text, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    copies = config_fields.get("copy_num_heads", 1) > 0
    config_fields["copy_vocab_size"] = len(word_tokenizer or tokenizer) if copies else None
    values = None
    if teacher is not None:
        dim = len(teacher.encode(["."])[0])
        if config_fields.setdefault("embedding_dim", dim) != dim:
            raise ValueError(
                f"the teacher's vectors have {dim} dimensions, embedding_dim is {config_fields['embedding_dim']}; leave "
                "embedding_dim out to take the teacher's"
            )
        if copies:  # a head without a copy path needs no vector of any token
            values = _token_vectors(teacher, word_tokenizer or tokenizer)
    config = NativeRetrievalConfig(**config_fields)
    if max_prompt_tokens is None:
        # A query prompt is a few words; 32 tokens are ample.
        context = getattr(text, "max_position_embeddings", None) or 2048
        max_prompt_tokens = max(context - config.max_query_tokens - 32, 1)
    processor = NativeRetrievalProcessor(tokenizer, word_tokenizer, max_prompt_tokens)
    model = NativeRetrievalModel(config, backbone, processor)
    if values is not None:
        with torch.no_grad():
            model.query_head.copy_path.token_values.weight.copy_(values)
    return model.eval()


def _word_tokenizer(teacher: Any) -> PreTrainedTokenizerFast | None:
    """A copy of the teacher's tokenizer that cuts nothing off, for a conversation is longer than what a teacher reads."""
    tokenizer = getattr(teacher, "tokenizer", None)
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(tokenizer, "no_truncation"):
        return None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _token_vectors(teacher: Any, tokenizer: Any) -> torch.Tensor:
    """
    The teacher's vector of each token of a vocabulary, `(tokens, dim)`.

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
