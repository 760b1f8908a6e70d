"""On a machine with a GPU: everything that can be seen there within ten minutes, in order of value.

    cd FOLDER && python -m bench.gpu.rehearse --wheels wheels     what prepare.py put into FOLDER, no index needed
    python -m bench.gpu.rehearse                                  where this package is installed
    python -m bench.gpu.rehearse --smoke                          on a CPU: that the parts run

Each part is a process of its own with a limit; its rows go to one file when it has ended, in the form of bench/rows.py. What
fails becomes a row, too, and the next part follows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from bench import rows
from bench.rows import Row

HERE = Path(__file__).parent
TAIL_CHARACTERS = 3000
END_LIMIT_S = 45.0  # a server is given 30 s to stop
SMOKE_PATIENCE = 4  # times the limit: Triton's interpreter on a busy CPU
MIB = 1 << 20
BROUGHT = ("torch", "torchvision", "triton", "transformers", "numpy", "scipy", "numba")  # by the machine, not the kit
FIRST_SHARED = re.compile(r"ets_tree: the first decode that shares KV: (.*)")
POLICIES = ("rebase", "ets", "ets_kv", "dvts", "beam", "best_of_n")
# As the kit's machine needs it: no compiled kernels but Triton's, and no sampling kernels of another package.
PLAIN_FLAGS = ("--sampling-backend", "pytorch", "--cuda-graph-backend-decode", "disabled")
PLAIN_ENV = {
    "SGLANG_FORCE_FUSED_OP_BACKEND": "torch",
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",  # the compiled one needs another torch
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
}
SEVEN_B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TINY = SEVEN_B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "torch_dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is asked of the servers."""

    widths: tuple[int, ...]
    policies: tuple[str, ...]
    max_tokens: int
    problems: int
    preamble: str = ""  # before each problem


FULL = Sizes((16, 64), POLICIES, 256, 4)
# Two rows share so little that `ets_tree` would leave them to sglang's kernels, were their prompt not long.
SMOKE = Sizes((2,), ("ets", "best_of_n"), 12, 1, preamble="1+1=2\n" * 45)


@dataclass(frozen=True)
class Part:
    """One part of the rehearsal: what it yields are its rows."""

    run: Callable[[bool, Path], Iterator[Row]]
    limit_s: int


def machine(_smoke: bool, _folder: Path) -> Iterator[Row]:
    """What the rest is measured on, and what it brings."""
    import torch

    brought = {name: _version(name) for name in BROUGHT}
    row: Row = {"brought": brought, "torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        row |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
        row |= {"free_gib": free / 2**30, "total_gib": total / 2**30}
    yield row


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def kernel_results(smoke: bool, _folder: Path) -> Iterator[Row]:
    """The kernels' tests for a GPU; without one, in the interpreter."""
    tests = ["tests/kernels/test_tree_attention.py"] if smoke else ["tests/kernels/test_cuda.py"]
    env = {"TRITON_INTERPRET": "1"} if smoke else {}
    options = ["-q", "-p", "no:cacheprovider", *(["-k", "rows_of_a_search"] if smoke else [])]
    yield {"output": _output(["-m", "pytest", *options, *tests], env).splitlines()[-1]}


def kernel_times(smoke: bool, folder: Path) -> Iterator[Row]:
    """`bench.kernels`: time against the bytes bound."""
    yield from _rows_of("bench.kernels", smoke, folder)


def decode_times(smoke: bool, folder: Path) -> Iterator[Row]:
    """`bench.gpu.decode`: decode attention that reads shared KV once."""
    yield from _rows_of("bench.gpu.decode", smoke, folder, {"TRITON_INTERPRET": "1"} if smoke else {})


def triton_server(smoke: bool, folder: Path) -> Iterator[Row]:
    """All policies on sglang's Triton backend."""
    yield from _searches("triton", smoke, folder)


def tree_server(smoke: bool, folder: Path) -> Iterator[Row]:
    """The same on `ets_tree`."""
    yield from _searches("ets_tree", smoke, folder)


def large_model(smoke: bool, folder: Path) -> Iterator[Row]:
    """Random weights in the shape of a 7B, scored by themselves: time of its passes and the memory of both pools."""
    from bench.embedded import MODELS

    model = folder / "random_model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(TINY if smoke else SEVEN_B), encoding="utf-8")
    for file in (MODELS / "policy").glob("*token*"):
        (model / file.name).write_bytes(file.read_bytes())
    flags = ["--model-path", str(model), "--load-format", "dummy", "--prm-format", "confidence"]
    flags += ["--search-step-delimiter", r"\n", "--dtype", "float32" if smoke else "bfloat16"]
    flags += ["--max-total-tokens", "2000", "--prm-max-total-tokens", "2000"] if smoke else []
    yield from _searches("torch_native" if smoke else "triton", smoke, folder, flags, name="large")


PARTS = {
    "machine": Part(machine, 60),
    "kernel_results": Part(kernel_results, 150),
    "decode_times": Part(decode_times, 120),
    "triton_server": Part(triton_server, 180),
    "tree_server": Part(tree_server, 180),
    "large_model": Part(large_model, 240),
    "kernel_times": Part(kernel_times, 120),
}


# ---- what parts are made of ----


def _output(arguments: list[str], env: Mapping[str, str] | None = None) -> str:
    """Of a Python process.

    Raises:
        RuntimeError: it failed; the end of what it wrote is in the message.
    """
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-TAIL_CHARACTERS:])
    return done.stdout


def _rows_of(module: str, smoke: bool, folder: Path, env: Mapping[str, str] | None = None) -> Iterator[Row]:
    out = folder / f"{module}.jsonl"
    out.unlink(missing_ok=True)  # of an earlier rehearsal
    _output(["-m", module, "--out", str(out), *(["--smoke"] if smoke else [])], env)
    for row in rows.read(out):
        del row["run"]  # that bench's, not this rehearsal's
        yield row


def _searches(
    backend: str, smoke: bool, folder: Path, flags: list[str] | None = None, name: str | None = None
) -> Iterator[Row]:
    """Searches of every policy and width on one server, plain sampling beside them, and what is held at the end."""
    from bench.embedded import client_of, held_out_problems
    from bench.server import running_server

    sizes = SMOKE if smoke else FULL
    is_interpreted = smoke and backend != "torch_native"
    given = ["--attention-backend", backend, *(() if smoke else PLAIN_FLAGS), *(flags or [])]
    log = folder / f"{name or backend}.log"
    started = time.perf_counter()
    with running_server(given, log=log, env={"TRITON_INTERPRET": "1"} if is_interpreted else {}) as url:
        yield {"backend": backend, "start_s": time.perf_counter() - started}
        client = client_of(url)
        prompts = [sizes.preamble + problem["prompt"] for problem in held_out_problems(sizes.problems)]
        for width in sizes.widths:
            for policy in sizes.policies:
                yield {"backend": backend, **_timed(client, prompts, sizes, width, policy)}
            yield {"backend": backend, **_timed(client, prompts, sizes, width, None)}
        shared = FIRST_SHARED.search(log.read_text(encoding="utf-8", errors="replace"))
        yield {"backend": backend, "held": _held(url), "first_shared": shared and shared[1]}


def _timed(client: Any, prompts: list[str], sizes: Sizes, width: int, policy: str | None) -> Row:
    """All problems at once, by one policy, or by as many plain samples (None)."""

    def ask(prompt: str) -> tuple[int, Row, str]:
        """Tokens generated, the figures of the search, and the answer."""
        search = {"search_width": width, "search": {"algorithm": policy}} if policy else {"n": width}
        answer = client.completions.create(
            model="default", prompt=prompt, max_tokens=sizes.max_tokens, temperature=1.0, seed=0, extra_body=search
        )
        return answer.usage.completion_tokens, getattr(answer, "search", None) or {}, answer.choices[0].text

    ask(prompts[0])  # what is compiled at its first use is not timed
    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as clients:
        asked = list(clients.map(ask, prompts))
    seconds = time.perf_counter() - started
    return {
        "width": width,
        "policy": policy or "plain sampling",
        "seconds": seconds,
        "tokens_per_s": sum(tokens for tokens, _, _ in asked) / seconds,
        "kv_tokens_peak": max(figures.get("kv_tokens_peak", 0) for _, figures, _ in asked),
        "nodes_failed": sum(figures.get("nodes_failed", 0) for _, figures, _ in asked),  # by an error of the PRM, say
        "answers": [text for _, _, text in asked],
    }


def _held(url: str) -> Row:
    """What the server still holds: nothing, if both ledgers balance."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/server_info", timeout=60) as response:
        state = json.load(response)["internal_states"][0]
    search = state["search"]
    keys = ("live", "done", "failed", "held_kv_tokens", "locks")
    return {**{key: search[key] for key in keys}, "prm": search["prm"], "memory": state.get("memory_usage")}


# ---- the rehearsal ----


def environment(wheels: Path | None, folder: Path) -> dict[str, str]:
    """Of every part: where wheels are given, these alone beside what the machine has. This process sees them, too, for its rows
    tell their versions."""
    if wheels is None:
        return {}
    site = folder.resolve() / "site"
    shutil.rmtree(site, ignore_errors=True)  # pip would leave the versions of an earlier rehearsal beside the new ones
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    files = map(str, sorted(wheels.glob("*.whl")))
    subprocess.run([*pip, "--no-compile", *files], check=True)  # the ten minutes are for what is imported
    sys.path.append(str(site))
    return {"PYTHONPATH": os.pathsep.join([str(HERE / "stand_in"), str(site), str(Path.cwd())]), **PLAIN_ENV}


def installed(wheels: Path, seconds: float) -> Row:
    """The row of the wheels, each with its size."""
    sizes = {file.name: file.stat().st_size / MIB for file in sorted(wheels.glob("*.whl"))}
    return {"part": "install", "wheels_mib": sizes, "part_s": seconds}


def run_within(limit_s: float, command: list[str], env: Mapping[str, str], log: TextIO) -> int | None:
    """Exit status; None if it took too long. It is then asked to end, so that it can stop the server that it has started: what
    stays on the card is missing for the next part."""
    process = subprocess.Popen(command, env=dict(env), stdout=log, stderr=subprocess.STDOUT)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


def run_part(name: str, folder: Path, env: Mapping[str, str], smoke: bool) -> list[Row]:
    """Rows of one part, the last of which tells its time, and its error if it had one."""
    part, started = PARTS[name], time.perf_counter()
    out = folder / f"part_{name}.jsonl"
    out.unlink(missing_ok=True)  # of an earlier rehearsal
    command = [sys.executable, "-m", "bench.gpu.rehearse", "--part", name, "--folder", str(folder), "--rows", str(out)]
    error = None
    with (folder / f"part_{name}.log").open("w+", encoding="utf-8") as log:
        limit_s = part.limit_s * (SMOKE_PATIENCE if smoke else 1)
        status = run_within(limit_s, [*command, *(["--smoke"] if smoke else [])], {**os.environ, **env}, log)
        log.seek(0)
        if status != 0:
            said = log.read()[-TAIL_CHARACTERS:].strip()
            error = f"more than {limit_s} s" if status is None else said or f"exit status {status}, without a word"
    made = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    end: Row = {"part": name, "part_s": time.perf_counter() - started}
    return [*made, end | ({"error": error} if error else {})]


def run_here(name: str, folder: Path, out: Path, smoke: bool) -> None:
    """In the process of a part: write each row when it is made."""
    with out.open("w", encoding="utf-8") as rows_file:
        for row in PARTS[name].run(smoke, folder):
            rows_file.write(json.dumps({"part": name, **row}) + "\n")
            rows_file.flush()


def outcome(end: Row) -> str:
    """In a line, from the last row of a part."""
    return str(end.get("error", "done").splitlines()[-1])


def table(measured: list[Row]) -> str:
    """Markdown: the parts of one rehearsal, what they made and how they ended."""
    cells = []
    for end in (row for row in measured if "part_s" in row):
        of_part = [row for row in measured if row["part"] == end["part"]]
        cells.append([end["part"], len(of_part) - 1, outcome(end)])
    return rows.markdown(["part", "rows", "outcome"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install and use; default: what is installed")
    parser.add_argument("--folder", type=Path, default=Path("rehearsal"), help="for rows and logs")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help="used by the rehearsal itself: one part, in this process")
    parser.add_argument("--rows", type=Path, help="with --part")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.part:
        run_here(args.part, args.folder, args.rows, args.smoke)
        return
    started = time.perf_counter()
    env, out = environment(args.wheels, args.folder), args.folder / "rows.jsonl"
    if args.wheels:
        rows.append(out, installed(args.wheels, time.perf_counter() - started))
    for name in args.parts:
        made = run_part(name, args.folder, env, args.smoke)
        for row in made:
            rows.append(out, row)
        print(f"{name}: {made[-1]['part_s']:.0f} s, {len(made) - 1} rows, {outcome(made[-1])}", flush=True)


if __name__ == "__main__":
    main()
