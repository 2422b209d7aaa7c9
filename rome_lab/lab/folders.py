"""Which folder figures go to: never over those that other parameters made.

A folder of figures holds `parameters.json`: for each notebook the parameters that made what is there. A first try of another
size, or of another model, goes to a folder below it that is named after what differs, such as figures/n_facts=12. Pictures
that no note tells of are never drawn over either, nor are times that were measured. What is drawn by hand, cell by cell or
with "run all cells", goes to a folder by_hand below one that holds figures.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from rome_lab.base import Json, write_atomically

logger = logging.getLogger(__name__)

NOTE = "parameters.json"
PICTURES = (".pdf", ".png")
IN_BATCH = "ROME_LAB_IN_BATCH"  # set where the batch runner, which has chosen the folder, runs a notebook
BY_HAND = "by_hand"
TIMED = ("cost",)  # notebooks that draw what they measure on the machine they run on, which is another each time
HERE = "here"
PLACES = ("figures", "results", "device")  # parameters that what is drawn does not depend on
LONGEST = 80  # characters of a folder's name


def folder_of_figures(
    notebook: str, parameters: Mapping[str, Json], defaults: Mapping[str, Json] = MappingProxyType({})
) -> str:
    """The folder for what `notebook` draws with these parameters: its own `figures`, or one below it.

    Args: defaults: of the notebook's parameters, for those that it had not yet when what is there was drawn.

    Raises: ValueError: the folder's note cannot be read.
    """
    folder = Path(str(parameters["figures"]))
    notes = parameters_of(folder)
    if not notes and has_pictures(folder):
        beside = free_folder(folder, "new", notebook, parameters)
        logger.warning("%s has pictures, but no %s says what made them, so others go to %s.", folder, NOTE, beside)
        return beside
    earlier = notes.get(notebook)
    if earlier is None:
        return str(folder)
    if notebook in TIMED:
        return free_folder(folder, HERE, notebook, parameters)
    earlier = drawn_with(defaults) | earlier
    differing = {name: value for name, value in drawn_with(parameters).items() if earlier.get(name, value) != value}
    words = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in differing.items())
    if not differing:
        return str(folder)
    name = re.sub(r"[^\w.=,+-]+", "-", ",".join(words))[:LONGEST]
    return free_folder(folder, name, notebook, parameters)


def drawn_by_hand(folder: str) -> str:
    """The folder for what a notebook draws: as given in batch, or where nothing is drawn; else the one below it for this."""
    drawn = ((Path(folder) / NOTE).exists() or has_pictures(Path(folder))) and Path(folder).name != BY_HAND
    if os.environ.get(IN_BATCH) or not drawn:
        return folder
    beside = str(Path(folder) / BY_HAND)
    print(f"{folder} holds figures, so what is drawn by hand goes to {beside}.")
    return beside


def has_pictures(folder: Path) -> bool:
    return any(path.suffix in PICTURES for path in folder.glob("*.*"))


def free_folder(folder: Path, name: str, notebook: str, parameters: Mapping[str, Json]) -> str:
    """The folder of that name below another, or one with a number, in which no other parameters made what is there.

    Long values are cut, and signs that no folder may bear replaced, so that other parameters may have taken the name.
    """
    ours = drawn_with(parameters)
    return str(next(folder / x for x in numbered(name) if parameters_of(folder / x).get(notebook, ours) == ours))


def numbered(name: str) -> Iterator[str]:
    """A name, and the same with numbers, from 2."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def note_parameters(notebook: str, parameters: Mapping[str, Json]) -> None:
    """Note in the folder of figures, where there is one, what made this notebook's."""
    folder = Path(str(parameters.get("figures", "")))
    if "figures" in parameters and folder.is_dir():
        notes = dict(sorted((parameters_of(folder) | {notebook: drawn_with(parameters)}).items()))
        text = json.dumps(notes, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / NOTE, lambda path: path.write_text(text, encoding="utf-8"))


def parameters_of(folder: Path) -> dict[str, dict[str, Json]]:
    """Notebook -> the parameters that made what the folder holds of it."""
    note = folder / NOTE
    if not note.exists():
        return {}
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{note} cannot be read ({error}); remove it, or choose another folder for figures.") from None


def drawn_with(parameters: Mapping[str, Json]) -> dict[str, Json]:
    """What the figures depend on, as JSON gives it back."""
    return json.loads(json.dumps({name: value for name, value in parameters.items() if name not in PLACES}))
