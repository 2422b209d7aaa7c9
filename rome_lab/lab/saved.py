"""Edits and models as files: `SavedEdits`, the part of the panel that lists, loads, downloads and exports them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w

from rome_lab.editing import Edit, load_edit
from rome_lab.lab.folders import numbered
from rome_lab.lab.history import counted
from rome_lab.lab.live import StatusLine, row
from rome_lab.models import LanguageModel

CHOOSE = "choose a saved edit …"


def free_path(folder: Path, name: str, end: str = "") -> Path:
    """Where nothing is yet, in the folder, by that name or with a number."""
    return next(path for x in numbered(name) if not (path := folder / f"{x}{end}").exists())


class SavedEdits:
    """The files of one folder.

    Args:
        folder: where edits and models are saved.
        button: makes a button of a name, an action, which returns what to say, and the line that says it.
        loaded: called with each edit that was loaded, and the code that loads it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        folder: str,
        button: Callable[[str, Callable[[], str], StatusLine], w.Button],
        loaded: Callable[[Edit, str], None],
    ) -> None:
        self.lm, self.folder, self.line, self.loaded = lm, Path(folder).expanduser(), StatusLine(), loaded
        self.files = w.Dropdown(description="Saved edits")
        self.export_folder = w.Text(description="Model to", tooltip="A new folder for the edited model")
        self.load_button = button("Load", self.load, self.line)
        self.download_button = w.Button(description="Download", tooltip="Download the file of the chosen edit")
        self.download_button.on_click(lambda _: self.download())
        self.export_button = button("Export", self.export, self.line)
        for field in (self.files, self.export_folder):
            field.style.description_width = "90px"
            field.add_class("rl-wide")
        rows = [[self.files, self.load_button, self.download_button], [self.export_folder, self.export_button]]
        self.widget = w.VBox([*map(row, rows), self.line])
        self.list_files()

    def list_files(self, chosen: Path | None = None) -> None:
        """List the saved edits, the latest first; choose one, or keep the choice; and propose a free name for a model."""
        paths = self.folder.glob("*.safetensors") if self.folder.is_dir() else ()
        files = sorted(filter(Path.is_file, paths), key=lambda path: path.stat().st_mtime, reverse=True)
        chosen = chosen or Path(self.files.value or "")
        self.files.options = [(CHOOSE if files else f"none in {self.folder}", ""), *((x.name, str(x)) for x in files)]
        self.files.value = str(chosen) if chosen in files else ""
        self.export_folder.value = str(free_path(self.folder, "model"))

    def save(self, edit: Edit) -> str:
        words = re.sub(r"\W+", "-", f"{edit.fact.subject} {edit.target}").strip("-").lower()
        path = edit.save(self.folder / f"{words}-layer-{edit.layer}-{edit.digest[:6]}.safetensors")
        self.list_files(path)
        return f"Saved: {path}, {path.stat().st_size / 1024:.0f} KB. It stands in the list of saved edits."

    def chosen(self) -> Path:
        """The chosen file.

        Raises: ValueError: none is chosen.
        """
        if not self.files.value:
            raise ValueError("No saved edit is chosen; choose one in the list, or save an edit first.")
        return Path(self.files.value)

    def load(self) -> str:
        path = self.chosen()
        edit = load_edit(path)
        edit.apply(self.lm)
        self.loaded(edit, f"rl.load_edit({str(path)!r})")
        return f"Loaded and in force: {edit}."

    def download(self) -> None:
        """Send the chosen file to the browser."""
        try:
            path = self.chosen()
            self.line.send_file(path.name, "application/octet-stream", path.read_bytes())
            self.line.say(f"Downloaded: {path.name}.")
        except (ValueError, OSError) as error:
            self.line.say(str(error), "error")

    def export(self) -> str:
        name = self.export_folder.value.strip()
        if not name:
            raise ValueError("The field 'Model to' is empty; write the name of a new folder for the model.")
        folder = Path(name).expanduser()
        edits = counted(self.lm.edits)
        self.line.progress(f"Writing {folder} …", 0.0)
        self.lm.save_pretrained(folder)
        self.list_files()
        return f"Exported: {folder}, a model with {edits} that plain transformers loads."
