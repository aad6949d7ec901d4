# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
One vLLM server that chats, and returns the native query vector of any request that asks for it.

    python -m native_retrieval.integrations.vllm outputs/best --port 8000

starts vLLM's OpenAI server on the model's backbone, with further words passed on to it. Then, with the OpenAI client:

    answer = client.chat.completions.create(
        model="native-retrieval", messages=messages, max_tokens=1,
        extra_body={"kv_transfer_params": {"query_mode": "context"}},
    )
    vector = answer.kv_transfer_params["query_vector"]

The prefill stays in vLLM's prefix cache, so that the answer behind the documents, a second request, passes only these.

vLLM extracts the hidden states that the head reads (its `extract_hidden_states` keeps them in paged memory, as keys and
values); this connector applies the head to them in the worker. `probe` cannot be served so: its adapter acts on a few
tokens of a request and on no others, and vLLM's adapters act on all of them.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)
from vllm.logger import init_logger

from configuration_native_retrieval import NativeRetrievalConfig
from modeling_native_retrieval import plain_text, special_tokens_of

from ..cli import CommandParser, one_line_errors
from ..loading import load_head, load_model, model_folder

logger = init_logger(__name__)

MODES = ("context", "generated")


def problem_of(asked: dict[str, Any], num_prompt_tokens: int, max_prompt_tokens: int) -> str | None:
    """What is wrong with a request for a vector, in one line; None if one can be given."""
    mode, count = asked.get("query_mode"), asked.get("num_query_tokens")
    if mode not in MODES:
        return f"query_mode={mode!r} is unknown; choose one of {', '.join(MODES)}"
    if mode == "generated" and not (type(count) is int and 1 <= count <= num_prompt_tokens):
        return (
            f"num_query_tokens={count!r} is no number of tokens from 1 to the prompt's {num_prompt_tokens}; "
            "give the number of tokens of the written query, which end the prompt"
        )
    read = num_prompt_tokens - (count if mode == "generated" else 0)
    if read > max_prompt_tokens:
        return (
            f"the conversation has {read} tokens, over the model's max_prompt_tokens={max_prompt_tokens}; leave out its "
            "oldest turns, as embed_query does"
        )
    return None


@dataclass
class Wanted:
    """A request whose prompt passes in this step, and whose vector is asked for."""

    request_id: str
    token_ids: list[int]
    block_ids: list[int]
    num_query_tokens: int  # 0: context


@dataclass
class WantedMetadata(KVConnectorMetadata):
    requests: list[Wanted] = field(default_factory=list)


class NativeQueryConnector(ExampleHiddenStatesConnector):
    """
    Answers a `query_mode` in a request's `kv_transfer_params` with the query vector of its prompt: `"context"`, or
    `"generated"`, which reads the last `num_query_tokens` tokens, those of a query that a request before has written.

    The head is applied in the worker, in the very step in which the prompt passes. The scheduler may live in another
    process; the vector reaches it as a file of two kilobytes, in a folder that only this user can read.
    """

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        folder = self._kv_transfer_config.get_from_extra_config("model", None)
        if folder is None:
            raise ValueError("kv_connector_extra_config has no model; name the folder of a trained model")
        self.max_prompt_tokens = NativeRetrievalConfig.from_pretrained(folder).max_prompt_tokens
        self.folder = Path(self._kv_transfer_config.get_from_extra_config("vectors", None) or tempfile.gettempdir())
        if role == KVConnectorRole.WORKER:
            self.model = load_head(folder)

    def path(self, request_id: str) -> Path:
        return self.folder / f"{hashlib.sha256(request_id.encode()).hexdigest()[:32]}.json"

    # -- the worker ----------------------------------------------------------------------------------------------------

    def wait_for_save(self) -> None:
        """Called when all states of this step are in the cache."""
        if self._is_tp_rank_zero and self.has_connector_metadata():
            for wanted in self._get_connector_metadata().requests:
                try:
                    answer = {"query_vector": self.embed(wanted)}
                except Exception as error:  # a request must not take the engine down with it
                    logger.exception("no query vector for request %s", wanted.request_id)
                    answer = {"query_error": f"{type(error).__name__}: {error}"}
                self.path(wanted.request_id).write_text(json.dumps(answer))

    @torch.no_grad()
    def embed(self, wanted: Wanted) -> list[float]:
        blocks = torch.tensor(wanted.block_ids, dtype=torch.long)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten().to(self._kv_cache.device)
        states = extract_from_kv_cache(self._kv_cache, slots, len(wanted.token_ids)).cpu()
        input_ids, readout_mask = torch.tensor([wanted.token_ids]), None
        if wanted.num_query_tokens:
            readout_mask = torch.arange(len(wanted.token_ids))[None] >= len(wanted.token_ids) - wanted.num_query_tokens
        output = self.model(input_ids, readout_mask=readout_mask, hidden_states=states[None])
        return output.query_embeddings[0].tolist()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        return None, None  # nothing is sent in the background

    # -- the scheduler -------------------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output) -> WantedMetadata:
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


def backbone_of(folder: Path) -> tuple[str, NativeRetrievalConfig]:
    """Where vLLM finds a saved model's backbone (written beside it, if the model holds it), and its configuration."""
    config = NativeRetrievalConfig.from_pretrained(folder)
    if not config.store_backbone:
        return config.backbone_name_or_path, config
    backbone, aside = folder / "backbone", folder / "_backbone"
    written = backbone / "config.json"
    if not written.exists() or written.stat().st_mtime < (folder / "config.json").stat().st_mtime:
        whole = load_model(folder)
        # Aside first: vLLM would read what a stopped run has left half written.
        shutil.rmtree(aside, ignore_errors=True)
        whole.backbone.save_pretrained(aside)
        whole.tokenizer.save_pretrained(aside)
        shutil.rmtree(backbone, ignore_errors=True)
        os.replace(aside, backbone)
    return str(backbone), config


def guarded_template(tokenizer) -> str:
    """
    A tokenizer's chat template, with the special tokens in the messages' text made plain before it sees them, as
    `build_prompt` does: vLLM's server renders messages itself, and would read a document's markers as turns.
    """
    tokens = special_tokens_of(tokenizer).values()
    plain = "".join(
        f" | replace({json.dumps(token)}, {json.dumps(plain_text(token, [token]))})"
        for token in tokens
        if len(token) > 1
    )
    return (
        "{%- set plain = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        "{%- if message.content is string -%}"
        f"{{%- set message = dict(message, content=message.content{plain}) -%}}"
        "{%- endif -%}"
        "{%- set plain.messages = plain.messages + [message] -%}"
        "{%- endfor -%}"
        "{%- set messages = plain.messages -%}"
    ) + tokenizer.get_chat_template()


def serve_command(model: str, words: list[str]) -> list[str]:
    """The command that starts vLLM's OpenAI server for a saved model."""
    folder = model_folder(model)
    backbone, config = backbone_of(folder)
    own = Path(tempfile.mkdtemp(prefix="native-retrieval-"))
    transfer = {
        "kv_connector": "NativeQueryConnector",
        "kv_connector_module_path": "native_retrieval.integrations.vllm",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"model": str(folder.resolve()), "vectors": str(own)},
    }
    extract = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": config.hidden_state_layers}},
    }
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config.text_config)
    if config.backbone_revision and not config.store_backbone:  # the one whose states the head was trained on
        revision = config.backbone_revision
        words = ["--revision", revision, "--tokenizer-revision", revision, *words]
    if tokenizer.chat_template:
        (own / "template.jinja").write_text(guarded_template(tokenizer), encoding="utf-8")
        # Text in parts comes to the template joined; parts of their own would pass the guard by.
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
