"""
Talk to an agent that searches before it answers, in a terminal: one model, one pass a turn.

    python examples/agent.py                        # with what `make demo` has made
    python examples/agent.py MODEL INDEX            # your own
"""

import sys

from native_retrieval.agent import Agent
from native_retrieval.index import DocumentIndex
from native_retrieval.loading import load_model


def main(model_dir: str = ".cache/demo/model", index_dir: str = ".cache/demo/index") -> None:
    agent = Agent(load_model(model_dir), DocumentIndex.load(index_dir))
    print("Ask, and press Enter; an empty line ends the conversation.")
    while question := input("\nYou     ").strip():
        found = agent.search(question)
        milliseconds = ", ".join(f"{name} {spent:.0f} ms" for name, spent in found.milliseconds.items())
        print(f"Found   {' | '.join(document['title'] for document in found.documents)} ({milliseconds})")
        print("Agent   ", end="")
        for piece in agent.answer():
            print(piece, end="", flush=True)
        print(f" ({agent.first_token_ms:.0f} ms to the first token)" if agent.first_token_ms else "(nothing to say)")


if __name__ == "__main__":
    try:
        if len(sys.argv) > 3:
            raise ValueError(f"{len(sys.argv) - 1} arguments; give the folders of a model and of its index, or nothing")
        main(*sys.argv[1:])
    except (KeyboardInterrupt, EOFError):
        print()
    except (ValueError, OSError) as error:
        print(f"agent.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
