"""`deltakit pull` of damaged files, over bad networks, onto full disks: nothing half-done is left."""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from attack_factory import forged
from hub_server import HubServer
from pull_lab import OBJECT, ROOT, blobs, family_of, go_elsewhere, here, run

import deltakit as dk
from deltakit.errors import (
    ChecksumError,
    OutputError,
    UnsupportedVersionError,
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


@pytest.mark.parametrize("whole", [False, True])
def test_wrong_bytes_of_the_right_length_leave_nothing(news: HubServer, whole: bool) -> None:
    news.corrupt(OBJECT)
    with pytest.raises(ChecksumError, match="removed from the cache, run the same command again"):
        dk.pull("org/news", family=whole)
    assert (here(), blobs()) == ([], [])
    dk.pull("org/news", family=whole)
    assert here() != []


@pytest.mark.parametrize("use", ["pull", "from_hub"])
def test_a_cache_that_went_bad_is_noticed_and_mended(news: HubServer, use: str) -> None:
    dk.pull("org/news", "a.sdelta")
    (blob,) = blobs()
    data = bytearray(blob.read_bytes())
    data[-9] ^= 1
    blob.write_bytes(data)

    def again() -> object:
        return dk.pull("org/news") if use == "pull" else dk.SparseDelta.from_hub("org/news")

    with pytest.raises(
        ChecksumError, match=r"differ from their digest.*; it was removed from the ca"
    ):
        again()
    assert (here(), blobs()) == (["a.sdelta"], [])
    again()
    assert blobs()[0].read_bytes() == Path("a.sdelta").read_bytes()


def test_what_was_published_damaged_is_told_as_that(
    hub: HubServer, family: dict[str, bytes]
) -> None:
    data = bytearray(family["delta.sdelta"])
    data[-9] ^= 1
    hub.add("org/bad", {"delta.sdelta": bytes(data)})
    message = r"the Hub records these very bytes, so tell the owner of org/bad"
    for call in (dk.pull, dk.SparseDelta.from_hub):
        with pytest.raises(ChecksumError, match=message):
            call("org/bad")
        assert (here(), blobs()) == ([], [])


def test_a_newer_version_is_not_told_as_damage(hub: HubServer) -> None:
    newer = forged("v1-rice", lambda header: header.update(version=99))
    hub.add("org/new", {"delta.sdelta": newer})
    message = r"^hf://org/new@\w+/delta.sdelta: .*version 99 is newer.* upgrade"
    for call in (dk.pull, dk.SparseDelta.from_hub):
        with pytest.raises(UnsupportedVersionError, match=message):
            call("org/new")
    assert (here(), len(blobs())) == ([], 1)


def test_a_dropped_connection_goes_on(news: HubServer, family: dict[str, bytes]) -> None:
    news.drop(OBJECT, after=100)
    dk.pull("org/news")
    assert Path("news.sdelta").read_bytes() == family["delta.sdelta"]


def test_a_hub_that_does_not_come_back_leaves_nothing(news: HubServer) -> None:
    news.shorten(OBJECT, times=9)
    code, _, err = run("pull", "org/news", "--all")
    assert (code, here()) == (1, [])
    assert "the download ended before its last byte; run the same command again" in err


def test_an_interrupted_pull_leaves_nothing(
    news: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second file of a family is copied to its place."""
    copied: list[object] = []
    copy = shutil.copyfile

    def stopped(source: Path, target: Path) -> Path:
        copied.append(source)
        if len(copied) == 2:
            raise KeyboardInterrupt
        return copy(source, target)

    monkeypatch.setattr("deltakit.publishing.pull.shutil.copyfile", stopped)
    code, _, err = run("pull", "org/news", "--all")
    assert (code, err, here()) == (130, "Interrupted.\n", [])


def test_a_full_disk_is_one_line(news: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is seen before; a disk that fills up while it is written to, then."""

    def full(source: Path, target: Path) -> Path:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for message in (
        r"no space left for the download in .*HF_HOME",
        r"news.sdelta needs .* 10 B free",
    ):
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
            with pytest.raises(OutputError, match=message):
                dk.pull("org/news")
        dk.SparseDelta.from_hub("org/news")  # is in the cache from here on
    monkeypatch.setattr("deltakit.publishing.pull.shutil.copyfile", full)
    code, _, err = run("pull", "org/news")
    assert (code, here()) == (1, [])
    assert err == (
        "Error: cannot write news.sdelta: No space left on device; nothing was left behind\n"
    )


def large_delta(entries: int) -> bytes:
    """A file of `entries` entries whose indices do not compress well: 8.3 bytes an entry."""
    random = np.random.default_rng(0)
    indices = np.cumsum(random.integers(1, 2**28, entries))
    tensor = dk.TensorDelta(
        name="w",
        shape=(int(indices[-1]) + 1,),
        dtype="float32",
        mode="add",
        indices=indices,
        values=random.standard_normal(entries).astype(np.float32),
    )
    return encode(dk.SparseDelta(tensors={"w": tensor}))


def written_to(terminal: int) -> str:
    """All that was written to a terminal that is closed on the other side."""
    told = b""
    with suppress(OSError):  # by which a terminal ends
        while part := os.read(terminal, 2**16):
            told += part
    os.close(terminal)
    return told.decode()


def test_a_large_delta_shows_its_progress(hub: HubServer, tmp_path: Path) -> None:
    """On a terminal: a bar with bytes, rate and the time that is left, which -q keeps back."""
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    data = large_delta(3_000_000)
    assert len(data) > 20_000_000
    hub.add("org/large", {"delta.sdelta": data})
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    env.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # commands run in this process may have set it
    told = {}
    for name, more in (("loud", []), ("quiet", ["--quiet"])):
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
        command = [sys.executable, "-m", "deltakit", "pull", "org/large", "-o", f"{name}.sdelta"]
        done = subprocess.run(
            [*command, *more],
            env={**env, "HF_HOME": str(tmp_path / name)},
            stdout=subprocess.PIPE,
            stderr=writer,
            check=False,
        )
        os.close(writer)
        told[name] = written_to(reader)
        assert done.returncode == 0
        assert Path(f"{name}.sdelta").read_bytes() == data
    assert "delta.sdelta" in told["loud"]
    assert re.search(r"100%.* 22\.\dM/22\.\dM \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", told["loud"])
    assert told["quiet"] == ""
