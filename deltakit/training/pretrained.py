"""Base models, their configurations and processors, by local path or Hub id; one-line errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from deltakit.errors import ConfigError, HubError, MissingFileError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.hub.locate import base_at, description_at
from deltakit.hub.location import Location, is_location
from deltakit.live.coordinates import checkpoint_names
from deltakit.quantized.scheme import Quantization
from deltakit.training.images import ImageScaling
from deltakit.training.readers import first_line
from deltakit.training.task import Head, Problem

_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")  # some old models have no owner
_NO_CODE = {"trust_remote_code": False}  # left open, transformers asks on the terminal


@dataclass(frozen=True, slots=True)
class Located:
    """A base on this machine: its folder, and the Hub id and commit it came from, if any.

    location: of its folder on the Hub at that commit.
    """

    folder: Path
    model_id: str | None = None
    revision: str | None = None
    location: Location | None = None


def locate(model: str, revision: str | None = None) -> Located:
    """The local folder of a model; of a Hub id or location, all but the weights is downloaded.

    model: a folder, "owner/name", or `hf://owner/name[@revision][/folder]`. Raises MissingFileError
    for a path that is no folder, ConfigError for two revisions and HubError for what cannot be had.
    """
    path = Path(model)
    if path.is_dir():
        return Located(path)
    if path.exists() or model.startswith((".", "/", "~")):
        raise MissingFileError(
            f"model {model}: expected a folder with config.json and safetensors files"
        )
    location = _location(model, revision)
    try:
        found = description_at(location)
    except HubError as error:
        if is_location(model):
            raise
        raise type(error)(f"model {model!r} is no local folder, and as a Hub id: {error}") from None
    pinned = replace(location, revision=found.revision)
    return Located(found.path, found.model_id, found.revision, pinned)


def with_weights(located: Located) -> Located:
    """The same model with its weights on this machine, downloaded where they are not."""
    if located.location is not None:
        base_at(located.location)
    return located


def _location(model: str, revision: str | None) -> Location:
    if not is_location(model) and not _ID.fullmatch(model):
        raise MissingFileError(
            f"model {model!r} is neither a local folder nor on the Hub, as owner/name or "
            "hf://owner/name[@revision][/folder]"
        )
    location = Location.parse(model) if is_location(model) else Location(model)
    if None not in (revision, location.revision) and revision != location.revision:
        raise ConfigError(f"model {model} names a revision, and the setting revision is {revision}")
    return replace(location, revision=location.revision or revision)


def load_config(located: Located) -> Any:
    """The model's transformers configuration; MissingFileError when it cannot be read."""
    try:
        return transformers.AutoConfig.from_pretrained(located.folder, **_NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise MissingFileError(f"model {located.folder}: {_why(error)}") from None


def load_processor(located: Located, config: Any, problem: Problem) -> Any:
    """What turns the problem's rows into the model's inputs: a tokenizer or image processor.

    Raises MissingFileError when it cannot be loaded.
    """
    if problem.inputs == "images":
        return load_image_processor(located, config)
    return load_tokenizer(located, words=problem.inputs == "words")


def load_tokenizer(located: Located, *, words: bool = False) -> Any:
    """The model's tokenizer; where it has no padding token, its end token serves as one.

    words: texts come as lists of words. Vocabularies that tell `the` from ` the` then see every
    word as they see it within a text.
    """
    options = {"add_prefix_space": True, **_NO_CODE} if words else _NO_CODE
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(located.folder, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MissingFileError(
            f"model {located.folder}: its tokenizer cannot be loaded: {_why(error)}"
        ) from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(located: Located, config: Any) -> Any:
    """The model's image processor, or `ImageScaling` where its folder describes none."""
    if not (located.folder / "preprocessor_config.json").is_file():
        return ImageScaling.of(config)
    auto: Any = transformers.AutoImageProcessor
    try:
        return auto.from_pretrained(located.folder, **_NO_CODE)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MissingFileError(
            f"model {located.folder}: its image processor cannot be loaded: {_why(error)}"
        ) from None


def head_of(config: Any, task: str) -> Head | None:
    """The classification head that a configuration says the model has, or None.

    task: "sequence-classification" and the like, which names the class of the model.
    """
    ending = "For" + task.title().replace("-", "")
    if not task.endswith("-classification") or not any(
        name.endswith(ending) for name in config.architectures or []
    ):
        return None
    labels = [config.id2label[number] for number in range(config.num_labels)]
    return Head(labels, config.problem_type)


def apply_changes(config: Any, changes: Mapping[str, Any]) -> None:
    """Put changes to config.json ({"id2label": {"0": "no"}, ...}) into a loaded configuration."""
    for name, value in changes.items():
        if name == "id2label":
            config.id2label = {int(number): label for number, label in value.items()}
        elif name != "num_labels":  # follows from id2label
            setattr(config, name, value)


def load_model(
    located: Located,
    config: Any,
    problem: Problem,
    dtype: str,
    quantization: Quantization | None = None,
) -> Any:
    """The model with the problem's head, in evaluation mode; its linear layers quantised if asked.

    config: as from `load_config`, with the problem's changes. A head that the checkpoint lacks is
    drawn from torch's global generator. dtype: torch's name, or "auto" for the checkpoint's.
    """
    auto = getattr(transformers, problem.model_class)
    try:
        model = auto.from_pretrained(located.folder, config=config, dtype=dtype, **_NO_CODE)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model {located.folder}: {_why(error)}") from None
    if quantization is None:
        return model
    from deltakit.quantized.replacing import quantize_model

    names = checkpoint_names(model, Checkpoint(located.folder))
    return quantize_model(model, quantization, new=[n for n, at in names.items() if at is None])


def empty_model(config: Any, problem: Problem, dtype: Any) -> Any:
    """The same model without its weights, in evaluation mode; made under torch's meta device."""
    auto = getattr(transformers, problem.model_class)
    return auto.from_config(config, dtype=dtype, **_NO_CODE).eval()


def _why(error: Exception) -> str:
    """The reason that transformers gives, in one line."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own (trust_remote_code), and deltakit runs no code of models"
    return first_line(error)


def longest_input(processor: Any, config: Any, asked: int) -> int:
    """The most tokens per example that the setting, tokenizer and model all allow."""
    positions = getattr(config, "max_position_embeddings", None) or asked
    return int(min(asked, getattr(processor, "model_max_length", asked), positions))


def needs_padding_token(config: Any, processor: Any, problem: Problem) -> Mapping[str, Any]:
    """The config change by which a decoder's classification head finds the last token.

    Such a head looks for the padding token of its configuration; without one it cannot take
    batches, so the tokenizer's goes there.
    """
    pad = getattr(processor, "pad_token_id", None)
    if problem.config_changes and pad is not None and getattr(config, "pad_token_id", None) is None:
        return {"pad_token_id": pad}
    return {}
