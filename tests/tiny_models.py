"""Tiny random base models with tokenizers, and rows of data that they can learn from."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "runs",
    "sleeps",
    "sings",
    "the",
    "a",
    "and",
    "not",
    "very",
    "user:",
    "answer:",
    "yes",
    "no",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}user: {{ m['content'] }} "
    "{% else %}answer: {% generation %}{{ m['content'] }} </s>{% endgeneration %} {% endif %}"
    "{% endfor %}"
)


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, framed as BERT does: [CLS] a [SEP] b [SEP]."""
    tokenizer = _words()
    ids = [(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def decoder_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Words as tokens, with <s> put before every text, and no padding token."""
    tokenizer = _words()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template
    return fast


def target_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, with </s> after every text, as T5 has it."""
    tokenizer = _words()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    )


def _words() -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def write_bert(folder: Path) -> Path:
    """An encoder without a head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder


def write_llama(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A decoder with its own output layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    decoder_tokenizer(template).save_pretrained(folder)
    return folder


def write_gpt2(folder: Path) -> Path:
    """A decoder with transposed layers and a tied output layer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    decoder_tokenizer().save_pretrained(folder)
    return folder


def write_opt(folder: Path) -> Path:
    """A decoder with learnt positions and biases."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        pad_token_id=SPECIAL.index("[PAD]"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    OPTForCausalLM(config).save_pretrained(folder)
    decoder_tokenizer().save_pretrained(folder)
    return folder


def write_t5(folder: Path) -> Path:
    """An encoder and decoder with shared embeddings, which the output layer is tied to."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=SPECIAL.index("[PAD]"),
        eos_token_id=SPECIAL.index("</s>"),
        decoder_start_token_id=SPECIAL.index("[PAD]"),
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    target_tokenizer().save_pretrained(folder)
    return folder


def write_vit(folder: Path, channels: int = 1) -> Path:
    """An image encoder for 8 by 8 pixels, without a head or a preprocessor_config.json."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=channels,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    ViTModel(config).save_pretrained(folder)
    return folder


def write_resnet(folder: Path) -> Path:
    """A convolutional image encoder with BatchNorm, for 8 by 8 pixels of 3 channels."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=8
    )
    ResNetModel(config).save_pretrained(folder)
    return folder


def colour_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences labelled by the colour in them."""
    choice = random.Random(seed).choice
    rows = []
    for _ in range(count):
        colour = choice(["red", "green", "blue"])
        words = ["the", choice(["very", "not", "a"]), colour, choice(["cat", "dog", "bird"])]
        words += [choice(["runs", "sleeps", "sings"])] * choice([1, 2, 3])
        rows.append({"text": " ".join(words), "label": colour})
    return rows


def tagged_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences whose animals, with the colour before them, are entities in IOB2 tags."""
    rows = []
    for row in colour_rows(count, seed):
        words = row["text"].split()
        kinds = [{"cat": "PET", "dog": "PET", "bird": "WILD"}.get(word) for word in words]
        tags = ["O"] * len(words)
        for at, kind in enumerate(kinds):
            if kind:
                tags[at - 1 : at + 1] = [f"B-{kind}", f"I-{kind}"]
        rows.append({"tokens": words, "tags": tags})
    return rows


def bright_images(count: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [count, 8, 8] with one bright quarter, and labels [count]: which one it is."""
    random_state = np.random.default_rng(seed)
    images = random_state.integers(0, 60, (count, 8, 8), np.uint8)
    labels = random_state.integers(0, 4, count)
    for image, label in zip(images, labels, strict=True):
        top, left = 4 * (label // 2), 4 * (label % 2)
        image[top : top + 4, left : left + 4] += 150
    return images, labels


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
