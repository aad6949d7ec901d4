"""
Talk to an agent that searches before it answers, in a terminal: one model, one pass a turn.

    python examples/agent.py pretrained/smollm2-135m-minilm INDEX
    python examples/agent.py                        # with what `make demo-train` has made
    python examples/agent.py MODEL INDEX            # your own
"""

import sys

from native_retrieval.agent import Agent
from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.index import DocumentIndex, label
from native_retrieval.loading import load_model


def take_turn(agent: Agent, question: str) -> None:
    found = agent.search(question)
    milliseconds = ", ".join(f"{name} {spent:.0f} ms" for name, spent in found.milliseconds.items())
    print(f"Vector  [{' '.join(f'{number:+.3f}' for number in found.vector[:5])} ...], {len(found.vector)} numbers")
    if agent.model.query_head.selection is not None:
        print(f"Text    {agent.model.extract_prefilled(agent.cache, [agent.messages])[0]}")
    print(f"Found   {' | '.join(map(label, found.documents))} ({milliseconds})")
    print("Agent   ", end="")
    for piece in agent.answer():
        print(piece, end="", flush=True)
    print(f" ({agent.first_token_ms:.0f} ms to the first token)" if agent.first_token_ms else "(nothing to say)")


@one_line_errors("agent.py")
def main() -> None:
    parser = CommandParser("agent.py", __doc__)
    parser.add_argument("model", nargs="?", default=".cache/demo/model", help="a trained model (default: %(default)s)")
    parser.add_argument("index", nargs="?", default=".cache/demo/index", help="its teacher's (default: %(default)s)")
    parser.add_argument(
        "--backbone", help="a copy of its language model on this machine, in place of the one that it names"
    )
    parser.add_argument("--ask", nargs="+", metavar="QUESTION", help="ask these, and end")
    words = parser.parse_args()
    options = {"backbone": words.backbone} if words.backbone else {}
    agent = Agent(load_model(words.model, **options), DocumentIndex.load(words.index))
    if words.ask:
        for question in words.ask:
            print(f"\nYou     {question}")
            take_turn(agent, question)
        return
    print("Ask, and press Enter; an empty line ends the conversation.")
    while question := input("\nYou     ").strip():
        take_turn(agent, question)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, EOFError):
        print()
