"""Training beside a base in 4 bits: a sparse delta, and a sparsified LoRA; both merge unquantised.

    python examples/sparse_lora_nf4.py [--model MODEL] [--data DATA] [--rank 32] [--share 50%]

The base's linear weights are held as NF4 codes (Dettmers et al., 2023), which never change. Beside
them train (1) entries of the weights themselves, and (2) a LoRA of which a share of the weights may
move: the others keep their initial values, which a seed gives back. Both deltas belong to the
full-precision base, and `dk.merge` folds them into it. MODEL and DATA: see classify.py. Needs
`pip install "deltakit-sparse[train,8bit,peers]"`.

Expected, in accuracy: the sparse delta 73 % beside NF4 and 68 % merged, the LoRA 66 and 54 %. What
is lost on merging is the error of quantising, which training has seen and the merged model has not;
large models lose less. `dk.evaluate(..., quantize="nf4")` measures a delta where it was trained.
"""

import argparse
from pathlib import Path
from typing import Any

import deltakit as dk

DEMO = Path(dk.__file__).parent / "demo_data"  # the embedded model and its data


def main(args: argparse.Namespace) -> None:
    task: dict[str, Any] = {"data": args.data, "task": "sequence-classification"}
    task |= {"max_length": 48}
    kinds: dict[str, dict[str, Any]] = {
        "sparse": {"budget": args.budget},
        "sparse-lora": {"adapter": "lora", "rank": args.rank, "budget": args.share},
    }
    print(f"{'':12}{'entries':>10}{'bytes':>10}{'beside NF4':>12}{'merged':>9}")
    for name, settings in kinds.items():
        run = dk.train(
            model=args.model,
            **task,
            quantize="nf4",
            **settings,
            epochs=args.epochs,
            max_steps=args.max_steps,
            batch_size=32,
            eval_strategy="budget",  # at the end alone, as there are no marks
            output_dir=args.output / name,
            force=True,
        )
        final, merged = run["final"], args.output / f"{name}-merged"
        report = dk.merge(args.model, final["path"], merged, force=True)
        assert dk.verify(final["path"], args.model).ok
        whole = dk.evaluate(merged, **task)["metrics"]["accuracy"]
        beside = final["metrics"]["accuracy"]
        print(f"{name:12}{final['entries']:10,}{final['bytes']:10,}{beside:12.3f}{whole:9.3f}")
        print(f"{'':12}{merged}: {report.tensors} tensors changed, in full precision")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO / "base", help="base model: a folder or a Hub id")
    parser.add_argument("--data", default=DEMO / "tasks" / "family", help="text and label")
    parser.add_argument("--output", type=Path, default=Path("runs/nf4"))
    parser.add_argument("--budget", default="20k", help="weights of the base that may change")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--share", default="50%", help="of the LoRA's weights that may change")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-steps", type=int, help="instead of epochs")
    main(parser.parse_args())
