"""Data sets that others publish: downloaded when first asked for, checked, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import http.client
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib import request

from rome_lab.base import user_cache, write_atomically
from rome_lab.facts.records import read_records

logger = logging.getLogger(__name__)

ADDRESS = "https://rome.baulab.info/data/dsets/"
SILENCE_S = 30  # longest wait for the server's next bytes
DEADLINE_S = 1800  # longest download
DOWNLOAD_CHUNK = 1 << 16


@dataclass(frozen=True)
class Published:
    """A data set that others publish, and what it must look like.

    Attributes:
        fields: what every record has.
        least: records that there are at least.
        most_bytes: size beyond which it cannot be what was asked for.
    """

    url: str
    fields: frozenset[str]
    least: int
    most_bytes: int


PUBLISHED: dict[str, Published] = {
    "known_1000": Published(
        ADDRESS + "known_1000.json",
        frozenset({"subject", "attribute", "template", "prompt"}),
        least=1_000,
        most_bytes=10_000_000,
    ),
    "counterfact": Published(
        ADDRESS + "counterfact.json",
        frozenset({"case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"}),
        least=20_000,
        most_bytes=200_000_000,
    ),
    "zsre": Published(
        ADDRESS + "zsre_mend_eval.json",
        frozenset({"subject", "src", "rephrase", "alt", "answers", "loc", "loc_ans"}),
        least=10_000,
        most_bytes=100_000_000,
    ),
}


def published_file(name: str, opener: request.OpenerDirector | None = None) -> Path:
    """The file of a published data set in the user's cache, downloaded and checked when first asked for.

    Its checksum is kept beside it; a file that was altered since is downloaded again. A file that the user has put there
    has none, and is taken as it is.

    Args:
        opener: what opens the address; one that speaks HTTPS only by default.

    Raises:
        ConnectionError: it could not be downloaded, or what arrived is not it; the message says what to do.
        OSError: the cache cannot be written.
    """
    published = PUBLISHED[name]
    path = user_cache() / "datasets" / f"{name}.json"
    seal = path.with_suffix(".sha256")
    if path.exists() and is_as_sealed(path, seal):
        return path

    def fetch(target: Path) -> None:
        logger.info("downloading the data set %s from %s", name, published.url)
        with target.open("wb") as file:
            for chunk in download(published, opener or https_only()):
                file.write(chunk)
        check_arrived(target, published)

    try:
        write_atomically(path, fetch)
    except _Failed as failure:
        raise ConnectionError(
            f"load_facts: the data set {name!r} could not be downloaded: {failure}; fetch {published.url} by other means "
            f"and save it as {path}."
        ) from failure
    write_atomically(seal, lambda temporary: temporary.write_text(digest_of(path)))
    return path


def is_as_sealed(path: Path, seal: Path) -> bool:
    """Whether a file is byte for byte what was downloaded; one that is not is reported and removed."""
    if not seal.exists() or seal.read_text(errors="replace") == digest_of(path):
        return True
    logger.warning("%s was altered since it was downloaded, and is downloaded again", path)
    path.unlink(missing_ok=True)
    seal.unlink(missing_ok=True)
    return False


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Failed(Exception):
    """A download failed; says why, as part of a sentence."""


def https_only(https: request.HTTPSHandler | None = None) -> request.OpenerDirector:
    """An opener that has no other protocol than HTTPS, so that no redirection can lead to one."""
    proxies = {scheme: proxy for scheme, proxy in request.getproxies().items() if scheme == "https"}
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(proxies),
        request.UnknownHandler(),
        request.HTTPDefaultErrorHandler(),
        request.HTTPRedirectHandler(),
        request.HTTPErrorProcessor(),
        https or request.HTTPSHandler(),
    ):
        opener.add_handler(handler)
    return opener


def download(published: Published, opener: request.OpenerDirector) -> Iterator[bytes]:
    """What stands at the address, piece by piece, within the limits of size and time."""
    began, size = time.monotonic(), 0
    try:
        address = request.Request(published.url, headers={"User-Agent": "rome-lab"})
        with opener.open(address, timeout=SILENCE_S) as response:
            while chunk := response.read1(DOWNLOAD_CHUNK):
                size += len(chunk)
                if size > published.most_bytes:
                    raise _Failed(f"more than {published.most_bytes} bytes came")
                if time.monotonic() - began > DEADLINE_S:
                    raise _Failed(f"it was not complete after {DEADLINE_S} s")
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(str(error).removeprefix("<urlopen error ").removesuffix(">")) from error


def check_arrived(path: Path, published: Published) -> None:
    """Raise where a downloaded file is not the data set that was asked for."""
    try:
        records = read_records(path)
    except ValueError as error:
        raise _Failed("what arrived is no list of JSON records") from error
    if len(records) < published.least:
        raise _Failed(f"only {len(records)} records came, expected at least {published.least}")
    for number, record in enumerate(records, start=1):
        missing = published.fields - set(record if isinstance(record, dict) else ())
        if missing:
            raise _Failed(f"record {number} of what arrived lacks {', '.join(sorted(missing))}")
