"""`deltakit pull`: the right delta of a repository, whole and sound, or nothing at its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from pull_lab import OBJECT, family_of, go_elsewhere, here, run

import deltakit as dk
from deltakit.errors import (
    BudgetError,
    ConfigError,
    FormatError,
    HubAccessError,
    HubNotFoundError,
    HubUnavailableError,
    MissingFileError,
    OutputExistsError,
)
from deltakit.formats.sdelta import encode


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_elsewhere(tmp_path, monkeypatch)


@pytest.fixture
def family(delta_file: Path) -> dict[str, bytes]:
    return family_of(delta_file)


@pytest.fixture
def news(hub: HubServer, family: dict[str, bytes]) -> HubServer:
    """A Hub with the family as `org/news`."""
    hub.add("org/news", family)
    return hub


@pytest.mark.parametrize("given", ["org/news", "hf://org/news", "hf://org/news@main/delta.sdelta"])
def test_the_usual_delta_byte_for_byte(
    news: HubServer, family: dict[str, bytes], given: str
) -> None:
    code, out, err = run("pull", given)
    name = "delta.sdelta" if given.endswith("delta.sdelta") else "news.sdelta"
    assert (code, err) == (0, "")
    commit = news.repos["model", "org/news"].refs["main"]
    assert out.startswith(f"{name}: 110 entries, ")
    assert f", hf://org/news@{commit[:12]}/delta.sdelta\nmade for org/base; " in out
    assert here() == [name]
    assert Path(name).read_bytes() == family["delta.sdelta"]


def test_as_json(news: HubServer, family: dict[str, bytes]) -> None:
    code, out, err = run("pull", "org/news", "--json", "-o", "mine.sdelta")
    assert (code, err) == (0, "")
    file = {"name": "delta.sdelta", "path": "mine.sdelta", "entries": 110}
    assert json.loads(out) == {
        "repo": "org/news",
        "commit": news.repos["model", "org/news"].refs["main"],
        "output": "mine.sdelta",
        "files": [{**file, "bytes": len(family["delta.sdelta"])}],
        "base_id": "org/base",
        "base_revision": None,
    }


def test_an_output_that_is_a_folder_takes_the_file(news: HubServer) -> None:
    Path("runs").mkdir()
    assert run("pull", "org/news", "-o", "runs")[0] == 0
    assert here() == ["runs", "runs/news.sdelta"]


@pytest.mark.parametrize("budget", ["50", "0.05k", "8%"])
def test_a_budget_picks_the_member_of_so_many_entries(
    news: HubServer, family: dict[str, bytes], budget: str
) -> None:
    """8 % of 620 weights are 49.6 entries, rounded down; nothing has 49."""
    if budget == "8%":
        whole = dk.SparseDelta.from_hub("org/news")
        news.add("org/news", {"odd.sdelta": encode(dk.truncate(whole, 49))})
    report = dk.pull("org/news", budget=budget)
    assert dk.load(report.output).nnz == (49 if budget == "8%" else 50)
    assert report.output == ("news-8%.sdelta" if budget == "8%" else "news-50.sdelta")
    assert dk.SparseDelta.from_hub("org/news", budget=budget).nnz == dk.load(report.output).nnz


def test_a_budget_reads_headers_alone(news: HubServer) -> None:
    """The usual name is looked at first; only the delta that is meant is downloaded whole."""
    assert run("pull", "org/news", "-b", "25")[0] == 0
    asked = [each.range for each in news.seen if each.call.startswith(OBJECT)]
    assert asked == ["bytes=0-65535", None]


def test_a_name_is_not_believed(news: HubServer, family: dict[str, bytes]) -> None:
    """A run that stopped early has fewer entries than its file's name says."""
    renamed = {
        "budget-50.sdelta": family["budget-25.sdelta"],
        "x.sdelta": family["budget-50.sdelta"],
    }
    news.add("org/news", renamed)
    assert [f.name for f in dk.pull("org/news", budget=50).files] == ["x.sdelta"]


def test_the_last_delta_goes_before_the_best(news: HubServer) -> None:
    assert [f.name for f in dk.pull("org/news", budget=110).files] == ["delta.sdelta"]


def test_several_of_one_budget_must_be_named(hub: HubServer, family: dict[str, bytes]) -> None:
    hub.add("org/two", dict.fromkeys(["a.sdelta", "b.sdelta"], family["budget-25.sdelta"]))
    with pytest.raises(
        ConfigError, match=r"holds a.sdelta, b.sdelta; name one, such as hf://org/tw"
    ):
        dk.pull("org/two", budget=25)


def test_a_budget_that_no_member_has(news: HubServer) -> None:
    news.add("org/news", {"broken.sdelta": b"x" * 200})
    code, out, err = run("pull", "org/news", "--budget", "30")
    assert (code, out, here()) == (1, "", [])
    assert err == (
        "Error: hf://org/news has no delta of exactly 30 entries; there: best.sdelta (110), "
        "broken.sdelta (not readable), budget-25.sdelta (25), budget-50.sdelta (50), "
        "delta.sdelta (110); to make one: deltakit truncate hf://org/news/budget-50.sdelta "
        "--budget 30\n"
    )
    assert run("truncate", "hf://org/news/budget-50.sdelta", "--budget", "30")[0] == 0
    with pytest.raises(BudgetError, match=r"exactly 1,000 entries; .*\(110\); none is larger$"):
        dk.pull("org/news", budget=1000)


def test_the_whole_family(news: HubServer, family: dict[str, bytes]) -> None:
    code, out, _ = run("pull", "org/news", "--all")
    assert code == 0
    assert "news/config.yaml: 12 B, hf://org/news@" in out
    assert here() == ["news", *sorted(f"news/{name}" for name in family if name != "README.md")]
    for path in Path("news").iterdir():
        assert path.read_bytes() == family[path.name]


def test_a_family_in_a_folder_of_the_repository(hub: HubServer, family: dict[str, bytes]) -> None:
    hub.add("org/runs", {f"a/{name}": data for name, data in family.items()} | {"b.sdelta": b"x"})
    dk.pull("hf://org/runs/a", "out", family=True)
    assert here() == ["out", *sorted(f"out/{name}" for name in family if name != "README.md")]
    assert dk.pull("hf://org/runs/a", budget=25).output == "a-25.sdelta"


def test_nothing_is_overwritten_unless_forced(news: HubServer) -> None:
    Path("news.sdelta").write_text("mine")
    Path("news").mkdir()
    Path("news/notes.txt").write_text("mine")
    for more in ([], ["--all"]):
        before = len(news.seen)
        code, _, err = run("pull", "org/news", *more)
        assert code == 1
        assert "exists; give another output or --force to replace it" in err
        assert len(news.seen) == before  # nothing is asked for in vain
    assert run("pull", "org/news", "--force")[0] == 0
    assert dk.load("news.sdelta").nnz == 110
    assert run("pull", "org/news", "--all", "--force")[0] == 0
    assert Path("news/notes.txt").read_text() == "mine"
    assert dk.load("news/budget-25.sdelta").nnz == 25
    with pytest.raises(OutputExistsError, match=r"news.sdelta exists and is a file"):
        dk.pull("org/news", "news.sdelta", family=True, force=True)


def test_a_revision(news: HubServer, family: dict[str, bytes]) -> None:
    news.repos["model", "org/news"].tag("v1")
    news.add("org/news", {"delta.sdelta": family["budget-25.sdelta"]})
    assert run("pull", "org/news", "--revision", "v1", "-o", "old.sdelta")[0] == 0
    assert dk.load("old.sdelta").nnz == 110
    assert dk.SparseDelta.from_hub("org/news").nnz == 25
    assert dk.SparseDelta.from_hub("org/news", revision="v1").nnz == 110
    with pytest.raises(ConfigError, match="names a revision, and revision is v2; give one"):
        dk.pull("hf://org/news@v1", revision="v2")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"repo": "news"}, ConfigError, "no repository of the Hub; expected hf://owner/repo"),
        ({"repo": "org/none"}, HubNotFoundError, "no repository org/none; check the name"),
        ({"repo": "org/news", "out": "no/x.sdelta"}, MissingFileError, "folder no does not exist"),
        ({"repo": "org/news", "out": "hf://org/x"}, ConfigError, "a pull writes to a local path"),
        ({"repo": "org/news", "budget": 5, "family": True}, ConfigError, r"or family \(--all\)"),
        (
            {"repo": "hf://org/news/delta.sdelta", "budget": 5},
            ConfigError,
            "names a file, and a bud",
        ),
        ({"repo": "hf://org/news/README.md"}, ConfigError, "is no .sdelta file, and pull gets del"),
        ({"repo": "org/base"}, HubNotFoundError, "org/base has no .sdelta file"),
        ({"repo": "org/base", "family": True}, HubNotFoundError, "org/base has no .sdelta file"),
        (
            {"repo": "hf://org/news/delta.sdelta", "family": True},
            ConfigError,
            "names a file; give its",
        ),
        ({"repo": "org/news", "revision": "../x"}, ConfigError, "no branch, tag or commit after @"),
        ({"repo": "org/news", "budget": "many"}, BudgetError, "is no number; write 100k"),
    ],
)
def test_what_cannot_be_pulled(
    news: HubServer, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    news.add("org/base", {"model.safetensors": b"x"})
    with pytest.raises(error, match=message) as caught:
        dk.pull(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert here() == []


def test_a_file_name_cannot_lead_out_of_the_folder(
    news: HubServer, family: dict[str, bytes]
) -> None:
    news.add("org/news", {"../evil.sdelta": family["delta.sdelta"]})
    with pytest.raises(FormatError, match=r"'../evil.sdelta', which is no plain path"):
        dk.pull("org/news", family=True)
    assert here() == []


def test_private_repositories_need_their_owner(
    news: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    news.repos["model", "org/news"].private = True
    with pytest.raises(HubNotFoundError, match="log in"):
        dk.pull("org/news")
    monkeypatch.setenv("HF_TOKEN", "hf_org")
    dk.pull("org/news")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubAccessError, match=r"\(401\)"):
        dk.pull("org/news", "again.sdelta")
    assert here() == ["news.sdelta"]


def test_the_cache_and_offline_mode(news: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    dk.pull("org/news", "a.sdelta")
    before = len(news.seen)
    dk.pull("org/news", "b.sdelta")
    assert [each.call for each in news.seen[before:]] == ["GET /api/models/org/news"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(news.seen)
    dk.pull("org/news", "c.sdelta")
    assert dk.pull("org/news", "d.sdelta", budget=110).files[0].entries == 110
    with pytest.raises(HubUnavailableError, match=r"offline mode is on .* lacks some file of it"):
        dk.pull("org/news", budget=25)
    with pytest.raises(HubUnavailableError, match=r"lacks it; run once without it"):
        dk.pull("org/other")
    assert len(news.seen) == before
    assert here() == ["a.sdelta", "b.sdelta", "c.sdelta", "d.sdelta"]


def test_what_an_incomplete_cache_gives_is_told(
    news: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dk.pull("org/news", "a.sdelta")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = run("pull", "org/news", "--all", "-o", "all")
    assert code == 0
    assert err == (
        "Note: hf://org/news: only what the cache holds is pulled, perhaps not all of it\n"
    )
    assert here() == ["a.sdelta", "all", "all/delta.sdelta"]
