"""LangChain, unmodified, against a server with search: invoke, n, batch, stream, completions. Needs `langchain-openai`."""

from __future__ import annotations

import argparse
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

PROBLEMS = ("10*18-19-15+(13*4-15)=\n", "9+16+(1+(4*17+(5-1)))=\n", "17*(13-8)-(14-8-(16-11))=\n")
SEARCH: dict[str, Any] = {"search_width": 8, "search": {"algorithm": "ets"}}
COMMON: dict[str, Any] = {
    "model": "default", "api_key": "none", "max_tokens": 256, "max_retries": 0, "extra_body": SEARCH,
}  # fmt: skip


def model_of(url: str, **fields: Any) -> ChatOpenAI:
    """What LangChain does not know goes through `extra_body`, as it is, into the body of each request."""
    return ChatOpenAI(base_url=f"{url}/v1", **COMMON, **fields)


def show_one(url: str) -> None:
    """One question: the text, and the usage with the tokens of pruned steps."""
    message = model_of(url).invoke(PROBLEMS[0])
    print(f"invoke: {message.text!r}\n  usage_metadata: {message.usage_metadata}")
    print(f"  response_metadata: {message.response_metadata}\n")


def show_ranked(url: str) -> None:
    """`n` ranked answers: `generate` keeps all of them, `invoke` only the first."""
    result = model_of(url, n=2).generate([[HumanMessage(PROBLEMS[0])]])
    for place, generation in enumerate(result.generations[0]):
        print(f"n=2, answer {place}: {generation.text!r}")
    print(f"  llm_output: {result.llm_output}\n")


def show_width_of_a_call(url: str) -> None:
    """A call's own `extra_body` replaces that of the model; width 1 is an ordinary request."""
    plain = model_of(url).invoke(PROBLEMS[0], extra_body={"search_width": 1})
    print(f"width 1: {plain.text!r}\n  usage_metadata: {plain.usage_metadata}\n")


def show_batch(url: str) -> None:
    """Several questions at once: LangChain sends one request each, from threads."""
    for problem, message in zip(PROBLEMS, model_of(url).batch(list(PROBLEMS)), strict=True):
        print(f"batch: {problem.strip()} -> {message.text.splitlines()[-1]!r}")
    print()


def show_stream(url: str) -> None:
    """Pieces as they become final, and the usage in the last one."""
    total: Any = None
    for piece in model_of(url, stream_usage=True).stream(PROBLEMS[0]):
        if piece.text:
            print(f"stream: {piece.text!r}")
        total = piece if total is None else total + piece
    print(f"  usage_metadata: {total.usage_metadata}\n")


def show_completions(url: str) -> None:
    """LangChain's client of `/v1/completions` sends its prompts as a list; `batch_size=1` makes that one a request."""
    result = OpenAI(base_url=f"{url}/v1", batch_size=1, **COMMON).generate(list(PROBLEMS[:2]))
    for generations in result.generations:
        print(f"completions: {generations[0].text.splitlines()[-1]!r}")
    print(f"  llm_output: {result.llm_output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    url = parser.parse_args().url
    for show in (show_one, show_ranked, show_width_of_a_call, show_batch, show_stream, show_completions):
        show(url)


if __name__ == "__main__":
    main()
