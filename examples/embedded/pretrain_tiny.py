"""Pretrain the small BERT that `deltakit demo` uses, on text of Python's standard library.

    OMP_NUM_THREADS=1 python examples/embedded/pretrain_tiny.py --output deltakit/demo_data/base

Masked-language modelling as in BERT (Devlin et al., 2019) over paragraphs of docstrings, comments
and help topics. One paragraph in eight, chosen by hash, is never seen: those give the held-out
loss printed here, and the validation texts of the demo tasks are drawn from them. Needs torch,
transformers and tokenizers; about 16 minutes on one core. The same machine, Python and number of
threads give the same bytes.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from stdlib_text import Text, held_out, library
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

SEED = 0
VOCABULARY = 4096  # word pieces
WIDTH = 160
LENGTH = 64  # tokens of a chunk, markers included
BATCH = 16  # chunks a step
MASKED = 0.2  # share of the tokens to predict
PEAK_RATE = 1.5e-3  # AdamW; linear warm-up, then linear decay to zero
WARM_UP = 0.08  # share of the steps
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, CLS, SEP, MASK = 0, 2, 3, 4


def train_tokenizer(texts: list[Text]) -> BertTokenizer:
    """Lower-cased WordPiece vocabulary of exactly `VOCABULARY` entries.

    The letters inside words are named up front because the trainer would number them in the
    order of a randomly seeded hash map, and so break ties differently in every run.
    """
    letters = sorted({c for t in texts for c in t.text.lower() if not c.isspace()})
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(
        (t.text for t in texts),
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL + [f"##{c}" for c in letters],
        show_progress=False,
    )
    return BertTokenizer(vocab=trainer.get_vocab(), model_max_length=LENGTH)


def chunks(paragraphs: list[list[int]]) -> list[list[int]]:
    """Pack paragraphs, in order, into "[CLS] a [SEP] b [SEP]" of at most `LENGTH` tokens."""
    packed = [[CLS]]
    for ids in paragraphs:
        for start in range(0, len(ids), LENGTH - 2):
            piece = ids[start : start + LENGTH - 2]
            if len(packed[-1]) + len(piece) + 1 > LENGTH:
                packed.append([CLS])
            packed[-1] += [*piece, SEP]
    return packed


def batches(packed: list[list[int]], rng: random.Random) -> Iterator[Tensor]:
    """One pass over the chunks in random order: int64 [BATCH, L], padded to the longest."""
    order = rng.sample(packed, len(packed))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[start : start + BATCH]
        width = max(map(len, rows))
        yield torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def word_vectors(packed: list[list[int]]) -> Tensor:
    """Factors of the positive pointwise mutual information of neighbours: float32 [V, WIDTH].

    As a start for the embedding (Levy and Goldberg, 2014) it saves the hundreds of steps that
    masked-language modelling takes to find out which words keep company; here it is worth half a
    nat after 400 steps. Neighbours up to 5 tokens apart count 1/distance.
    """
    stream = torch.tensor([token for row in packed for token in row])
    counts = torch.zeros(VOCABULARY * VOCABULARY)
    for apart in range(1, 6):
        cells = stream[:-apart] * VOCABULARY + stream[apart:]
        counts += torch.bincount(cells, minlength=VOCABULARY**2) / apart
    together = counts.view(VOCABULARY, VOCABULARY)
    together = together + together.T
    alone = together.sum(1)
    context = alone**0.75 / (alone**0.75).sum()
    information = (together / (alone[:, None] * context + 1e-9)).clamp_min(1.0).log()
    left, strength, _ = torch.svd_lowrank(information, WIDTH, niter=4)
    vectors: Tensor = normalize(left * strength.sqrt()) * 0.1 * WIDTH**0.5
    return vectors


def loss(model: BertForMaskedLM, tokens: Tensor, draw: torch.Generator) -> Tensor:
    """Mean negative log likelihood, in nats, of a random `MASKED` share of tokens [B, L]."""
    wanted = (torch.rand(tokens.shape, generator=draw) < MASKED) & (tokens > MASK)
    fate = torch.rand(tokens.shape, generator=draw)  # 80 % [MASK], 10 % a random piece, 10 % kept
    noise = torch.randint(len(SPECIAL), VOCABULARY, tokens.shape, generator=draw)
    seen = torch.where(wanted & (fate < 0.8), MASK, tokens)
    seen = torch.where(wanted & (fate >= 0.9), noise, seen)
    hidden = model.bert(input_ids=seen, attention_mask=(tokens != PAD).long()).last_hidden_state
    return cross_entropy(model.cls(hidden[wanted]), tokens[wanted])  # [masked, VOCABULARY]


@torch.no_grad()
def held_out_loss(model: BertForMaskedLM, packed: list[list[int]]) -> float:
    """Mean loss over all chunks of unseen text, with the same masks each time."""
    draw = torch.Generator().manual_seed(SEED)
    values = [loss(model, tokens, draw) for tokens in batches(packed, random.Random(SEED))]
    return float(torch.stack(values).mean())


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, linear decay to zero."""
    warm = WARM_UP * steps
    return PEAK_RATE * min((step + 1) / warm, (steps - step) / (steps - warm))


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the demo's small BERT.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    rng = random.Random(SEED)
    draw = torch.Generator().manual_seed(SEED)

    everything = library()
    texts = [t for t in everything if not held_out(t.text)]
    tokenizer = train_tokenizer(texts)
    train, unseen = (
        chunks(tokenizer([t.text for t in part], add_special_tokens=False)["input_ids"])
        for part in (texts, [t for t in everything if held_out(t.text)])
    )
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=5,
        intermediate_size=576,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,  # five passes over the text do not overfit
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[len(SPECIAL) :] = word_vectors(train)[
            len(SPECIAL) :
        ]
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    steps = args.epochs * (len(train) // BATCH)
    print(f"{len(texts)} paragraphs, {sum(map(len, train))} tokens, {steps} steps", flush=True)

    start = time.time()
    running: list[float] = []
    for epoch in range(args.epochs):
        for i, tokens in enumerate(batches(train, rng)):
            step = epoch * (len(train) // BATCH) + i
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps)
            value = loss(model, tokens, draw)
            torch.autograd.backward(value)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running.append(value.item())
            if (step + 1) % 500 == 0 or step + 1 == steps:
                mean, unseen_loss = sum(running) / len(running), held_out_loss(model, unseen)
                seconds = time.time() - start
                print(
                    f"{step + 1:5d}  {mean:.3f}  unseen {unseen_loss:.3f}  {seconds:.0f} s",
                    flush=True,
                )
                running.clear()
    save(model, tokenizer, args.output)


def save(model: BertForMaskedLM, tokenizer: BertTokenizer, output: Path) -> None:
    """Write the encoder (no vocabulary head) with a pooler, and the tokenizer.

    Masked-language modelling never reaches the pooler, so it is the identity: a classification
    head then starts from tanh of the first token's state rather than from a random mixture.
    """
    encoder = BertModel(model.config)
    pooler = {"pooler.dense.weight": torch.eye(WIDTH), "pooler.dense.bias": torch.zeros(WIDTH)}
    encoder.load_state_dict(model.bert.state_dict() | pooler)
    encoder.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
