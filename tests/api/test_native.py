"""What is refused in the HTTP process because the scheduler would die of it."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput

from sglang_ets.api.native import (
    MAX_N,
    MAX_SAMPLES,
    MAX_TEXT_CHARS,
    check_integers,
    check_lists,
    check_prompt,
    check_release,
    check_request,
    check_samples,
    check_texts,
    end_searches,
    reading,
)
from sglang_ets.wire import STOP_ID

VOCABULARY = 10


class Manager:
    """The part of a tokenizer manager that is asked."""

    def __init__(
        self, *, has_saver: bool = True, requests: int = 0, is_pause: bool = False, is_idle: bool = True
    ) -> None:
        self.model_config = SimpleNamespace(vocab_size=VOCABULARY)
        self.server_args = SimpleNamespace(enable_memory_saver=has_saver)
        self.rid_to_state = dict.fromkeys(range(requests))
        self.is_pause = is_pause
        self.is_idle = is_idle
        self.event_loop: object | None = object()
        self.sent: list[Any] = []

    async def flush_cache(self, timeout_s: float) -> Any:
        assert timeout_s > 0
        return SimpleNamespace(success=self.is_idle)

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        self.sent.append(obj)


def test_stop_texts_are_bounded_together() -> None:
    half = "x" * (MAX_TEXT_CHARS["stop"] // 2)
    check_texts(GenerateReqInput(text="1=", sampling_params={"stop": [half, half]}))
    with pytest.raises(ValueError, match=r"^stop must be text of at most \d+ characters, got "):
        check_texts(GenerateReqInput(text="1=", sampling_params={"stop": [half, half, "x"]}))


@pytest.mark.parametrize("name", MAX_TEXT_CHARS)
@pytest.mark.parametrize("is_list", [False, True])
def test_a_text_has_a_bounded_length(name: str, is_list: bool) -> None:
    def request(length: int) -> GenerateReqInput:
        params = {name: "x" * length}
        return GenerateReqInput(text="1=", sampling_params=[{}, params] if is_list else params)

    check_texts(request(MAX_TEXT_CHARS[name]))
    with pytest.raises(ValueError, match=f"^{name} must be text of at most {MAX_TEXT_CHARS[name]} characters, got "):
        check_texts(request(MAX_TEXT_CHARS[name] + 1))


@pytest.mark.parametrize(
    "params", [{"top_k": 2**31}, {"top_k": -(2**63)}, {"stop_token_ids": [1, 10**30]}, {"sampling_seed": 2**63}]
)
def test_integers_fit_into_tensors(params: dict[str, Any]) -> None:
    check_integers(GenerateReqInput(text="1=", sampling_params={"top_k": 2**31 - 1, "sampling_seed": 2**63 - 1}))
    check_integers(GenerateReqInput(text="1=", sampling_params={"custom_params": {"ets": {"seed": 2**62}}}))
    (name,) = params
    for sent in (params, [{}, params]):
        with pytest.raises(ValueError, match=rf"^{name} must be integers from -\d+ to \d+, got "):
            check_integers(GenerateReqInput(text="1=", sampling_params=sent))


@pytest.mark.parametrize(
    "fields", [{"rid": "a"}, {"rid": ["a"], "text": ["1="]}, {"sampling_params": [{}]}, {"rid": None}]
)
def test_lists_that_go_with_the_prompts_pass(fields: dict[str, Any]) -> None:
    check_lists(GenerateReqInput(**{"text": "1=", **fields}))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"text": "1=", "rid": ["a"]}, r"^rid must be one text for one prompt, got \['a'\]; "),
        ({"input_ids": [1, 2], "rid": ["a"]}, r"^rid must be one text for one prompt, got \['a'\]; "),
        ({"text": "1=", "sampling_params": []}, r"^sampling_params must be an object, .* got \[\]; "),
    ],
)
def test_other_lists_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_lists(GenerateReqInput(**fields))


@pytest.mark.parametrize(
    ("fields", "is_single"), [({}, True), ({"rid": "a"}, True), ({"rid": ["a"]}, False), ({"stream": True}, True)]
)
def test_a_refused_request_can_be_aborted(fields: dict[str, Any], is_single: bool) -> None:
    """sglang aborts a stream that has ended in any way, and asks the request whether it is a single one."""
    request = GenerateReqInput(text="1=", sampling_params={"n": MAX_N + 1}, **fields)
    with pytest.raises(ValueError, match=r"n must be|rid must be"):
        check_request(request)
    assert request.is_single is is_single


@pytest.mark.parametrize(
    "error", [TypeError("no\nkey"), IndexError(), KeyError("a"), AttributeError(), OverflowError(), re.error("x")]
)
def test_what_sglang_cannot_read_is_a_mistake_of_the_client(error: Exception) -> None:
    with pytest.raises(ValueError, match="could not be read") as caught, reading():
        raise error
    assert type(error).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    for error in (ValueError("as it is"), OSError("as it is")):
        with pytest.raises(type(error), match=r"^as it is$"), reading():
            raise error


@pytest.mark.parametrize("embeds", [[], [[]]])
def test_embeddings_hold_a_vector(embeds: list[Any]) -> None:
    check_texts(GenerateReqInput(input_embeds=[[0.5]]))
    with pytest.raises(ValueError, match=r"^input_embeds must be lists of vectors, got "):
        check_texts(GenerateReqInput(input_embeds=embeds))


@pytest.mark.parametrize("params", [None, {}, {"n": None}, {"n": 1}, {"n": MAX_N}, [{"n": 2}], []])
def test_so_many_samples_are_made(params: Any) -> None:
    check_samples(GenerateReqInput(text="1=", sampling_params=params))


@pytest.mark.parametrize("n", [0, -1, -(2**31 - 1), True, 1.0, float("nan")])
@pytest.mark.parametrize("prompt", [{"text": "1="}, {"input_ids": [1, 2]}, {"input_embeds": [[0.5]]}], ids=[*"tie"])
def test_what_sglang_takes_for_one_sample_of_one_prompt_is_left_to_it(n: Any, prompt: dict[str, Any]) -> None:
    request = GenerateReqInput(**prompt, sampling_params={"n": n})
    check_request(request)
    request.normalize_batch_and_arguments()
    assert request.is_single


@pytest.mark.parametrize("n", [MAX_N + 1, 10**6, 2**31 - 1])
@pytest.mark.parametrize("is_list", [False, True])
def test_no_larger_number_of_samples_is_made(n: Any, is_list: bool) -> None:
    with pytest.raises(ValueError, match=f"^n must be at most {MAX_N}, got"):
        check_samples(GenerateReqInput(text="1=", sampling_params=[{"n": n}] if is_list else {"n": n}))


@pytest.mark.parametrize("prompts", [{"text": ["1=", "2="]}, {"text": ["1="]}, {"input_ids": [[1], [2]]}], ids=str)
@pytest.mark.parametrize("n", [0, -1])
def test_several_prompts_have_a_sample_each(prompts: dict[str, Any], n: int) -> None:
    """sglang multiplies their list by `n` and then asks for the first."""
    with pytest.raises(ValueError, match=f"^n must be at least 1 for a list of prompts, got {n}; "):
        check_samples(GenerateReqInput(**prompts, sampling_params={"n": n}))


@pytest.mark.parametrize("n", ["2", 2.0, float("inf")])
def test_a_number_of_samples_of_another_type_is_a_mistake_of_the_client(n: Any) -> None:
    request = GenerateReqInput(text="1=", sampling_params={"n": n})
    check_samples(request)
    with pytest.raises(ValueError, match="could not be read"), reading():
        request.normalize_batch_and_arguments()


@pytest.mark.parametrize("field", ["text", "input_ids"])
def test_samples_are_counted_over_the_prompts(field: str) -> None:
    prompts = ["1="] * (MAX_SAMPLES // 2) if field == "text" else [[1]] * (MAX_SAMPLES // 2)
    check_samples(GenerateReqInput(**{field: prompts}, sampling_params={"n": 2}))
    check_samples(GenerateReqInput(**{field: prompts * 3}, sampling_params={"n": 1}))
    with pytest.raises(ValueError, match=f"n must be at most {MAX_SAMPLES} over the prompts of a request, got"):
        check_samples(GenerateReqInput(**{field: prompts}, sampling_params={"n": 3}))


def test_the_tokens_of_one_prompt_are_no_prompts() -> None:
    check_samples(GenerateReqInput(input_ids=[1] * MAX_SAMPLES, sampling_params={"n": MAX_N}))


def test_prompts_of_known_tokens_pass() -> None:
    check_prompt(Manager(), GenerateReqInput(input_ids=[0, VOCABULARY - 1]), [0, VOCABULARY - 1])
    check_prompt(
        Manager(), GenerateReqInput(text="1=", top_logprobs_num=VOCABULARY), [VOCABULARY + 5]
    )  # its tokenizer's
    check_prompt(Manager(), GenerateReqInput(input_ids=[], session_params={"id": "a"}), [])
    check_prompt(Manager(), GenerateReqInput(input_embeds=[[0.5]]), None)
    check_prompt(Manager(), SimpleNamespace(input_ids=[-1]), [-1])  # an embedding, which sglang checks itself


@pytest.mark.parametrize(
    ("request_fields", "token_ids", "sentence"),
    [
        ({"text": ""}, [], "must hold at least one token"),
        ({"text": ""}, None, "must hold at least one token"),
        ({"input_ids": [-1]}, [-1], "input_ids must be integers from 0 to 9, got -1"),
        ({"input_ids": [1, VOCABULARY]}, [1, VOCABULARY], "input_ids must be integers from 0 to 9, got 10"),
        ({"input_ids": [1, "a"]}, [1, "a"], "input_ids must be integers from 0 to 9, got 'a'"),
        ({"text": "1=", "top_logprobs_num": VOCABULARY + 1}, [1], "top_logprobs_num must be at most 10"),
    ],
)
def test_other_prompts_are_refused(request_fields: dict[str, Any], token_ids: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_prompt(Manager(), GenerateReqInput(**request_fields), token_ids)


@pytest.mark.parametrize(
    ("manager", "sentence"),
    [
        (Manager(requests=2), "while nothing runs, got 2 requests"),
        (Manager(has_saver=False), "start it with that flag"),
        (Manager(is_idle=False), "got work for over 2 s"),
    ],
)
def test_memory_is_not_released(manager: Manager, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        asyncio.run(check_release(manager))


def test_memory_is_released_when_idle_and_while_generation_is_paused() -> None:
    asyncio.run(check_release(Manager()))
    asyncio.run(check_release(Manager(requests=2, is_pause=True)))


def test_the_scheduler_learns_that_the_server_stops() -> None:
    manager = Manager()
    end_searches(manager)
    assert [(type(sent), sent.rid) for sent in manager.sent] == [(AbortReq, STOP_ID)]
    manager.event_loop, manager.sent = None, []
    end_searches(manager)
    assert manager.sent == []
