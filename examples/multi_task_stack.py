"""Two tasks from one base: train, compare, stack by several methods, measure, merge.

    python examples/multi_task_stack.py [--model MODEL] [--data A B] [--methods linear,ties,...]

Each task is a delta of the same base, so both fit into one set of weights: `dk.stack` adds them up,
or settles where they meet (TIES, DARE and a dozen more). Every task keeps its own head, which is a
few hundred weights. MODEL: an encoder or decoder; A and B: data sets with `text` and `label`.

Expected: of 20,000 entries each the deltas share about 1,400, half of them moved in opposite
directions. Alone they reach 73 % and 67 %; stacked, one body does both with some loss: 67 and 49 %
by `linear`, 63 and 54 % by `magnitude`, which is the better compromise. Merged folders give the
logits of the stacked delta, bit for bit.
"""

import argparse
from pathlib import Path
from typing import Any

import deltakit as dk

DEMO = Path(dk.__file__).parent / "demo_data"  # the embedded model and its data
TASK: dict[str, Any] = {"task": "sequence-classification", "max_length": 48}


def accuracy(model: Path, data: str, *deltas: dk.SparseDelta, **more: Any) -> dict[str, Any]:
    return dk.evaluate(model, deltas, data=data, **TASK, **more)


def main(args: argparse.Namespace) -> None:
    names = [Path(data).name for data in args.data]
    deltas = []
    for name, data in zip(names, args.data, strict=True):
        dk.train(
            model=args.model,
            data=data,
            **TASK,
            budget=args.budget,
            epochs=args.epochs,
            max_steps=args.max_steps,
            batch_size=32,
            eval_strategy="no",
            output_dir=args.output / name,
            force=True,
        )
        deltas.append(dk.load(args.output / name / "delta.sdelta"))
    met = dk.compare(deltas).pairs[0].total
    print(f"{met.shared:,} entries shared, {met.conflicts:,} of them moved in opposite directions")

    stacks = {"alone": deltas}
    for method in args.methods:
        density = {"density": 0.5} if method in ("ties", "dare", "magnitude") else {}
        stacks[method] = [
            dk.stack(deltas, method, **density, head=number) for number in range(len(deltas))
        ]
    means = {}
    print(f"{'':16}" + "".join(f"{name:>12}" for name in names))
    for method, stacked in stacks.items():
        found = [
            accuracy(args.model, data, delta)["metrics"]["accuracy"]
            for data, delta in zip(args.data, stacked, strict=True)
        ]
        means[method] = sum(found) / len(found)
        print(f"{method:16}" + "".join(f"{value:12.3f}" for value in found))

    best = max(args.methods, key=means.__getitem__)
    for name, data, delta in zip(names, args.data, stacks[best], strict=True):
        merged = args.output / f"{best}-{name}"
        dk.merge(args.model, delta, merged, force=True)
        digests = [
            accuracy(*what, predictions=args.output / "predictions.jsonl")["logits_sha256"]
            for what in ((args.model, data, delta), (merged, data))
        ]
        assert digests[0] == digests[1]
        print(f"merged into {merged}: logits are equal, to the bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = [DEMO / "tasks" / name for name in ("family", "kind")]
    parser.add_argument("--model", default=DEMO / "base", help="base model: a folder or a Hub id")
    parser.add_argument("--data", nargs="+", default=tasks, help="data sets of text and label")
    parser.add_argument("--output", type=Path, default=Path("runs/stack"))
    parser.add_argument("--budget", default="20k", help="weights that each task may change")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-steps", type=int, help="instead of epochs")
    methods = "linear,ties,dare,magnitude"
    parser.add_argument("--methods", type=lambda text: text.split(","), default=methods)
    main(parser.parse_args())
