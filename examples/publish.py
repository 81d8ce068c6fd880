"""Publish a run on the Hub, card included, and pull it back as anybody would.

    hf auth login        # or HF_TOKEN: a token that may write
    python examples/publish.py you/my-delta [--run RUN] [--public]

Publishes the deltas of a run with settings, metrics and a card written from the files, by one
commit; a second push without changes makes none. Then it looks at the delta by range requests,
pulls one budget of the family, and compares every byte. Without --run a short one is made first, by
default on the embedded model. The repository is private unless --public is given. An HF_ENDPOINT of
your own takes the place of huggingface.co.

Expected: the files with their sizes, the first lines of the card, and "equal, byte for byte".
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import hf_hub_download

import deltakit as dk

DEMO = Path(dk.__file__).parent / "demo_data"  # the embedded model and its data


def short_run(args: argparse.Namespace) -> Path:
    """Two budgets of one family: 5,000 and 20,000 entries."""
    dk.train(
        model=args.model,
        data=args.data,
        task="sequence-classification",
        budget="20k",
        checkpoint_budgets=["5k"],
        unmask_fraction=0.8,  # so that the smaller budget is reached after some training
        eval_strategy="budget",
        max_steps=args.max_steps,
        batch_size=32,
        max_length=48,
        output_dir=args.output,
        force=True,
    )
    return args.output


def main(args: argparse.Namespace) -> None:
    run = args.run or short_run(args)
    plan = dk.push(run, args.repo, private=not args.public, dry_run=True)
    for file in plan.files:
        print(f"{file.name:24} {file.bytes:>9,} bytes, {file.status}")
    pushed = dk.push(run, args.repo, private=not args.public)
    print(f"{pushed.url} at {pushed.commit[:12]}")
    assert not dk.push(run, args.repo, private=not args.public).changed

    card = Path(hf_hub_download(args.repo, "README.md")).read_text(encoding="utf-8")
    body = card.split("---\n", 2)[2].strip()  # after the metadata
    print("\n".join(body.splitlines()[:8]))

    found = dk.inspect(f"hf://{args.repo}")  # its header alone
    print(f"{found.entries:,} entries in {len(found.tensors)} tensors")
    smallest = min(run.glob("*.sdelta"), key=lambda path: dk.inspect(path).entries)
    with tempfile.TemporaryDirectory() as folder:
        budget = dk.inspect(smallest).entries
        pulled = dk.pull(args.repo, Path(folder) / "pulled.sdelta", budget=budget)
        assert Path(pulled.output).read_bytes() == smallest.read_bytes()
        print(f"pulled {pulled.files[0].name} of {budget:,} entries: equal, byte for byte")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo", help="owner/name")
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--model", default=DEMO / "base", help="of a short run")
    parser.add_argument("--data", default=DEMO / "tasks" / "family", help="of a short run")
    parser.add_argument("--output", type=Path, default=Path("runs/publish"), help="of a short run")
    parser.add_argument("--max-steps", type=int, default=64, help="of a short run")
    main(parser.parse_args())
