"""Reinforcement learning with weight patches: a trainer publishes them, an actor process follows.

    python examples/rl_weight_patches.py [--model MODEL] [--data DATA] [--steps N]

The policy reads a sentence and names its class; a right answer is rewarded with 1. The actor, a
process of its own, holds the policy in bfloat16, tries several actions per sentence, and sends what
it saw. The trainer holds it in float32, learns by REINFORCE (Williams, 1992) with the mean of a
sentence's rewards as its baseline, and publishes after every step the bits that changed in
bfloat16. `dk.SparseTuner` moves --budget weights and the head alone, so a patch is a fraction of
the model; with another optimizer more bits change, and nothing else is different. A patch names the
step it starts from and the digest of all weights there, so that the actor cannot miss one, repeat
one or take one of another run. MODEL and DATA: see classify.py.

Expected: rewards rise from chance (0.17) to 0.65, a patch is 2 % of the model, and in the end the
actor has the trainer's weights, bit for bit; so has an actor that comes late and takes all patches
joined into one; and a patch out of turn is refused.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import multiprocessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import deltakit as dk

DEMO = Path(dk.__file__).parent / "demo_data"  # the embedded model and its data


def patch(folder: Path, step: int) -> Path:
    return folder / f"patch-{step:05d}.sdelta"


def act(args: argparse.Namespace, inputs: dict, answers: torch.Tensor, seen) -> None:
    """The actor: takes every patch in turn, answers a batch, reports. Ends with its position."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    policy = AutoModelForSequenceClassification.from_pretrained(args.output / "base").eval()
    for step in range(args.steps + 1):
        if step > 0:
            while not patch(args.output, step).exists():  # files appear whole or not at all
                time.sleep(0.01)
            dk.apply(policy, patch(args.output, step))
        if step < args.steps:
            rows = torch.randint(len(answers), (args.batch,))
            with torch.no_grad():
                logits = policy(**{name: tensor[rows] for name, tensor in inputs.items()}).logits
            policies = torch.distributions.Categorical(logits=logits.float())
            actions = policies.sample((args.tries,))  # [tries, batch]
            seen.put((rows.tolist(), actions.tolist(), (actions == answers[rows]).tolist()))
    seen.put(dk.chain_position(policy, verify=True))  # reads all weights once more


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    for old in args.output.glob("patch-*.sdelta"):
        old.unlink()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = (Path(args.data) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    names = sorted({json.loads(line)["label"] for line in lines})
    answers = torch.tensor([names.index(json.loads(line)["label"]) for line in lines])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    options = {"padding": True, "truncation": True, "max_length": 32, "return_tensors": "pt"}
    inputs = dict(tokenizer([json.loads(line)["text"] for line in lines], **options))

    half = {"num_labels": len(names), "dtype": torch.bfloat16}
    base = AutoModelForSequenceClassification.from_pretrained(args.model, **half)
    base.save_pretrained(args.output / "base")  # where all start from
    trained = AutoModelForSequenceClassification.from_pretrained(
        args.output / "base", dtype=torch.float32
    )
    head = [n for n in trained.state_dict() if not n.startswith(trained.base_model_prefix)]
    method = dk.ID3(
        budget=args.budget,
        allocation="proportional",
        precondition="factored",
        unmask_fraction=0.1,
    )
    options = {"exclude": "*embed*", "extras": head, "extras_lr": 5e-3, "total_steps": args.steps}
    tuner = dk.SparseTuner(trained, method, lr=args.lr, **options)

    def served() -> dict[str, torch.Tensor]:
        return {name: tensor.bfloat16() for name, tensor in trained.state_dict().items()}

    context = multiprocessing.get_context("spawn")
    seen = context.Queue()
    actor = context.Process(target=act, args=(args, inputs, answers, seen), daemon=True)
    actor.start()
    stream = dk.PatchStream(served())
    whole, bytes_sent, rewards = sum(t.nbytes for t in served().values()), 0, []
    for step in range(1, args.steps + 1):
        rows, actions, rewarded = (torch.tensor(each) for each in seen.get(timeout=300))
        logits = trained(**{name: tensor[rows] for name, tensor in inputs.items()}).logits
        chosen = torch.distributions.Categorical(logits=logits).log_prob(actions)
        advantage = rewarded.float() - rewarded.float().mean(0)
        (-(chosen * advantage).mean()).backward()
        tuner.step()
        dk.save(stream.step(served()), patch(args.output, step))
        bytes_sent += patch(args.output, step).stat().st_size
        rewards.append(rewarded.float().mean().item())
        if step % (args.steps // 5 or 1) == 0:
            recent = rewards[-(args.steps // 5 or 1) :]
            share = bytes_sent / step / whole
            print(f"step {step}: reward {sum(recent) / len(recent):.2f}, {share:.1%} of the model")
    assert seen.get(timeout=300) == stream.position  # the actor's step and digest of all weights
    actor.join()
    print(f"the actor's weights are the trainer's, bit for bit, at {stream.position}")

    late = AutoModelForSequenceClassification.from_pretrained(args.output / "base")
    patches = [dk.load(patch(args.output, step)) for step in range(1, args.steps + 1)]
    dk.apply(late, dk.compose(patches))
    assert all(torch.equal(late.state_dict()[name], t) for name, t in served().items())
    print("one that comes late has them by one joined patch")
    try:
        dk.apply(late, patches[0])
    except dk.DeltakitError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO / "base", help="base model: a folder or a Hub id")
    parser.add_argument("--data", default=DEMO / "tasks" / "family", help="folder: text and label")
    parser.add_argument("--output", type=Path, default=Path("runs/rl"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64, help="sentences per step")
    parser.add_argument("--tries", type=int, default=16, help="actions per sentence")
    parser.add_argument("--budget", type=int, default=20_000, help="weights that may change")
    parser.add_argument("--lr", type=float, default=1e-2)
    main(parser.parse_args())
