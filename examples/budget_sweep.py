"""How many weights does a task need? Accuracy against budget, with a plot.

    python examples/budget_sweep.py [--model MODEL] [--data DATA] [--budgets 500,2k,...]

Trains once for each budget, and once more asks a cheaper question: how good is the largest delta
cut down to each budget? `dk.truncate` keeps its largest changes, in milliseconds. MODEL and DATA:
see classify.py. Writes sweep.json and sweep.png (which needs matplotlib) to --output.

Expected: accuracy rises from 0.30 at 300 entries to 0.75 at 50,000. Cut to 10,000, the largest
delta is better (0.71) than the one trained at that budget (0.60), which would need more than this
one epoch, or a larger rate (`lr="auto"` finds one); cut to 300 it is worse (0.17). Time depends on
steps, hardly on the budget.
"""

import argparse
import json
from pathlib import Path

import deltakit as dk

DEMO = Path(dk.__file__).parent / "demo_data"  # the embedded model and its data


def sweep(args: argparse.Namespace) -> list[dict[str, float]]:
    """One row per budget: entries, bytes, and accuracy when trained and when truncated."""
    task = {"data": args.data, "task": "sequence-classification", "max_length": 48}
    rows = []
    for budget in args.budgets:
        run = dk.train(
            model=args.model,
            **task,
            budget=budget,
            epochs=args.epochs,
            max_steps=args.max_steps,
            batch_size=32,
            eval_strategy="budget",  # at the end alone, as there are no marks
            output_dir=args.output / f"budget-{budget}",
            force=True,
        )
        final = run["final"]
        rows.append({"entries": final["entries"], "bytes": final["bytes"]})
        rows[-1]["trained"] = final["metrics"]["accuracy"]
    largest = dk.load(run["final"]["path"])
    for row in rows:
        cut = dk.truncate(largest, row["entries"])
        row["truncated"] = dk.evaluate(args.model, cut, **task)["metrics"]["accuracy"]
        print("{entries:>9,} {bytes:>11,} {trained:>9.3f} {truncated:>9.3f}".format(**row))
    return rows


def plot(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="entries of the delta", ylabel="accuracy")
    entries = [row["entries"] for row in rows]
    axes.plot(entries, [row["trained"] for row in rows], "o-", label="trained at this budget")
    axes.plot(entries, [row["truncated"] for row in rows], "s--", label="largest, truncated")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main(args: argparse.Namespace) -> None:
    print(f"{'entries':>9} {'bytes':>11} {'trained':>9} {'truncated':>9}")
    rows = sweep(args)
    (args.output / "sweep.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    plot(rows, args.output / "sweep.png")
    print(f"plotted in {args.output / 'sweep.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO / "base", help="base model: a folder or a Hub id")
    parser.add_argument("--data", default=DEMO / "tasks" / "family", help="text and label")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--budgets", type=lambda t: t.split(","), default="300,2k,10k,50k")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-steps", type=int, help="instead of epochs")
    main(parser.parse_args())
