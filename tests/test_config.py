"""Settings: round trips, layers, presets, and refusals that name the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakit.errors import ConfigError, DeltakitError, MissingFileError
from deltakit.selection import METHODS
from deltakit.selection.recipe import make_method
from deltakit.training.config import TrainConfig, describe
from deltakit.training.config_file import read_file, render, resolve
from deltakit.training.presets import PRESETS
from deltakit.training.settings_doc import settings_markdown

NEEDED: dict[str, Any] = {
    "model": "base",
    "data": "rows.jsonl",
    "task": "causal-lm",
    "budget": "100k",
    "output_dir": "run",
}


def test_every_setting_is_described() -> None:
    """Each field has a kind, a group and one line of help."""
    for name, setting in describe().items():
        assert setting.about, name
        assert not setting.about.endswith("."), name
        assert setting.group


def test_saved_settings_are_the_same_settings() -> None:
    """render -> YAML -> resolve gives the configuration back, for every preset."""
    for preset in [*PRESETS, "none"]:
        method = PRESETS.get(preset, {}).get("method", "id3")
        config = resolve({**NEEDED, "method": method, "preset": preset}, {})
        again = resolve(yaml.safe_load(render(config)), {})
        assert again == config
        assert render(again) == render(config)


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=40)
@given(
    model=_TEXT,
    target=st.lists(_TEXT, max_size=3),
    lr=st.floats(min_value=1e-30, max_value=1e9),
    budget=st.one_of(st.integers(0, 2**40), st.sampled_from(["0.1%", "2.5m", "100k"])),
    clipping=st.one_of(st.none(), st.floats(min_value=1e-6, max_value=1e6)),
)
def test_any_values_survive_the_file(
    model: str, target: list[str], lr: float, budget: str | int, clipping: float | None
) -> None:
    """Colons, quotes, line ends, `no`, small numbers: YAML has traps for all of them."""
    given_values = {**NEEDED, "model": model, "target": target, "lr": lr, "budget": budget}
    config = resolve({**given_values, "gradient_clipping": clipping}, {})
    assert resolve(yaml.safe_load(render(config)), {}) == config


def test_flags_win_over_file_and_file_over_preset() -> None:
    """The order of the layers."""
    preset = resolve(NEEDED, {})
    assert preset.preset == "id3-default"
    assert preset.lr == PRESETS["id3-default"]["lr"]
    file = resolve({**NEEDED, "lr": 0.5}, {})
    assert file.lr == 0.5
    assert resolve({**NEEDED, "lr": 0.5}, {"lr": 0.25}).lr == 0.25


def test_everything_by_flags_equals_everything_by_file() -> None:
    """The two ways in are one."""
    assert resolve({}, NEEDED) == resolve(NEEDED, {})


def test_another_preset_by_flag_replaces_the_old_one() -> None:
    """A saved run spells out its preset; --preset must not be drowned by that."""
    saved = resolve({**NEEDED, "batch_size": 4}, {}).as_dict()
    paper = resolve(saved, {"preset": "id3-paper"})
    assert (paper.preset, paper.allocation, paper.age) == ("id3-paper", "global", "shared")
    assert paper.exclude == ()
    assert paper.batch_size == 4


def test_another_method_by_flag_brings_its_own_preset() -> None:
    """What belongs to the old method goes with it."""
    saved = resolve(NEEDED, {}).as_dict()
    mask = resolve(saved, {"method": "random"})
    assert (mask.method, mask.preset, mask.lr) == (
        "random",
        "random-default",
        PRESETS["random-default"]["lr"],
    )
    assert mask.schedule is None
    assert resolve({**NEEDED, "exp": -1.0}, {"method": "random"}).exp is None


def test_no_preset() -> None:
    """`none` leaves the method as the library has it."""
    config = resolve(NEEDED, {"preset": "none"})
    assert (config.preset, config.schedule, config.exclude) == ("none", None, ())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    """Every preset makes a configuration, and its method can be built from it."""
    config = resolve({**NEEDED, "method": PRESETS[name]["method"], "preset": name}, {})
    mask = Path(__file__).with_name("golden") / "v1-base-values.sdelta"
    own = {"mask": mask} if config.method == "mask" else {}
    assert make_method(config.method, 10, {**config.method_settings(), **own}).budget == 10


def test_every_method_has_defaults() -> None:
    """`deltakit train --method X` finds `X-default`, which is for X."""
    for method in METHODS.names():
        assert resolve({**NEEDED, "method": method}, {}).preset == f"{method}-default"


def test_presets_of_the_papers() -> None:
    """As the authors state them."""
    found = {n: (PRESETS[n]["exp"], PRESETS[n]["eps"]) for n in PRESETS if "id3-paper-" in n}
    assert found["id3-paper-nlu"] == (2.0, 1.0)
    assert found["id3-paper-best"] == (-1.0, 0.5)
    mask = resolve({**NEEDED, "preset": "random-paper", "method": "random"}, {})
    assert (mask.target, mask.exclude) == (("attention-qv",), ())
    assert (mask.scheduler, mask.warmup, mask.lr) == ("constant", 0.0, 1e-2)


def test_numbers_as_yaml_reads_them() -> None:
    """YAML 1.1 reads 1e-3 as text."""
    content = yaml.safe_load("lr: 1e-3\nepochs: 2\nbudget: 5000\nbatch_size: '8'")
    assert content["lr"] == "1e-3"
    config = resolve({**NEEDED, **content}, {})
    assert (config.lr, config.epochs, config.budget, config.batch_size) == (1e-3, 2.0, 5000, 8)


def test_lists_in_every_form() -> None:
    """A list, one value, values with commas where those are numbers, and none at all."""
    marks = resolve({**NEEDED, "checkpoint_budgets": "25k,50k"}, {})
    assert marks.checkpoint_budgets == ("25k", "50k")
    assert marks.budgets(10**6) == (100_000, [25_000, 50_000])
    assert resolve({**NEEDED, "target": "*.weight"}, {}).target == ("*.weight",)
    assert resolve({**NEEDED, "target": ["a,b", "c"]}, {}).target == ("a,b", "c")
    assert resolve({**NEEDED, "exclude": ""}, {}).exclude == ()


def test_shares_are_of_the_base() -> None:
    """0.1% of 22.6 million weights, rounded down; marks are sorted and counted once."""
    config = resolve({**NEEDED, "budget": "0.1%", "checkpoint_budgets": "0.05%,100,100"}, {})
    assert config.budgets(22_565_376) == (22_565, [100, 11_282])


def test_marks_above_the_budget_are_refused() -> None:
    """Said with both numbers."""
    config = resolve({**NEEDED, "checkpoint_budgets": "50k,200k"}, {})
    with pytest.raises(ConfigError, match=r"\[50000, 200000\] must lie between 1 and the budget"):
        config.budgets(10**7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "unknown setting 'learning_rate'"),
        ({"bugdet": 1}, "unknown setting 'bugdet'; nearest: budget"),
        ({"head_lr": "auto"}, "setting head_lr: expected a number; found 'auto'"),
        ({"optimizer": "adamax2"}, "setting optimizer: expected one of adamw, adamw8bit, "),
        ({"optimizer_options": "momentum"}, "setting optimizer_options: expected name=value"),
        ({"lr": 0}, "setting lr: expected more than 0; found 0"),
        ({"lr": "fast"}, "setting lr: expected a number; found 'fast'"),
        ({"lr": float("nan")}, "setting lr: expected a number"),
        ({"batch_size": 2.5}, "setting batch_size: expected a whole number; found 2.5"),
        ({"batch_size": True}, "setting batch_size: expected a whole number; found True"),
        ({"batch_size": 0}, "setting batch_size: expected at least 1; found 0"),
        ({"task": "causal"}, "setting task: expected one of .*; nearest: causal-lm"),
        ({"dtype": "bf16"}, "setting dtype: expected one of auto, float32, bfloat16"),
        ({"budget": "many"}, "budget 'many' is no number"),
        ({"budget": [1]}, "setting budget: expected a number of entries such as 100k"),
        ({"model": ""}, "setting model is missing; give --model"),
        ({"text_column": ""}, "setting text_column: expected text; found ''"),
        ({"unmask_fraction": 1.5}, "setting unmask_fraction: expected at most 1; found 1.5"),
        ({"eval_strategy": "steps"}, "eval_strategy steps needs eval_steps"),
        ({"warmup": 10, "scheduler": "constant"}, "no warm-up; use constant_with_warmup"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "needs evaluation"),
        ({"method": "random", "exp": 1}, "setting exp does not apply to method random"),
        ({"preset": "id3-papr"}, "unknown preset 'id3-papr'; nearest: id3-paper"),
        ({"preset": "id3-paper", "method": "random"}, "preset id3-paper is for method id3, but"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    """One line that names the setting, what was expected and what was found."""
    with pytest.raises(DeltakitError, match=message) as caught:
        resolve({}, {**NEEDED, **values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model", "data", "task", "budget", "output_dir"])
def test_what_must_be_given(name: str) -> None:
    """Named with its flag."""
    rest = {key: value for key, value in NEEDED.items() if key != name}
    with pytest.raises(ConfigError, match=f"setting {name} is missing; give --{name[:6]}"):
        resolve(rest, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: [1", "config.yaml line 2: "),
        ("- lr", "expected settings as `name: value`"),
        ("seeed: 1", "config.yaml: unknown setting 'seeed'; nearest: seed"),
        ("1: 2", "config.yaml: unknown setting 1"),
    ],
)
def test_unreadable_file(content: str, message: str, tmp_path: Path) -> None:
    """Told with the file and, where YAML itself is broken, the line."""
    path = tmp_path / "config.yaml"
    path.write_text(f"{content}\n")
    with pytest.raises(ConfigError, match=message):
        read_file(path)


def test_missing_file(tmp_path: Path) -> None:
    """A typed error as well."""
    with pytest.raises(MissingFileError, match=r"cannot read configuration .*: No such file"):
        read_file(tmp_path / "gone.yaml")


def test_empty_file(tmp_path: Path) -> None:
    """Everything may come from flags."""
    (tmp_path / "config.yaml").write_text("# nothing\n")
    assert read_file(tmp_path / "config.yaml") == {}


def test_python_sees_the_same_checks() -> None:
    """The dataclass itself refuses."""
    with pytest.raises(ConfigError, match="setting seed: expected at least 0; found -1"):
        TrainConfig(**NEEDED, seed=-1)


def test_page_of_the_settings_is_up_to_date() -> None:
    """docs/settings.md is what the declarations say."""
    page = Path(__file__).parents[1] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_markdown(), (
        "run: python -m deltakit.training.settings_doc > docs/settings.md"
    )
