"""Layouts: step by step they give the tokens of the whole solution; formats are recognised; what lacks is said."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import sglang_ets
from bench.testbed.task import distinct_problems, solve
from sglang_ets.prm.choose import AUTO, check_checkpoint, choose_format
from sglang_ets.prm.formats import StepProbability, StepTokens
from tests.prm.checkpoints import CASES, Case, Reference

NAMES = [f"{case.format}-{case.architecture}" for case in CASES]


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Path]:
    folder = tmp_path_factory.mktemp("prm")
    return Reference(request.param, folder), folder


@pytest.mark.parametrize("lines", [1, 2, 3], ids="lines{}".format)
def test_tokens_do_not_drift(reference: tuple[Reference, Path], lines: int) -> None:
    model, folder = reference
    case: Case = model.case
    spec = choose_format(str(folder), case.given, model.tokenizer)
    assert spec.name == case.format
    rng = random.Random(1)
    for problem in distinct_problems("validation", 20):
        steps = in_lines(solve(problem, rng), lines)
        whole, _ = model.step_scores(problem.prompt, steps)
        ids = list(spec.layout.prompt(problem.prompt))
        for depth, step in enumerate(steps, 1):
            made = spec.layout.step(step, depth)
            read = ids + list(made.read)
            ids += made.path
            assert all(line in model.tokenizer.decode(list(made.path)[made.words]) for line in step.strip().split("\n"))
        assert read == whole


def in_lines(steps: list[str], lines: int) -> list[str]:
    """The steps joined, so many lines in one, with a blank line behind the first."""
    joined = ["".join(steps[first : first + lines]) for first in range(0, len(steps), lines)]
    return [step.replace("\n", "\n\n", 1) for step in joined] if lines > 2 else joined


def test_a_line_of_a_skywork_step_is_tokenised_alone(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.format == "skywork")
    tokenizer = Reference(case, tmp_path).tokenizer
    made = choose_format(str(tmp_path), AUTO, tokenizer).layout.step("3+4=7\n\n7*8=56\n", 1)
    first, second, newline = (tokenizer.encode(text, add_special_tokens=False) for text in ("3+4=7", "7*8=56", "\n"))
    assert list(made.path) == [*first, *newline, *newline, *second, *newline]
    assert made.path[made.words] == made.path[:-1]


@pytest.mark.parametrize("text", ["", "\n", "  ", "a\n\nb"])
def test_odd_steps_have_tokens_to_read_and_words_to_embed(reference: tuple[Reference, Path], text: str) -> None:
    model, folder = reference
    layout = choose_format(str(folder), model.case.given, model.tokenizer).layout
    for depth in (1, 3):
        made = layout.step(text, depth)
        assert made.read
        assert made.path[made.words] or not made.path


def test_words_of_a_step_without_words_are_the_whole_step() -> None:
    assert StepTokens((4, 5), text_start=0, text_end=0).words == slice(0, 2)
    assert StepTokens((4, 5, 6), (7,), 1, 2).words == slice(1, 2)
    assert StepTokens((), (7, 8)).words == slice(0, 2)


@pytest.mark.parametrize(
    ("texts", "first"), [(["a", "=", "b"], 2), (["a", "b"], 0), (["a", "="], 0), (["x=y", "z"], 1)]
)
def test_first_scored(texts: list[str], first: int) -> None:
    assert StepProbability("product", "=").first_scored(texts) == first


def test_names_of_checkpoints_tell_their_format(tmp_path: Path) -> None:
    model = Reference(CASES[5], tmp_path / "math-shepherd-mistral-7b-prm")
    assert choose_format(str(tmp_path / "math-shepherd-mistral-7b-prm"), AUTO, model.tokenizer).name == "math_shepherd"


def test_a_causal_model_tells_no_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(SystemExit, match="does not tell its own; name the format"):
        choose_format(str(tmp_path), AUTO, None)


def test_a_checkpoint_of_its_format_passes(reference: tuple[Reference, Path]) -> None:
    model, folder = reference
    for wanted in {model.case.given, model.case.format}:
        check_checkpoint(str(folder), wanted)


@pytest.mark.parametrize(
    ("architecture", "wanted", "sentence"),
    [
        (
            "Qwen2ForProcessRewardModel",
            "skywork",
            "reads the head of Qwen2ForPrmModel, and FOLDER is a Qwen2ForProcessRewardModel; give --prm-format qwen_prm",
        ),
        ("Qwen2ForPrmModel", "qwen_prm", "and FOLDER is a Qwen2ForPrmModel; give --prm-format skywork"),
        ("Qwen2ForCausalLM", "skywork", "and FOLDER is a Qwen2ForCausalLM; give another --prm-format, or another"),
        ("Qwen3ForTokenClassification", "judge", "reads the head of a language model, and FOLDER is a Qwen3ForToken"),
        (
            "LlamaForCausalLM",
            "token_classification",
            "reads the head of *ForTokenClassification, and FOLDER is a Llama",
        ),
        ("LlamaForCausalLM", AUTO, "and FOLDER does not tell its own; name the format"),
        ("LlamaForCausalLM", "nonsense", "--prm-format must be one of auto, "),
        (
            None,
            "skywork",
            "must name a folder with a checkpoint or a model on the Hub, got 'FOLDER', in which no config",
        ),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_before_it_is_loaded(
    architecture: str | None, wanted: str, sentence: str, tmp_path: Path
) -> None:
    if architecture:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    with pytest.raises(SystemExit) as caught:
        check_checkpoint(str(tmp_path), wanted)
    assert sentence.replace("FOLDER", str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_that_is_not_there_or_cannot_be_read_is_one_sentence(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "prm"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(SystemExit, match=r"^--prm-model-path must name a checkpoint, got ") as caught:
        check_checkpoint(str(folder), "skywork")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_the_tag_is_refused(tmp_path: Path) -> None:
    embedded = AutoTokenizer.from_pretrained(Path(sglang_ets.__file__).parent / "models" / "policy")
    for name in ("qwen_prm", "judge"):
        with pytest.raises(SystemExit, match=f"{name} needs a tokenizer with one token"):
            choose_format(str(tmp_path), name, embedded)
