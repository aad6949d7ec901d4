# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
One vLLM server that chats, and returns the native query vector of any request that asks for it.

    python -m native_retrieval.integrations.vllm outputs/best --port 8000

starts vLLM's OpenAI server on the model's backbone; further words go to vLLM. Then, with the OpenAI client:

    wanted = {"kv_transfer_params": {"query_mode": "context"}}
    answer = client.chat.completions.create(model="native-retrieval", messages=messages, max_tokens=1, extra_body=wanted)
    vector = answer.kv_transfer_params["query_vector"]

The prefill stays in vLLM's prefix cache: a second request, with the documents, passes only the documents. vLLM extracts the
hidden states that the head reads (`extract_hidden_states`); the connector below applies the head to them in the worker.
"""

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)
from vllm.logger import init_logger

from configuration_native_retrieval import QUERY_MODES, NativeRetrievalConfig
from processing_native_retrieval import NativeRetrievalProcessor

from ..cli import CommandParser, one_line_errors
from ..loading import load_head, local_paths, model_folder

logger = init_logger(__name__)

GUARD = """\
{%- set guarded = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string -%}{%- set message = dict(message, content=message.content | broken) -%}{%- endif -%}
{%- set guarded.messages = guarded.messages + [message] -%}
{%- endfor -%}
{%- set messages = guarded.messages %}"""


def problem_of(asked: dict[str, Any], num_prompt_tokens: int, max_prompt_tokens: int | None) -> str | None:
    """Why a request cannot get a vector, in one line; `None` if it can."""
    mode, count = asked.get("query_mode"), asked.get("num_query_tokens")
    if mode not in QUERY_MODES:
        return f"query_mode={mode!r} is unknown; choose one of {', '.join(QUERY_MODES)}"
    if mode == "generated" and not (type(count) is int and 1 <= count <= num_prompt_tokens):
        return (
            f"num_query_tokens={count!r} must be a whole number from 1 to {num_prompt_tokens}, the prompt's tokens; give "
            "the number of tokens of the written query at the prompt's end"
        )
    read = num_prompt_tokens - (count if mode == "generated" else 0)
    if max_prompt_tokens and read > max_prompt_tokens:
        return (
            f"the conversation has {read} tokens, over the model's max_prompt_tokens={max_prompt_tokens}; drop its oldest "
            "turns, as embed_query does"
        )
    return None


@dataclass
class Wanted:  # a request for a vector whose prompt passes in this step
    request_id: str
    token_ids: list[int]
    block_ids: list[int]
    num_query_tokens: int  # 0: context


@dataclass
class WantedMetadata(KVConnectorMetadata):
    requests: list[Wanted] = field(default_factory=list)


class NativeQueryConnector(ExampleHiddenStatesConnector):
    """
    Answers a request with `query_mode` in its `kv_transfer_params` by the query vector of its prompt. `"generated"` reads
    the last `num_query_tokens` tokens: a query that an earlier request has written.

    The head is applied in the worker, in the step in which the prompt passes. The scheduler may be another process: it gets
    the vector as a file of a few kilobytes, in a private folder that `serve_command` makes.
    """

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        get = self._kv_transfer_config.get_from_extra_config
        model, folder, self.max_prompt_tokens = (get(name, None) for name in ("model", "vectors", "max_prompt_tokens"))
        if not model or not folder or os.stat(folder).st_mode & 0o077 or os.stat(folder).st_uid != os.getuid():
            raise ValueError(
                f"kv_connector_extra_config has model={model!r} and vectors={folder!r}; give a trained model's folder, and a "
                "folder that only this user can enter (mode 700), as `serve_command` does"
            )
        self.folder = Path(folder)
        if role == KVConnectorRole.WORKER:
            self.model = load_head(model)

    def path(self, request_id: str) -> Path:
        return self.folder / f"{hashlib.sha256(request_id.encode()).hexdigest()[:32]}.json"

    def wait_for_save(self) -> None:
        """In the worker, when all states of a step are in the cache."""
        if self._is_tp_rank_zero and self.has_connector_metadata():
            for wanted in self._get_connector_metadata().requests:
                try:
                    answer = {"query_vector": self.embed(wanted)}
                except Exception as error:  # one request must not end the engine
                    logger.exception("no query vector for request %s", wanted.request_id)
                    answer = {"query_error": f"{type(error).__name__}: {error}"}
                path = self.path(wanted.request_id)
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(answer))
                os.replace(partial, path)  # the scheduler finds the whole file, or none

    @torch.no_grad()
    def embed(self, wanted: Wanted) -> list[float]:
        input_ids, count, readout_mask = torch.tensor([wanted.token_ids]), len(wanted.token_ids), None
        blocks = torch.tensor(wanted.block_ids, dtype=torch.long)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten().to(self._kv_cache.device)
        states = extract_from_kv_cache(self._kv_cache, slots, count).cpu()  # (tokens, layers, hidden_size)
        if wanted.num_query_tokens:
            readout_mask = torch.arange(count)[None] >= count - wanted.num_query_tokens
        output = self.model(input_ids, readout_mask=readout_mask, hidden_states=states[None])
        return output.query_embeddings[0].tolist()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        return None, None  # nothing is sent in the background

    def build_connector_meta(self, scheduler_output) -> WantedMetadata:
        """In the scheduler, before each step."""
        metadata = WantedMetadata()
        for new in scheduler_output.scheduled_new_reqs:
            extra = (new.sampling_params.extra_args if new.sampling_params else None) or {}
            asked = extra.get("kv_transfer_params") or {}
            passed = new.num_computed_tokens + scheduler_output.num_scheduled_tokens[new.req_id]
            length = len(new.prompt_token_ids)
            if passed >= length and not problem_of(asked, length, self.max_prompt_tokens):
                count = asked["num_query_tokens"] if asked["query_mode"] == "generated" else 0
                blocks = new.block_ids[self._cache_kv_group_id]
                metadata.requests.append(Wanted(new.req_id, list(new.prompt_token_ids), list(blocks), count))
        return metadata

    def request_finished(self, request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        asked = request.kv_transfer_params or {}
        if asked.get("query_mode") is None:
            return False, None
        if problem := problem_of(asked, request.num_prompt_tokens, self.max_prompt_tokens):
            return False, {"query_error": problem}
        path = self.path(request.request_id)
        try:
            answer = json.loads(path.read_text())
        except OSError:
            return False, {"query_error": "the prompt did not pass in one step; start vLLM without chunked prefill"}
        path.unlink()
        return False, answer


def guarded_template(processor: NativeRetrievalProcessor) -> str:
    """
    The chat template, with special tokens in the messages' text broken by a word joiner, so that no text forges a turn:
    vLLM renders messages itself, and reads every special token as one.
    """
    tokens = [token for token in processor.tokenizer.convert_ids_to_tokens(processor.special_ids) if len(token) > 1]
    broken = "".join(f" | replace({json.dumps(t)}, {json.dumps(t[0] + chr(0x2060) + t[1:])})" for t in tokens)
    return GUARD.replace(" | broken", broken) + processor.tokenizer.get_chat_template()


def backbone_of(folder: Path) -> tuple[str, NativeRetrievalConfig]:
    """Where vLLM finds a saved model's backbone, and the model's configuration."""
    config, elsewhere = NativeRetrievalConfig.from_pretrained(folder), local_paths(folder).get("backbone")
    elsewhere = elsewhere or config.backbone_name_or_path
    return str(folder / "backbone") if config.store_backbone else elsewhere, config


def serve_command(model: str, words: list[str]) -> list[str]:
    """The command that starts vLLM's OpenAI server for a saved model, with a new folder that only this user can enter."""
    folder = model_folder(model)
    backbone, config = backbone_of(folder)
    processor = NativeRetrievalProcessor.from_pretrained(folder, config=config)
    own, limit = Path(tempfile.mkdtemp(prefix="native-retrieval-")), processor.max_prompt_tokens
    transfer = {
        "kv_connector": "NativeQueryConnector",
        "kv_connector_module_path": "native_retrieval.integrations.vllm",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"model": str(folder.resolve()), "vectors": str(own), "max_prompt_tokens": limit},
    }
    layers = {"hf_config": {"eagle_aux_hidden_state_layer_ids": config.hidden_state_layers}}
    extract = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": layers}
    if config.backbone_revision and not config.store_backbone:  # the one that the head was trained on
        words = ["--revision", config.backbone_revision, "--tokenizer-revision", config.backbone_revision, *words]
    if processor.tokenizer.chat_template:
        (own / "template.jinja").write_text(guarded_template(processor), encoding="utf-8")
        # As a string: the guard does not look into parts.
        words = ["--chat-template", str(own / "template.jinja"), "--chat-template-content-format", "string", *words]
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", backbone),
        *("--served-model-name", "native-retrieval", "--no-enable-chunked-prefill"),
        *("--kv-transfer-config", json.dumps(transfer), "--speculative-config", json.dumps(extract), *words),
    ]


@one_line_errors("vllm")
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("python -m native_retrieval.integrations.vllm", __doc__)
    parser.add_argument("model", help="folder or Hub id of a trained model; further words go to vLLM")
    arguments, words = parser.parse_known_args(argv)
    command = serve_command(arguments.model, words)
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
