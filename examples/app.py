"""
A web page to talk to the agent. For each turn it compares two searches: by the native query vector, and by a query that the
language model writes and the teacher encodes.

    python examples/app.py                          # what `make demo-train` has made, on http://127.0.0.1:7860
    python examples/app.py --model MODEL --index INDEX [--teacher TEACHER] [--port 7861]

Conversations are stored in the browser and survive a refresh. The server keeps only the KV caches of open pages.
"""

import sys
import time
from dataclasses import dataclass

import gradio as gr
import numpy as np
import pandas as pd
import torch
from starlette.middleware import Middleware

from native_retrieval.agent import Agent
from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.figures import plot_map
from native_retrieval.index import DocumentIndex, label
from native_retrieval.loading import load_model, local_paths
from native_retrieval.methods import read_query
from native_retrieval.teacher import Teacher, teacher_of

EXAMPLES = ("Who painted Guernica?", "How high is Mount Everest?", "What did Clara Schumann compose?")
NATIVE, PIPELINE = "native", "generate, then encode"
COLOURS = {
    (NATIVE,): "#7FB8D8",
    (PIPELINE,): "#E9B08A",
    (NATIVE, PIPELINE): "#6E6E6E",
}  # of documents, by who found them
PARTS = {"head": "#0072B2", "write the query": "#D55E00", "encode it": "#E69F00", "search": "#9A9A9A"}
NUM_DOCUMENTS = 5


class OwnImagesOnly:
    """An answer is Markdown: a document could make the model write an image whose address leaks the conversation."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", b"img-src 'self' data: blob:")]
            await send(message)

        await self.app(scope, receive, send_with_policy)


SERVED = {"app_kwargs": {"middleware": [Middleware(OwnImagesOnly)]}, "theme": gr.themes.Soft(), "footer_links": []}


@dataclass
class Comparison:
    """One turn, searched both ways after one prefill: documents, milliseconds of each part, and the written query."""

    query: str
    rows: dict[str, list[int]]
    scores: dict[str, list[float]]
    vectors: dict[str, np.ndarray]
    milliseconds: list[tuple[str, str, float]]


@torch.no_grad()
def compare(agent: Agent, teacher: Teacher) -> Comparison:
    """Searches both ways for the turn that the agent has just taken."""
    model, index, comparison = agent.model, agent.index, Comparison("", {}, {}, {}, [])

    def timed(way: str, part: str, function, *arguments):
        begin = time.perf_counter()
        result = function(*arguments)
        comparison.milliseconds.append((way, part, round(1000 * (time.perf_counter() - begin), 1)))
        return result

    output = timed(NATIVE, "head", model.embed_prefilled, agent.cache, "context")
    _, (query,) = timed(PIPELINE, "write the query", model.write_queries, agent.cache)
    question = agent.messages[-1]["content"]
    comparison.query = read_query(model.processor.tokenizer, query, question)  # as `eval.py` does
    comparison.vectors = {
        NATIVE: output.query_embeddings.float().cpu().numpy(),
        PIPELINE: timed(PIPELINE, "encode it", teacher.encode, [comparison.query]),
    }
    for way, vector in comparison.vectors.items():
        scores, rows = timed(way, "search", index.search, vector, NUM_DOCUMENTS)
        comparison.rows[way], comparison.scores[way] = rows[0].tolist(), scores[0].tolist()
    return comparison


def table(index: DocumentIndex, rows: list[int], scores: list[float]) -> pd.DataFrame:
    names = [label(index.documents[row]) for row in rows]
    return pd.DataFrame({"document": names, "cosine": [round(score, 3) for score in scores]})


def bars(comparison: Comparison) -> pd.DataFrame:
    return pd.DataFrame(comparison.milliseconds, columns=["way", "part", "milliseconds"])


def chart(index: DocumentIndex, comparison: Comparison):
    """Queries are stars. Documents are points: blue if the native query found them, orange the pipeline, grey both."""
    queries = {"native query": comparison.vectors[NATIVE][0], f"“{comparison.query}”": comparison.vectors[PIPELINE][0]}
    documents = {}
    for row in dict.fromkeys([*comparison.rows[NATIVE], *comparison.rows[PIPELINE]]):
        ways = tuple(way for way in (NATIVE, PIPELINE) if row in comparison.rows[way])
        name = label(index.documents[row])
        name = f"{row}: {name}" if name in documents else name
        documents[name] = (index.vectors.reconstruct(row), COLOURS[ways])
    return plot_map(queries, documents)


def remember(history: list[dict] | None) -> list[dict]:
    """The page's conversation as plain messages; Gradio returns their text in parts."""

    def text(content) -> str:
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    return [{"role": message["role"], "content": text(message["content"])} for message in history or []]


def take_turn(agent: Agent, teacher: Teacher, question: str, before: list[dict]):
    """Streams what the page shows: the user's turn, the documents found, and the answer piece by piece."""
    if not question.strip():
        raise gr.Error("Ask something first.", duration=4, print_exception=False)
    if agent.messages != before:  # after a refresh, or in a new conversation
        agent.messages, agent.cache = before, None
    try:
        agent.search(question)
    except ValueError as error:
        raise gr.Error(f"{str(error)[0].upper()}{str(error)[1:]}.", print_exception=False) from error
    found = compare(agent, teacher)
    tables = [table(agent.index, found.rows[way], found.scores[way]) for way in (NATIVE, PIPELINE)]
    right = [*tables, found.query, bars(found), chart(agent.index, found)]
    asked, said = agent.messages, ""
    yield [[*asked, {"role": "assistant", "content": "…"}], agent, *(gr.update(value=value) for value in right)]
    unchanged = [gr.skip()] * len(right)
    for piece in agent.answer():
        said += piece
        yield [[*asked, {"role": "assistant", "content": said}], agent, *unchanged]
    yield [agent.messages, agent, *unchanged]


def build_page(model, teacher: Teacher, index: DocumentIndex, max_new_tokens: int = 96) -> gr.Blocks:
    with gr.Blocks(title="Native Retrieval", fill_width=True) as page:
        gr.Markdown(
            "# Native Retrieval\n"
            f"{len(index):,} documents, embedded by *{index.info['teacher_name'].rstrip('/').split('/')[-1]}*. The language "
            "model's own state is the query. Left: the conversation. Right: the documents that each way finds for the "
            "last turn."
        )
        kept = gr.BrowserState([], storage_key="native-retrieval")
        agents = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                chat = gr.Chatbot(label="Conversation", height=460, elem_id="chat", buttons=["copy"])
                box = gr.Textbox(
                    placeholder="Ask something", show_label=False, max_lines=4, elem_id="question", autofocus=True
                )
                with gr.Row():
                    send = gr.Button("Send", variant="primary", elem_id="send")
                    stop = gr.Button("Stop", elem_id="stop")
                    clear = gr.Button("New conversation", elem_id="clear")
                gr.Examples([[text] for text in EXAMPLES], box)
            with gr.Column(scale=5, min_width=420):
                with gr.Row():
                    columns = {"headers": ["document", "cosine"], "column_widths": ["75%", "25%"], "wrap": True}
                    ours = gr.Dataframe(label="Native query: no text is written", elem_id="native", **columns)
                    theirs = gr.Dataframe(label="Generate a query, then encode it", elem_id="pipeline", **columns)
                query = gr.Textbox(label="The query that the model would have written", elem_id="query")
                with gr.Row():
                    spent = gr.BarPlot(
                        x="way",
                        y="milliseconds",
                        color="part",
                        color_map=PARTS,
                        x_title=" ",
                        title="Milliseconds after the prefill",
                        height=260,
                        elem_id="spent",
                    )
                    where = gr.Plot(show_label=False, elem_id="where")
        shown = [ours, theirs, query, spent, where]
        # Always updates, never values: Gradio 6.31 leaks a copy per turn of a component that gets an update first and a value
        # later.
        nothing = [gr.update(value=value) for value in (None, None, "", None, None)]

        def turn(question: str, history: list[dict], agent: Agent | None):
            agent = agent or Agent(model, index, NUM_DOCUMENTS, max_new_tokens=max_new_tokens)
            yield from take_turn(agent, teacher, question, remember(history))

        # One turn at a time: a page drops clicks while it runs.
        asked = gr.on(
            [box.submit, send.click],
            turn,
            [box, chat, agents],
            [chat, agents, *shown],
            trigger_mode="once",
            show_progress="minimal",
            concurrency_limit=4,
        )
        gr.on([box.submit, send.click], None, None, box, js="() => ''")  # the question is already sent
        asked.then(remember, chat, kept, show_progress="hidden")
        stop.click(remember, chat, kept, cancels=[asked], show_progress="hidden")
        gr.on(
            [clear.click, chat.clear],
            lambda: ["", [], None, [], *nothing],
            None,
            [box, chat, agents, kept, *shown],
            cancels=[asked],
        )
        page.load(lambda messages: messages, kept, chat, show_progress="hidden")
    return page.queue(max_size=64)


@one_line_errors("app.py")
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("app.py", __doc__)
    parser.add_argument("--model", default=".cache/demo/model", help="a trained model (default: %(default)s)")
    parser.add_argument("--index", default=".cache/demo/index", help="its teacher's index (default: %(default)s)")
    parser.add_argument("--teacher", help="name or path of the teacher, if it has moved since training")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    words = parser.parse_args(argv)
    model, index = load_model(words.model), DocumentIndex.load(words.index)
    index.check_model(model.config)
    teacher = teacher_of(model.config, words.teacher or local_paths(words.model).get("teacher"))
    page = build_page(model, teacher, index)
    page.launch(server_name=words.host, server_port=words.port, **SERVED)


if __name__ == "__main__":
    sys.exit(main())
