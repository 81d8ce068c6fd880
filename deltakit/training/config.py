"""The settings of a training run: every one declared, documented and checked once.

Flags, help, the saved config.yaml and the checks are all made from the declarations in
`config_run` and `config_method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from typing import Any

from deltakit.budget import parse_budget
from deltakit.errors import ConfigError, nearest
from deltakit.quantized.scheme import Quantization
from deltakit.training.config_method import METHOD_SETTINGS, AdapterSettings, MethodSettings
from deltakit.training.config_run import (
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
)
from deltakit.training.settings import AUTO, Setting, parse_option, parse_setting

REQUIRED = ("model", "data", "task", "budget", "output_dir")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunSettings,  # dataclasses take the fields of their last base first
    EvaluationSettings,
    OptimizationSettings,
    AdapterSettings,
    MethodSettings,
    DataSettings,
    ModelSettings,
):
    """All settings of one run; each field's help is in its metadata (`describe`).

    Raises ConfigError naming the setting, what was expected and what was found.
    """

    def __post_init__(self) -> None:
        described = describe()
        for name in REQUIRED:
            if getattr(self, name) == "":
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"setting {name} is missing; give {flag} or name it in the file")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                checked = parse_setting(field.name, described[field.name], value)
                object.__setattr__(self, field.name, checked)
        self._check_together()

    def _check_together(self) -> None:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise ConfigError("eval_strategy steps needs eval_steps")
        if self.warmup and self.scheduler == "constant":
            raise ConfigError("scheduler constant has no warm-up; use constant_with_warmup")
        if self.early_stopping_patience and self.eval_strategy == "no":
            raise ConfigError("early_stopping_patience needs evaluation; eval_strategy is no")
        if self.adapter is None:
            for name in ("rank", "adapter_options", "adapter_seed"):
                if getattr(self, name):
                    raise ConfigError(f"setting {name} needs an adapter; give --adapter")
        if self.loftq and (self.adapter != "lora" or self.quantize is None):
            raise ConfigError(
                "loftq starts lora at a quantised base; give --adapter lora and --quantize"
            )
        if self.quantization is not None and self.hessian:
            raise ConfigError("hessian is measured on full-precision weights; leave out --quantize")
        if self.sharding != "none":
            self._check_sharding()
        accepted = self._accepted()
        with_ = f" with heuristic {self.heuristic}" if "heuristic" in accepted else ""
        for name in METHOD_SETTINGS:
            if getattr(self, name) is not None and name not in accepted:
                raise ConfigError(
                    f"setting {name} does not apply to method {self.method}"
                    f"{with_ if self.heuristic else ''}; docs/settings.md says which settings do"
                )

    def _check_sharding(self) -> None:
        """Raise ConfigError for what needs a whole model in one process."""
        unfit = {"adapter": self.adapter, "quantize": self.quantize, "hessian": self.hessian}
        unfit["lr"] = self.lr == AUTO
        for name, given in unfit.items():
            if given:
                raise ConfigError(
                    f"sharding {self.sharding} splits the model among processes, and {name} "
                    f"{getattr(self, name)} needs it whole; leave one of them out"
                )

    @property
    def quantization(self) -> Quantization | None:
        """How the base is quantised, if it is."""
        return Quantization.of(
            self.quantize, double=self.double_quantization, compute_dtype=self.compute_dtype
        )

    def method_settings(self) -> dict[str, Any]:
        """The settings that make the method, unset ones as None; the seed included."""
        made = {name: getattr(self, name) for name in self._accepted()}
        mask_seed = made.pop("mask_seed", None)
        return made if mask_seed is None else {**made, "seed": mask_seed}

    def _accepted(self) -> list[str]:
        """The settings that the method takes, where a seed of its own may stand for the run's."""
        from deltakit.selection.recipe import settings_of

        taken = settings_of(self.method, self.heuristic)
        names = [name for name in (*METHOD_SETTINGS, "seed") if name in taken]
        return [*names, "mask_seed"] if "seed" in names else names

    def adapter_settings(self) -> dict[str, Any]:
        """The options that make the adapter, unset ones left out."""
        given = dict(parse_option(each) for each in self.adapter_options)
        return given if self.rank is None else {**given, "rank": self.rank}

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain YAML values, in order of declaration."""
        values = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def budgets(self, total_weights: int) -> tuple[int, list[int]]:
        """The resolved budget and its marks, rising; ConfigError for a mark above the budget.

        total_weights: what a share is one of: the base's, with an adapter the adapter's.
        """
        whole_budget = parse_budget(self.budget, total_weights)
        marks = sorted({parse_budget(mark, total_weights) for mark in self.checkpoint_budgets})
        if marks and not 0 < marks[0] <= marks[-1] <= whole_budget:
            raise ConfigError(
                f"checkpoint_budgets {marks} must lie between 1 and the budget {whole_budget}"
            )
        return whole_budget, marks


def describe() -> dict[str, Setting]:
    """Every setting's description, in order of declaration."""
    return {field.name: _described(field) for field in fields(TrainConfig)}


def _described(field: Field[Any]) -> Setting:
    described: Setting = field.metadata["setting"]
    return described


def check_names(given: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a name that is no setting, with the nearest that are."""
    known = list(describe())
    for name in given:
        if name not in known:
            hint = nearest(str(name), known) or "; see deltakit train --help"
            raise ConfigError(f"{where}: unknown setting {name!r}{hint}")
