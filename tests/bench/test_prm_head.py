"""A PRM head learned from rollouts: the embedded policy model, its own solutions, and no server."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from bench import rows
from bench.embedded import MODELS
from bench.testbed import prm_head, verifiers
from bench.testbed.prm_head import FORMATS, fit, learn, save, train
from bench.testbed.rollouts import Rollout, halves, rollouts_in, some_of
from bench.testbed.sampling import sample
from bench.testbed.task import distinct_problems, split_steps
from bench.testbed.verifiers import CHECKPOINT, Step, compare, read
from sglang_ets.prm.choose import POLICY_HEAD, check_checkpoint, is_policy_head
from sglang_ets.prm.formats import Judge
from sglang_ets.prm.policy_head import LinearHead

TOKENIZER = AutoTokenizer.from_pretrained(MODELS / "policy")
NUM_PROBLEMS, WIDTH = 6, 6


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "NUM_RESAMPLES", 40)


def path_of(text: str, first: int) -> list[dict[str, Any]]:
    """The nodes of one complete trajectory, the first of which has the id `first`."""
    steps = split_steps(text)
    return [
        {
            "id": first + place, "parent": first + place - 1 if place else 0, "text": step, "score": 0.5,
            "token_ids": TOKENIZER.encode(step, add_special_tokens=False),
            "state": "complete" if place == len(steps) - 1 else "retained",
        }
        for place, step in enumerate(steps)
    ]  # fmt: skip


def row_of(question: str, expected: str, texts: list[str]) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = []
    for text in texts:
        nodes += path_of(text, len(nodes) + 1)
    made = {"problem": question, "question": question, "expected": expected, "is_chat": False}
    return made | {"search_result": {"tree": {"nodes": nodes}}}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> list[Rollout]:
    """Solutions of the embedded policy model as rows of `sglang-ets run`, read back."""
    policy = LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32)
    problems = sorted(distinct_problems("validation", 40), key=lambda problem: len(problem.prompt))[:NUM_PROBLEMS]
    solutions = sample(policy, problems, WIDTH, temperature=1.0, seed=0)
    path = tmp_path_factory.mktemp("rollouts") / "run.jsonl"
    with path.open("w") as file:
        for problem, texts in zip(problems, solutions, strict=True):
            file.write(json.dumps(row_of(problem.prompt.strip(), str(problem.answer), [*texts, texts[0]])) + "\n")
    return rollouts_in(path, TOKENIZER, "the_answer_is")


def test_rollouts_are_the_distinct_trajectories_with_their_outcomes(rollouts: list[Rollout]) -> None:
    assert len({(one.problem, one.steps) for one in rollouts}) == len(rollouts) <= NUM_PROBLEMS * WIDTH
    assert {one.is_right for one in rollouts} == {True, False}
    first = rollouts[0]
    assert first.prompt_ids == tuple(TOKENIZER.encode(first.problem + "\n"))
    assert first.question == first.problem and len(first.texts) == len(first.steps)
    fewer = some_of(rollouts, 2, seed=0)
    assert {one.problem for one in fewer} == {one.problem for one in rollouts} and set(fewer) <= set(rollouts)
    assert all(sum(one.problem == name for one in fewer) == 2 for name in {one.problem for one in fewer})


def test_a_file_without_trees_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "1"}\n')
    with pytest.raises(ValueError, match="must hold rows of `sglang-ets run`, got fields problem"):
        rollouts_in(path, TOKENIZER, "boxed")


@torch.no_grad()
def test_a_pass_reads_states_at_the_ends_of_steps_and_the_steps_own_probabilities(
    rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifiers, "CHUNK_TOKENS", 7)
    model, one = LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32).eval(), rollouts[0]
    token_ids = [*one.prompt_ids, *(token for step in one.steps for token in step)]
    whole = model(torch.tensor([token_ids]), output_hidden_states=True)
    states, log_p = whole.hidden_states[-1][0].numpy(), whole.logits[0].log_softmax(-1)
    made = read(model, one, layers=[2])
    inner = whole.hidden_states[2][0].numpy()
    at = len(one.prompt_ids)
    for place, step in enumerate(one.steps):
        expected = sum(float(log_p[at + index - 1, token]) for index, token in enumerate(step))
        at += len(step)
        assert made.log_probabilities[place] == pytest.approx(expected, abs=1e-4)
        np.testing.assert_allclose(made.states[CHECKPOINT][place], states[at - 1], atol=1e-4)
        np.testing.assert_allclose(made.states[POLICY_HEAD][place], states[at - 2], atol=1e-4)
        np.testing.assert_allclose(made.states["policy head of layer 2"][place], inner[at - 2], atol=1e-4)
        normed = model.model.norm(whole.hidden_states[2][0, at - 1]).numpy()
        np.testing.assert_allclose(made.states["head of layer 2"][place], normed, atol=1e-4)
    assert made.lengths.tolist() == [len(step) for step in one.steps]


class Words:
    """A tokenizer of characters that has one token for each of the judge's words."""

    chat_template = None
    unk_token_id, eos_token_id, bos_token_id = 3, 1, 2

    def encode(self, text: str, **_: bool) -> list[int]:
        return {" Yes": [70], " No": [71]}.get(text, [4 + ord(character) % 60 for character in text])


@torch.no_grad()
def test_the_judge_is_asked_after_every_step_and_its_questions_are_not_kept() -> None:
    """Each verdict is what a pass over the solution so far and the question gives."""
    config = LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model, judge = LlamaForCausalLM(config).eval(), Judge(Words())
    one = Rollout("a", "1+2=", (), ((1,), (1,), (1,)), ("1+2=", "3", " so 3"), True)
    made = verifiers.judged(model, judge, one)
    for depth in (1, 2, 3):
        steps = [judge.step(text, place) for place, text in enumerate(one.texts[:depth], 1)]
        token_ids = [*judge.prompt(one.question), *(token for step in steps for token in step.path), *steps[-1].query]
        yes, no = model(torch.tensor([token_ids])).logits[0, -1, [70, 71]].double()
        assert made[depth - 1] == pytest.approx(float((yes - no).sigmoid()), abs=1e-5)
    assert len(set(made.round(4))) == 3


def test_a_fit_separates_what_can_be_separated_and_is_right_on_average() -> None:
    draw = np.random.default_rng(0)
    states = draw.normal(3, [1, 5, 0.1, 2], size=(300, 4))
    labels = (states[:, 1] > 4).astype(float)
    weights = draw.uniform(0.1, 1, size=300)
    loose = fit(states, labels, weights, 1e-4)
    assert ((loose.scores(states) > 0.5) == labels).mean() > 0.98
    for penalty in (1e-3, 1.0):
        # The bias is free, so the mean probability is the share of right ones whatever the penalty.
        mean = np.average(fit(states, labels, weights, penalty).scores(states), weights=weights)
        assert mean == pytest.approx(np.average(labels, weights=weights), abs=1e-3)
    assert np.abs(fit(states, labels, weights, 100.0).weight).max() < np.abs(loose.weight).max() / 100


def test_a_head_is_trained_on_some_problems_and_tested_on_others() -> None:
    """Right rollouts lie on one side of the first direction in all problems, where the server's own states tell nothing."""
    draw, chance = np.random.default_rng(0), random.Random(0)
    made, steps = [], []
    for number in range(40):
        is_right = chance.random() < 0.5
        states = draw.normal(size=(3, 6))
        states[:, 0] += 3 * is_right
        made.append(Rollout(str(number // 2), "", (), ((number,),) * 3, ("",) * 3, is_right))
        steps.append(Step({CHECKPOINT: states, POLICY_HEAD: np.zeros((3, 6))}, np.full(3, -1.0), np.ones(3)))
    first, second = halves(made)
    assert not {made[at].problem for at in first} & {made[at].problem for at in second}
    heads = {name: train([made[at] for at in first], [steps[at].states[name] for at in first]).head for name in FORMATS}
    tested = [made[at] for at in second]
    reads = [verifiers.scores_of(replace(steps[at], verdicts=np.full(3, 0.5)), heads) for at in second]
    by_name = {row["verifier"]: row for row in compare(tested, reads, seed=0)}
    assert by_name["head"]["auc_last"] > 0.9 > 0.5 == by_name["judge"]["auc_last"] == by_name["policy head"]["auc_last"]
    assert by_name["head"]["low"] <= by_name["head"]["auc_last"] <= by_name["head"]["high"]
    assert "judge" not in verifiers.scores_of(steps[0], heads), "it was not asked"
    with pytest.raises(SystemExit, match="right and wrong rollouts must be in both halves"):
        halves([one for one in made if one.is_right])


def test_a_penalty_is_chosen_for_the_probabilities_not_only_for_the_order() -> None:
    """One direction tells all: any penalty orders alike, and only a small one gives right and wrong steps scores far apart."""
    draw = np.random.default_rng(1)
    labels = np.repeat([True, False], 60)
    states = [draw.normal([4 * float(one), 0], 1, size=(2, 2)) for one in labels]
    made = [Rollout(str(number % 30), "", (), ((0,),) * 2, ("",) * 2, bool(one)) for number, one in enumerate(labels)]
    learned = train(made, states)
    scores = learned.head.scores(np.concatenate(states))
    assert learned.penalty < 0.1 and learned.loss < 0.2 and scores[:120].mean() > 0.9 and scores[120:].mean() < 0.1


def test_a_log_loss_is_the_mean_of_what_surprises_and_never_infinite() -> None:
    weights = np.array([1.0, 3.0])
    assert prm_head.log_loss(np.array([0.5, 0.25]), np.array([1.0, 0.0]), weights) == pytest.approx(
        (-np.log(0.5) - 3 * np.log(0.75)) / 4
    )
    assert np.isfinite(prm_head.log_loss(np.array([0.0, 1.0]), np.array([1.0, 0.0]), weights))


def test_the_server_that_samples_has_a_head_without_knowledge(tmp_path: Path) -> None:
    args = argparse.Namespace(model_path=str(MODELS / "policy"), dtype="bfloat16", pool_tokens=9)
    made = prm_head.flags(args, tmp_path)
    head = LinearHead.load(made[made.index("--prm-model-path") + 1])
    size = AutoConfig.from_pretrained(MODELS / "policy").hidden_size
    assert head.scores(np.ones((2, size))).tolist() == [0.5, 0.5]


def test_the_checkpoint_is_one_that_the_server_recognises(rollouts: list[Rollout], tmp_path: Path) -> None:
    heads, made = learn(str(MODELS / "policy"), rollouts, torch.float32, seed=0, layers=[2])
    names = ["head", "policy head", "policy head of layer 2", "head of layer 2", "likelihood"]
    assert [row["verifier"] for row in made][:5] == names
    losses = made[0]["loss"]
    for kind in FORMATS:
        is_inner = losses[verifiers.name_of(kind, 2)] < losses[kind]
        assert heads[kind].layer == made[0]["layer"][kind] == (2 if is_inner else None)
    assert set(losses) == set(made[0]["penalty"]) == {*FORMATS, *names[2:4]}
    assert prm_head.inner_layers(24) == [12, 16] and prm_head.inner_layers(2) == [1]
    assert all(row["train_problems"] == row["test_problems"] == NUM_PROBLEMS // 2 for row in made)
    text = verifiers.table([{"model": "m", "data": "d", **row} for row in made])
    assert f"| head | {made[0]['auc_last']:.3f} | [{made[0]['low']:.3f}, {made[0]['high']:.3f}] |" in text
    save(str(MODELS / "policy"), heads[CHECKPOINT], torch.float32, tmp_path)
    check_checkpoint(str(tmp_path), "auto")
    heads[POLICY_HEAD].save(tmp_path)
    loaded = LinearHead.load(str(tmp_path))
    np.testing.assert_allclose(loaded.weight, heads[POLICY_HEAD].weight, rtol=1e-6)
    assert loaded.bias == pytest.approx(heads[POLICY_HEAD].bias) and is_policy_head(str(tmp_path), "auto")


@pytest.mark.parametrize("layer", [None, 2])
def test_a_checkpoint_ends_at_its_layer_and_scores_as_it_was_trained(
    rollouts: list[Rollout], tmp_path: Path, layer: int | None
) -> None:
    policy, one = LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32).eval(), rollouts[0]
    states = read(policy, one, layers=[2]).states[verifiers.name_of(CHECKPOINT, layer)]
    weight = np.random.default_rng(0).normal(size=states.shape[1]) / np.abs(states).mean() / 2
    head = LinearHead(weight, float(-states[0] @ weight), layer)
    save(str(MODELS / "policy"), head, torch.float32, tmp_path)
    model = LlamaForTokenClassification.from_pretrained(tmp_path).eval()
    assert len(model.model.layers) == (layer or policy.config.num_hidden_layers)
    token_ids = [*one.prompt_ids, *(token for step in one.steps for token in step)]
    with torch.no_grad():
        last = float(model(torch.tensor([token_ids])).logits[0, -1].softmax(-1)[1])
    expected = head.scores(states)
    assert last == pytest.approx(expected[-1], abs=1e-4) and abs(expected[-1] - expected[0]) > 0.01


def test_a_model_whose_head_the_server_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_ets.prm.models.CLASSES", {"Qwen2ForTokenClassification": object})
    head = LinearHead(np.zeros(1), 0.0)
    with pytest.raises(SystemExit, match="one of Qwen2ForTokenClassification, got LlamaForTokenClassification"):
        save(str(MODELS / "policy"), head, torch.float32, tmp_path)


def test_the_rows_of_this_repository_make_their_tables() -> None:
    path = rows.RESULTS / "prm_head.jsonl"
    made = list(rows.read(path))
    assert made and not [row for row in made if "/" in row["data"]]
    assert path.with_suffix(".md").read_text(encoding="utf-8") == verifiers.tables(made) + "\n"
