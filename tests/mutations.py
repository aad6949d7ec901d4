"""Breaks the code in one place at a time, and records whether the tests notice.

    python tests/mutations.py --output results/mutations.json

The tests run in a copy of the repository, first as it is and then once for each mutation. A mutation that no test
notices is a missing test, and ends in exit code 1; so does one whose text is no longer in its file exactly once.
"""

import argparse
import multiprocessing
import os
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
TARGETS = "native_retrieval/targets.py"
MODEL, CONFIG = "modeling_native_retrieval.py", "configuration_native_retrieval.py"
METRICS, DATA, EXAMPLES = "native_retrieval/metrics.py", "native_retrieval/data.py", "native_retrieval/dataset.py"
TEACHER, INDEX = "native_retrieval/teacher.py", "native_retrieval/index.py"
LOADING, SYNTHESIS = "native_retrieval/loading.py", "native_retrieval/synthesis/llm.py"
VLLM = "native_retrieval/integrations/vllm.py"

MUTATIONS = [
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
        EXAMPLES,
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
        "examples: hard negatives may be relevant",
        EXAMPLES,
        "ranked[~np.isin(ranked, relevant)]",
        "ranked",
        "trainer::test_hard_negatives_are_never_relevant",
    ),
    Mutation(
        "examples: the head reads the whole prompt",
        EXAMPLES,
        '-min(prompt["num_read"], length) :] = True',
        "-length:] = True",
        "trainer::test_the_head_is_to_read_the_end_of_each_prompt",
    ),
    Mutation(
        "head: positions count from the start",
        MODEL,
        "from_end = mask.flip(1).cumsum(1).flip(1) - 1",
        "from_end = mask.cumsum(1) - 1",
        "head::test_the_newest_token_has_the_same_position_in_every_prompt",
    ),
    Mutation(
        "head: padding is attended to",
        MODEL,
        "layer(encoded, src_key_padding_mask=~mask)",
        "layer(encoded)",
        "modeling::test_vectors_do_not_depend_on_batch_size_or_order[llama-tied-context]",
    ),
    Mutation(
        "head: padding is in the mean",
        MODEL,
        "weights = mask.to(states.dtype)",
        "weights = torch.ones_like(mask, dtype=states.dtype)",
        "modeling::test_vectors_do_not_depend_on_batch_size_or_order[llama-tied-context]",
    ),
    Mutation(
        "head: reads its tokens in reverse",
        MODEL,
        "dim=1).values.flip(1)",
        "dim=1).values",
        "head::test_the_head_reads_the_last_tokens_and_knows_which_is_the_newest",
    ),
    Mutation(
        "vectors: no L2 normalisation",
        MODEL,
        "query_embeddings=F.normalize(vectors.float(), dim=-1)",
        "query_embeddings=vectors.float()",
        "modeling::test_vectors_do_not_depend_on_batch_size_or_order[llama-tied-context]",
    ),
    Mutation(
        "copy path: mask",
        MODEL,
        "scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)",
        "pass",
        "head::test_attributions[llama-tied]",
    ),
    Mutation(
        "copy path: special tokens are copied",
        MODEL,
        "real & ~special & ~sink",
        "real & ~sink",
        "head::test_attributions[llama-tied]",
    ),
    Mutation(
        "copy path: the attention sink is copied",
        MODEL,
        "real & ~special & ~sink",
        "real & ~special",
        "head::test_the_attention_sink_is_not_copied",
    ),
    Mutation(
        "copy path: turns are counted from the start",
        MODEL,
        "segments = special.flip(1).cumsum(1).flip(1)",
        "segments = special.cumsum(1)",
        "head::test_what_an_agent_does_since_does_not_move_the_question",
    ),
    Mutation(
        "the teacher's tokens: each at the backbone's token behind it",
        MODEL,
        "return encoding.ids, places.clamp(max=len(tokens) - 1)",
        "return encoding.ids, (places + 1).clamp(max=len(tokens) - 1)",
        "head::test_the_copy_path_reads_what_the_teacher_would",
    ),
    Mutation(
        "the teacher's tokens: bytes are taken for characters",
        MODEL,
        "    if not text.isascii():\n        characters",
        "    if False:\n        characters",
        "head::test_the_copy_path_reads_what_the_teacher_would",
    ),
    Mutation(
        "the teacher's tokens: they reach over turns",
        MODEL,
        "!= copied[:-1]).nonzero().flatten() + 1",
        "!= copied[:-1]).nonzero().flatten()[:1] + 1",
        "head::test_the_teachers_tokens_do_not_reach_over_turns",
    ),
    Mutation(
        "the teacher's tokens: cut off as in the teacher",
        MODEL,
        "            teacher_tokenizer.no_truncation()\n",
        "",
        "head::test_the_teachers_tokenizer_is_saved_and_loaded",
    ),
    Mutation(
        "novelty: no threshold",
        MODEL,
        " - gate * self.threshold * length",
        "",
        "head::test_a_vector_is_turned_away_from_turns_over_the_threshold",
    ),
    Mutation(
        "novelty: what turns share is taken away from each",
        MODEL,
        "torch.linalg.solve(turns @ turns.mT + ridge, excess)",
        "excess",
        "head::test_a_turn_said_twice_is_not_taken_away_twice",
    ),
    Mutation(
        "what generation pads a row with is read",
        MODEL,
        "while len(row) > 1 and row[-1] == pad and",
        "while len(row) > len(row) and row[-1] == pad and",
        "saving::test_what_generation_pads_a_row_with_is_not_read",
    ),
    Mutation(
        "a backbone that computes in float32 is saved in it",
        MODEL,
        "v.to(self._stored_dtype)",
        "v",
        "saving::test_a_processor_without_bfloat16_computes_in_float32_and_saves_what_it_was_given",
    ),
    Mutation(
        "every model around a backbone reads the same layers",
        MODEL,
        "_stacked(output.hidden_states, cache.hidden_state_layers)",
        "_stacked(output.hidden_states, [1, 2])",
        "saving::test_models_around_one_backbone_read_their_own_layers",
    ),
    Mutation(
        "the part that is read is a layer short",
        MODEL,
        "self.backbone.base_model, max(self.config.hidden_state_layers)",
        "self.backbone.base_model, max(self.config.hidden_state_layers) - 1",
        "modeling::test_layers_behind_the_last_one_read_run_for_generation_alone",
    ),
    Mutation(
        "the last layer that is read is normed",
        MODEL,
        "tie_last_hidden_states = False",
        "tie_last_hidden_states = True",
        "modeling::test_layers_behind_the_last_one_read_run_for_generation_alone",
    ),
    Mutation(
        "novelty: turns are mixed up",
        MODEL,
        "turns = count - 1 - segments",
        "turns = count - 1 - segments.clamp(max=1)",
        "head::test_turns_are_told_apart",
    ),
    Mutation(
        "copy path: what an agent does moves the question",
        MODEL,
        "numbered = segments - since.clamp(min=0)",
        "numbered = segments",
        "head::test_what_an_agent_does_since_does_not_move_the_question",
    ),
    Mutation(
        "antecedents: the question refers to itself",
        MODEL,
        "earlier = mask & (segments > last)",
        "earlier = mask & (segments >= last)",
        "head::test_antecedents_stand_in_turns_before_the_question",
    ),
    Mutation(
        "antecedents: what an agent has done since asks",
        MODEL,
        "mask = mask & (segments > 0)",
        "mask = mask & (segments >= 0)",
        "head::test_antecedents_stand_in_turns_before_the_question",
    ),
    Mutation(
        "antecedents: a line end behind the question asks",
        MODEL,
        "numbered.masked_fill(numbered < behind, 0)",
        "numbered.clamp(min=0)",
        "head::test_antecedents_stand_in_turns_before_the_question",
    ),
    Mutation(
        "antecedents: padding asks",
        MODEL,
        ".masked_fill((asking == 0)[:, None], low)",
        "",
        "head::test_the_copy_path_is_attention_over_normed_states",
    ),
    Mutation(
        "antecedents: what the other heads have found is theirs",
        MODEL,
        "mixed[:, self.num_heads :], self",
        "mixed[:, : self.num_heads], self",
        "head::test_the_copy_path_is_attention_over_normed_states",
    ),
    Mutation(
        "copy path: what an agent does is part of the topic",
        MODEL,
        "words[:, -1] = 0",
        "words[:, -1] *= 1",
        "head::test_the_copy_path_is_attention_over_normed_states",
    ),
    Mutation(
        "copy path: other topics are copied as this one",
        MODEL,
        "- self.topic_slope[:, None] * off_topic",
        "- 0 * self.topic_slope[:, None] * off_topic",
        "head::test_words_of_another_topic_are_left",
    ),
    Mutation(
        "copy path: values of states that are not normed",
        MODEL,
        "weights * scale[:, None] @ states",
        "weights @ states",
        "head::test_the_copy_path_is_attention_over_normed_states",
    ),
    Mutation(
        "novelty: attributions leave it out",
        MODEL,
        "-away.gather(1, turns) * shares",
        "0 * away.gather(1, turns) * shares",
        "head::test_attributions_are_what_the_vector_is_made_of",
    ),
    Mutation(
        "targets: turned away from the answer itself",
        TARGETS,
        "others = others[others @ documents[row] < SAME_TEXT]",
        "pass",
        "targets::test_a_target_is_not_turned_away_from_what_is_asked_for_once_more",
    ),
    Mutation(
        "generated: the head reads the prompt too",
        MODEL,
        "readout_mask[:, :query_start] = False",
        "pass",
        "generation::test_generated_mode_reads_what_the_bare_backbone_would_write[llama-tied]",
    ),
    Mutation(
        "generated: a query may be empty",
        MODEL,
        "min_new_tokens=1,",
        "min_new_tokens=0,",
        "generation::test_a_backbone_that_writes_no_query_still_gives_a_vector",
    ),
    Mutation(
        "padding: on the right",
        MODEL,
        "input_ids[row, width - len(prompt) :] = torch.tensor(prompt)\n"
        "            attention_mask[row, width - len(prompt) :] = 1",
        "input_ids[row, : len(prompt)] = torch.tensor(prompt)\n            attention_mask[row, : len(prompt)] = 1",
        "generation::test_a_padded_batch_generates_what_each_prompt_does_alone",
    ),
    Mutation(
        "padding: positions count it",
        MODEL,
        "position_ids=(attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]",
        "position_ids=torch.arange(input_ids.shape[1])[None, past:]",
        "modeling::test_vectors_do_not_depend_on_batch_size_or_order[gpt2-tied-context]",
    ),
    Mutation(
        "cache: crop leaves the keys",
        MODEL,
        "super().crop(tokens_to_remove)",
        "pass",
        "generation::test_an_edited_history_is_passed_anew_from_where_it_differs[llama-tied]",
    ),
    Mutation(
        "cache: crop leaves the recorded states",
        MODEL,
        "rest = -tokens_to_remove",
        "rest = 0",
        "generation::test_a_cache_that_is_cropped_forgets_what_it_has_recorded[llama-tied]",
    ),
    Mutation(
        "cache: an interrupted pass goes unnoticed",
        MODEL,
        "if self.get_seq_length() != passed:",
        "if False:",
        "generation::test_what_interrupts_a_pass_does_not_spoil_the_cache[llama-tied]",
    ),
    Mutation(
        "cache: a recurrent state is cut",
        MODEL,
        "if any(map(_is_recurrent, self.layers)) and not torch.equal(mask, padding):",
        "if False:",
        "generation::test_a_recurrent_backbone_goes_on_from_a_cache[context]",
    ),
    Mutation(
        "cache: a window is cut too late",
        MODEL,
        "layer.keys.shape[-2] - (passed - tokens) <",
        "layer.keys.shape[-2] <",
        "generation::test_a_window_that_could_not_be_cut_is_not_cut_later",
    ),
    Mutation(
        "cache: a branch shares its layers",
        MODEL,
        "branch.layers = [copy.deepcopy(layer) if _is_recurrent(layer) else copy.copy(layer) for layer in self.layers]",
        "pass",
        "generation::test_a_query_that_is_written_is_not_in_the_prompts_cache[llama-tied]",
    ),
    Mutation(
        "cache: a branch shares a recurrent state",
        MODEL,
        "copy.deepcopy(layer) if _is_recurrent(layer) else copy.copy(layer)",
        "copy.copy(layer)",
        "generation::test_a_recurrent_backbone_goes_on_from_a_cache[generated]",
    ),
    Mutation(
        "copy path: autocast rounds what it adds up",
        MODEL,
        "with torch.autocast(states.device.type, enabled=False):",
        "if True:",
        "head::test_under_autocast_the_copy_path_adds_up_in_full_precision",
    ),
    Mutation(
        "padding: nothing on the left is left out",
        MODEL,
        "if any(row[0] == pad for row in rows):",
        "if False:",
        "generation::test_padding_is_known_without_a_mask",
    ),
    Mutation(
        "segments: a tool in a user's clothes asks",
        MODEL,
        "if tool:  # a tool's turn",
        "if False:  # a tool's turn",
        "prompts::test_a_tools_result_in_a_users_turn_is_no_question",
    ),
    Mutation(
        "prompt: markers that are not called special are text",
        MODEL,
        "ids |= {i for i in written if",
        "_ = {i for i in written if",
        "prompts::test_markers_that_are_not_called_special_cannot_be_forged",
    ),
    Mutation(
        "segments: padding in the middle is read",
        MODEL,
        "order = real.long().argsort(dim=1, stable=True)",
        "order = torch.arange(real.shape[1]).expand_as(input_ids)",
        "head::test_padding_in_the_middle_does_not_hide_a_users_turn",
    ),
    Mutation(
        "cache: a branch that keeps nothing keeps what passes",
        MODEL,
        "return copy.copy(self.layers[layer_idx]).update(",
        "return self.layers[layer_idx].update(",
        "modeling::test_a_branch_that_keeps_nothing_is_as_long_after_a_pass[llama-tied]",
    ),
    Mutation(
        "cache: a branch shares what was recorded",
        MODEL,
        "branch._recorded = list(self._recorded)",
        "pass",
        "generation::test_a_query_that_is_written_is_not_in_the_prompts_cache[llama-tied]",
    ),
    Mutation(
        "going on: no token is left to pass",
        MODEL,
        "[: len(prompt) - 1]",
        "[: len(prompt)]",
        "generation::test_the_next_turn_passes_only_what_is_new[llama-tied-context]",
    ),
    Mutation(
        "going on: past the first difference",
        MODEL,
        "same.long().cumprod(0).sum()",
        "same.long().sum()",
        "generation::test_an_edited_history_is_passed_anew_from_where_it_differs[llama-tied]",
    ),
    Mutation(
        "probe: its head does not start at zero",
        MODEL,
        "self.linear_out = ZeroInitLinear(config.head_dim, config.embedding_dim)",
        "self.linear_out = nn.Linear(config.head_dim, config.embedding_dim)",
        "modeling::test_a_new_probe_changes_nothing",
    ),
    Mutation(
        "probe: its adapter does not start at zero",
        MODEL,
        "init.zeros_(module.up[name])",
        "init.normal_(module.up[name], std=0.1)",
        "modeling::test_a_new_probe_passes_as_the_words_that_ask_for_a_query",
    ),
    Mutation(
        "probe: its adapter stays on",
        MODEL,
        "_PASSING.reset(passing)",
        "pass",
        "modeling::test_the_adapter_acts_on_the_probe_alone[llama-tied]",
    ),
    Mutation(
        "prompt: special tokens in a text",
        MODEL,
        "if len(token) > 1 and token in text:",
        "if False:",
        "prompts::test_no_text_forges_a_turn",
    ),
    Mutation(
        "prompt: no special token is known by default",
        MODEL,
        "special_tokens_of(tokenizer).values() if special_tokens is None else special_tokens",
        "special_tokens or ()",
        "prompts::test_no_text_forges_a_turn",
    ),
    Mutation(
        "prompt: an error quotes the conversation",
        MODEL,
        'said = type(refused).__name__ == "TemplateError"',
        "said = True",
        "prompts::test_a_template_that_fails_does_not_quote_the_conversation",
    ),
    Mutation(
        "synthesis: special tokens in a document",
        SYNTHESIS,
        "prompts = [plain_text(prompt, special_tokens) for prompt in prompts]",
        "pass",
        "synthesis::test_a_document_forges_no_turn_in_what_the_llm_is_asked",
    ),
    Mutation(
        "vLLM: special tokens in a text",
        VLLM,
        "content=message.content | broken)",
        "content=message.content)",
        "vllm::test_no_text_forges_a_turn",
    ),
    Mutation(
        "weights: checksum check",
        LOADING,
        "if is_damaged(weights):",
        "if False:",
        "faults::test_a_flipped_byte_in_the_weights_is_named",
    ),
    Mutation(
        "prompt: a second beginning-of-sequence token",
        MODEL,
        "add_special_tokens=not tokenizer.chat_template",
        "add_special_tokens=True",
        "prompts::test_no_special_token_of_a_template_stands_twice",
    ),
    Mutation(
        "prompt: the system message is dropped with old turns",
        MODEL,
        'oldest = 1 if messages[0]["role"] == "system" else 0',
        "oldest = 0",
        "prompts::test_history_is_truncated_from_the_oldest_turn",
    ),
    Mutation(
        "tokenizer: fingerprint check",
        MODEL,
        "elif self.config.tokenizer_fingerprint != seen:",
        "elif False:",
        "saving::test_another_tokenizer_template_or_library_is_warned_of_once",
    ),
    Mutation(
        "config: a probe mode without probe tokens",
        CONFIG,
        'self.query_mode != "probe" or self.num_probe_tokens > 0',
        "True",
        "saving::test_bad_configs",
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
        "data: overlap with the held-out split",
        DATA,
        "if held_out.isdisjoint(keys)]",
        "]",
        "data::test_drop_overlap",
    ),
    Mutation(
        "bootstrap: turns of a conversation one by one",
        "native_retrieval/metrics.py",
        "if groups is not None and len(set(groups)) > 1:",
        "if False:",
        "metrics",
    ),
    Mutation(
        "train: the head is drawn without the seed",
        "train.py",
        "set_seed(args.seed)",
        "set_seed(0)",
        "trainer::test_a_seed_draws_the_head_as_well_as_the_order",
    ),
    Mutation(
        "data: documents judged 0 are gold",
        DATA,
        "if judgement.score > 0 and judgement.document not in documents:",
        "if judgement.document not in documents:",
        "data::test_task_round_trip",
    ),
    Mutation(
        "features: states of the padding",
        "native_retrieval/features.py",
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
        "agent: documents may close their fence",
        "native_retrieval/conversations.py",
        "{plain(': '.join(",
        "{(': '.join(",
        "app::test_a_document_cannot_leave_its_fence_or_forge_a_turn",
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
        {"command": f"python tests/mutations.py --output {arguments.output}", "mutations": rows}, arguments.output
    )
    unnoticed = [row["name"] for row in rows if not row["caught"]]
    print(f"{len(rows) - len(unnoticed)} of {len(rows)} mutations were noticed")
    for name in unnoticed:
        print(f"mutations: no test notices {name!r}; write one")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
