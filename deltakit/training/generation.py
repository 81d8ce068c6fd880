"""Greedy generation in batches, for scoring what a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from deltakit.training.task import Live


@torch.no_grad()
def generate_texts(live: Live, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """What the model writes after each prompt, greedily, without special tokens.

    prompts: token ids. A decoder's prompts are padded on the left, so that all of a batch end where
    writing starts, an encoder's on the right.
    """
    model, tokenizer = live.model, live.processor
    model.eval()
    device = next(model.parameters()).device
    cast = torch.autocast(device.type, torch.bfloat16) if live.mixed_precision else nullcontext()
    encoder = bool(model.config.is_encoder_decoder)
    pad = tokenizer.pad_token_id or 0
    ends = _ends(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    texts: list[str] = []
    for start in range(0, len(prompts), live.batch_size):
        part = prompts[start : start + live.batch_size]
        longest = max(map(len, part))
        tokens = torch.full((len(part), longest), pad)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(part):
            first = 0 if encoder else longest - len(prompt)
            tokens[row, first : first + len(prompt)] = torch.tensor(prompt)
            mask[row, first : first + len(prompt)] = 1
        with cast:
            written = model.generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                eos_token_id=ends or None,
            )
        texts += tokenizer.batch_decode(
            written if encoder else written[:, longest:], skip_special_tokens=True
        )
    return texts


def _ends(of_model: int | list[int] | None, of_tokenizer: int | None) -> list[int]:
    """What the model stops at: its own end tokens, and the one that training puts at the end."""
    ends = of_model if isinstance(of_model, list) else [of_model]
    return sorted({end for end in (*ends, of_tokenizer) if end is not None})
