"""Text classification inside `transformers.Trainer`: train, save a delta, merge, prove equality.

    python examples/classify.py [--model MODEL] [--data DATA] [--budget N] [--output FOLDER]

`dk.SparseTrainer` is a Trainer that moves an exact number of weights (and the new head). Its delta,
merged into the base, is an ordinary checkpoint with the very logits of the trained model. MODEL is
any encoder or decoder, a folder or a Hub id; DATA any data set with the columns `text` and `label`
and the splits `train` and `validation`. By default the embedded encoder learns which part of
Python's standard library a sentence is about (six classes, so guessing gives 17 %).

Expected: accuracy 77 %, a delta of 133 kB beside a base of 7.4 MB, and "logits are equal".
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments
from transformers import set_seed as set_all_seeds

import deltakit as dk

DEMO = Path(dk.__file__).parent / "demo_data"  # the embedded model and its data


def main(args: argparse.Namespace) -> None:
    set_all_seeds(0)  # the new head is random
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_dataset(str(args.data)).class_encode_column("label")
    names = data["train"].features["label"].names
    short = {"truncation": True, "max_length": 64}
    data = data.map(lambda row: tokenizer(row["text"], **short))
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    trainer = dk.SparseTrainer(
        model,
        TrainingArguments(
            output_dir=str(args.output),
            learning_rate=2e-2,  # sparse training takes far larger rates than dense training
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=32,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        method=dk.ID3(  # what `deltakit train` does by default; dk.ID3(budget=N) is the paper's
            budget=args.budget,
            allocation="proportional",
            precondition="factored",
            unmask_fraction=0.1,
        ),
        exclude="*embed*",
        extras_lr=5e-3,  # of the new head, which is trained whole
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    trainer.train()
    delta = trainer.delta()
    dk.save(delta, args.output / "delta.sdelta")
    accuracy = trainer.evaluate()["eval_accuracy"]
    size = (args.output / "delta.sdelta").stat().st_size
    print(f"{delta.nnz:,} entries, {size:,} bytes, accuracy {accuracy:.3f}")

    dk.merge(args.model, delta, args.output / "merged", force=True)
    merged = AutoModelForSequenceClassification.from_pretrained(args.output / "merged")
    batch = tokenizer(data["validation"]["text"][:8], padding=True, return_tensors="pt", **short)
    with torch.no_grad():
        live, reloaded = (m.eval().cpu()(**batch).logits for m in (model, merged))
    assert torch.equal(live, reloaded)
    guess = merged.config.id2label[int(reloaded[0].argmax())]
    print(f"merged into {args.output / 'merged'}: logits are equal, to the bit")
    print(f"{data['validation']['text'][0]!r} is about {guess}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO / "base", help="base model: a folder or a Hub id")
    parser.add_argument("--data", default=DEMO / "tasks" / "family", help="text and label")
    parser.add_argument("--output", type=Path, default=Path("runs/classify"))
    parser.add_argument("--budget", type=int, default=20_000, help="weights that may change")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1, help="instead of epochs")
    main(parser.parse_args())
