"""Every PRM format on two tensor-parallel ranks: split over them or whole on each, equal scores that are transformers' own.

Each scores the tree of a search.

Two processes with gloo between them and no server, forked from one that has imported sglang: tests/prm/two_ranks.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from bench.server import _free_port
from sglang_ets.prm.choose import NAMES, POLICY_HEAD
from sglang_ets.prm.split import num_prm_ranks, ranks_of
from tests.prm.checkpoints import CASES, Case, Reference
from tests.prm.conftest import MODELS, TOKENIZER
from tests.prm.two_ranks import ENVIRONMENT, NUM_RANKS, Step, score

TOLERANCE = 1e-4
LIMIT_S = 300
QUESTION = "10*18-19-15+(13*4-15)=\n"
STEPS: tuple[Step, ...] = (  # of a search: siblings, wrong ones, some of several lines, some that nothing continues
    (0, "here 10*18=180:180-19-15+(13*4-15)\n"),
    (0, "here 10*18=170:170-19-15+(13*4-15)\n"),
    (0, "here 10*18=180:180-19-15+(13*4-15)\nthus 180-19=161:161-15+(13*4-15)\n"),
    (1, "thus 180-19=161:161-15+(13*4-15)\n"),
    (1, "next 13*4=52:180-19-15+(52-15)\n\nand 52-15=37:180-19-15+37\n"),
    (2, "thus 170-19=151:151-15+(13*4-15)\n"),
    (4, "here 161-15=146:146+(13*4-15)\n"),
    (4, "next 13*4=52:161-15+(52-15)\nand 52-15=38:161-15+38\n"),
    (6, "here 151-15=136:136+(13*4-15)"),
)


@dataclass(frozen=True)
class Wanted:
    """One PRM to load on both ranks, and over how many ranks it must then be."""

    name: str
    path: Path
    format: str
    ranks: int
    num_ranks: int | None = None  # --prm-tp


def path_to(place: int) -> list[str]:
    """Texts of the steps from the first to this one, by its number."""
    parent, text = STEPS[place - 1]
    return [*path_to(parent), text] if parent else [text]


PATHS = [path_to(place) for place in range(1, len(STEPS) + 1)]


def reference_of(case: Case, folder: Path, num_heads: int = 2) -> list[float]:
    reference = Reference(case, folder, num_heads)
    return [reference.step_scores(QUESTION, path)[1][-1] for path in PATHS]


def confidence() -> list[float]:
    model = LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32).eval()
    scores = []
    for path in PATHS:
        ids = list(TOKENIZER.encode(QUESTION))
        for step in path:
            new = TOKENIZER.encode(step, add_special_tokens=False)
            ids += new
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -len(new) - 1 : -1]
        scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).mean().exp()))
    return scores


def run_both(wanted: Sequence[Wanted], folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank says, in the order of `wanted`."""
    jobs = folder / "jobs.json"
    given = [
        {"path": str(one.path), "format": one.format, "num_ranks": one.num_ranks, "question": QUESTION, "steps": STEPS}
        for one in wanted
    ]
    jobs.write_text(json.dumps(given), encoding="utf-8")
    command = [sys.executable, "-m", "tests.prm.two_ranks", str(_free_port()), str(jobs), str(folder)]
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=out, start_new_session=True
        )
        try:
            status = process.wait(LIMIT_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks, if they still run
            process.wait()
    assert status == 0, log.read_text(encoding="utf-8")[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(NUM_RANKS)]


def test_all_formats_on_two_ranks(tmp_path: Path, load_engine: Any) -> None:
    expected: dict[str, list[float]] = {}
    wanted: list[Wanted] = []
    for case in (*CASES[:2], *CASES[3:]):  # the third has three heads, below
        folder = tmp_path / f"{case.format}-{case.architecture}"
        expected[folder.name] = reference_of(case, folder)
        wanted.append(Wanted(folder.name, folder, case.given, NUM_RANKS))
    shepherd = next(one for one in wanted if one.format == "math_shepherd")
    wanted.append(Wanted(shepherd.name, shepherd.path, "math_shepherd", 1, num_ranks=1))
    expected["likelihood"] = score(load_engine(4000), QUESTION, STEPS)
    wanted.append(Wanted("likelihood", MODELS / "prm", "likelihood", NUM_RANKS))
    expected["confidence"] = confidence()
    wanted.append(Wanted("confidence", MODELS / "policy", "confidence", NUM_RANKS))
    odd = tmp_path / "three heads"
    expected[odd.name] = reference_of(CASES[2], odd, num_heads=3)
    wanted.append(Wanted(odd.name, odd, "auto", 1))
    first, second = run_both(wanted, tmp_path)
    formats = set()
    for one, own, other in zip(wanted, first, second, strict=True):
        assert own["scores"] == other["scores"], one.name
        assert own["scores"] == pytest.approx(expected[one.name], abs=TOLERANCE), one.name
        assert len({round(score, 3) for score in own["scores"]}) > 2, one.name
        assert own["stats"]["ranks"] == one.ranks, one.name
        assert (own["stats"]["locks"], other["stats"]["locks"]) == (0, 0)
        formats.add(own["stats"]["format"])
    assert formats == set(NAMES) - {POLICY_HEAD}  # which has no pass: test_policy_head.py


SEVEN_B = {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}


@pytest.mark.parametrize(("num_ranks", "ranks"), [(1, 1), (2, 2), (4, 4), (8, 1), (3, 1)])
def test_a_prm_that_does_not_divide_is_whole_on_each_rank(num_ranks: int, ranks: int) -> None:
    assert ranks_of(SEVEN_B, num_ranks) == ranks
    assert ranks_of({"text_config": SEVEN_B}, num_ranks) == ranks
    assert ranks_of(SEVEN_B, num_ranks, wanted=1) == 1


@pytest.mark.parametrize(
    ("num_ranks", "wanted", "message"),
    [
        (4, 2, "--prm-tp must be 1, for a whole PRM on each rank, or 4 as --tp, got 2; leave it out"),
        (4, 0, "--prm-tp must be 1, .* got 0"),
        (8, 8, "--prm-tp 8 does not divide the PRM's heads and layers; leave it out for a whole PRM on each rank"),
    ],
)
def test_a_wrong_number_of_ranks_is_one_sentence(num_ranks: int, wanted: int, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        ranks_of(SEVEN_B, num_ranks, wanted)


def test_shared_weights_are_where_the_policy_model_is() -> None:
    assert num_prm_ranks("/policy", "/policy", 8) == num_prm_ranks("/policy", "/policy", 8, 8) == 8
    with pytest.raises(SystemExit, match=r"--prm-tp 1 needs a --prm-model-path of its own, .* are on 8 ranks"):
        num_prm_ranks("/policy", "/policy", 8, 1)
