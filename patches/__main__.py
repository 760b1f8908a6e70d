"""`python -m sglang_ets.patches` prints the patch table, with `--hashes` the hash of every target as installed."""

from __future__ import annotations

import argparse

from sglang_ets.patches import hashes, table

from sglang_ets import cpu_shim

parser = argparse.ArgumentParser(prog="python -m sglang_ets.patches", description=__doc__)
parser.add_argument("--hashes", action="store_true", help="print the hashes of the targets as installed")
if parser.parse_args().hashes:
    cpu_shim.install()
    print(hashes())
else:
    print(table())
