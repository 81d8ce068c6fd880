"""Publishing: one commit with everything, of checked files, that tells nothing it should not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from push_lab import TOKEN, commits, files, log_in, repository, run, write_model, write_run

import deltakit as dk
from deltakit.errors import ChecksumError, ConfigError, FormatError, MissingFileError
from deltakit.publishing.travelling import fit_to_travel

# The client uploads with an argument that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def writer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub with the user "org" logged in."""
    return log_in(hub, monkeypatch)


@pytest.fixture
def finished(tmp_path: Path, delta_file: Path) -> Path:
    """The folder of a finished run."""
    return write_run(tmp_path / "secret-project" / "run", delta_file)


def test_a_run_is_one_commit(writer: HubServer, finished: Path) -> None:
    code, out, err = run(finished, "org/news")
    assert (code, err) == (0, "")
    deltas = ["best.sdelta", "budget-40.sdelta", "delta.sdelta"]
    names = ["README.md", *deltas, "config.yaml", "metrics.json"]
    there = files(writer)
    assert sorted(there) == sorted(names)
    assert commits(writer) == 1
    for name in deltas:
        assert there[name] == (finished / name).read_bytes()
    head = repository(writer, "org/news").refs["main"]
    assert f"org/news@{head[:12]}: 6 files" in out
    assert f"published to {writer.url}/org/news" in out
    assert dk.load("hf://org/news").nnz == 110


def test_nothing_new_is_no_commit(writer: HubServer, finished: Path) -> None:
    first = dk.push(finished, "org/news")
    again = dk.push(finished, "org/news")
    assert (first.changed, first.created) == (True, True)
    assert (again.changed, again.created, again.commit) == (False, False, first.commit)
    assert {file.status for file in again.files} == {"unchanged"}
    assert commits(writer) == 1
    assert "unchanged, so no commit was made" in run(finished, "org/news")[1]


def test_only_what_changed_is_sent(writer: HubServer, finished: Path) -> None:
    dk.push(finished, "org/news")
    small = finished / "budget-40.sdelta"
    dk.save(dk.truncate(dk.load(small), 30), small)
    sent = len(writer.calls("PUT /object/"))
    report = dk.push(finished, "org/news")
    assert len(writer.calls("PUT /object/")) == sent + 1
    status = {file.name: file.status for file in report.files}
    assert status["budget-40.sdelta"] == "changed"
    assert status["delta.sdelta"] == "unchanged"
    assert commits(writer) == 2


def test_records_tell_no_folders_and_no_tokens(writer: HubServer, finished: Path) -> None:
    dk.push(finished, "org/news")
    there = files(writer)
    metrics, settings = json.loads(there["metrics.json"]), yaml.safe_load(there["config.yaml"])
    assert metrics["final"]["path"] == "delta.sdelta"
    assert metrics["marks"][0]["path"] == "budget-40.sdelta"
    assert metrics["model"] == settings["model"] == "base.safetensors"
    assert metrics["data"] == settings["data"] == "news.jsonl"
    assert settings["output_dir"] == "run"
    assert metrics["log"] == "read with ***"
    assert metrics["final"]["metrics"] == {"accuracy": 0.75}
    for content in there.values():
        for secret in ("secret-project", "/home/me", TOKEN, "tmp"):
            assert secret.encode() not in content


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model", "hf://org/base@v1/sub", "hf://org/base@v1/sub"),
        ("model", "org/base", "org/base"),
        ("model", "a/b/base", "base"),
        ("model", r"C:\Users\me\base", "base"),
        ("data", "~/me/x.jsonl", "x.jsonl"),
        ("data", "../x.jsonl", "x.jsonl"),
        ("data", "https://me:password@host/x", "https://host/x"),
        ("avoid", ["runs/a.sdelta", "hf://org/b"], ["a.sdelta", "hf://org/b"]),
        ("target", [r"encoder\.layer\.\d+", r"\.weight"], [r"encoder\.layer\.\d+", r"\.weight"]),
        ("output_dir", "runs/news/", "news"),
        ("note", {"path": "/a/b"}, {"path": "b"}),
        ("note", "api_org_0123456789abcdefghij", "***"),
        ("seed", 3, 3),
        ("note", "either/or", "either/or"),
    ],
)
def test_what_is_fit_to_travel(name: str, value: object, expected: object) -> None:
    assert fit_to_travel({name: value}) == {name: expected}


def test_files_keep_their_names_and_join_a_family(
    writer: HubServer, delta_file: Path, tmp_path: Path
) -> None:
    """What was there before stays, and the card tells of all."""
    dk.push(delta_file, "org/news")
    small, tiny = tmp_path / "budget-9.sdelta", tmp_path / "budget-30.sdelta"
    for path, entries in ((small, 9), (tiny, 30)):
        dk.save(dk.truncate(dk.load(delta_file), entries), path)
    report = dk.push([tiny, small], "hf://org/news")
    assert [file.name for file in report.files] == [small.name, tiny.name, "README.md"]
    assert report.notes == ("delta.sdelta was there before and stays as it is",)
    there = files(writer)
    assert there["delta.sdelta"] == delta_file.read_bytes()
    for name in ("delta.sdelta", small.name, tiny.name):
        assert name in there["README.md"].decode() or name == "delta.sdelta"
    assert commits(writer) == 2


def test_metrics_that_are_there_serve_the_card_while_they_fit(
    writer: HubServer, finished: Path, tmp_path: Path
) -> None:
    dk.push(finished, "org/news")
    other = tmp_path / "other.sdelta"
    dk.save(dk.truncate(dk.load(finished / "delta.sdelta"), 20), other)
    dk.push(other, "org/news")
    assert "0.75" in files(writer)["README.md"].decode()
    replaced = tmp_path / "delta.sdelta"
    dk.save(dk.truncate(dk.load(finished / "delta.sdelta"), 20), replaced)
    report = dk.push(replaced, "org/news")
    assert "metrics.json there is of an earlier push" in report.notes[-1]
    assert "0.75" not in files(writer)["README.md"].decode()


def test_several_deltas_without_a_main_one_are_noted(
    writer: HubServer, delta_file: Path, tmp_path: Path
) -> None:
    for name in ("a.sdelta", "b.sdelta"):
        (tmp_path / name).write_bytes(delta_file.read_bytes())
    code, _, err = run(tmp_path / "a.sdelta", tmp_path / "b.sdelta", "org/news")
    assert code == 0
    assert "name one when you use it, such as hf://org/news/a.sdelta" in err


def test_what_a_person_wrote_stays(writer: HubServer, delta_file: Path, finished: Path) -> None:
    dk.push(delta_file, "org/news")
    card = files(writer)["README.md"].decode()
    writer.add("org/news", {"README.md": f"{card}\nOur own words.\n".encode()})
    dk.push(finished, "org/news")
    assert files(writer)["README.md"].decode().count("Our own words.") == 1


def test_a_delta_in_memory(writer: HubServer, delta_file: Path) -> None:
    delta = dk.load(delta_file)
    report = delta.push_to_hub("org/news", message="Straight from memory", tag="v1")
    assert dk.load("hf://org/news@v1").equals(delta)
    assert report.tag == "v1"
    assert {file.name for file in report.files} == {"delta.sdelta", "README.md"}


def test_a_model(writer: HubServer, tmp_path: Path) -> None:
    model = write_model(tmp_path / "merged")
    code, _, err = run(model, "org/merged")
    assert code == 0
    assert err == "Note: not published: LICENSE\n"
    names = ["chat_template.jinja", "config.json", "model.safetensors", "vocab.txt"]
    assert sorted(files(writer, "org/merged")) == names
    assert commits(writer, "org/merged") == 1


def test_a_pushed_model_is_read_by_transformers(
    writer: HubServer, bert: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModel

    dk.push(bert, "org/bert")
    here = AutoModel.from_pretrained(bert)
    there = AutoModel.from_pretrained("org/bert", cache_dir=tmp_path)
    for name, weight in here.state_dict().items():
        assert torch.equal(weight, there.state_dict()[name])


def test_models_and_deltas_do_not_mix(writer: HubServer, delta_file: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "merged")
    dk.push(delta_file, "org/news")
    with pytest.raises(ConfigError, match=r"holds delta\.sdelta, and a model beside it"):
        dk.push(model, "org/news")
    dk.push(model, "org/merged")
    with pytest.raises(ConfigError, match=r"holds model\.safetensors, and deltas beside it"):
        dk.push(delta_file, "org/merged")
    (model / "a.sdelta").write_bytes(delta_file.read_bytes())
    with pytest.raises(ConfigError, match="holds both deltas"):
        dk.push(model, "org/both")


def test_private_and_public(writer: HubServer, delta_file: Path) -> None:
    code, out, _ = run(delta_file, "org/hidden", "--private")
    assert code == 0
    assert "published to private http" in out
    assert repository(writer, "org/hidden").private
    assert not dk.push(delta_file, "org/open").private
    with pytest.raises(ConfigError, match="is public already, and private was asked for"):
        dk.push(delta_file, "org/open", private=True)
    assert dk.push(delta_file, "org/hidden").private


def test_branches(writer: HubServer, delta_file: Path) -> None:
    dk.push(delta_file, "org/news", revision="dev/next")
    assert files(writer) == {}
    assert set(files(writer, revision="dev/next")) == {"delta.sdelta", "README.md"}
    assert dk.push(delta_file, "hf://org/news@dev%2Fnext").changed is False
    with pytest.raises(ConfigError, match="names a revision, and the option revision is main"):
        dk.push(delta_file, "hf://org/news@dev%2Fnext", revision="main")


def test_tags_and_commits_are_no_branches(writer: HubServer, delta_file: Path) -> None:
    commit = dk.push(delta_file, "org/news", tag="v1").commit
    assert repository(writer, "org/news").refs["v1"] == commit
    with pytest.raises(ConfigError, match="tags stay as they are"):
        dk.push(delta_file, "org/news", revision="v1")
    with pytest.raises(ConfigError, match="commits stay as they are"):
        dk.push(delta_file, "org/news", revision=commit)


def test_a_tag_alone(writer: HubServer, delta_file: Path) -> None:
    """Content that is there is named without a new commit, once and again."""
    commit = dk.push(delta_file, "org/news").commit
    for _ in range(2):
        report = dk.push(delta_file, "org/news", tag="v1")
        assert (report.commit, report.changed) == (commit, False)
    assert repository(writer, "org/news").refs["v1"] == commit
    with pytest.raises(ConfigError, match="no branch, tag or commit"):
        dk.push(delta_file, "org/news", tag="a b")


def test_a_dry_run_changes_nothing(
    writer: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(finished, "org/news", "--dry-run", "--private", "--tag", "v1")
    assert code == 0
    assert "delta.sdelta" in out
    assert f"would be published to a new private repository {writer.url}/org/news (main)" in out
    assert writer.repos == {}
    dk.push(finished, "org/news")
    monkeypatch.delenv("HF_TOKEN")
    (finished / "budget-40.sdelta").unlink()
    code, out, _ = run(finished, "org/news", "--dry-run", "--json")
    told = json.loads(out)
    assert (told["dry_run"], told["changed"], told["created"]) == (True, False, False)
    assert told["files"][0]["name"] == "delta.sdelta"
    assert commits(writer) == 1


def test_nothing_is_made_for_what_cannot_be_published(
    writer: HubServer, delta_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a\tb.sdelta").write_bytes(delta_file.read_bytes())
    with pytest.raises(ConfigError, match="is no path in a repository"):
        dk.push(tmp_path / "a\tb.sdelta", "org/new")
    assert writer.repos == {}


def test_json(writer: HubServer, delta_file: Path) -> None:
    code, out, err = run(delta_file, "org/news", "--json", "--message", "First")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["repo"] == "org/news"
    assert told["commit"] == repository(writer, "org/news").refs["main"]
    assert told["files"][0]["bytes"] == delta_file.stat().st_size


def test_a_delta_on_the_hub_is_published_elsewhere(writer: HubServer, delta_file: Path) -> None:
    dk.push(delta_file, "org/news")
    dk.push("hf://org/news", "org/copy")
    assert files(writer, "org/copy")["delta.sdelta"] == delta_file.read_bytes()


def test_a_large_delta_goes_up_in_parts(writer: HubServer, delta_file: Path) -> None:
    writer.chunk = 1000
    dk.push(delta_file, "org/news")
    assert len(writer.calls("PUT /part/")) > 1
    assert dk.load("hf://org/news").equals(dk.load(delta_file))


def test_a_renamed_repository_is_found(writer: HubServer, delta_file: Path) -> None:
    writer.add("org/news", {"a.json": b"{}"})
    writer.renamed["org/olds"] = "org/news"
    report = dk.push(delta_file, "org/olds")
    assert report.repo == "org/news"
    assert report.notes[-1].startswith("org/olds is called org/news now")
    assert set(files(writer)) == {"a.json", "delta.sdelta", "README.md"}
    assert dk.push(delta_file, "org/olds").changed is False


def test_damaged_files_are_never_sent(writer: HubServer, finished: Path, tmp_path: Path) -> None:
    data = bytearray((finished / "budget-40.sdelta").read_bytes())
    data[-1] ^= 1
    (finished / "budget-40.sdelta").write_bytes(data)
    with pytest.raises(ChecksumError):
        dk.push(finished, "org/news")
    (tmp_path / "x.sdelta").write_bytes(b"no delta at all")
    with pytest.raises(FormatError):
        dk.push(tmp_path / "x.sdelta", "org/news")
    assert writer.seen == []


def test_a_delta_with_a_token_in_it_is_not_published(
    writer: HubServer, delta_file: Path, tmp_path: Path
) -> None:
    delta = dk.load(delta_file)
    told = dk.SparseDelta(tensors=delta.tensors, provenance={"command": f"train --token {TOKEN}"})
    dk.save(told, tmp_path / "t.sdelta")
    with pytest.raises(ConfigError, match="an access token seems to stand in its provenance") as e:
        dk.push(tmp_path / "t.sdelta", "org/news")
    assert TOKEN not in str(e.value)


def test_mistakes(writer: HubServer, finished: Path, delta_file: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in run(tmp_path / "none.sdelta", "org/news")[2]
    assert "no repository of the Hub" in run(delta_file, "news")[2]
    code, _, err = run(delta_file, finished)
    assert (code, "is a path here" in err) == (2, True)
    assert run("org/news")[0] == 2
    assert "a whole repository is published to" in run(delta_file, "hf://org/news/a")[2]
    assert "publish a folder by itself" in run(finished, delta_file, "org/news")[2]
    assert "holds nothing to publish" in run(_empty(tmp_path / "empty"), "org/news")[2]
    assert "is called no .sdelta file" in run(finished / "metrics.json", "org/news")[2]
    copy = _empty(tmp_path / "copy") / "delta.sdelta"
    copy.write_bytes(delta_file.read_bytes())
    assert "would both become delta.sdelta" in run(copy, delta_file, "org/news")[2]
    (finished / "metrics.json").unlink()
    assert "so it is not finished" in run(finished, "org/news")[2]
    assert writer.seen == []
    with pytest.raises(MissingFileError, match="the Hub shows no repository org/news"):
        dk.push(delta_file, "org/news", create=False)
    assert writer.repos == {}


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder
