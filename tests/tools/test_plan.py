"""`sglang-ets plan` against sizes that are known: published models, and the pools that sglang allocates here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sglang_ets.launch_server import MODELS
from sglang_ets.prm.policy_head import LinearHead
from sglang_ets.tools import plan

QWEN_7B = {
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584,
    "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def qwen(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return str(tmp_path)


def test_sizes_of_a_published_7b(qwen: str) -> None:
    size = plan.model_size(qwen)
    assert size.kv_bytes_per_token == 28 * 2 * 4 * 128 * 2  # 57 kB
    assert size.weight_bytes / 2 == pytest.approx(7.62e9, rel=0.01)
    assert plan.model_size(qwen, "float8_e4m3fn").kv_bytes_per_token * 2 == size.kv_bytes_per_token


def test_files_of_weights_count_as_they_are() -> None:
    folder = MODELS / "policy"
    size = plan.model_size(str(folder))
    assert size.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert size.kv_bytes_per_token == 4 * 2 * 2 * 64 * 2


def test_kv_of_latent_attention(tmp_path: Path) -> None:
    config = {**QWEN_7B, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    assert plan.model_size(str(tmp_path)).kv_bytes_per_token == 28 * 576 * 2


def test_both_pools_fill_what_the_weights_leave(qwen: str) -> None:
    size = plan.model_size(qwen)
    pools = plan.plan_pools(size, size, 80.0, 1, 10.0)
    used = 2 * size.weight_bytes + pools.policy_tokens * 2 * size.kv_bytes_per_token
    assert 0 <= 70e9 - used < 2 * size.kv_bytes_per_token
    alone = plan.plan_pools(size, None, 80.0, 1, 10.0)
    assert alone.room_bytes - pools.room_bytes == size.weight_bytes


def test_a_head_on_the_policy_model_leaves_all_to_one_pool(
    qwen: str, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    head = tmp_path_factory.mktemp("head")
    LinearHead(np.zeros(3584), 0.0).save(head)
    with pytest.raises(SystemExit) as caught:
        plan.main(
            ["--model-path", qwen, "--prm-model-path", str(head), "--memory-gb", "80", "--cards", "2", "--width", "16"]
        )
    said, size = capsys.readouterr().out, plan.model_size(qwen)
    tokens = int((70e9 - size.weight_bytes / 2) / (size.kv_bytes_per_token / 2))
    assert caught.value.code == 0
    assert f"flags: --max-total-tokens {tokens}\n" in said and "PRM: a head on the policy model's own states" in said


@pytest.mark.parametrize(("cards", "ranks"), [(1, 1), (2, 2), (4, 4), (8, 1)])
def test_a_prm_whose_heads_do_not_divide_is_whole_on_each_card(qwen: str, cards: int, ranks: int) -> None:
    assert plan.prm_ranks(plan.model_size(qwen), cards) == ranks


def test_a_card_holds_at_least_one_head_of_kv(qwen: str) -> None:
    size = plan.model_size(qwen)
    assert size.kv_on_card(8) == size.kv_on_card(4) == size.kv_bytes_per_token / 4


@pytest.mark.parametrize(
    ("flags", "status", "parts"),
    [
        ([], 0, ["--max-total-tokens", "--prm-max-total-tokens", "at once", "kB of KV"]),
        (["--memory-gb", "24"], 1, ["does not fit"]),
        (["--width", "4096", "--memory-gb", "48"], 1, ["       0"]),
        (["--cards", "8"], 0, ["28 heads do not divide by 8"]),
        (["--max-tokens", "8000"], 1, ["context of 4096 tokens is shorter"]),
        (["--cards", "0"], 2, ["must be positive"]),
    ],
)
def test_what_it_prints(
    qwen: str, flags: list[str], status: int, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main(["--model-path", qwen, "--prm-model-path", qwen, *flags])
    printed = "".join(capsys.readouterr())
    assert caught.value.code == status, printed
    assert all(part in printed for part in parts), printed


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main(["--model-path", str(tmp_path)])
    assert caught.value.code == 2
    assert "config.json" in capsys.readouterr().err
