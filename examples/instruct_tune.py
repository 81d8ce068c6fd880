"""Instruction tuning of a causal language model, with the loss on answers only.

    python examples/instruct_tune.py [--model MODEL] [--data DATA] [--budget N] [--output FOLDER]

MODEL is any causal model. DATA has rows of `prompt` and `completion`, whose completions alone are
learnt, or of `messages`, which go through the tokenizer's chat template: where it marks the
assistant's turns ({% generation %}) they alone are learnt, otherwise everything is.

deltakit embeds no causal model, so by default one is made here: the embedded encoder looking
backwards only, with an output layer that knows nothing. It learns to answer two instructions about
a sentence with one word. That is enough to see that answers follow the instruction, and all that so
small a model can do.

Expected: 0 % of the answers right before, 70 % after (guessing gives 21 %), and four answers, such
as "send mail over a socket which part of the library ? -> network".
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import deltakit as dk

DEMO = Path(dk.__file__).parent / "demo_data"  # the embedded model and its data
ASK = {"family": "which part of the library ?", "kind": "what sort of text ?"}


def tiny_causal_model(folder: Path) -> Path:
    """The embedded encoder as a decoder; its output layer is tied to the embeddings."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", is_decoder=True)
    model.save_pretrained(folder)
    words = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))
    words.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def instructions(folder: Path, rows: int) -> Path:
    """Rows of prompt and completion from the two embedded tasks, in turn; an eighth to measure."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("validation", rows // 8)):
        files = [(DEMO / "tasks" / task / f"{split}.jsonl").read_text("utf-8") for task in ASK]
        made = []
        for pair in zip(*(text.splitlines() for text in files), strict=False):
            for ask, line in zip(ASK.values(), pair, strict=True):
                row = json.loads(line)
                text = " ".join(row["text"].split()[:24])
                made.append({"prompt": f"{text} {ask}", "completion": f" {row['label']}"})
        lines = "".join(json.dumps(row) + "\n" for row in made[:count])
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def main(args: argparse.Namespace) -> None:
    model = args.model or tiny_causal_model(args.output / "base")
    data = args.data or instructions(args.output / "data", args.rows)
    task = {"task": "causal-lm", "max_length": args.max_length}
    task |= {"generate_metrics": ["exact_match"], "max_new_tokens": args.max_new_tokens}
    before = dk.evaluate(model, data=data, **task)
    run = dk.train(
        model=model,
        data=data,
        **task,
        budget=args.budget,
        epochs=args.epochs,
        max_steps=args.max_steps,
        batch_size=32,
        eval_strategy="budget",  # at the end alone, as there are no marks
        output_dir=args.output / "run",
        force=True,
    )
    for when, metrics in (("before", before["metrics"]), ("after", run["final"]["metrics"])):
        print(f"{when}: loss {metrics['loss']:.2f}, answers right {metrics['exact_match']:.1%}")

    tokenizer = AutoTokenizer.from_pretrained(model)
    live = AutoModelForCausalLM.from_pretrained(model).eval()
    with dk.applied(live, args.output / "run" / "delta.sdelta"):  # as merged, and back after
        for prompt in args.prompt:
            asked = tokenizer(prompt, return_tensors="pt")
            written = live.generate(**asked, max_new_tokens=args.max_new_tokens, do_sample=False)
            new = written[0, asked["input_ids"].shape[1] :]
            answer = tokenizer.decode(new, skip_special_tokens=True)
            print(f"{prompt} -> {answer.strip()}")


if __name__ == "__main__":
    texts = ("send mail over a socket", "raise an error if the thread is still running")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="causal model: a folder or a Hub id")
    parser.add_argument("--data", help="prompt and completion, or messages")
    parser.add_argument("--output", type=Path, default=Path("runs/instruct"))
    parser.add_argument("--budget", default="50k", help="weights that may change: 50k, 0.1%%")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-steps", type=int, help="instead of epochs")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4000, help="of the data that is made here")
    parser.add_argument(
        "--prompt", nargs="+", default=[f"{t} {a}" for t in texts for a in ASK.values()]
    )
    main(parser.parse_args())
