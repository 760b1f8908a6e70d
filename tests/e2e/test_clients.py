"""Unmodified openai clients against a real server: sync, async, streaming, completions and chat."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.e2e.serving import PROBLEMS, Server

pytestmark = pytest.mark.server

PROMPT = PROBLEMS[0]["prompt"]
SEARCH = {"search_width": 8, "search": {"algorithm": "ets"}}


def test_sync(server: Server) -> None:
    done = server.client.completions.create(model="default", prompt=PROMPT, max_tokens=512, n=2, extra_body=SEARCH)
    assert done.choices[0].text
    assert done.choices[0].finish_reason in ("stop", "length")
    assert done.usage is not None
    assert done.usage.completion_tokens > 8


def test_streaming_ranked_choices_and_usage(server: Server) -> None:
    """At temperature 0 both requests search the same tree, so the streams join to the choices of the whole answer."""
    asked: dict[str, Any] = {"model": "default", "prompt": PROMPT, "max_tokens": 512, "n": 2, "temperature": 0}
    done = server.client.completions.create(**asked, extra_body=SEARCH)
    streamed = server.client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}, extra_body=SEARCH
    )
    texts = ["" for _ in done.choices]
    usage = None
    for chunk in streamed:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in done.choices]
    assert usage is not None
    assert done.usage is not None
    assert usage.completion_tokens == done.usage.completion_tokens


def test_native_generate_through_custom_params(server: Server) -> None:
    search = {"search_width": 4, "algorithm": "rebase", "n": 2}
    sampling = {"max_new_tokens": 256, "custom_params": {"ets": search}}
    status, answer = server.post("/generate", {"text": PROMPT, "sampling_params": sampling})
    assert status == 200, answer
    (result,) = answer["meta_info"]["search"]
    assert (result["search"]["algorithm"], result["search"]["width"]) == ("rebase", 4)
    assert result["results"][0]["text"]
    for wrong, named in (({"search_width": 1}, "search_width"), ({"search_width": 4, "kv": 1}, "no setting 'kv'")):
        sampling["custom_params"] = {"ets": wrong}
        status, answer = server.post("/generate", {"text": PROMPT, "sampling_params": sampling})
        assert (status, named in str(answer)) == (400, True)
    sampling["custom_params"] = {"ets": search}
    status, answer = server.post("/generate", {"text": PROMPT, "sampling_params": sampling, "return_logprob": True})
    assert (status, "return_logprob" in str(answer)) == (400, True)


def test_async_chat_in_parallel(server: Server) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=512,
            seed=seed,
            stream=True,
            extra_body=SEARCH,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(ask(client, seed) for seed in range(3))))

    assert all(asyncio.run(run()))


def test_errors_have_the_clients_own_types(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="search_width must be an integer from 2"):
        server.client.completions.create(model="default", prompt=PROMPT, extra_body={"search_width": 0})
