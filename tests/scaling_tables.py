"""`python -m tests.scaling_tables` writes the tables of docs/scaling.md: what `plan` computes, and what the tests run."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_ets.tools import plan

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "scaling.md"
_MARK = re.compile(r"(<!-- scaling: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CARD_GB, PROMPT_TOKENS, MAX_TOKENS = 80.0, 300, 1024
WIDTHS, LENGTHS = (16, 64, 256), (512, 1024, 2048, 4096)
DENSE: dict[str, Any] = {"vocab_size": 152064, "torch_dtype": "bfloat16"}
MODELS: dict[str, dict[str, Any]] = {
    "7B": {
        **DENSE, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584,
        "intermediate_size": 18944,
    },
    "72B": {
        **DENSE, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192,
        "intermediate_size": 29568,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Models on cards of `CARD_GB`; no PRM: the policy model's own weights score."""

    policy: str
    prm: str | None
    cards: int


BUDGETS = (
    Budget("7B", "7B", 1),
    Budget("7B", None, 1),
    Budget("7B", "7B", 2),
    Budget("72B", "7B", 4),
    Budget("72B", "7B", 8),
    Budget("72B", None, 8),
)


@dataclass(frozen=True)
class Configuration:
    """What was run on a CPU, or is refused; the test that shows it as file::name."""

    what: str
    result: str
    test: str


SCALING, RANKS = "tests/e2e/test_scaling.py", "tests/prm/test_ranks.py"
CONFIGURATIONS = (
    Configuration(
        "`--tp 2`, every policy, `deadline_s`, answers by value",
        "works; sglang's rank consensus checker is on and silent",
        f"{SCALING}::test_two_ranks_run_one_search",
    ),
    Configuration(
        "`--tp 2`, every PRM format",
        "works; scores are those of transformers",
        f"{RANKS}::test_all_formats_on_two_ranks",
    ),
    Configuration(
        "`--tp 2`, a PRM of three heads", "works; whole on each rank", f"{RANKS}::test_all_formats_on_two_ranks"
    ),
    Configuration("`--tp 2 --prm-tp 1`", "works; whole on each rank", f"{RANKS}::test_all_formats_on_two_ranks"),
    Configuration(
        "`--tp 2 --prm-tp 1`, no PRM of its own",
        "refuses: --prm-tp 1 needs a --prm-model-path of its own ...",
        "tests/e2e/test_refused_starts.py::test_what_cannot_work_is_refused_before_weights_load",
    ),
    Configuration(
        "`--prm-tp 2` with `--tp 4`",
        "refuses: --prm-tp must be 1 ... or 4 as --tp ...",
        f"{RANKS}::test_a_wrong_number_of_ranks_is_one_sentence",
    ),
    Configuration(
        "`--dp-size 2`",
        "works; searches are shared out, answers as on one server",
        f"{SCALING}::test_replicas_share_searches_and_answer_as_one_server",
    ),
    Configuration(
        "sglang-router, `/v1/completions`",
        "works",
        f"{SCALING}::test_a_router_passes_on_searches_of_completions",
    ),
    Configuration(
        "sglang-router, `/v1/chat/completions`",
        "drops `search_width`; works by `metadata`",
        f"{SCALING}::test_a_router_drops_the_search_of_a_chat_and_keeps_its_metadata",
    ),
    Configuration(
        "a server behind the router dies in a stream",
        "the stream breaks off: no `finish_reason`, no `[DONE]`",
        f"{SCALING}::test_a_stream_whose_worker_dies_has_no_end",
    ),
    Configuration(
        "`sglang_ets.Engine`", "works", "tests/e2e/test_offline.py::test_the_example_searches_without_a_server"
    ),
)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    names = list(header)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)])


def size_of(name: str) -> plan.ModelSize:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]), encoding="utf-8")
        return plan.model_size(folder)


def budgets() -> str:
    def row(budget: Budget) -> Iterable[Any]:
        policy, prm = size_of(budget.policy), None if budget.prm is None else size_of(budget.prm)
        pools = plan.plan_pools(policy, prm, CARD_GB, budget.cards, plan.default_reserve_gb(CARD_GB))
        split = budget.cards if prm is None else plan.prm_ranks(prm, budget.cards)
        weights = policy.weights_on_card(budget.cards) + (0 if prm is None else prm.weights_on_card(split))
        needs = [plan.search_tokens(width, PROMPT_TOKENS, MAX_TOKENS) for width in WIDTHS]
        where = (
            "its own weights"
            if prm is None
            else budget.prm
            if split == budget.cards
            else f"{budget.prm}, whole on each card"
        )
        numbers = (f"{weights / plan.GB:.1f}", f"{pools.room_bytes / plan.GB:.1f}", pools.policy_tokens)
        return budget.policy, where, budget.cards, *numbers, *(pools.searches(need) for need in needs)

    header = ("policy model", "PRM", "cards", "weights a card, GB", "for both pools, GB", "tokens in each pool")
    return table((*header, *(f"width {width}" for width in WIDTHS)), map(row, BUDGETS))


def needs() -> str:
    rows = [(width, *(plan.search_tokens(width, PROMPT_TOKENS, length) for length in LENGTHS)) for width in WIDTHS]
    return table(("width", *(f"{length} tokens" for length in LENGTHS)), rows)


def configurations() -> str:
    rows = [(one.what, one.result, f"`{one.test.split('::')[1]}`") for one in CONFIGURATIONS]
    return table(("configuration", "on a CPU", "test"), rows)


def filled(text: str) -> str:
    """The text with the tables as they are now between its marks."""
    tables: dict[str, Callable[[], str]] = {"budgets": budgets, "needs": needs, "configurations": configurations}
    return _MARK.sub(lambda mark: f"{mark[1]}{tables[mark[2]]()}\n{mark[3]}", text)


if __name__ == "__main__":
    DOC.write_text(filled(DOC.read_text(encoding="utf-8")), encoding="utf-8")
