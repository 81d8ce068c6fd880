"""The adapters of peft that deltakit builds, and why it does not build the others.

`fields` are peft's own names for all that shapes the layers, with the defaults of peft 0.21 (alpha
as large as the rank where that is the neutral choice).
"""

from __future__ import annotations

from typing import Any

from deltakit.adapters.kind import Kind

_BOTH = ("Linear", "Conv1D")
_RANK_NAMES = {"rank": "r", "alpha": "alpha", "dropout": "rank_dropout"}
_LORA_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_RANKS: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
_LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "fan_in_fan_out": False,
    **_RANKS,
}
_LYCORIS: dict[str, Any] = {
    "r": 8,
    "alpha": 8,
    "rank_dropout": 0.0,
    "module_dropout": 0.0,
    **_RANKS,
}


def _peft(tuner: str, fields: dict[str, Any], names: dict[str, str], **more: Any) -> Kind:
    return Kind(
        builder="deltakit.adapters.peft_layers", peft=tuner, fields=fields, names=names, **more
    )


# name -> one line, source, kind
PEFT_KINDS: dict[str, tuple[str, str, Kind]] = {
    "lora": (
        "adds the product of two thin matrices to a weight",
        "Hu et al., 2021, arXiv 2106.09685",
        _peft("LORA", _LORA, _LORA_NAMES, folds=True, layers=_BOTH, family="lora"),
    ),
    "dora": (
        "LoRA on a weight's direction, and magnitudes of its own",
        "Liu et al., 2024, arXiv 2402.09353",
        _peft("LORA", _LORA, _LORA_NAMES, fixed={"use_dora": True}, folds=True, layers=_BOTH),
    ),
    "adalora": (
        "LoRA as a singular value decomposition (its own rank schedule is left to strategies)",
        "Zhang et al., 2023, arXiv 2303.10512",
        _peft(
            "ADALORA",
            {"init_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "fan_in_fan_out": False},
            {"rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
            fixed={"total_step": 1},
            folds=True,
            layers=_BOTH,
            family="adalora",
        ),
    ),
    "ia3": (
        "rescales keys, values and feed-forward activations",
        "Liu et al., 2022, arXiv 2205.05638",
        _peft(
            "IA3",
            {"feedforward_modules": None, "fan_in_fan_out": False},
            {},
            folds=True,
            layers=_BOTH,
            target="",
        ),
    ),
    "loha": (
        "adds the Hadamard product of two low-rank matrices",
        "Hyeon-Woo et al., 2021, arXiv 2108.06098",
        _peft("LOHA", _LYCORIS, _RANK_NAMES, folds=True, family="loha"),
    ),
    "lokr": (
        "adds the Kronecker product of two matrices",
        "Yeh et al., 2023, arXiv 2309.14859",
        _peft(
            "LOKR",
            {**_LYCORIS, "decompose_both": False, "decompose_factor": -1},
            _RANK_NAMES,
            folds=True,
            family="lokr",
        ),
    ),
    "hira": (
        "adds the Hadamard product of a weight and a low-rank matrix",
        "Huang et al., 2025 (ICLR)",
        _peft(
            "HIRA",
            {"r": 32, "hira_dropout": 0.0, "fan_in_fan_out": False, "rank_pattern": {}},
            {"rank": "r", "dropout": "hira_dropout"},
            layers=_BOTH,
        ),
    ),
    "gralora": (
        "LoRA in blocks of a weight",
        "Jung et al., 2025, arXiv 2505.20355",
        _peft(
            "GRALORA",
            {
                "r": 32,
                "hybrid_r": 0,
                "alpha": 64,
                "gralora_dropout": 0.0,
                "gralora_k": 2,
                "fan_in_fan_out": False,
            },
            {"rank": "r", "alpha": "alpha", "dropout": "gralora_dropout"},
            layers=_BOTH,
        ),
    ),
    "delora": (
        "LoRA of bounded norm",
        "Bini et al., 2025, arXiv 2503.18225",
        _peft(
            "DELORA",
            {
                "r": 8,
                "delora_lambda": 15,
                "module_dropout": 0.0,
                "rank_pattern": {},
                "lambda_pattern": {},
            },
            {"rank": "r", "dropout": "module_dropout"},
        ),
    ),
    "vera": (
        "vectors that scale random matrices, which all layers share",
        "Kopiczko et al., 2023, arXiv 2310.11454",
        _peft(
            "VERA",
            {"r": 256, "vera_dropout": 0.0, "d_initial": 0.1, "fan_in_fan_out": False},
            {"rank": "r", "dropout": "vera_dropout"},
            fixed={"save_projection": False},
            layers=_BOTH,
        ),
    ),
    "fourierft": (
        "adds a few random frequencies to a weight",
        "Gao et al., 2024, arXiv 2405.03003",
        _peft(
            "FOURIERFT",
            {
                "n_frequency": 1000,
                "scaling": 150.0,
                "n_frequency_pattern": {},
                "fan_in_fan_out": False,
            },
            {"alpha": "scaling"},
            layers=_BOTH,
        ),
    ),
    "oft": (
        "turns a weight's rows by orthogonal blocks",
        "Qiu et al., 2023, arXiv 2306.07280",
        _peft(
            "OFT",
            {
                "oft_block_size": 32,
                "module_dropout": 0.0,
                "coft": False,
                "eps": 6e-5,
                "block_share": False,
                "use_cayley_neumann": True,
                "num_cayley_neumann_terms": 5,
            },
            {"dropout": "module_dropout"},
        ),
    ),
    "boft": (
        "turns a weight by products of sparse orthogonal matrices",
        "Liu et al., 2023, arXiv 2311.06243",
        _peft(
            "BOFT",
            {
                "boft_block_size": 4,
                "boft_block_num": 0,
                "boft_n_butterfly_factor": 1,
                "boft_dropout": 0.0,
            },
            {"dropout": "boft_dropout"},
        ),
    ),
    "hra": (
        "reflects a weight by Householder vectors",
        "Yuan et al., 2024, arXiv 2405.17484",
        _peft("HRA", {"r": 8, "apply_GS": False}, {"rank": "r"}),
    ),
    "miss": (
        "adds one thin matrix, repeated over shards of a weight",
        "Kang and Yin, 2024, arXiv 2409.15371",
        _peft(
            "MISS",
            {"r": 64, "mini_r": 1, "miss_dropout": 0.0},
            {"rank": "r", "dropout": "miss_dropout"},
        ),
    ),
    "road": (
        "turns pairs of outputs",
        "Liao and Monz, 2024, arXiv 2409.00119",
        _peft("ROAD", {"variant": "road_1", "group_size": 64}, {}),
    ),
    "c3a": (
        "adds circular convolutions by blocks",
        "Chen et al., 2024, arXiv 2407.19342",
        _peft("C3A", {"block_size": 256, "block_size_pattern": {}}, {}),
    ),
}

_PROMPTS = "it puts virtual tokens before the input and stands at no weight"
_DRAWS = "it holds frozen random values that only peft itself can draw"
_PLAIN = "it trains the base's own weights; train entries of them by --target"
_WHOLE = "it wraps the model as a whole or layers together, not one module at a time"
_DECOMPOSES = "it starts from decompositions of the weights, whose bits depend on the machine"

# name -> why deltakit does not build it
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("adaption-prompt", "cartridge", "cpt", "multitask-prompt-tuning", "p-tuning"), _PROMPTS
    ),
    **dict.fromkeys(("prefix-tuning", "prompt-tuning"), _PROMPTS),
    **dict.fromkeys(("frod", "pvera", "randlora", "tinylora", "unilora", "waveft"), _DRAWS),
    **dict.fromkeys(("beft", "ln-tuning", "shira", "supertuning", "trainable-tokens"), _PLAIN),
    **dict.fromkeys(("lily", "poly", "shadow", "vblora", "xlora"), _WHOLE),
    **dict.fromkeys(("adamss", "deft", "osf", "psoft"), _DECOMPOSES),
    "rslora": 'it is LoRA with another scaling; use "lora" with use_rslora',
}
