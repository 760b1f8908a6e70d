"""Every PRM format in a real server: each step score of a search equals transformers on the whole solution, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import serving
from tests.e2e.test_prm_parity import MODELS, TOKENIZER, scored_paths
from tests.prm.checkpoints import CASES, QUESTION, Case, Reference

pytestmark = pytest.mark.server
TOLERANCE = 1e-4


CHAT = {"model": "default", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 512, "search_width": 4}


# Without the first: test_prm_parity.py has one of its format and architecture, saved by transformers.
@pytest.mark.parametrize("case", CASES[1:], ids=[f"{case.format}-{case.architecture}" for case in CASES[1:]])
def test_parity(case: Case, tmp_path: Path, record_property: Any) -> None:
    reference = Reference(case, tmp_path / "prm")
    flags = ["--prm-model-path", str(tmp_path / "prm"), "--prm-format", case.given]
    with serving(tmp_path / "log.txt", flags) as server:
        search = {"algorithm": "rebase", "return_tree": True}
        paths = scored_paths(server.search(QUESTION, 8, search=search))
        in_lines = {"step_delimiter": "\n\n", "max_step_tokens": 24}  # the policy model never writes an empty line
        paths += scored_paths(server.search(QUESTION, 8, search=search | in_lines))
        status, answer = server.post("/v1/chat/completions", {**CHAT, "search": {"return_tree": True}})
        assert status == 200, answer
        paths += scored_paths(answer)  # the PRM is asked about the last user message
        state = server.search_state()["prm"]
    assert state["format"] == case.format
    assert 0 < state["tokens_extended"] < state["tokens_if_rescored"]
    worst, seen = 0.0, set()
    for path in paths:
        _, scores = reference.step_scores(QUESTION, [node["text"] for node in path])
        worst = max(worst, abs(path[-1]["score"] - scores[-1]))
        seen.add(round(scores[-1], 3))
    print(f"{case.format} {case.architecture}: {len(paths)} steps, largest difference {worst:.1e}")
    record_property("largest_difference", worst)
    assert worst < TOLERANCE
    assert len(seen) > 5
    assert sum("\n" in path[-1]["text"].strip() for path in paths) > 5


def test_confidence_shares_the_policy_models_weights(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32).eval()
    with serving(tmp_path / "log.txt", ["--prm-format", "confidence"]) as server:
        paths = scored_paths(server.search(QUESTION, 8, search={"algorithm": "ets", "return_tree": True}))
        state = server.search_state()["prm"]
    assert state["format"] == "confidence"
    assert state["shares_policy_weights"]
    prompt = TOKENIZER.encode(QUESTION)
    for path in paths:
        ids = prompt + [token for node in path for token in node["token_ids"]]
        length = len(path[-1]["token_ids"])
        with torch.no_grad():
            taken = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        assert path[-1]["score"] == pytest.approx(float(taken[-length:].mean().exp()), abs=TOLERANCE)
    assert len({round(path[-1]["score"], 3) for path in paths}) > 5
