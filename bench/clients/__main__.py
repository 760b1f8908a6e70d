"""Real clients, unmodified, in an environment of their own, against a server that this starts: `python -m bench.clients`.

The environment lies in the user's cache; the first run installs about 1 GB of packages into it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.server import running_server

PACKAGES = ("langchain-openai==1.7.4", "lm_eval[api]==0.4.13", "transformers==5.24.0")
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-ets" / "clients"
TASK = ["--tasks", "embedded_arithmetic", "--include_path", "bench/clients/lm_eval_task"]


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with `PACKAGES`; made anew when these have changed.

    Raises:
        subprocess.CalledProcessError: it could not be made; the tool's own words are on stderr.
    """
    python, stamp = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(PACKAGES)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def evaluations(url: str) -> list[list[str]]:
    """Arguments of lm_eval: prompts as text with the search of the task file, as token ids, and as chat messages."""
    completions, chat = (f"model=default,base_url={url}/v1/{kind}completions" for kind in ("", "chat/"))
    as_text = f"{completions},tokenizer_backend=none,num_concurrent=4"
    as_tokens = f"{completions},tokenizer_backend=huggingface,tokenizer=sglang_ets/models/policy"
    as_json = ["--gen_kwargs", '{"search_width": 4, "search": {"algorithm": "rebase"}}', "--limit", "2"]
    as_pairs = ["--gen_kwargs", "search_width=4,search=None,temperature=0.8", "--limit", "2"]
    return [
        ["--model", "local-completions", "--model_args", as_text],
        ["--model", "local-completions", "--model_args", as_tokens, *as_json],
        ["--model", "local-chat-completions", "--model_args", chat, "--apply_chat_template", *as_pairs],
    ]


def run(command: Sequence[str], data_sets: str) -> None:
    """One client, with its command shown; its data sets are local, so the Hub is never asked.

    Raises:
        subprocess.CalledProcessError: the client failed.
    """
    print("$", " ".join(command[1:]), flush=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": data_sets, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    subprocess.run(command, check=True, cwd=ROOT, env=env)


def run_clients(python: Path, url: str) -> None:
    """All clients, one after the other."""
    with tempfile.TemporaryDirectory() as data_sets:
        run([str(python), str(HERE / "langchain_search.py"), "--url", url], data_sets)
        for arguments in evaluations(url):
            run([str(python), "-m", "lm_eval", "run", *TASK, *arguments], data_sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a server that runs already, for example http://127.0.0.1:30000")
    parser.add_argument("--environment", type=Path, default=CACHE, help="folder of the clients' virtual environment")
    given = parser.parse_args()
    python = environment(given.environment)
    if given.url:
        run_clients(python, given.url)
        return
    with running_server(["--search", "ets"]) as url:
        run_clients(python, url)


if __name__ == "__main__":
    main()
