"""The testbed: its labels are exact, its splits disjoint, and the shipped models are worth searching with."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.testbed import sampling, task
from bench.testbed.evaluate import HERE, Row, load_problems, mean_row, report, verifier_rows, vote
from bench.testbed.likelihood import area_under_curve, path_scores, step_scores
from bench.testbed.sampling import greedy_accuracy, sample
from bench.testbed.task import Operation, Problem
from bench.testbed.tokenizer import EOS_ID, UNKNOWN_ID, encode
from bench.testbed.train import MODELS

PROBLEM = Problem("10*5-2+10*10", 148)
# Prompts of one length share a batch: one quick run of the network for all of them.
ONE_LENGTH = [problem for problem in task.distinct_problems("test", 400) if len(problem.prompt) == 37][:16]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32)


@pytest.fixture(scope="module")
def prm() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODELS / "prm", dtype=torch.float32)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (Operation("-", Operation("-", 9, 4), 3), "9-4-3"),
        (Operation("-", 9, Operation("-", 4, 3)), "9-(4-3)"),
        (Operation("+", 9, Operation("*", 4, 3)), "9+4*3"),
        (Operation("*", Operation("+", 9, 4), 3), "(9+4)*3"),
        (Operation("*", 9, Operation("*", 4, 3)), "9*(4*3)"),
        (Operation("*", Operation("*", 9, 4), 3), "9*4*3"),
    ],
)
def test_render_and_parse_are_inverse_and_agree_with_python(expression: Operation, text: str) -> None:
    assert task.render(expression) == text
    assert task.parse(text) == expression
    assert task.evaluate(expression) == eval(text)


@pytest.mark.parametrize("text", ["", "1+", "(1+2", "1+2)", "1 + 2", "1/2", "one"])
def test_parse_refuses_what_is_no_expression(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        task.parse(text)


@pytest.mark.parametrize(
    ("step", "is_right"),
    [
        ("so 10*10=100:10*5-2+100\n", True),
        ("here 48+100=148:The answer is 148", True),
        ("so 10*10=110:10*5-2+110\n", False),  # wrong result
        ("so 10*10=100:10*5-2+10\n", False),  # right equation, wrong copy
        ("so 10*10=110:10*5-2+100\n", False),  # right value left by a false equation
        ("here 48+100=148:The answer is 149", False),
        ("hm 10*10=100:10*5-2+100\n", False),
        ("so 10*10=100:10*5-2+(100\n", False),
        ("so 10*10=100\n", False),
        ("", False),
    ],
)
def test_step_labels_are_exact(step: str, is_right: bool) -> None:
    assert task.step_is_right(PROBLEM, step) is is_right


def test_every_step_of_a_solution_is_right_and_any_changed_digit_after_the_marker_is_wrong() -> None:
    rng = random.Random(3)
    for problem in islice(task.problems("train", seed=3), 50):
        steps = task.solve(problem, rng)
        assert len(steps) == task.NUM_INTEGERS - 1
        assert all(task.step_is_right(problem, step) for step in steps)
        assert task.answer_of("".join(steps)) == problem.answer
        last = steps[-1][:-1] + str((int(steps[-1][-1]) + 1) % 10)
        assert not task.step_is_right(problem, last)


def test_generator_is_deterministic_and_seeds_differ() -> None:
    first = list(islice(task.problems("test", seed=5), 20))
    assert first == list(islice(task.problems("test", seed=5), 20))
    assert first != list(islice(task.problems("test", seed=6), 20))


def test_splits_share_no_expression() -> None:
    # Two integers make few expressions, so that every split would meet the others' if they could.
    made = {
        split: {problem.expression for problem in islice(task.problems(split, num_integers=2), 2000)}
        for split in ("train", "validation", "test")
    }
    assert all(len(expressions) > 50 for expressions in made.values())
    assert not made["train"] & made["validation"]
    assert not made["train"] & made["test"]
    assert not made["validation"] & made["test"]


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        next(task.problems("dev"))  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", ["policy", "prm"])
def test_shipped_tokenizer_round_trips_the_task(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / folder)
    rng = random.Random(0)
    for problem in islice(task.problems("test"), 50):
        text = problem.prompt + "".join(task.solve(problem, rng))
        token_ids = tokenizer(text).input_ids
        assert token_ids == encode(text)
        assert tokenizer.decode(token_ids) == text
    assert tokenizer("é~").input_ids == [UNKNOWN_ID, UNKNOWN_ID]
    assert tokenizer.eos_token_id == EOS_ID
    message = [{"role": "user", "content": PROBLEM.prompt}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == PROBLEM.prompt


def test_shipped_problems_are_the_generators_and_held_out() -> None:
    shipped = load_problems(MODELS / "problems.jsonl")
    assert shipped == task.distinct_problems("test", len(shipped))
    assert {task.split_of(problem.expression) for problem in shipped} == {"test"}


@pytest.fixture(scope="module")
def solutions(policy: LlamaForCausalLM) -> list[list[str]]:
    """Greedy ones of `ONE_LENGTH`: sampling is what takes long here."""
    return sample(policy, ONE_LENGTH, 1, temperature=0.0, seed=0)


def test_sampling_with_a_cache_equals_the_network_run_without_one(
    policy: LlamaForCausalLM, solutions: list[list[str]]
) -> None:
    # Solutions end at different times, so rows leave the cache.
    texts = [text for (text,) in solutions]
    assert len({len(text) for text in texts}) > 1
    for problem, text in zip(ONE_LENGTH[:8], texts, strict=False):
        token_ids = torch.tensor([encode(problem.prompt + text)])
        with torch.inference_mode():
            expected = policy(token_ids).logits[0, len(problem.prompt) - 1 :].argmax(-1).tolist()
        assert expected == [*encode(text), EOS_ID]


def test_policy_solves_some_held_out_problems_but_not_all(
    policy: LlamaForCausalLM, solutions: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "sample", lambda *_args, **_options: solutions)
    assert 0.2 < greedy_accuracy(policy, ONE_LENGTH) < 0.9


def test_likelihood_separates_right_steps_from_wrong_ones(prm: LlamaForCausalLM, solutions: list[list[str]]) -> None:
    rows = [(problem, text) for problem, (text,) in zip(ONE_LENGTH, solutions, strict=True)]
    measured = {row.metric: row.value for row in verifier_rows(rows, step_scores(prm, rows))}
    assert measured["PRM, AUC on steps whose prefix is right"] > 0.8


def test_step_score_counts_exactly_the_tokens_after_the_marker(prm: LlamaForCausalLM) -> None:
    text = "so 10*10=100:10*5-2+100\nnext 10*5=50:50-2+100"
    token_ids = torch.tensor([encode(PROBLEM.prompt + text)])
    with torch.inference_mode():
        log_p = prm(token_ids).logits[0].log_softmax(-1)
    expected = []
    for counted in ("100:10*5-2+100\n", "50:50-2+100"):
        start = len(PROBLEM.prompt) + text.index("=" + counted) + 1
        places = range(start, start + len(counted))
        expected.append(sum(log_p[place - 1, token_ids[0, place]] for place in places).exp().item())
    assert step_scores(prm, [(PROBLEM, text)])[0] == pytest.approx(expected, rel=1e-4)


def test_path_score_is_the_least_so_far() -> None:
    assert path_scores([0.9, 0.4, 0.7]) == [0.9, 0.4, 0.4]


def test_area_under_curve_counts_ties_as_half() -> None:
    assert area_under_curve([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == 0.875
    with pytest.raises(ValueError, match="both classes"):
        area_under_curve([0.1, 0.2], [True, True])


def test_the_report_is_a_table_of_its_rows() -> None:
    text = report([mean_row("greedy", [1.0, 0.0, 1.0, 1.0]), Row("AUC", 0.9, None, "7 steps")], seed=3)
    assert "| greedy | 0.750 | 0.250 | 4 problems |\n| AUC | 0.900 |  | 7 steps |" in text
    head, tail = (HERE / "REPORT.md").read_text().replace("seed 0", "seed 3").split("|---|---|---|---|\n")
    assert text.startswith(head) and text.endswith(tail.split("\n\n")[1])


def test_vote_adds_weights_and_ignores_texts_without_an_answer() -> None:
    texts = ["The answer is 1", "The answer is 2", "The answer is 1", "so 1+"]
    assert vote(texts, [0.2, 0.5, 0.2, 9.0]) == 2
    assert vote(texts, [1.0, 1.0, 1.0, 1.0]) == 1
    assert vote(["so"], [1.0]) is None


@pytest.mark.parametrize("folder", ["policy", "prm"])
def test_a_shipped_model_is_small_and_complete(folder: str) -> None:
    path: Path = MODELS / folder
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names <= {file.name for file in path.iterdir()}
    assert sum(file.stat().st_size for file in path.iterdir()) < 3_000_000
