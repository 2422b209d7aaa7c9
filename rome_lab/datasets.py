"""Data sets as files: CSV and JSON as records, and the published data sets, downloaded when first asked for."""

from __future__ import annotations

import csv
import hashlib
import http.client
import io
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib import request

from rome_lab.store import user_cache, write_atomically

Json: TypeAlias = Any  # what json.loads returns

ADDRESS = "https://rome.baulab.info/data/dsets/"
SILENCE_S = 30  # longest wait for the server's next bytes
DEADLINE_S = 1800  # longest download
CHUNK = 1 << 16

logger = logging.getLogger(__name__)


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


def read_records(path: Path) -> list[Json]:
    """The records of a CSV or JSON file, in order.

    Raises:
        ValueError: the file is not UTF-8, is neither, or holds no records; the message says where and what to do.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OSError(f"load_facts: {path} cannot be read ({error.strerror}); check its permissions.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"load_facts: {path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "save it as UTF-8 (in a spreadsheet: CSV UTF-8)."
        ) from None
    looks_like_json = path.suffix.lower() != ".csv" and text.lstrip().startswith(("[", "{"))
    parse = parse_json if path.suffix.lower() == ".json" or looks_like_json else parse_csv
    records = parse(text, str(path))
    if not records:
        raise ValueError(f"load_facts: {path} holds no records; give a file with at least one fact.")
    return records


def parse_json(text: str, source: str) -> list[Json]:
    """The items of a JSON list; `source` names the text in errors."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_facts: {source} is not valid JSON: {error}; expected a list of objects.") from None
    if type(records) is not list:
        raise ValueError(f"load_facts: {source} holds a JSON {type(records).__name__}; expected a list of objects.")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # an escape of half a character: both halves stand there, or one alone
        for number, record in enumerate(records, start=1):
            check_text(f"load_facts: {source}: record {number}", json.dumps(record, ensure_ascii=False))
    return records


def parse_csv(text: str, source: str) -> list[Json]:
    """The rows of a CSV text as dictionaries by column; `source` names the text in errors."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        records = list(reader)
    except csv.Error as error:
        raise ValueError(f"load_facts: {source}, line {reader.line_num}: not valid CSV: {error}.") from None
    if len(set(columns)) < len(columns):
        raise ValueError(
            f"load_facts: {source} has a column twice ({', '.join(map(repr, columns))}); rename one of them."
        )
    return records


def check_text(name: str, text: object) -> None:
    """Raise where `text` is no text, or holds half a character, which no tokenizer and no file can take.

    Python and JSON write characters beyond U+FFFF as two halves, and let one stand alone.

    Raises:
        TypeError, ValueError: it is so; the message calls it `name`.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} is {text!r}; expected text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"{name} holds half a character, {half}; write the whole character, or leave it out."
        ) from None


def text_at(record: Json, path: str) -> str:
    """The text at a path of keys, such as "target_true.str" or "answers.0"; a ValueError names it where there is none."""
    value = record
    for key in path.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            value = None
    if value is None:
        raise ValueError(f"the field {path} is missing")
    if type(value) is not str:
        raise ValueError(f"the field {path} is {value!r}, not text")
    if not value.strip():
        raise ValueError(f"the field {path} is empty")
    return value


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
        asked = request.Request(published.url, headers={"User-Agent": "rome-lab"})
        with opener.open(asked, timeout=SILENCE_S) as response:
            while chunk := response.read1(CHUNK):
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
