"""The one folder that appears at once: what is in the way, what a kill leaves, what is foreign."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest

from bake.artifact import Artifact
from bake.artifact.staged import (
    Identity,
    Place,
    digests,
    identity_of,
    partial_of,
    staged,
    write_staged,
)
from bake.checkpoints.source import Stamps
from bake.checkpoints.writer import Finished
from bake.errors import CheckpointError, InputError, UsageError

RECORD = "bake.json"


def write_one(text: str = "new") -> Callable[[Place], Artifact]:
    def write(place: Place) -> Artifact:
        (place.folder / "deep").mkdir()
        (place.folder / "deep" / "a.txt").write_text(text)
        (place.folder / RECORD).write_text("{}")
        return Artifact("lora", place.final, digests(place.folder), 2 + len(text), 0)

    return write


def run(out: Path, text: str = "new", *, force: bool = False, identity: str = "i") -> Artifact:
    return write_staged(out, Identity(identity), force=force, write=write_one(text))


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file and link below a folder, hidden ones too; a link as what it names."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()).encode()
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def whole(text: str = "new") -> dict[str, bytes]:
    return {"out/deep/a.txt": text.encode(), f"out/{RECORD}": b"{}"}


# --- what is in the way --------------------------------------------------------------------------


def appearing(what: str, out: Path) -> None:
    """Put something of somebody else's in the place of the output."""
    if what == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    elif what == "file":
        out.write_text("mine")
    elif what == "link":
        out.with_name("else").mkdir()
        out.symlink_to(out.with_name("else"))
    else:  # an artifact of bake, which another run has made
        out.mkdir()
        (out / RECORD).write_text("theirs")


@pytest.mark.parametrize("what", ["folder", "file", "link", "artifact"])
def test_what_appears_during_the_run_is_left_alone(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"

    def write(place: Place) -> Artifact:
        made = write_one()(place)
        appearing(what, out)
        return made

    with pytest.raises(UsageError, match=r"exists and is|is a link"):
        write_staged(out, Identity("i"), force=False, write=write)
    theirs = tree(tmp_path)
    assert {name.partition("/")[0] for name in theirs} == {"out"}
    assert b"mine" in theirs.values() or what in ("link", "artifact")
    # The control: what is there before is refused alike, and an empty folder is filled.
    with pytest.raises(UsageError, match=r"exists and is|is a link"):
        run(out)
    assert tree(tmp_path) == theirs
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty").files.keys() == {"deep/a.txt", RECORD}


def test_what_appears_at_the_last_moment_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the rename, which itself replaces nothing."""
    out, rename = tmp_path / "out", Path.rename

    def racing(self: Path, target: Path) -> Path:
        if target == out and not out.exists():
            appearing("folder", out)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", racing)
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(out)
    assert tree(tmp_path) == {"out/thesis.txt": b"mine"}


def test_what_appears_while_an_artifact_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the other's folder goes nor what was there before; the error says where it is."""
    out, rename = tmp_path / "out", Path.rename
    run(out, "old")

    def racing(self: Path, target: Path) -> Path:
        found = rename(self, target)
        if target.name == "old":
            appearing("folder", out)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", racing)
        with pytest.raises(UsageError, match="what was there before is in") as error:
            run(out, "newer", force=True)
    aside = partial_of(out) / "old"
    assert str(aside) in str(error.value)
    assert (aside / "deep" / "a.txt").read_text() == "old"
    assert (out / "thesis.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="what was there before is in"):
        run(out, "newer", force=True)
    (out / "thesis.txt").unlink()
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(out, "newer")
    assert (out / "deep" / "a.txt").read_text() == "old"  # it is back
    run(out, "newer", force=True)
    assert tree(tmp_path) == whole("newer")


@pytest.mark.parametrize(
    ("names", "replaced"),
    [
        ([RECORD, "anything.txt"], True),
        (["lora/bake.json", "gguf/bake.json"], True),
        (["lora/bake.json", "notes.txt"], False),
        (["lora/adapter_config.json"], False),
        (["thesis.txt"], False),
        (["config.json", "model.safetensors"], False),
    ],
)
def test_force_replaces_artifacts_and_nothing_else(
    tmp_path: Path, names: list[str], replaced: bool
) -> None:
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(out)
    if not replaced:
        with pytest.raises(UsageError, match="was not written by bake, so it is not replaced"):
            run(out, force=True)
    assert tree(tmp_path) == before
    if replaced:
        run(out, force=True)
        assert tree(tmp_path) == whole()


# --- what is foreign -----------------------------------------------------------------------------


def _journal_link(root: Path, victim: Path) -> None:
    root.mkdir()
    (root / "journal").symlink_to(victim / "x.txt")


def _journal_hard_link(root: Path, victim: Path) -> None:
    root.mkdir()
    os.link(victim / "x.txt", root / "journal")


def _root_link(root: Path, victim: Path) -> None:
    root.symlink_to(victim)


def _inner_link(name: str) -> Callable[[Path, Path], None]:
    def plant(root: Path, victim: Path) -> None:
        root.mkdir()
        (root / "journal").touch()
        (root / name).symlink_to(victim)

    return plant


def _folder_of_somebody(root: Path, victim: Path) -> None:
    (root / "files").mkdir(parents=True)
    (root / "thesis.txt").write_text("mine")


def _journal_of_somebody(root: Path, victim: Path) -> None:
    root.mkdir()
    (root / "journal").write_text("Dear diary,\n")


def _old_without_a_run(root: Path, victim: Path) -> None:
    (root / "old").mkdir(parents=True)
    (root / "old" / "thesis.txt").write_text("mine")
    (root / "journal").touch()


FOREIGN: dict[str, Callable[[Path, Path], None]] = {
    "a journal that is a link": _journal_link,
    "a journal with a second name": _journal_hard_link,
    "a link in the folder's place": _root_link,
    "files/ that is a link": _inner_link("files"),
    "old/ that is a link": _inner_link("old"),
    "scratch/ that is a link": _inner_link("scratch"),
    "a folder of somebody's": _folder_of_somebody,
    "a journal of somebody's": _journal_of_somebody,
    "old/ of no run": _old_without_a_run,
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("force", [True, False])
def test_what_is_not_bakes_is_neither_followed_nor_removed(
    tmp_path: Path, name: str, force: bool
) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.mkdir()
    (victim / "x.txt").write_text("precious")
    FOREIGN[name](partial_of(out), victim)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="is in the way and is not bake's"):
        run(out, force=force)
    assert tree(tmp_path) == before and not out.exists()
    # The control: once it is away, the same run succeeds.
    root = partial_of(out)
    root.unlink() if root.is_symlink() else shutil.rmtree(root)
    run(out, force=force)
    assert (victim / "x.txt").read_text() == "precious"


def test_another_users_folder_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    partial_of(out).mkdir()
    (partial_of(out) / "journal").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
        with pytest.raises(UsageError, match="is in the way and is not bake's"):
            run(out)
    assert (partial_of(out) / "journal").exists()
    run(out)  # the control: it is ours
    assert tree(tmp_path) == whole()


def test_links_among_finished_files_are_not_followed(tmp_path: Path) -> None:
    """A run takes up what an earlier one finished, and a link was never finished by bake."""
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    victim.write_text("precious")
    with pytest.raises(KeyboardInterrupt), staged(out, Identity("i"), force=False) as stage:
        stage.record("shard", Finished(8, "0"))
        raise KeyboardInterrupt
    (partial_of(out) / "files" / "shard").symlink_to(victim)
    (partial_of(out) / "files" / "folder").symlink_to(tmp_path)

    def write(place: Place) -> Artifact:
        assert not any(place.folder.iterdir()) and place.finished("shard") is None
        return write_one()(place)

    write_staged(out, Identity("i"), force=False, write=write)
    assert victim.read_text() == "precious"
    assert not any(path.is_symlink() for path in out.rglob("*"))


# --- what a kill leaves --------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_staged
calls = 0
def fatal(real):
    def call(*args, **options):
        global calls
        calls += 1
        before = calls
        if before == {nth} and {early}:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **options)
        if before == {nth}:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return call
for module, name in ((os, "fsync"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (Path, "rename")):
    setattr(module, name, fatal(getattr(module, name)))
test_staged.run(Path({out!r}), {text!r}, force={force})
print("calls", calls)
"""


def killed(out: Path, nth: int, text: str, *, force: bool, early: bool) -> bool:
    """Run in a process that is killed at one of its calls; return whether it came that far."""
    code = KILLED.format(
        tests=str(Path(__file__).parent),
        nth=nth,
        early=early,
        out=str(out),
        text=text,
        force=force,
    )
    done = programs.run(code)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


FORK = """
import importlib, os, sys
sys.path.insert(0, {tests!r})
import test_staged
from pathlib import Path
for force in (False, True):
    for early in (False, True):
        nth = 1
        while True:
            home = Path({home!r}) / f"{{force}}-{{early}}-{{nth}}"
            home.mkdir()
            out = home / "out"
            if force:
                test_staged.run(out, "old", identity="before")
            child = os.fork()
            if not child:
                code = test_staged.KILLED.format(
                    tests={tests!r}, nth=nth, early=early, out=str(out), text="new", force=force
                )
                exec(code.replace("print(", "(lambda *_: None)("), {{}})
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                break
            nth += 1
print("done")
"""


def test_a_kill_at_any_call_leaves_nothing_that_the_next_run_does_not_mend(tmp_path: Path) -> None:
    code = FORK.format(tests=str(Path(__file__).parent), home=str(tmp_path))
    done = programs.run(code)
    assert done.stdout == "done\n", done.stderr
    homes = sorted(tmp_path.iterdir())
    assert len(homes) > 40
    repaired = 0
    for home in homes:
        out, force = home / "out", home.name.startswith("True")
        found = tree(out) if out.exists() else {}
        states = [{}, *({k.removeprefix("out/"): v for k, v in whole(t).items()} for t in ("new",))]
        if force:
            states.append({k.removeprefix("out/"): v for k, v in whole("old").items()})
        assert found in states, home.name  # nothing or all of it, never a part
        left = partial_of(out).exists()
        if force or left or not found:
            try:
                run(out, force=force)
            except UsageError:  # it was complete, but for an empty folder beside it
                assert found and not force
        repaired += left
        assert tree(home) == whole(), home.name
        assert sorted(path.name for path in home.iterdir()) == ["out"]
    assert repaired > 20


def test_a_finished_output_is_recognised_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = run(out)
    root = partial_of(out)
    with (
        pytest.raises(KeyboardInterrupt),
        staged(tmp_path / "two", Identity("i"), force=False) as stage,
    ):
        stage.finish("", write_one()(stage.place()))
        stage._append({"complete": True})
        raise KeyboardInterrupt
    partial_of(tmp_path / "two").rename(root)
    shutil.rmtree(root / "files")  # as it is after the last rename
    shutil.copytree(root, tmp_path / "kept")
    calls: list[Place] = []
    again = write_staged(out, Identity("i"), force=False, write=lambda place: calls.append(place))  # type: ignore[arg-type, return-value]
    assert again == made and not calls
    assert not root.exists() and out.is_dir()
    # The controls: another request, or another content, is not what was finished.
    for identity, text in (("j", "new"), ("i", "changed")):
        shutil.copytree(tmp_path / "kept", root)
        (out / "deep" / "a.txt").write_text(text)
        with pytest.raises(UsageError, match="exists and is not empty"):
            run(out, identity=identity)
        assert not root.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_a_command_and_its_children(tmp_path: Path, number: signal.Signals) -> None:
    """The child outlives a signal to its parent alone, unless bake ends it."""
    script = f"""
        import sys, click
        import bake.cli
        from pathlib import Path
        from bake.artifact.staged import Identity, write_staged
        from bake.process import run_script

        def write(place):
            (place.folder / "half").write_text("half")
            code = ("import os, time; from pathlib import Path; "
                    "Path('child').write_text(str(os.getpid())); time.sleep(60)")
            run_script("x", Path(sys.executable), ["-c", code], folder=Path({str(tmp_path)!r}),
                       timeout=60, variables={{}})

        @click.command()
        def work():
            write_staged(Path({str(tmp_path / "out")!r}), Identity("i"), force=False, write=write)

        bake.cli.Commands.get_command = lambda *_: work
        bake.cli.main(["export"])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE, text=True
    )
    child = tmp_path / "child"
    while not (child.exists() and child.read_text()):
        assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "interrupted: nothing was written" in said and "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["child"]


# --- the disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mkdir", "fsync", "open", "scandir", "rename"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_one_call_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """Whichever call it is; with --force what was there stays until the new one is there."""
    out = tmp_path / "out"
    module: Any = Path if name == "rename" else os
    real = getattr(module, name)
    for force in (False, True):
        if force:
            run(out, "old", identity="before")
        before, refused = tree(tmp_path), 0
        for nth in range(1, 60):
            calls = 0

            def failing(*args: Any, nth: int = nth, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == nth:
                    raise OSError(code, os.strerror(code))
                return real(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(module, name, failing)
                try:
                    run(out, force=force)
                except InputError as error:
                    refused += 1
                    assert os.strerror(code) in str(error)
                    assert tree(tmp_path) == before, (nth, force)
                    assert not partial_of(out).exists()
                    continue
            if calls < nth:
                break
            # It did not matter; where it was a call of the clean-up, the next run makes up for it.
            assert tree(out) == {k.removeprefix("out/"): v for k, v in whole().items()}
            shutil.rmtree(out)
            run(out, "old", identity="before")
            assert not partial_of(out).exists()
            if not force:
                shutil.rmtree(out)
        assert refused > 0 and calls < nth
        shutil.rmtree(out)


def test_identity_tells_files_apart_that_kept_their_times(tmp_path: Path) -> None:
    file = tmp_path / "base"
    file.write_text("one")
    about = file.stat()
    first = identity_of(["fact"], Stamps.of([file]))
    assert identity_of(["fact"], Stamps.of([file])) == first
    assert identity_of(["another"], Stamps.of([file])).digest != first.digest
    file.write_text("two")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert identity_of(["fact"], Stamps.of([file])).digest != first.digest
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        first.read.check()


def rewrite_keeping_times(file: Path) -> None:
    about = file.stat()
    file.write_text("two")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def replace_by_another(file: Path) -> None:
    other = file.with_name("other")
    shutil.copy2(file, other)
    other.rename(file)


@pytest.mark.parametrize("change", [rewrite_keeping_times, replace_by_another, Path.unlink])
def test_a_source_that_changes_during_the_run_is_no_source(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    out, file = tmp_path / "out", tmp_path / "base"
    file.write_text("one")
    identity = identity_of([], Stamps.of([file]))

    def write(place: Place) -> Artifact:
        change(file)
        return write_one()(place)

    with pytest.raises(CheckpointError, match="changed while it was in use") as refused:
        write_staged(out, identity, force=False, write=write)
    assert refused.value.exit_code == 4 and refused.value.where == str(file)
    assert not out.exists() and not partial_of(out).exists()
    # The control: what lies as it was lets the output appear.
    file.write_text("one")
    write_staged(out, identity_of([], Stamps.of([file])), force=False, write=write_one())
    assert out.exists()


def test_everything_is_on_disk_before_it_appears_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    log: list[tuple[str, int]] = []
    sync, rename = os.fsync, Path.rename

    def syncing(handle: int) -> None:
        log.append(("sync", os.stat(handle).st_ino))
        sync(handle)

    def renaming(self: Path, target: Path) -> Path:
        log.append(("rename", 0))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    run(out)
    at = log.index(("rename", 0))
    synced = {inode for _, inode in log[:at]}
    assert {path.stat().st_ino for path in (out, *out.rglob("*"))} <= synced
    assert ("sync", tmp_path.stat().st_ino) in log[at:]
    assert tmp_path.stat().st_ino not in synced  # the control: not by chance
