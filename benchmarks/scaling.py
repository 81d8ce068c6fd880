"""What deltakit costs at any size: tables by arithmetic, and the arithmetic against measurement.

    pip install -c constraints.txt -e .[dev]
    python benchmarks/scaling.py table [--write]
    python benchmarks/scaling.py memory [--ranks 2] [--only CASE...]
    python benchmarks/scaling.py simulate [--sizes 70B 405B 1T] [--entries 200000] [--folder DIR]

table: the tables of docs/scaling.md, or with --write these in their place. memory: peak resident
memory of real ranks (gloo) that train a Llama-shaped model, beside the arithmetic. simulate: the
real commands over checkpoints of 141 GB to 2 TB whose weights are holes of sparse files, so that
they take up nearly no disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="what", required=True)
    table = kinds.add_parser("table")
    table.add_argument("--write", action="store_true")
    memory = kinds.add_parser("memory")
    memory.add_argument("--ranks", type=int, default=2)
    memory.add_argument("--only", nargs="*")
    memory.add_argument("--as-rank", type=int, help=argparse.SUPPRESS)
    memory.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    simulate = kinds.add_parser("simulate")
    simulate.add_argument("--sizes", nargs="+", choices=["8B", "70B", "405B", "1T"])
    simulate.add_argument("--entries", type=int, default=200_000)
    simulate.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.what == "table":
        import scaling_tables

        if options.write:
            page = scaling_tables.PAGE
            page.write_text(scaling_tables.filled(page.read_text()))
        else:
            print("\n\n".join(make() for make in scaling_tables.TABLES.values()))
    elif options.what == "memory":
        import scaling_memory

        if options.as_rank is not None:
            (case,) = options.only
            scaling_memory.as_rank(case, options.as_rank, options.ranks, options.folder)
        else:
            print(scaling_memory.report(options.only or [*scaling_memory.CASES], options.ranks))
    else:
        import scaling_simulate

        sizes = options.sizes or ["70B", "405B", "1T"]
        print(scaling_simulate.report(sizes, options.entries, options.folder))


if __name__ == "__main__":
    main()
