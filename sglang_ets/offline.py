"""Searches without a server: `sgl.Engine` with the models, flags and answers of `sglang-ets serve`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from types import TracebackType
from typing import Any

from sglang_ets.core.answer import RankedAnswer
from sglang_ets.launch_server import is_given, prepared
from sglang_ets.wire import CUSTOM_KEY, RESULT_KEY

SEED_BITS = 31  # of the seed of searches that are given none
DEFAULT_WIDTH = 16
END_WAIT_S = 10.0  # for a process that was killed


class SearchFailed(RuntimeError):
    """A search that was taken in and has no answer."""


@dataclass(frozen=True)
class SearchResult:
    """The answer of one search."""

    answers: tuple[RankedAnswer, ...]  # best first, at least one
    usage: Mapping[str, int]  # prompt_tokens, completion_tokens of all steps, answer_tokens, prm_tokens
    search: Mapping[str, Any]  # figures, as in the field of that name in a response of the server
    tree: Mapping[str, Any] | None = None  # with `return_tree`

    @property
    def text(self) -> str:
        """Of the best answer."""
        return self.answers[0].text


class Engine:
    """Both models in processes of their own, until `shutdown` or the end of a `with` block.

    `flags` are those of `sglang-ets serve`, with underscores: `model_path`, `prm_model_path`, `tp`, `max_total_tokens`,
    `search_max_tokens`; True is a switch. Without `model_path` it has the embedded models. A script must make it under
    `if __name__ == "__main__":`, because the processes that it starts import the script.

    Raises:
        SystemExit: a flag is wrong.
    """

    def __init__(self, **flags: Any) -> None:
        argv = arguments(flags)
        quiet = [] if is_given(argv, "--log-level") else ["--log-level", "error"]
        server_args = prepared([*argv, *quiet])
        from sglang import Engine as StockEngine

        others = set(active_children())
        self.sglang = StockEngine(server_args=server_args)  # for ordinary requests
        self._processes = [process for process in active_children() if process not in others]

    def search(self, prompt: str | Sequence[int], width: int = DEFAULT_WIDTH, **settings: Any) -> SearchResult:
        """One search for one prompt, a text or token ids: see `search_all`."""
        return self.search_all([prompt], width, **settings)[0]

    def search_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        width: int = DEFAULT_WIDTH,
        *,
        n: int = 1,
        seed: int | None = None,
        max_tokens: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> list[SearchResult]:
        """One search for each prompt, side by side; results in the order of the prompts.

        `n` answers come back of each; `max_tokens` bounds a trajectory. `sampling` has sglang's sampling parameters of every
        step (`temperature`, `stop`), `settings` what may stand in `search` of a request (`algorithm`, `return_tree`).

        Raises:
            ValueError: a search cannot be served; one sentence.
            SearchFailed: a search has no answer.
        """
        from fastapi import HTTPException

        seed = random.getrandbits(SEED_BITS) if seed is None else seed
        carried = {"search_width": width, "n": n, "seed": seed, **settings}
        given = {"max_new_tokens": self._room(max_tokens), **(sampling or {}), "custom_params": {CUSTOM_KEY: carried}}
        are_texts = [isinstance(prompt, str) for prompt in prompts]
        if any(are_texts) != all(are_texts):
            raise ValueError("prompts must be all texts or all token ids, got both; search for them in two calls")
        where = {"prompt" if all(are_texts) else "input_ids": [p if isinstance(p, str) else list(p) for p in prompts]}
        try:
            answered = self.sglang.generate(sampling_params=[given] * len(prompts), **where)
        except HTTPException as error:
            raise SearchFailed(str(error.detail)) from error
        return [result_of(one["meta_info"]) for one in answered]

    def _room(self, max_tokens: int | None) -> int:
        """Tokens of a trajectory: as given, or the server's default."""
        from sglang_ets.core.config import SearchConfig

        default: int | None = self.sglang.server_args._ets["max_tokens"]
        return max_tokens or default or SearchConfig().max_tokens

    def shutdown(self) -> None:
        """End all processes of the engine, and wait until they are gone. Idempotent."""
        self.sglang.shutdown()
        for process in self._processes:
            process.join(END_WAIT_S)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as a command line.

    Raises:
        TypeError: a value is no text, number, truth value or list of these.
    """
    argv: list[str] = []
    for name, value in flags.items():
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(item, (str, int, float, bool, type(None))) for item in values):
            raise TypeError(f"{name} must be a text, a number, True or a list of these, got {type(value).__name__}")
        if value is None or value is False:
            continue
        argv.append(f"--{name.replace('_', '-')}")
        argv += [] if value is True else [str(item) for item in values]
    return argv


def result_of(meta_info: Mapping[str, Any]) -> SearchResult:
    """The result in what sglang returns of a request.

    Raises:
        SearchFailed: there is none.
    """
    reports = meta_info.get(RESULT_KEY)
    reason = meta_info.get("finish_reason") or {}
    if not reports or reason.get("type") == "abort":
        raise SearchFailed(reason.get("message") or "the scheduler returned no result")
    report = reports[-1]
    answers = tuple(
        RankedAnswer(**{**answer, "token_ids": tuple(answer["token_ids"]), "step_scores": tuple(answer["step_scores"])})
        for answer in report["results"]
    )
    return SearchResult(answers, report["usage"], report["search"], report.get("tree"))
