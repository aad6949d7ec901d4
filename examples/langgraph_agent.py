"""
An agent as a LangGraph graph. Its `search` tool takes the query vector from the language model's own state: no embedding
model is loaded, as the last line says.

    python examples/langgraph_agent.py              # the demo's model and index
    python examples/langgraph_agent.py MODEL INDEX  # your own
"""

import sys
from typing import Annotated

import torch
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, ToolNode

from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.conversations import search_results
from native_retrieval.index import DocumentIndex
from native_retrieval.integrations.langchain import conversation_of
from native_retrieval.loading import load_model

QUESTIONS = ("Who painted Guernica?", "Which war is it about?")


def build_graph(model, index: DocumentIndex):
    """`decide` calls the tool, `search` finds documents, `answer` resumes from the KV cache of the search."""
    caches = {}  # of the present conversation; a tensor has no place in a graph's state

    def decide(state: MessagesState) -> dict:
        # A larger model decides for itself; one of 135M parameters always searches.
        call = {"name": "search", "args": {}, "id": f"call_{len(state['messages'])}", "type": "tool_call"}
        return {"messages": [AIMessage("", tool_calls=[call])]}

    @tool
    def search(messages: Annotated[list[BaseMessage], InjectedState("messages")]) -> str:
        """Find documents for the conversation so far."""
        conversation = conversation_of(messages[:-1])  # without the call itself
        found = model.embed_query(conversation, past_key_values=caches.get("last"), return_cache=True)
        caches["last"] = found.past_key_values
        _, rows = index.search(found.query_embeddings.float().cpu().numpy(), 1)
        return search_results(conversation[-1]["content"], [index.documents[int(row)] for row in rows[0]])["content"]

    def answer(state: MessagesState) -> dict:
        prompt = model.processor.encode(conversation_of(state["messages"]))
        input_ids = torch.tensor([prompt], device=model.backbone.device)
        output = model.generate(input_ids, past_key_values=caches["last"], max_new_tokens=60, do_sample=False)
        text = model.processor.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
        return {"messages": [AIMessage(text.strip())]}

    graph = StateGraph(MessagesState)
    graph.add_node("decide", decide).add_node("search", ToolNode([search])).add_node("answer", answer)
    graph.add_edge(START, "decide").add_edge("decide", "search").add_edge("search", "answer")
    return graph.compile()


@one_line_errors("langgraph_agent.py")
def main() -> None:
    parser = CommandParser("langgraph_agent.py", __doc__)
    parser.add_argument("model", nargs="?", default=".cache/demo/model", help="a trained model (default: %(default)s)")
    parser.add_argument("index", nargs="?", default=".cache/demo/index", help="its teacher's (default: %(default)s)")
    words = parser.parse_args()
    model, index = load_model(words.model), DocumentIndex.load(words.index)
    index.check_model(model.config)
    graph = build_graph(model, index)
    messages = []
    for question in QUESTIONS:
        messages = graph.invoke({"messages": [*messages, HumanMessage(question)]})["messages"]
        for message in messages[-4:]:
            if message.text:
                print(f"{message.type:6} {message.text[:200]}")
    embedders = [name for name in sys.modules if name.split(".")[0] == "sentence_transformers"]
    print(f"Embedding models loaded in this process: {embedders or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
