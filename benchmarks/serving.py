# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Many users at once: one vLLM server that chats and returns the native query vector, against vLLM that writes the query and a
second server that encodes it with the teacher. It needs vLLM, in an environment of its own: `make serve-test` makes it.

    .venv-vllm/bin/python benchmarks/serving.py --model .cache/demo/model --queries data/handwritten/queries.jsonl \\
        --output results/bench-serving.json

First 200 requests are cancelled by their senders, and 200 more, at once, must get vectors that agree with `embed_query` (cosine
over 0.999); --check stops here. --load sends 5,000 more, 200 at a time, cancels every third, records the server's memory, and
stops. Otherwise both pipelines answer the same retrieval turns (a conversation in, a query vector out) at each concurrency; the
two-model pipeline runs plain vLLM, without our connector. Turns of one conversation share prefixes, which both may cache.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from openai import AsyncOpenAI
from tqdm.auto import tqdm

from benchmarks.common import parser as command_parser
from benchmarks.common import plot, write
from benchmarks.load import LOOK_EVERY, growth
from benchmarks.load import draw as draw_memory
from native_retrieval.cli import one_line_errors
from native_retrieval.data import read_conversations
from native_retrieval.integrations.vllm import backbone_of, serve_command
from native_retrieval.loading import load_model, local_paths, model_folder

NAME, PORT, TEACHER_PORT = "native-retrieval", 8021, 8022
CHECKED, AT_ONCE, LEAST_COSINE = 200, 200, 0.999
STARTS_WITHIN = 300  # seconds
LONGEST = ["--max-model-len", "2048"]
ONE, TWO = "one vLLM, native-context", "vLLM writes the query, a second server encodes it"


@contextmanager
def server(command: list[str], port: int):
    """Runs a server while the block lasts, from when it answers."""
    words = [*command, "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    if not torch.cuda.is_available():
        words.append("--enforce-eager")
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        # Threads that wait must not spin: the two servers of the pipeline share the cores, as ours need not.
        quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, env=quiet)
        try:
            deadline = time.monotonic() + STARTS_WITHIN
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        lines = log.read().splitlines()  # the first error is the cause, and the rest its echoes
                        cause = next((line for line in lines if "Error: " in line), "no error in its log")
                        raise OSError(f"{' '.join(words[:4])} did not start: {cause}") from None
                    time.sleep(1)
            yield process
        finally:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def client(port: int) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0)


async def native_turn(llm: AsyncOpenAI, messages: list[dict]) -> list[float]:
    answer = await llm.chat.completions.create(
        model=NAME,
        messages=messages,
        max_tokens=1,
        extra_body={"kv_transfer_params": {"query_mode": "context"}},
    )
    parameters = answer.kv_transfer_params
    if "query_vector" not in parameters:
        raise ValueError(parameters["query_error"])
    return parameters["query_vector"]


async def two_model_turn(
    llm: AsyncOpenAI, teacher: AsyncOpenAI, messages: list[dict], query_prompt: str
) -> list[float]:
    answer = await llm.chat.completions.create(
        model=NAME,
        messages=[*messages, {"role": "assistant", "content": query_prompt}],
        max_tokens=32,
        temperature=0,
        stop=["\n"],
        extra_body={"add_generation_prompt": False, "continue_final_message": True},
    )
    query = answer.choices[0].message.content.strip() or "."
    return (await teacher.embeddings.create(model="teacher", input=query)).data[0].embedding


async def drive(turn, ports: list[int], conversations: list, concurrency: int) -> tuple[list, np.ndarray, float]:
    """Results, milliseconds of each turn, and seconds of all, with `concurrency` turns under way at any time."""
    gate, milliseconds = asyncio.Semaphore(concurrency), np.zeros(len(conversations))
    clients = [client(port) for port in ports]

    async def one(i: int, messages: list[dict]):
        async with gate:
            begin = time.perf_counter()
            result = await turn(*clients, messages)
            milliseconds[i] = 1000 * (time.perf_counter() - begin)
            return result

    begin = time.perf_counter()
    try:
        results = await asyncio.gather(*(one(i, messages) for i, messages in enumerate(conversations)))
        return results, milliseconds, time.perf_counter() - begin
    finally:
        for each in clients:
            await each.close()


async def leave_early(conversations: list) -> None:
    """As many requests at once, each given up a little later than the one before, most of them under way."""
    llm = client(PORT)
    turns = [asyncio.create_task(native_turn(llm, messages)) for messages in conversations]
    for turn in turns:
        await asyncio.sleep(0.01)
        turn.cancel()
    await asyncio.gather(*turns, return_exceptions=True)
    await llm.close()


def check(model_dir: str, conversations: list) -> float:
    """The lowest cosine between served vectors and `embed_query`'s, after as many requests that were given up."""
    conversations = [conversations[i % len(conversations)] for i in range(CHECKED)]
    asyncio.run(leave_early(conversations))
    vectors, _, _ = asyncio.run(drive(native_turn, [PORT], conversations, AT_ONCE))
    wanted = load_model(model_dir).embed_query(conversations)
    return float((torch.tensor(vectors) * wanted).sum(1).min())


async def under_load(count: int, conversations: list, wanted: torch.Tensor, server: subprocess.Popen) -> dict:
    """`count` requests, every third given up: how many of the others were wrong, and the memory of the server's processes."""
    llm, gate, rows, wrong = client(PORT), asyncio.Semaphore(AT_ONCE), [], 0
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    bar = tqdm(total=count, unit="request")

    async def one(i: int) -> None:
        nonlocal wrong
        async with gate:
            row = i % len(conversations)
            turn = asyncio.create_task(native_turn(llm, conversations[row]))
            if i % 3 == 2:
                await asyncio.sleep(0.2 * (i % 7))
                turn.cancel()
                await asyncio.gather(turn, return_exceptions=True)
            else:
                wrong += float(torch.tensor(await turn) @ wanted[row]) < LEAST_COSINE
            bar.update()
            if bar.n % LOOK_EVERY == 0:
                rows.append({"requests": bar.n, "rss_mb": sum(p.memory_info().rss for p in processes) // 10**6})

    await asyncio.gather(*(one(i) for i in range(count)))
    bar.close()
    await llm.close()
    return {
        "what": "requests to one vLLM, every third given up",
        "at_once": AT_ONCE,
        "requests": count,
        "wrong": wrong,
        "growth_mb_second_half": growth(rows),
        "rows": rows,
    }


def measure(way: str, turn, ports: list[int], warm: list, parts: dict[int, list]) -> list[dict]:
    asyncio.run(drive(turn, ports, warm, 4))
    rows = []
    for concurrency, conversations in parts.items():
        _, milliseconds, seconds = asyncio.run(drive(turn, ports, conversations, concurrency))
        p50, p95 = np.percentile(milliseconds, (50, 95))
        row = {"way": way, "concurrency": concurrency, "turns_per_s": round(len(conversations) / seconds, 2)}
        rows.append({**row, "p50_ms": round(float(p50), 1), "p95_ms": round(float(p95), 1)})
        print(rows[-1], flush=True)
    return rows


def draw(result: dict, path: Path) -> None:
    with plot(path, "Retrieval turns a second", "Turns under way at any time") as axes:
        for way, colour in ((ONE, "#0072B2"), (TWO, "#6E6E6E")):
            points = [(row["concurrency"], row["turns_per_s"]) for row in result["rows"] if row["way"] == way]
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=way)
        axes.set_xscale("log", base=2)
        levels = sorted({row["concurrency"] for row in result["rows"]})
        axes.set_xticks(levels, levels)
        axes.minorticks_off()
        axes.set_ylim(0)


@one_line_errors("serving.py")
def main() -> None:
    parser = command_parser("serving.py", __doc__, "model", "queries")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--output", help="the JSON file to write; a figure goes into figures/ beside it")
    parser.add_argument("--check", action="store_true", help="compare the vectors of 200 requests at once, and stop")
    parser.add_argument("--load", type=int, metavar="REQUESTS", help="send as many, write the memory's curve, and stop")
    words = parser.parse_args()
    if not words.check and not words.output:
        parser.error("--output is missing; name a JSON file, or pass --check")
    command = " ".join([".venv-vllm/bin/python", *sys.argv])
    conversations = read_conversations(Path(words.queries))
    levels = words.concurrency
    warm, rest = conversations[: len(conversations) // 10], conversations[len(conversations) // 10 :]
    share = len(rest) // len(levels)
    parts = {level: rest[i * share : (i + 1) * share] for i, level in enumerate(levels)}

    with server(serve_command(words.model, LONGEST), PORT) as process:
        cosine = check(words.model, conversations)
        print(
            f"{CHECKED} requests given up, {CHECKED} at once answered: lowest cosine to embed_query {cosine:.5f}",
            flush=True,
        )
        if cosine < LEAST_COSINE:
            sys.exit(f"serving.py: wanted at least {LEAST_COSINE}")
        if words.check:
            return
        if words.load:
            wanted = load_model(words.model).embed_query(conversations)
            result = asyncio.run(under_load(words.load, conversations, wanted, process))
            write({"command": command, **result}, words.output, draw_memory)
            print(f"{result['wrong']} wrong; memory grew by {result['growth_mb_second_half']} MB in the second half")
            return
    with server(serve_command(words.model, LONGEST), PORT):  # anew: nothing of the check is in its cache
        rows = measure(ONE, native_turn, [PORT], warm, parts)
    folder = model_folder(words.model)
    backbone, config = backbone_of(folder)
    encoder = local_paths(folder).get("teacher") or config.teacher_name_or_path
    plain = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    encoder = [*plain, encoder, "--served-model-name", "teacher", "--runner", "pooling"]
    with server([*plain, backbone, "--served-model-name", NAME, *LONGEST], PORT), server(encoder, TEACHER_PORT):
        turn = partial(two_model_turn, query_prompt=config.query_prompt)
        rows += measure(TWO, turn, [PORT, TEACHER_PORT], warm, parts)
    speed = {(row["way"], row["concurrency"]): row["turns_per_s"] for row in rows}
    result = {
        "command": command,
        "turns": share,
        "cores": os.cpu_count(),
        "lowest_cosine": round(cosine, 5),
        "rows": rows,
        "ratio": {str(level): round(speed[ONE, level] / speed[TWO, level], 2) for level in levels},
    }
    write(result, words.output, draw)
    print(f"Turns a second, ours over the pipeline's: {result['ratio']}")


if __name__ == "__main__":
    sys.exit(main())
