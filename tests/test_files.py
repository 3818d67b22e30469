import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from conftest import new_checkpoint

from config import InputError
from storygpt import files
from storygpt.checkpoint import load_checkpoint, save_checkpoint
from storygpt.files import write_atomically, writing


def test_a_disk_that_syncs_no_folders_and_sets_no_modes_gets_its_file(tmp_path, monkeypatch):
    """A stand-in for CIFS and FUSE, which this machine has not."""
    sync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    def refused(*_) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "fsync", of_files_only)
    monkeypatch.setattr(files.os, "chmod", refused)
    # Beside its target: a rename does not lead from one disk to another.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    write_atomically(tmp_path / "a", lambda file: file.write(b"whole"))
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, new_checkpoint(step=1))
    old = path.read_bytes()

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (0, 100, len(old) // 2, len(old) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(InputError, match=r"a\.pt cannot be written .* is kept"):
                save_checkpoint(path, new_checkpoint(step=2))
            with pytest.raises(InputError, match=r"a\.pt cannot be written"):
                save_checkpoint(path, new_checkpoint(step=2, large=torch.zeros(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    with pytest.raises(InputError, match="cannot be written"):
        save_checkpoint(tmp_path / "no folder" / "a.pt", new_checkpoint())
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.pt", old)]


@pytest.mark.parametrize("wish", [KeyboardInterrupt, SystemExit(143)])
@pytest.mark.parametrize("after", range(1, 8))
def test_a_wish_to_end_in_the_middle_of_a_save_stays_one(wish, after, tmp_path):
    class Interrupted:
        def __init__(self, file):
            self.file, self.writes = file, 0

        def write(self, data):
            self.writes += 1
            if self.writes == after:
                raise wish
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    path, weights = tmp_path / "run.pt", {"a": torch.zeros(1000), "b": torch.ones(5)}
    path.write_bytes(b"old")
    with pytest.raises(wish if isinstance(wish, type) else SystemExit):
        write_atomically(path, lambda file: torch.save(weights, Interrupted(file)))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["run.pt"]


def test_who_is_reading_the_old_file_reads_it_to_its_end(tmp_path):
    """A copy in place would change it under the reader, and be half of each where it fails."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, new_checkpoint(step=1))
    old = path.read_bytes()
    with open(path, "rb") as reader:
        begun = reader.read(100)
        save_checkpoint(path, new_checkpoint(step=2))
        assert begun + reader.read() == old
    assert load_checkpoint(path)["step"] == 2


@pytest.mark.skipif(os.name != "posix", reason="no modes here")
def test_files_are_as_open_to_others_as_the_users_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "a.pt", new_checkpoint())
    finally:
        os.umask(before)
    assert (tmp_path / "a.pt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.ENOSPC, "free some space, or pass another --data_dir"),
        (errno.EFBIG, "allow larger files (`ulimit -f`), or pass another --data_dir"),
        (errno.EACCES, "close what has it open, or pass another --data_dir"),
        (errno.ESTALE, "its disk are still there, or pass another --data_dir"),
        (errno.EROFS, "(Read-only file system): pass another --data_dir"),
    ],
)
def test_the_remedy_is_that_of_the_error_and_names_the_flag(number, mend):
    with pytest.raises(InputError) as error, writing(Path("data"), "pass another --data_dir"):
        raise OSError(number, os.strerror(number))
    assert str(error.value).startswith("data cannot be written (")
    assert str(error.value).endswith(mend)


def test_a_drive_that_is_gone_is_one_sentence(tmp_path, monkeypatch):
    """A stand-in for Colab's Drive after it was unmounted: every call on it fails so."""

    def gone(*_, **__):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr("builtins.open", gone)
    monkeypatch.setattr(files.os, "stat", gone)
    monkeypatch.setattr(files.os, "open", gone)
    with pytest.raises(InputError, match=r"a\.pt cannot be written \(Transport endpoint"):
        write_atomically(tmp_path / "a.pt", lambda file: file.write(b"x"))
