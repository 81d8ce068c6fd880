"""The table of what `fidelity.py` measured, one line per setting, seeds side by side.

python benchmarks/fidelity_table.py OUT/fidelity.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean


def main() -> None:
    lines = map(json.loads, Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())
    settings: dict[tuple[str, ...], dict[int, dict[str, float]]] = {}
    for line in lines:
        rate = "" if line["lr"] is None else f"{line['lr']:g}"
        settings.setdefault((line["row"], rate, " ".join(line["flags"])), {})[line["seed"]] = line
    print("| method | lr | flags | entries | validation | test, by seed | mean | file |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for key, by_seed in sorted(settings.items()):
        runs = [by_seed[seed] for seed in sorted(by_seed)]
        validation, test = ([f"{100 * run[k]:.1f}" for run in runs] for k in ("validation", "test"))
        average = f"{100 * mean(run['test'] for run in runs):.1f}" if len(runs) > 1 else ""
        size = f"{runs[0]['bytes'] / 1e3:,.0f} kB"
        cells = [
            *key,
            f"{runs[0]['entries']:,}",
            " ".join(validation),
            " ".join(test),
            average,
            size,
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
