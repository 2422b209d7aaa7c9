"""What a notebook hands over to its executed copy: `record_values`; apart from `batch`, which imports for seconds."""

from __future__ import annotations

import json

from IPython.display import display

from rome_lab.base import Json, canonical_json

MIME = "application/vnd.rome_lab+json"


def record_values(**values: Json) -> None:
    """Called in a notebook: show `values`, and put them in the executed copy's metadata, under rome_lab.recorded.

    They travel in the cell's output, as data of the type `application/vnd.rome_lab+json`; a later value replaces an
    earlier one of its name. In an interactive session they are only shown.

    Raises:
        TypeError, ValueError: a value is not finite JSON.
    """
    plain = json.loads(canonical_json(values, "record_values: the values"))
    shown = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    display({"text/plain": f"recorded: {shown}", MIME: plain}, raw=True)
