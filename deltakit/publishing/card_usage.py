"""How to use a delta, as commands and Python that work for the very repository they stand in."""

from __future__ import annotations

import json
import re
from shlex import quote

from deltakit.adapters.kinds import KINDS
from deltakit.dtypes import DTYPES
from deltakit.publishing.card_facts import Facts
from deltakit.publishing.markdown import fenced

_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}
_FOLDER = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
SMALLER, STACKED = "smaller.sdelta", "stacked.sdelta"


def usage(facts: Facts) -> str:
    """The section about it, below its heading."""
    about = "The command `deltakit` comes with the distribution `deltakit-sparse`."
    if facts.base_on_hub is None:
        about += f" `{_base(facts)}` stands for your copy of the base."
    blocks = [about, fenced("bash", _commands(facts)), _in_python(facts), _on_a_model(facts)]
    return "\n\n".join(filter(None, blocks))


def _commands(facts: Facts) -> list[str]:
    name = quote(facts.repo_id.rpartition("/")[2])
    delta = quote(facts.location(facts.main))
    base = "" if facts.base_on_hub else f"{_base(facts)} "
    trained = " --dtype trained" if _other_dtypes(facts) else ""
    merge = f"deltakit merge {base}{delta} -o {name}-merged{trained}  # a plain checkpoint"
    return [
        f"deltakit inspect {delta}  # what it holds; downloads its header alone",
        f"deltakit pull {_pulled(facts)} -o {name}.sdelta  # the file, checked",
        *([merge] if _merges(facts) else []),
        *_member(facts),
        *_combining(facts, delta),
    ]


def _merges(facts: Facts) -> bool:
    """Whether its changes are ones of weights: those of some adapters depend on the input."""
    adapter = facts.main.found.header.adapter
    return adapter is None or (adapter.kind in KINDS.names() and KINDS[adapter.kind].folds)


def _member(facts: Facts) -> list[str]:
    """How to get a smaller delta of the family: one that its budget names."""
    for file in facts.files[1:]:
        entries = file.found.entries
        if file.name == f"budget-{entries}.sdelta":
            return [f"deltakit pull {facts.repo_id} --budget {entries}  # another of the files"]
    return []


def _combining(facts: Facts, delta: str) -> list[str]:
    """Truncating, and stacking what is left with the whole: both need the sizes of changes."""
    found = facts.main.found
    half = found.entries // 2
    if not half or not all(DTYPES[t.dtype].compute for t in found.tensors):
        return []
    base = ""
    if any(t.mode == "set" and not t.base_values for t in found.tensors):
        base = f" --base {quote(_base(facts))}"
    truncate = (
        f"deltakit truncate {delta} --budget {half}{base} -o {SMALLER}  # its largest changes"
    )
    if found.header.adapter is not None:
        return [truncate]
    return [
        truncate,
        f"deltakit stack {delta} {SMALLER} --weights 0.5,0.5{base} -o {STACKED}  # or other deltas",
    ]


def _in_python(facts: Facts) -> str:
    return fenced(
        "python",
        [
            "import deltakit as dk",
            "",
            f"delta = dk.load({json.dumps(facts.location(facts.main))})",
            "print(delta.nnz, list(delta.tensors)[:3])",
        ],
    )


def _on_a_model(facts: Facts) -> str:
    """Applying it to a live model; nothing where no class of transformers is known to fit."""
    kind = _CLASSES.get(facts.task or "")
    header = facts.main.found.header
    if kind is None:
        return ""
    base = facts.base_on_hub
    options = [json.dumps(_base(facts) if base is None else base.repo)]
    if base is not None and base.revision is not None:
        options.append(f"revision={json.dumps(base.revision)}")
    if isinstance(header.config.get("num_labels"), int):
        options.append(f"num_labels={header.config['num_labels']}")
    applied = [json.dumps(facts.location(facts.main))]
    if base is not None:  # whose checkpoint cannot be told from the model
        applied.append(f"base={json.dumps(str(base))}")
    trained = {t.trained_dtype for t in facts.main.found.tensors}
    if _other_dtypes(facts) and len(trained) == 1:
        options.append(f"dtype={json.dumps(trained.pop())}")
    return fenced(
        "python",
        [
            "import deltakit as dk",
            f"from transformers import {kind}",
            "",
            f"model = {kind}.from_pretrained({', '.join(options)})",
            f"with dk.applied(model, {', '.join(applied)}):",
            "    ...  # here the model is the tuned one",
            "# and here the base again, bit for bit",
        ],
    )


def _pulled(facts: Facts) -> str:
    usual = facts.main.name == "delta.sdelta"
    return quote(facts.repo_id if usual else facts.location(facts.main))


def _base(facts: Facts) -> str:
    """The base in a command: its location, or a folder called as the delta's maker called it."""
    if facts.base_on_hub is not None:
        return str(facts.base_on_hub)
    base = facts.main.found.header.base
    name = None if base is None else base.model_id
    return name if name is not None and _FOLDER.fullmatch(name) else "base"


def _other_dtypes(facts: Facts) -> bool:
    """Whether it was trained in other dtypes than the base has on disk."""
    return any(t.dtype != t.trained_dtype for t in facts.main.found.tensors)
