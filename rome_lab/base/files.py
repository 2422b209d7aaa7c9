"""Files that are written whole or not at all, and errors of the disk as sentences.

user_cache()                    the user's cache folder
write_atomically(path, write)   a file, whole or not at all
check_writable(folder)          find out now, not after hours of work; check_file the same for a file
with explained(folder)          errors of the disk say what to do
"""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import psutil
from safetensors import SafetensorError

PROBE_BYTES = 1 << 16
ABANDONED_AFTER_S = 24 * 3600  # files of other machines


def user_cache() -> Path:
    """The user's cache folder for rome_lab; the environment variable ROME_LAB_CACHE overrides it. It need not exist."""
    override = os.environ.get("ROME_LAB_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("rome_lab", appauthor=False)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Make the file `path`, whole or not at all, by calling `write` with the name of a temporary file beside it.

    The temporary name has the suffix of `path`, because many writers choose their format by it. Missing folders are
    made. Where `write` fails or is interrupted, `path` is what it was before and the temporary file is gone.

    Raises:
        OSError: the folder cannot be written; the message says why and what to do.
    """
    with _temporary(path.parent, path.suffix) as temporary:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)


def check_writable(folder: Path) -> None:
    """Raise now the OSError that `write_atomically` into `folder` would raise after hours of work."""
    with _temporary(folder, ".probe") as probe:
        probe.write_bytes(bytes(PROBE_BYTES))
        _flush(probe)


def check_file(doing: str, path: Path) -> None:
    """Raise now what writing the file `path` would raise after the work, in terms of what is being done.

    Raises:
        ValueError: it has no name.
        OSError: a folder is in its place, or its folder cannot be written.
    """
    if not path.name:
        raise ValueError(f"{doing}: {str(path)!r} is no name of a file; give one, such as mine{path.suffix}.")
    if path.is_dir():
        raise IsADirectoryError(f"{doing}: {path} is a folder; give the name of a file in it, such as {path / 'mine'}.")
    check_writable(path.parent)


ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would exceed the allowed size; raise the limit (ulimit -f) or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission is denied; change the permissions or choose another folder",
    errno.EPERM: "the system does not permit it; change the permissions or choose another folder",
    errno.ENOTDIR: "part of that path is a file, not a folder; move the file or choose another folder",
    errno.EEXIST: "there is a file of that name; move it or choose another folder",
    errno.EISDIR: "a folder is in the place of the file; move it or choose another folder",
    errno.ENOENT: "a part of that path is not there, or was removed meanwhile; make it or choose another folder",
    errno.ENAMETOOLONG: "the name is too long; choose a folder with a shorter one",
    errno.EIO: "the disk reports an error; check it or choose another folder",
}


@contextmanager
def explained(folder: Path, target: Path | None = None) -> Iterator[None]:
    """Within it, errors of the disk while something is made in `folder` become sentences that say what to do.

    Args: target: what is made, where that is known; errors about other files pass unchanged.
    """
    target = target or folder
    try:
        yield
    except (OSError, SafetensorError) as error:
        about = Path(getattr(error, "filename", None) or target)
        reason = ADVICE.get(error_number(error))
        if reason is None or not (about.is_relative_to(target) or folder.is_relative_to(about)):
            raise
        how = ", with the environment variable ROME_LAB_CACHE" if folder.is_relative_to(user_cache()) else ""
        raise OSError(f"Cannot write to the folder {folder}: {reason}{how}.") from error


def error_number(error: OSError | SafetensorError) -> int | None:
    """The errno of an error of the disk; safetensors tells it in words only."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number[1]) if number else None


@contextmanager
def _temporary(folder: Path, suffix: str) -> Iterator[Path]:
    """A fresh file name in `folder`, gone afterwards; errors of the disk become sentences that say what to do."""
    name = f".rome_lab-{_host()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"
    temporary = folder / name
    with explained(folder, temporary):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed while writing have left.

    A file of this machine is left behind when its process is gone, whatever the clock says; of another machine's only its
    age is known.
    """
    for path in folder.glob(".rome_lab-*"):
        try:
            host, pid = path.name.split("-")[1:3]
            age = time.time() - path.stat().st_mtime
            if not psutil.pid_exists(int(pid)) if host == _host() else age > ABANDONED_AFTER_S:
                path.unlink()
        except (OSError, ValueError):
            continue  # another process has just removed it, it belongs to another user, or it is no such file at all


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"
