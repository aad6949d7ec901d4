"""Breaks the code in one place at a time, and records whether the tests notice.

    python tests/mutations.py --output results/mutations.json

The tests run in a copy of the repository, first as it is and then once for each mutation. A mutation that no test
notices is a missing test, and ends in exit code 1; so does one whose text is no longer in its file exactly once.
"""

import argparse
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, NoReturn

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}

# What the tests need of other projects; nothing of this one, which the forks import from their copy.
import datasets  # noqa: F401
import evaluate  # noqa: F401
import faiss  # noqa: F401
import hypothesis  # noqa: F401
import ir_measures  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import sentence_transformers  # noqa: F401
import transformers
from tqdm.auto import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent

TIMEOUT = 1200  # seconds


class Mutation(NamedTuple):
    """In `file`, `old` becomes `new`. `tests` should notice: `losses` for all of tests/test_losses.py, or one in it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


LOSSES, TRAINER = "native_retrieval/losses.py", "native_retrieval/trainer.py"
TARGETS, FEATURES = "native_retrieval/targets.py", "native_retrieval/features.py"
METRICS, DATA, DATASET = "native_retrieval/metrics.py", "native_retrieval/data.py", "native_retrieval/dataset.py"
TEACHER, INDEX = "native_retrieval/teacher.py", "native_retrieval/index.py"
LOADING, SYNTHESIS = "native_retrieval/loading.py", "native_retrieval/synthesis/llm.py"
CACHE, CHECKPOINT = "cache_native_retrieval.py", "checkpoint_native_retrieval.py"
CONFIG, HEAD = "configuration_native_retrieval.py", "head_native_retrieval.py"
MESSAGES, MODEL = "messages_native_retrieval.py", "modeling_native_retrieval.py"
PROCESSOR = "processing_native_retrieval.py"
HEADS, METHODS = "native_retrieval/heads.py", "native_retrieval/methods.py"
INITIALISE = "native_retrieval/initialise.py"

BATCHES = "modeling::test_vectors_do_not_depend_on_batch_size_or_order"
AROUND = "head::test_a_row_gives_the_same_vector_whatever_is_beside_it_and_around_it"
ATTEND = "heads::test_copied_heads_attend_as_the_backbones_own[llama]"
ADDED = "head::test_words_are_added_once_in_order_as_they_are_spelt"
WORD_FEATURES = "head::test_the_features_of_words"

MUTATIONS = [
    # Losses and training
    Mutation("alignment: sign", LOSSES, "(1 - F.cosine", "(1 + F.cosine", "losses"),
    Mutation("contrastive: temperature", LOSSES, "positives.T / temperature", "positives.T", "losses"),
    Mutation(
        "contrastive: temperature of the hard negatives",
        LOSSES,
        "F.normalize(negatives, dim=-1)) / temperature",
        "F.normalize(negatives, dim=-1))",
        "losses",
    ),
    Mutation(
        "contrastive: no L2 normalisation",
        LOSSES,
        "queries, positives = F.normalize(queries, dim=-1), F.normalize(positives, dim=-1)",
        "pass",
        "losses",
    ),
    Mutation(
        "contrastive: false negatives in the batch are not masked",
        LOSSES,
        "scores = scores.masked_fill(excluded, -torch.inf)",
        "pass",
        "losses",
    ),
    Mutation(
        "contrastive: false hard negatives are not masked",
        LOSSES,
        "hard = hard.masked_fill(excluded, -torch.inf)",
        "pass",
        "losses",
    ),
    Mutation(
        "contrastive: other known positives are not masked",
        LOSSES,
        "excluded |= (positive_ids[None, :, None] == known_positives[:, None, :]).any(-1)",
        "pass",
        "losses",
    ),
    Mutation("contrastive: the own positive is masked", LOSSES, "excluded[own, own] = False", "pass", "losses"),
    Mutation("rank: direction of the KL", LOSSES, "F.kl_div(student, teacher", "F.kl_div(teacher, student", "losses"),
    Mutation("rank: temperature of the teacher", LOSSES, "teacher_scores / temperature", "teacher_scores", "losses"),
    Mutation("rank: mean over documents too", LOSSES, 'reduction="batchmean"', 'reduction="mean"', "losses"),
    Mutation(
        "training: weights of the losses",
        TRAINER,
        'getattr(self.args, f"{name}_weight") * part',
        "part",
        "trainer::test_parts_are_logged_and_add_up_to_the_loss",
    ),
    Mutation(
        "training: a loss that is not finite",
        TRAINER,
        "if not torch.isfinite(loss):",
        "if False:",
        "trainer::test_a_loss_that_is_not_finite_stops_training",
    ),
    Mutation(
        "training: padding of a ranking takes part",
        LOSSES,
        "student_scores.masked_fill(~mask, low)",
        "student_scores",
        "losses::test_padding_of_a_ranking_takes_no_part",
    ),
    Mutation(
        "training: rows without a ranking do not count",
        LOSSES,
        "kl * rows.float().mean()",
        "kl",
        "trainer::test_a_short_ranking_counts_as_it_would_alone_and_none_at_all_as_right",
    ),
    Mutation(
        "consistency: rows that were not changed do not count",
        TRAINER,
        "unchanged[: changed.sum()]) * changed.float().mean()",
        "unchanged[: changed.sum()])",
        "trainer::test_a_changed_conversation_is_drawn_to_the_same_one_unchanged",
    ),
    Mutation(
        "consistency: under dropout",
        TRAINER,
        "model.eval()  # without dropout",
        "pass",
        "trainer::test_a_changed_conversation_is_drawn_to_the_same_one_unchanged",
    ),
    Mutation(
        "consistency: of another conversation",
        DATASET,
        "[place[query] for query in self.ids]",
        "list(range(len(self.ids)))",
        "trainer::test_a_changed_conversation_is_drawn_to_the_same_one_unchanged",
    ),
    Mutation(
        "several devices: negatives are not gathered",
        LOSSES,
        'if "other_positives" in batch:',
        "if False:",
        "distributed",
    ),
    Mutation(
        "several devices: share of the gradient",
        TRAINER,
        "real * world / total",
        "1.0",
        "distributed",
    ),
    Mutation(
        "targets: towards the document",
        TARGETS,
        "(1 - share) * vectors + share * documents",
        "vectors",
        "targets::test_a_target_moves_to_its_first_document_by_its_share",
    ),
    Mutation(
        "dataset: hard negatives may be relevant",
        DATASET,
        "ranked[~np.isin(ranked, relevant)]",
        "ranked",
        "trainer::test_hard_negatives_are_never_relevant",
    ),
    Mutation(
        "dataset: the head reads the whole prompt",
        DATASET,
        '-min(prompt["num_read"], length) :] = True',
        "-length:] = True",
        "trainer::test_the_head_is_to_read_the_end_of_each_prompt",
    ),
    Mutation(
        "train: the head is drawn without the seed",
        "train.py",
        "set_seed(args.seed)",
        "set_seed(0)",
        "trainer::test_a_seed_draws_the_head_as_well_as_the_order",
    ),
    # Head
    Mutation(
        "head: positions count from the start",
        HEAD,
        "from_end = mask.flip(1).cumsum(1).flip(1) - 1",
        "from_end = mask.cumsum(1) - 1",
        "head::test_the_head_reads_the_last_tokens_or_those_marked",
    ),
    Mutation(
        "head: padding is attended to",
        HEAD,
        "layer(encoded, src_key_padding_mask=~mask)",
        "layer(encoded)",
        f"{BATCHES}[llama-tied-context]",
    ),
    Mutation(
        "head: padding is in the mean",
        HEAD,
        "shares = (mask / mask.sum(1, keepdim=True)).to(encoded.dtype)",
        "shares = torch.full(mask.shape, 1 / mask.shape[1])",
        f"{BATCHES}[llama-tied-context]",
    ),
    Mutation(
        "head: reads its tokens in reverse",
        HEAD,
        "dim=1).values.flip(1)",
        "dim=1).values",
        "head::test_the_head_reads_the_last_tokens_or_those_marked",
    ),
    Mutation(
        "head: no L2 normalisation",
        HEAD,
        "return F.normalize(vectors, dim=-1), attributions",
        "return vectors, attributions",
        f"{BATCHES}[llama-tied-context]",
    ),
    Mutation(
        "head: what is added does not start at zero",
        HEAD,
        "init.zeros_(self.projection.linear_out.weight)",
        "pass",
        "head::test_beside_words_the_projection_starts_at_zero",
    ),
    Mutation(
        "selection: padding asks",
        HEAD,
        "valid = torch.cat((newest > 0, last > 0), dim=1)",
        "valid = torch.cat((newest > -1, last > -1), dim=1)",
        AROUND,
    ),
    Mutation(
        "selection: padding is attended to",
        HEAD,
        "seen = real[:, None] & (place <= at[..., None])",
        "seen = place <= at[..., None]",
        ATTEND,
    ),
    Mutation(
        "selection: what follows is attended to",
        HEAD,
        "seen = real[:, None] & (place <= at[..., None])",
        "seen = real[:, None] & (place >= 0)",
        ATTEND,
    ),
    Mutation(
        "selection: positions count padding",
        HEAD,
        "positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)",
        "positions = place.expand(batch, -1) % 7",
        ATTEND,
    ),
    Mutation(
        "selection: heads of a layer are mixed up",
        HEAD,
        "self.key[heads], 1, heads, positions)",
        "self.key[heads[::-1]], 1, heads, positions)",
        ATTEND,
    ),
    Mutation(
        "selection: queries and keys are not normalised",
        HEAD,
        "if self.norm is not None:\n            mapped",
        "if False:\n            mapped",
        "heads::test_copied_heads_attend_as_the_backbones_own[qwen3]",
    ),
    Mutation(
        "selection: a token counts for each piece in it",
        HEAD,
        'words.groups * words.mask, "amax")',
        'words.groups * words.mask, "sum")',
        WORD_FEATURES,
    ),
    Mutation(
        "selection: how often a word is said is not counted",
        HEAD,
        "high.scatter_add(1, words.groups, words.mask.float())",
        'high.scatter_reduce(1, words.groups, words.mask.float(), "amax")',
        WORD_FEATURES,
    ),
    Mutation(
        "selection: the question's own words are selected",
        HEAD,
        "(counts[..., 0] > 0) & (asked == 0)",
        "counts[..., 0] > 0",
        ADDED,
    ),
    Mutation(
        "selection: function words are selected",
        HEAD,
        "selectable[:, 0] = False",
        "pass",
        WORD_FEATURES,
    ),
    Mutation(
        "selection: scores that mean nothing before they are fitted",
        HEAD,
        "[0.0, -1.0, 0.0]",
        "[0.0, 1.0, 0.0]",
        "heads::test_without_heads_to_copy_the_words_of_the_last_turns_come_first",
    ),
    Mutation(
        "select: a word each time that it is said",
        HEAD,
        "left.remove(group)  # its last piece",
        "pass",
        "head::test_the_best_words_are_selected",
    ),
    Mutation(
        "select: the last piece of a word alone",
        HEAD,
        "while start and groups[start - 1] == group:",
        "while False:",
        "head::test_the_best_words_are_selected",
    ),
    Mutation(
        "head: words twice where nobody asks",
        HEAD,
        "[*dict.fromkeys(question + places)]",
        "(question + places)",
        "head::test_a_prompt_with_few_words_or_none_has_a_vector",
    ),
    Mutation(
        "head: the oldest words of a long question",
        HEAD,
        "question[-self.max_pieces // 2 :]",
        "question[: self.max_pieces // 2]",
        "head::test_the_newest_words_count_where_there_are_too_many",
    ),
    Mutation(
        "head: the oldest words of a long conversation",
        HEAD,
        "list(range(max(count - self.max_pieces, 0), count))",
        "list(range(min(count, self.max_pieces)))",
        "head::test_the_newest_words_count_where_there_are_too_many",
    ),
    Mutation(
        "head: the four texts count the same",
        HEAD,
        "torch.tensor([0.5, 0.5, 1.0, 0.5])",
        "torch.tensor([1.0, 1.0, 1.0, 1.0])",
        "head::test_a_vector_is_made_of_four_texts",
    ),
    Mutation(
        "head: padding is encoded where there is no word",
        HEAD,
        " * (at >= 0), mask)",
        ", mask)",
        AROUND,
    ),
    Mutation(
        "head: attributions of each text in full",
        HEAD,
        "+= share / max(len(places), 1)",
        "+= share",
        "head::test_attributions_are_shares_of_words",
    ),
    Mutation(
        "encoder: order does not count",
        HEAD,
        "self.positions((mask.cumsum(1) - 1).clamp(min=0))",
        "self.positions(0 * mask.long())",
        "head::test_the_encoder_reads_words_in_order_and_none_of_the_padding",
    ),
    Mutation(
        "encoder: padding is attended to",
        HEAD,
        "layer(states, src_key_padding_mask=~mask)",
        "layer(states)",
        "head::test_the_encoder_reads_words_in_order_and_none_of_the_padding",
    ),
    Mutation(
        "encoder: a text longer than it reads",
        HEAD,
        "words.mask & (words.mask.cumsum(1) <= self.max_pieces)",
        "words.mask",
        "head::test_the_encoder_reads_words_in_order_and_none_of_the_padding",
    ),
    Mutation(
        "heads: the norm before a layer is left out",
        HEADS,
        "linear.weight[rows].float() * gain",
        "linear.weight[rows].float()",
        ATTEND,
    ),
    Mutation(
        "heads: keys of another group",
        HEADS,
        "own = head // (self.config.num_attention_heads // self.config.num_key_value_heads)",
        "own = head % self.config.num_key_value_heads",
        ATTEND,
    ),
    Mutation(
        "heads: biases are left out",
        HEADS,
        "if linear.bias is None else",
        "if True else",
        "heads::test_copied_heads_attend_as_the_backbones_own[qwen2]",
    ),
    Mutation(
        "heads: all layers turn at one speed",
        HEADS,
        'speed = getattr(rotary, f"{kind}_inv_freq", None)',
        'speed = rotary.full_attention_inv_freq if hasattr(rotary, "full_attention_inv_freq") else None',
        "heads::test_copied_heads_attend_as_the_backbones_own[gemma3]",
    ),
    Mutation(
        "heads: rows of a head that turns in part",
        HEADS,
        "order = torch.cat((order[:half], rest",
        "_ = torch.cat((order[:half], rest",
        "heads::test_copied_heads_attend_as_the_backbones_own[glm4_moe]",
    ),
    Mutation(
        "heads: the best of one data set",
        HEADS,
        "in calibrations], axis=0)",
        "in calibrations[:1]], axis=0)",
        "heads::test_a_head_must_hold_on_every_data_set",
    ),
    Mutation(
        "heads: the larger data set decides the score",
        HEADS,
        "1 / len(part.labels))",
        "1 / 5)",
        "heads::test_every_data_set_weighs_the_same_in_the_score",
    ),
    Mutation(
        "heads: the score is of standardised features",
        HEADS,
        "weight = linear.weight / torch.tensor(deviation)",
        "weight = linear.weight",
        "heads::test_the_fitted_score_separates_words_of_the_rewrite",
    ),
    Mutation(
        "heads: those that are named are left out",
        INITIALISE,
        "len(named) if named else NUM_HEADS",
        "NUM_HEADS",
        "heads::test_a_new_model_is_fitted_to_rewrites",
    ),
    Mutation(
        "extract: accents are lost",
        PROCESSOR,
        "pattern.search(said) or pattern.search(plain)",
        "pattern.search(said)",
        ADDED,
    ),
    Mutation(
        "words: a plural is another word",
        PROCESSOR,
        "else word[:-1]\n",
        "else word\n",
        "heads::test_a_plural_is_the_same_word",
    ),
    Mutation(
        "fusion: scores and not ranks",
        METHODS,
        "best = sorted(documents, key=documents.get, reverse=True)",
        "best = list(documents)",
        "methods::test_ranks_are_fused_and_not_scores",
    ),
    # Cache
    Mutation(
        "cache: crop leaves the keys",
        CACHE,
        "past.crop(-remove)",
        "pass",
        "generation::test_an_edited_history_passes_again_from_where_it_differs",
    ),
    Mutation(
        "cache: a window is cropped too late",
        CACHE,
        "layer.keys.shape[-2] - remove < window",
        "layer.keys.shape[-2] < window",
        "generation::test_a_window_that_could_not_be_cropped_is_not_cropped_later",
    ),
    Mutation(
        "cache: a recurrent state is cropped",
        CACHE,
        "if _is_recurrent(layer) or (window",
        "if (window",
        "generation::test_an_edited_history_passes_again_from_where_it_differs",
    ),
    Mutation(
        "cache: padding stands in a window",
        CACHE,
        "not (plain or len({*map(len, rest)}) == 1)",
        "False",
        "generation::test_rows_of_a_batch_go_on_by_different_lengths",
    ),
    Mutation(
        "cache: goes on past the first difference",
        CACHE,
        ".long().cumprod(0).sum()",
        ".long().sum()",
        "generation::test_an_edited_history_passes_again_from_where_it_differs",
    ),
    Mutation(
        "cache: no token is left to pass",
        CACHE,
        "count = min(len(at), len(prompt) - 1)",
        "count = min(len(at), len(prompt))",
        "generation::test_generation_goes_on_from_the_vectors_cache",
    ),
    Mutation(
        "cache: goes on without keys and values",
        CACHE,
        "columns = 0 if self.past_key_values is None else self.hidden_states.shape[1]",
        "columns = self.hidden_states.shape[1]",
        "generation::test_a_cache_without_keys_and_values_passes_again",
    ),
    Mutation(
        "cache: a fork shares its layers",
        CACHE,
        "fork.layers = [(copy.deepcopy if _is_recurrent(layer) else copy.copy)(layer) for layer in fork.layers]",
        "pass",
        "generation::test_a_written_query_is_not_in_the_prompts_cache",
    ),
    Mutation(
        "cache: a fork shares a recurrent state",
        CACHE,
        "(copy.deepcopy if _is_recurrent(layer) else copy.copy)(layer)",
        "copy.copy(layer)",
        "generation::test_a_written_query_is_not_in_the_prompts_cache",
    ),
    Mutation(
        "cache: a pass that is interrupted leaves half of it",
        MODEL,
        "past, cache.past_key_values = cache.past_key_values, None  # what interrupts a pass",
        "past = cache.past_key_values  # what interrupts a pass",
        "generation::test_what_interrupts_a_pass_does_not_spoil_the_cache",
    ),
    Mutation(
        "cache: a generation that is interrupted leaves half of it",
        MODEL,
        "past, cache.past_key_values = cache.past_key_values, None  # what interrupts it",
        "past = cache.past_key_values  # what interrupts it",
        "generation::test_what_interrupts_a_pass_does_not_spoil_the_cache",
    ),
    Mutation(
        "token ids: padding is read",
        CACHE,
        "[row[keep.bool()].tolist()",
        "[row.tolist()",
        "modeling::test_the_prompts_give_the_vectors_of_their_conversations",
    ),
    Mutation(
        "token ids: several rows without a mask",
        CACHE,
        "if attention_mask is None and len(input_ids) > 1:",
        "if False:",
        "modeling::test_bad_queries",
    ),
    # Generation
    Mutation(
        "generate: beams go on from one cache",
        CACHE,
        "not in (None, plain):",
        "is NotImplemented:",
        "generation::test_ways_that_one_cache_cannot_follow_are_refused",
    ),
    Mutation(
        "generate: only settings are refused, not arguments",
        CACHE,
        "rest.get(name, getattr(settings, name, None))",
        "getattr(settings, name, None)",
        "generation::test_arguments_that_one_cache_cannot_follow_are_refused",
    ),
    Mutation(
        "generate: the backbone says how a cache is filled",
        CACHE,
        "own[name] for name in own if name not in FILLING}",
        "own[name] for name in own}",
        "generation::test_a_backbones_own_settings",
    ),
    Mutation(
        "generate: the backbone's settings go before the caller's",
        CACHE,
        "defaults_only=True",
        "defaults_only=False",
        "generation::test_settings_are_the_callers_before_the_backbones",
    ),
    Mutation(
        "generate: the backbone's settings are mixed in once more",
        MODEL,
        "backbone.generation_config = settings",
        "pass",
        "generation::test_a_backbones_own_settings",
    ),
    Mutation(
        "generate: a longest length counts the columns of the cache",
        MODEL,
        "setattr(settings, name, getattr(settings, name) + shift)",
        "pass",
        "generation::test_rows_of_a_batch_go_on_by_different_lengths",
    ),
    # Model
    Mutation(
        "prefill: positions count padding",
        MODEL,
        "position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)[:, known:]",
        "position_ids=torch.arange(ids.shape[1])[None, known:]",
        f"{BATCHES}[gpt2-tied-context]",
    ),
    Mutation(
        "prefill: every model around a backbone reads the same layers",
        MODEL,
        "for i in self.query_head.layers]",
        "for i in [1, 2]]",
        "modeling::test_models_around_one_backbone_read_their_own_layers",
    ),
    Mutation(
        "prefill: the last layer that is read is normed",
        MODEL,
        "max(self.query_head.layers) + 1",
        "max(self.query_head.layers)",
        "modeling::test_layers_after_the_last_one_read_run_for_generation_alone",
    ),
    Mutation(
        "prefill: layers behind the last one read run for a vector",
        MODEL,
        "if not (embeds_only and ready) or",
        "if True or",
        "modeling::test_layers_after_the_last_one_read_run_for_generation_alone",
    ),
    Mutation(
        "generated: the head reads the prompt too",
        MODEL,
        "readout_mask[:, : prompt + len(self._query_prompt())] = False",
        "pass",
        "generation::test_generated_mode_reads_what_the_bare_backbone_would_write",
    ),
    Mutation(
        "generated: a query may be empty",
        MODEL,
        "min_new_tokens=1,",
        "min_new_tokens=0,",
        "generation::test_a_backbone_that_writes_no_query_still_gives_a_vector",
    ),
    Mutation(
        "generated: a query lacks its last token",
        MODEL,
        "max_new_tokens=self.config.max_query_tokens + 1,",
        "max_new_tokens=self.config.max_query_tokens,",
        "generation::test_a_written_query_ends_before_a_line_end_or_special_token",
    ),
    Mutation(
        "generated: a line end is part of a query",
        PROCESSOR,
        '{i for i, piece in enumerate(self._pieces) if b"\\n" in piece} | ',
        "",
        "generation::test_a_written_query_ends_before_a_line_end_or_special_token",
    ),
    Mutation(
        "model: vectors in the order of their lengths",
        MODEL,
        "vectors[rows] =",
        "vectors[begin : begin + batch_size] =",
        f"{BATCHES}[llama-tied-context]",
    ),
    Mutation(
        "model: the backbone is trained",
        MODEL,
        "backbone.requires_grad_(False).eval()",
        "backbone.eval()",
        "modeling::test_training_leaves_the_backbone_frozen_and_in_eval_mode",
    ),
    # Load and save
    Mutation(
        "checkpoint: no check of the reference vector",
        CHECKPOINT,
        "if not cosine > (0.9 if quantized else 0.9999):",
        "if False:",
        "saving",
    ),
    Mutation("checkpoint: no reference vector is stored", CHECKPOINT, "self.set_reference()", "pass", "saving"),
    Mutation("checkpoint: saving ends training", CHECKPOINT, "self.train(training)", "pass", "saving"),
    Mutation(
        "checkpoint: the backbone is stored though it should not be",
        CHECKPOINT,
        "if self.backbone is not None and self.config.store_backbone:",
        "if self.backbone is not None:",
        "saving",
    ),
    Mutation(
        "checkpoint: the backbone is stored with the head too",
        CHECKPOINT,
        "for name, weight in state.items() if not name.startswith(own)}",
        "for name, weight in state.items()}",
        "saving",
    ),
    Mutation(
        "checkpoint: the backbone's generation settings are lost",
        CHECKPOINT,
        'self.backbone.generation_config.to_json_file(os.path.join(folder, "generation_config.json"))',
        "pass",
        "saving",
    ),
    Mutation(
        "checkpoint: half a repository is pushed",
        CHECKPOINT,
        'if kwargs.pop("push_to_hub", False):',
        "if False:",
        "saving",
    ),
    Mutation(
        "checkpoint: the newest revision of a backbone that is not stored",
        CHECKPOINT,
        'hub["revision"] = None if backbone else model.config.backbone_revision',
        "pass",
        "saving",
    ),
    Mutation(
        "checkpoint: a word tokenizer of another vocabulary",
        CHECKPOINT,
        "wanted not in (None, read):",
        "False:",
        "saving",
    ),
    Mutation(
        "checkpoint: buffers are lost in a pickle",
        CHECKPOINT,
        "setattr(backbone.get_submodule(owner), leaf, buffer)",
        "pass",
        "saving",
    ),
    Mutation(
        "config: local paths are published",
        CONFIG,
        "if value and (os.path.isdir(value) or not",
        "if False and (os.path.isdir(value) or not",
        "saving",
    ),
    Mutation(
        "weights: checksum check",
        LOADING,
        "if is_damaged(weights):",
        "if False:",
        "faults::test_a_flipped_byte_in_the_weights_is_named",
    ),
    # Messages
    Mutation(
        "messages: lone surrogates",
        MESSAGES,
        'value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")',
        "pass",
        "processing::test_half_an_emoji_is_replaced",
    ),
    Mutation(
        "messages: parts run together",
        MESSAGES,
        'return "\\n".join(filter(None, map(_text, content)))',
        'return "".join(filter(None, map(_text, content)))',
        "processing::test_parts_are_joined_by_a_line_break",
    ),
    Mutation(
        "messages: refusals are lost",
        MESSAGES,
        ' or _text(message.pop("refusal", None))',
        "",
        "processing::test_a_refusal_is_what_was_said",
    ),
    Mutation(
        "messages: function calls of old are lost",
        MESSAGES,
        'if "function_call" in message',
        "if False",
        "processing::test_a_function_call_of_old_is_a_call",
    ),
    Mutation(
        "messages: an empty question",
        MESSAGES,
        'if cleaned[-1]["role"] == "user" and not',
        "if False and not",
        "processing::test_what_cannot_be_seen_is_no_question",
    ),
    Mutation(
        "messages: tools given beside conversations",
        MESSAGES,
        'own, name = tools, "conversation"',
        'own, name = None, "conversation"',
        "processing::test_arguments_reach_the_template",
    ),
    Mutation(
        "folding: calls that a template does not know are lost",
        MESSAGES,
        'if "tool_calls" in message and "tool_calls" not in knows:',
        "if False:",
        "processing::test_nothing_that_was_said_is_lost[smollm2]",
    ),
    Mutation(
        "folding: a developer that a template does not know",
        MESSAGES,
        'if role == "developer" and role not in knows:',
        "if False:",
        "processing::test_nothing_that_was_said_is_lost[qwen2.5]",
    ),
    Mutation(
        "folding: results that a template does not know",
        MESSAGES,
        'if role == "tool" and role not in knows:',
        "if False:",
        "processing::test_a_result_is_told_from_what_a_user_says",
    ),
    Mutation(
        "folding: later system messages stay where a template refuses them",
        MESSAGES,
        'elif role == "system" and folded and "late system" not in knows:',
        "elif False:",
        "processing::test_later_system_messages_move_to_the_front_where_the_template_refuses_them",
    ),
    Mutation(
        "folding: arguments of calls stay strings",
        MESSAGES,
        'function["arguments"] = _parsed(function["arguments"])',
        "pass",
        "processing::test_later_system_messages_move_to_the_front_where_the_template_refuses_them",
    ),
    Mutation(
        "folding: ids of calls of any length",
        MESSAGES,
        're.sub("[^a-zA-Z0-9]", "", str(holder.get(key, "")))[-9:].rjust(9, "0")',
        'str(holder.get(key, ""))',
        "processing::test_ids_of_calls_are_as_long_as_mistrals_template_wants_them",
    ),
    Mutation(
        "folding: users' and assistant's turns do not alternate",
        MESSAGES,
        'yield alternating(fold(messages, knows - {"tool_calls", "tool", "function"}))',
        "pass",
        "processing::test_nothing_that_was_said_is_lost[gemma2]",
    ),
    Mutation(
        "shortening: turns go before the middle of results",
        MESSAGES,
        "messages = cut(messages, (i for i, role in enumerate(roles) if role in ROLES[4:]), SHORTEST_RESULT)",
        "pass",
        "processing::test_results_lose_their_middle_before_any_turn_goes[smollm2]",
    ),
    Mutation(
        "shortening: system messages go",
        MESSAGES,
        "old = [i for i, role in enumerate(roles[:question]) if role not in ROLES[:2]]",
        "old = list(range(question))",
        "processing::test_system_messages_and_the_last_question_stay[300-extra1-smollm2]",
    ),
    Mutation(
        "shortening: the last question goes",
        MESSAGES,
        'question = max((i for i, role in enumerate(roles) if role == "user"), default=len(roles) - 1)',
        "question = len(roles) - 1",
        "processing::test_system_messages_and_the_last_question_stay[300-extra1-smollm2]",
    ),
    Mutation(
        "shortening: the newest turns go first",
        MESSAGES,
        "gone = set(old[:end])",
        "gone = set(old[len(old) - end :])",
        "processing::test_the_newest_turns_stay_and_results_never_lose_their_call[smollm2]",
    ),
    Mutation(
        "shortening: results lose their call",
        MESSAGES,
        "for n in range(len(old)) if roles[old[n]] not in ROLES[4:]]",
        "for n in range(len(old))]",
        "processing::test_the_newest_turns_stay_and_results_never_lose_their_call[smollm2]",
    ),
    # Processor
    Mutation(
        "prompt: special tokens in a text are special",
        PROCESSOR,
        '"sanitize_control_tokens": forged',
        '"sanitize_control_tokens": False',
        "processing::test_no_text_forges_a_turn[smollm2-user]",
    ),
    Mutation(
        "prompt: special tokens in a text are special without a template",
        PROCESSOR,
        "split_special_tokens=forged",
        "split_special_tokens=False",
        "processing::test_no_text_forges_a_special_token_without_a_template",
    ),
    Mutation(
        "prompt: markers that are not called special are text",
        PROCESSOR,
        "self.special_ids: list[int] = sorted(special | written)",
        "self.special_ids: list[int] = sorted(special)",
        "processing::test_markers_that_are_not_called_special_cannot_be_forged",
    ),
    Mutation(
        "prompt: an error quotes the conversation",
        PROCESSOR,
        'said = type(refused).__name__ == "TemplateError"',
        "said = True",
        "processing::test_a_template_that_fails_does_not_quote_the_conversation",
    ),
    Mutation(
        "prompt: half an answer is a whole one",
        PROCESSOR,
        '"continue_final_message": half_turn',
        '"continue_final_message": False',
        "processing::test_half_an_answer_is_continued",
    ),
    Mutation(
        "prompt: longer than its limit",
        PROCESSOR,
        "return input_ids if len(input_ids) <= limit else input_ids[: limit // 4] + input_ids[-(limit - limit // 4) :]",
        "return input_ids",
        "processing::test_any_conversation_fits_any_limit[smollm2]",
    ),
    Mutation(
        "padding: on the right",
        PROCESSOR,
        "input_ids[row, width - len(prompt) :] = torch.tensor(prompt)\n"
        "            attention_mask[row, width - len(prompt) :] = 1",
        "input_ids[row, : len(prompt)] = torch.tensor(prompt)\n            attention_mask[row, : len(prompt)] = 1",
        "generation::test_a_padded_batch_generates_what_each_prompt_does_alone",
    ),
    Mutation(
        "turns: counted from the start",
        PROCESSOR,
        "since = opens.flip(1).cumsum(1).flip(1) - opens.long()",
        "since = opens.cumsum(1)",
        "processing::test_turns_are_numbered_from_the_users_last",
    ),
    Mutation(
        "turns: what an agent does moves the question",
        PROCESSOR,
        "numbered = since - since.gather(1, order.gather(1, last)) + 1",
        "numbered = since + 1",
        "processing::test_what_an_agent_does_since_does_not_move_the_question",
    ),
    Mutation(
        "turns: a tool in a user's clothes asks",
        PROCESSOR,
        "if tool:\n",
        "if False:\n",
        "processing::test_what_an_agent_does_since_does_not_move_the_question",
    ),
    Mutation(
        "turns: padding in the middle is read",
        PROCESSOR,
        "order = real.long().argsort(dim=1, stable=True)",
        "order = torch.arange(real.shape[1]).expand_as(input_ids)",
        "processing::test_words_do_not_depend_on_padding_or_on_other_rows",
    ),
    Mutation(
        "words: special tokens are copied",
        PROCESSOR,
        "copied = real & ~special & ~",
        "copied = real & ~",
        "processing::test_words_are_those_of_each_turn",
    ),
    Mutation(
        "words: the attention sink is copied",
        PROCESSOR,
        "real & ~special & ~(real & (real.cumsum(1) == 1))",
        "real & ~special",
        "head::test_the_attention_sink_is_no_word",
    ),
    Mutation(
        "words: each stands at the token behind it",
        PROCESSOR,
        "return encoding.ids, places.clamp(max=len(tokens) - 1)",
        "return encoding.ids, (places + 1).clamp(max=len(tokens) - 1)",
        "processing::test_a_word_stands_where_its_last_letter_is_written",
    ),
    Mutation(
        "words: bytes are taken for characters",
        PROCESSOR,
        "if not text.isascii():\n            characters",
        "if False:\n            characters",
        "processing::test_a_word_stands_where_its_last_letter_is_written",
    ),
    Mutation(
        "words: they reach over turns",
        PROCESSOR,
        "(keep[1:] != keep[:-1]).nonzero().flatten() + 1",
        "(keep[1:] != keep[:-1]).nonzero().flatten()[:1] + 1",
        "processing::test_words_are_those_of_each_turn",
    ),
    Mutation(
        "words: a turn that is known is read again",
        PROCESSOR,
        "before.get(turn) or self._read(turn)",
        "self._read(turn)",
        "processing::test_what_was_read_before_changes_nothing",
    ),
    Mutation(
        "words: cut off as in the teacher",
        PROCESSOR,
        "backend.no_truncation()",
        "pass",
        "processing::test_words_of_a_text_are_the_word_tokenizers",
    ),
    # What is built on the model
    Mutation(
        "synthesis: special tokens in a document",
        SYNTHESIS,
        'self.processor.encode([{"role": "user", "content": p}], enable_thinking=False)',
        "self.processor.tokenizer.apply_chat_template(\n"
        '            [{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False)',
        "synthesis::test_a_document_forges_no_turn_in_what_the_llm_is_asked",
    ),
    Mutation(
        "vLLM: special tokens in a text",
        "native_retrieval/integrations/vllm.py",
        "content=message.content | broken)",
        "content=message.content)",
        "vllm::test_no_text_forges_a_turn",
    ),
    Mutation(
        "agent: documents may close their fence",
        "native_retrieval/conversations.py",
        "{plain(': '.join(",
        "{(': '.join(",
        "app::test_a_document_cannot_leave_its_fence_or_forge_a_turn",
    ),
    Mutation(
        "features: states of the padding",
        FEATURES,
        "row[-num_rows(rows) :]",
        "row[: num_rows(rows)]",
        "features::test_states_are_those_of_one_sequence_at_a_time",
    ),
    Mutation(
        "shards: a damaged one is believed",
        "native_retrieval/cache.py",
        "if array_file.checksum(shards[i]) != wanted",
        "if False",
        "sharded::test_a_damaged_shard_is_computed_anew",
    ),
    Mutation(
        "teacher: fingerprints always agree",
        TEACHER,
        ".bit_count() <= FINGERPRINT_TOLERANCE",
        ".bit_count() >= 0",
        "teacher::test_more_bits_are_another_teacher",
    ),
    Mutation(
        "teacher: fingerprint check of a loaded teacher",
        TEACHER,
        "if not same_teacher(teacher.fingerprint, config.teacher_fingerprint):",
        "if False:",
        "eval::test_bad_model",
    ),
    Mutation(
        "index: checksum check",
        INDEX,
        "if (checksum := sha256(path / name)) != wanted:",
        "if False:",
        "index::test_truncated_faiss_file",
    ),
    Mutation(
        "index: teacher check",
        INDEX,
        "same_teacher(index_fingerprint, model_fingerprint)",
        "True",
        "index::test_check_teacher",
    ),
    Mutation("metrics: order of a run", METRICS, "-float(position)", "float(position)", "metrics"),
    Mutation(
        "metrics: ties",
        METRICS,
        "for doc_id, score in scores.items()), reverse=True)",
        "for doc_id, score in scores.items()), key=lambda x: x[0], reverse=True)",
        "metrics",
    ),
    Mutation("metrics: cutoff of the reciprocal rank", METRICS, "RR @ 10", "RR @ 100", "metrics"),
    Mutation(
        "metrics: irrelevant documents in ranks", METRICS, ".get(doc_id, 0) >= 1)", ".get(doc_id, 0) >= 0)", "metrics"
    ),
    Mutation(
        "bootstrap: not paired",
        METRICS,
        "differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)",
        "differences = np.sort(np.asarray(a, dtype=np.float64)) - np.sort(np.asarray(b, dtype=np.float64))[::-1]",
        "metrics",
    ),
    Mutation("bootstrap: confidence", METRICS, "confidence_level=confidence", "confidence_level=0.8", "metrics"),
    Mutation(
        "bootstrap: turns of a conversation one by one",
        METRICS,
        "if groups is not None and len(set(groups)) > 1:",
        "if False:",
        "metrics",
    ),
    Mutation(
        "data: overlap with the held-out split",
        DATA,
        "if held_out.isdisjoint(keys)]",
        "]",
        "data::test_drop_overlap",
    ),
    Mutation(
        "data: documents judged 0 are gold",
        DATA,
        "if judgement.score > 0 and judgement.document not in documents:",
        "if judgement.document not in documents:",
        "data::test_task_round_trip",
    ),
]


def copy_repository(target: Path) -> None:
    """The files that git knows or would add, as they are now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():  # not one that was deleted and is still in the index
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((REPOSITORY / name).read_bytes())


def passes(repository: Path, tests: Iterable[str]) -> bool:
    """
    Whether the tests pass, in a fork of this process, which has the libraries loaded already: that takes longer than
    most tests. Raises `RuntimeError` if they cannot even begin.
    """
    output = repository / ".output"
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(repository, list(tests), output))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        return False
    if process.exitcode not in (0, 1):
        raise RuntimeError(f"{tests} do not run:\n{output.read_text()[-3000:]}")
    return process.exitcode == 0


def run_tests(repository: Path, tests: list[str], output: Path) -> NoReturn:
    os.chdir(repository)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    # The code of the copy, and never what a mutation of the same length and second before it was compiled to.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (REPOSITORY, REPOSITORY / "tests")]
    sys.dont_write_bytecode = True
    named = (test.partition("::") for test in tests)
    words = [f"tests/test_{file}.py{colons}{name}" for file, colons, name in named]
    code = pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *words])
    os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="the JSON file to write")
    parser.add_argument("--only", default="", metavar="WORD", help="those that have this in their name")
    arguments = parser.parse_args()
    stale = [m for m in MUTATIONS if (REPOSITORY / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    for mutation in stale:
        print(f"mutations: {mutation.name!r}: {mutation.file} has its text not exactly once; edit tests/mutations.py")
    if stale:
        return 1

    chosen = [mutation for mutation in MUTATIONS if arguments.only in mutation.name]
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder)
        copy_repository(copy)
        # Where transformers puts the code of the models that it loads; their own processes read the variable.
        transformers.dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"] = str(copy / ".modules")
        by_file = lambda tests: tests.partition("::")[0]  # noqa: E731
        wanted = groupby(sorted({mutation.tests for mutation in chosen}), by_file)
        for name, tests in tqdm([(name, list(tests)) for name, tests in wanted], desc="Without mutation", unit="file"):
            if not passes(copy, tests):
                print(f"mutations: tests/test_{name}.py fails without any mutation; mend that first")
                return 1
        bar = tqdm(chosen, desc="Mutations", unit="mutation")
        for mutation in bar:
            bar.set_postfix_str(mutation.name)
            path = copy / mutation.file
            whole = path.read_text(encoding="utf-8")
            path.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
            rows.append({"name": mutation.name, "file": mutation.file, "caught": not passes(copy, [mutation.tests])})
            path.write_text(whole, encoding="utf-8")

    sys.path.insert(0, str(REPOSITORY))
    from native_retrieval.results import write_json

    write_json(
        {"command": shlex.join(["python", "tests/mutations.py", *sys.argv[1:]]), "mutations": rows}, arguments.output
    )
    unnoticed = [row["name"] for row in rows if not row["caught"]]
    print(f"{len(rows) - len(unnoticed)} of {len(rows)} mutations were noticed")
    for name in unnoticed:
        print(f"mutations: no test notices {name!r}; write one")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
