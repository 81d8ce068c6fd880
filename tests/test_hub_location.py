"""`hf://owner/repo[@revision][/file]`: read, written, told from local paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.errors import ConfigError
from deltakit.hub.locate import label_of, named_after
from deltakit.hub.location import Location, is_location

NAMES = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_]|[.-](?=[A-Za-z0-9_])){0,9}", fullmatch=True)
OWNERS = NAMES.filter(lambda name: name not in ("datasets", "spaces", "buckets"))
REVISIONS = st.one_of(
    st.just("main"),
    st.from_regex(r"[0-9a-f]{40}", fullmatch=True),
    st.from_regex(r"refs/pr/[1-9][0-9]?", fullmatch=True),
    st.from_regex(r"[a-zäß%@#+,;=]([a-zäß%@#+,;=.-][a-z]){0,4}(/[a-z]{1,5})?", fullmatch=True),
)
PARTS = st.from_regex(r"[\w %@#+=-][\w .%@#+=-]{0,9}", fullmatch=True)
PATHS = st.lists(PARTS, max_size=3).map("/".join)


@given(OWNERS, NAMES, st.none() | REVISIONS, PATHS)
def test_what_is_written_is_read_again(
    owner: str, name: str, revision: str | None, path: str
) -> None:
    location = Location(f"{owner}/{name}", revision, path)
    assert Location.parse(str(location)) == location
    assert Location.parse(Path(str(location))) == location  # though pathlib eats a slash
    assert is_location(str(location))
    assert is_location(Path(str(location)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://org/d", Location("org/d")),
        ("hf://org/d/", Location("org/d")),
        ("hf://org/d.v1@v1.0", Location("org/d.v1", "v1.0")),
        ("hf://org/d@feature%2Fx/sub/a.sdelta", Location("org/d", "feature/x", "sub/a.sdelta")),
        ("hf://org/d@refs%2Fpr%2F1", Location("org/d", "refs/pr/1")),
        ("hf://org/d@refs/pr/1/a.sdelta", Location("org/d", "refs/pr/1", "a.sdelta")),
        ("hf://org/d@refs/pr/1", Location("org/d", "refs/pr/1")),
        ("hf://org/d/a@b.sdelta", Location("org/d", None, "a@b.sdelta")),
        ("hf:/org/d", Location("org/d")),
    ],
)
def test_locations(text: str, expected: Location) -> None:
    assert Location.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hf://org", "no repository of the Hub; expected hf://owner/repo"),
        ("hf://", "no repository of the Hub"),
        ("hf:///org/d", "no repository of the Hub"),
        ("hf://org/-d", "no repository of the Hub"),
        ("hf://org/a--b", "no repository of the Hub"),
        ("hf://org/d@", "no branch, tag or commit after @"),
        ("hf://org/d@/a.sdelta", "no branch, tag or commit after @"),
        ("hf://org/d@..%2F..%2Fx", "no branch, tag or commit after @"),
        ("hf://org/d@a%0Ab", "no branch, tag or commit after @"),
        ("hf://org/d/../x", "no path of a file after the repository"),
        ("hf://org/d/a//b", "no path of a file after the repository"),
        ("hf://org/d/a\\b", "is no path in a repository"),
        ("hf://datasets/org/d", "stand in model repositories, not datasets"),
    ],
)
def test_what_is_none_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        Location.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a.sdelta", "./hf", "org/base", "/hf:/x", "https://x/y", 3, None])
def test_local_paths_are_no_locations(path: object) -> None:
    assert not is_location(path)


@pytest.mark.parametrize(
    ("given", "suffix", "name"),
    [
        ("hf://org/news", ".sdelta", "news.sdelta"),
        ("hf://org/news.v1@v2", ".sdelta", "news.v1.sdelta"),
        ("hf://org/news/run/best.sdelta", ".sdelta", "best.sdelta"),
        ("hf://org/base", "", "base"),
        ("hf://org/base/model.safetensors", "", "model.safetensors"),
        ("hf://org/base/model.safetensors.index.json", "", "base"),
        ("hf://org/base/sub/model.safetensors.index.json", "", "sub"),
        ("there/a.sdelta", ".sdelta", "there/a.sdelta"),
    ],
)
def test_outputs_are_named_after_the_last_part(given: str, suffix: str, name: str) -> None:
    assert named_after(given, suffix) == Path(name)


def test_labels_say_where_something_is() -> None:
    assert label_of(Path("hf://org/d@v1")) == "hf://org/d@v1"
    assert label_of("./a.sdelta") == "a.sdelta"
