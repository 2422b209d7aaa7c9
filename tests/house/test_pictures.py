"""The committed figure stands at the top of notebooks that take long to run, as an attachment: JupyterLab, whose root is
notebooks/, reaches no file outside of it.

`ROME_LAB_ACCEPT=1 pytest tests/house/test_pictures.py` attaches the figures anew.
"""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
ACCEPT = os.environ.get("ROME_LAB_ACCEPT", "0") not in ("", "0")
WIDTH, COLOURS = 900, 96  # of the attached copy, which has to be small


def small_copy(figure: Path) -> Image.Image:
    """The figure on white, as wide as a notebook shows it."""
    picture = Image.open(figure).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return white.resize((WIDTH, round(white.height * WIDTH / white.width)), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("name", ["figure_1", "evaluation"])
def test_the_committed_figure_stands_at_the_top(name: str) -> None:
    path, file = ROOT / "notebooks" / f"{name}.ipynb", f"{name}.png"
    notebook, copy = json.loads(path.read_text("utf-8")), small_copy(ROOT / "figures" / file)
    title = notebook["cells"][0]
    if ACCEPT:
        data = io.BytesIO()
        copy.quantize(COLOURS).save(data, "png", optimize=True)
        title["attachments"] = {file: {"image/png": base64.b64encode(data.getvalue()).decode()}}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    assert f"](attachment:{file})" in "".join(title["source"])
    data = base64.b64decode(title["attachments"][file]["image/png"])
    attached = Image.open(io.BytesIO(data)).convert("RGB")
    assert attached.size == copy.size and len(data) < 100_000
    difference = np.abs(np.asarray(attached, float) - np.asarray(copy, float)).mean()
    assert difference < 2, "the committed figure is another one by now; attach it anew: see the top of this file"
