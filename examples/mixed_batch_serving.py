"""One model in memory, rows of one batch for different tasks: `DeltaBank.batched`.

    python examples/mixed_batch_serving.py [--model MODEL] [--data A B] [--deltas A.sdelta B.sdelta]

Two small deltas are trained (or given) and served from one copy of the base. Rows of a batch take
the task that they are asked for, or none. No weight is written meanwhile, so the base's bits stay,
and rows equal what they are alone within rounding; to the bit equal to merged models are rows of a
task that is switched to by `bank.activate`. Heads must have one shape, so both tasks are trained
with as many classes as the larger one needs. MODEL, A and B: see multi_task_stack.py.

Expected: equal answers, differences about 1e-6, and a mixed batch faster than switching row by row.
"""

import argparse
import json
import time
from itertools import cycle
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import deltakit as dk

DEMO = Path(dk.__file__).parent / "demo_data"  # the embedded model and its data


def rows_of(data: str, split: str) -> list[dict[str, str]]:
    lines = (Path(data) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train(args: argparse.Namespace, data: str, classes: int) -> Path:
    run = args.output / Path(data).name
    dk.train(
        model=args.model,
        data=data,
        task="sequence-classification",
        num_labels=classes,
        budget=args.budget,
        max_steps=args.max_steps,
        batch_size=32,
        max_length=48,
        eval_strategy="no",
        output_dir=run,
        force=True,
    )
    return run / "delta.sdelta"


def main(args: argparse.Namespace) -> None:
    classes = max(len({row["label"] for row in rows_of(data, "train")}) for data in args.data)
    deltas = args.deltas or [train(args, data, classes) for data in args.data]
    tasks = [Path(data).name for data in args.data]

    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    before = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    bank = dk.DeltaBank(model, dict(zip(tasks, deltas, strict=True)))

    texts = [row["text"] for row in rows_of(args.data[0], "validation")[: args.rows]]
    wanted = [task for task, _ in zip(cycle(tasks), texts, strict=False)]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    with bank.batched(wanted):  # row i belongs to wanted[i]; None would be the base
        started = time.perf_counter()
        mixed = model(**inputs).logits
        together = time.perf_counter() - started
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    started = time.perf_counter()
    alone = []
    for number, task in enumerate(wanted):
        with bank.using(task), torch.no_grad():  # switches the weights themselves
            row = {name: tensor[number : number + 1] for name, tensor in inputs.items()}
            alone.append(model(**row).logits[0])
    one_by_one = time.perf_counter() - started
    expected = torch.stack(alone)
    assert torch.equal(mixed.argmax(-1), expected.argmax(-1))
    print(f"{len(texts)} rows, answers equal, logits within {(mixed - expected).abs().max():.0e}")
    print(f"mixed batch {together * 1e3:.0f} ms, row by row {one_by_one * 1e3:.0f} ms")

    bank.activate(tasks[0])
    dk.merge(args.model, deltas[0], args.output / "merged", force=True)
    merged = AutoModelForSequenceClassification.from_pretrained(args.output / "merged").eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, merged(**inputs).logits)
    bank.deactivate()
    print(f"{tasks[0]} by bank.activate: the merged model's logits, to the bit")
    names = {t: dk.load(d).config["id2label"] for t, d in zip(tasks, deltas, strict=True)}
    for task, row, text in zip(wanted[:4], mixed, texts, strict=False):
        print(f"{task:8} {names[task][str(int(row.argmax()))]:12} {text[:60]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sets = [DEMO / "tasks" / name for name in ("family", "kind")]
    parser.add_argument("--model", default=DEMO / "base", help="base model: a folder or a Hub id")
    parser.add_argument("--data", nargs="+", default=sets, help="folders of text and label")
    parser.add_argument("--deltas", nargs="+", help="one for each of --data; trained if left out")
    parser.add_argument("--output", type=Path, default=Path("runs/serving"))
    parser.add_argument("--budget", default="20k", help="weights that each task may change")
    parser.add_argument("--max-steps", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64, help="rows of the batch")
    main(parser.parse_args())
