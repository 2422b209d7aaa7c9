"""Looks at a model as HTML, a column each: bars of the next tokens, continuations, paraphrases and neighbours.

compared_page(probe, looks)     the page; blue is the old object, orange the target, in light and dark themes

What a model says is shown as text, never as HTML.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from rome_lab.base import differing, visible
from rome_lab.lab.looks import Look, Probe

STYLE = """<style>
.rl-look {font-size: 13px; line-height: 1.45; color: var(--jp-ui-font-color1, #222); container-type: inline-size;
  --rl-object: #0072b2; --rl-target: #c04f00; --rl-other: #8c8c8c}
[data-jp-theme-light="false"] .rl-look {--rl-object: #56b4e9; --rl-target: #f0904a}
.rl-look h4 .dim {font-weight: 400}
.rl-look h4, .rl-look .title {font-size: 13px; margin: 12px 0 4px; font-weight: 600; color: inherit}
.rl-look .title ~ .head {margin: 12px 0 4px}
.rl-look .grid {display: grid; column-gap: 20px; row-gap: 3px; align-items: center}
.rl-look .text {align-items: start; row-gap: 6px}
.rl-look .head, .rl-look .dim {color: var(--jp-ui-font-color2, #595959)}
.rl-look .bar {display: flex; height: 11px; background: var(--jp-layout-color2, #eee); border-radius: 2px; overflow: hidden}
.rl-look .bar i {display: block; height: 100%; background: var(--rl-other)}
.rl-look .bar .object {background: var(--rl-object)} .rl-look .bar .target {background: var(--rl-target)}
.rl-look .token {display: grid; grid-template-columns: minmax(50px, 110px) minmax(20px, 1fr) 44px; column-gap: 8px;
  align-items: center}
.rl-look .token code {text-align: right; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; background: none;
  color: inherit}
.rl-look mark {background: color-mix(in srgb, var(--rl-target) 18%, transparent); color: inherit}
.rl-look .p {text-align: right; font-variant-numeric: tabular-nums}
.rl-look .object, .rl-look .token code.object {color: var(--rl-object)}
.rl-look .target, .rl-look .token code.target {color: var(--rl-target)}
.rl-look .question, .rl-look .text > div {overflow-wrap: anywhere}
.rl-look .question button {all: unset; cursor: pointer; text-decoration: underline dotted; text-underline-offset: 3px}
.rl-look .question button:hover, .rl-look .question button:focus-visible {text-decoration-style: solid}
@container (max-width: 620px) {
  .rl-look .questions {grid-template-columns: repeat(var(--looks), minmax(0, 1fr)) !important}
  .rl-look .question, .rl-look .questions .title {grid-column: 1 / -1}
}
</style>"""


def compared_page(probe: Probe, looks: Mapping[str, Look], ask: str = "") -> str:
    """HTML of several looks with the same questions, a column each, under the names that they are given.

    Args: ask: where it is given, each paraphrase and neighbour is a button that asks for this of its row in `Look.table`.
    """
    columns = list(looks.values())
    words = (f'<b class="{kind}">{html.escape(text)}</b>' for kind, text in words_of(probe).items())
    heading = f'{html.escape(probe.fact.prompt)} <span class="dim">…</span> {" or ".join(words)}'
    names = "".join(f'<div class="head">{html.escape(name)}</div>' for name in looks)
    tokens = ("".join(token_bar(probe, *x) for x in look.next_tokens) for look in columns)
    bars = "".join(f'<div class="tokens">{x}</div>' for x in tokens)
    rows = zip(*(look.continuations for look in columns), strict=True)
    texts = "".join(f'<div><span class="dim">…</span>{one_line(text, row[0])}</div>' for row in rows for text in row)
    split = f"grid-template-columns: repeat({len(columns)}, minmax(0, 1fr))"
    return f"""{STYLE}<div class="rl-look">
<h4>{heading}</h4>
<div class="grid" style="{split}">{names}{bars}</div>
<h4>Continuations <span class="dim">(first the most probable words, then the same random numbers each time)</span></h4>
<div class="grid text" style="{split}">{texts}</div>
{question_rows("paraphrase", probe, columns, ask)}{question_rows("neighbour", probe, columns, ask)}
</div>"""


def words_of(probe: Probe) -> dict[str, str]:
    """The words that have a colour: the object and, where it is another word, the target."""
    words = {"object": probe.fact.object}
    return words if probe.target == probe.fact.object else words | {"target": probe.target}


def token_bar(probe: Probe, token: str, p: float) -> str:
    """One next token: in the colour of the object or the target where that begins with it."""
    word = token.strip()
    kind = next((kind for kind, text in words_of(probe).items() if word and text.startswith(word)), "other")
    name = html.escape(visible(word or token))
    bar = f'<div class="bar"><i class="{kind}" style="width: {p:.2%}"></i></div>'
    return f'<div class="token"><code class="{kind}">{name}</code>{bar}<span class="p">{p:.3f}</span></div>'


def question_rows(kind: str, probe: Probe, looks: Sequence[Look], ask: str) -> str:
    """The questions of one kind, a row each, and in each look a bar with the probabilities of object and target."""
    rows = [look.table[look.table["kind"] == kind] for look in looks]
    if rows[0].empty:
        hint = "are known for this wording: choose its relation, or write your own, under “Questions before and after”."
        return f'<h4>No {kind}s <span class="dim">{hint}</span></h4>' if ask else ""
    verb, column = {"paraphrase": ("follow", "p_target"), "neighbour": ("stay", "p_object")}[kind]
    words = words_of(probe)
    means = [f"mean p {look.mean(kind, column):.3f}" for look in looks]
    counts = ["{} of {} {}, ".format(*look.more_probable(kind, column), verb) * (len(words) > 1) for look in looks]
    title = f"{verb}: the {column[2:]} is more probable than the other; mean p: of the {column[2:]}"
    heads = [f'<div class="head" title="{title}">{x}{mean}</div>' for x, mean in zip(counts, means, strict=True)]
    cells = [f'<div class="title">{kind.capitalize()}s</div>', *heads]
    for number, row in enumerate(rows[0].itertuples()):
        text = html.escape(row.text)
        if ask:
            text = f'<button data-ask="{ask}" data-value="{row.Index}" title="Trace this prompt">{text}</button>'
        own = f' <span class="object">{html.escape(row.object)}</span>' if kind == "neighbour" else ""
        cells.append(f'<div class="question">{text}{own}</div>')
        cells += [divided_bar(table.iloc[number], words) for table in rows]
    split = f"--looks: {len(looks)}; grid-template-columns: minmax(0, 1fr) repeat({len(looks)}, minmax(120px, 205px))"
    return f'<div class="grid questions" style="{split}">{"".join(cells)}</div>'


def divided_bar(row: pd.Series, words: Iterable[str]) -> str:
    """One bar of which the object takes a part, and the target another."""
    title = ", ".join(f"{word} {row[f'p_{word}']:.3f}" for word in words)
    bars = "".join(f'<i class="{word}" style="width: {row[f"p_{word}"]:.2%}"></i>' for word in words)
    return f'<div class="bar" title="{title}">{bars}</div>'


def one_line(text: str, other: str) -> str:
    """A text in one line, with marks where it differs from another."""

    def flat(text: str) -> str:
        return " ↵ ".join(part for part in (x.strip() for x in text.split("\n")) if part)

    parts = ((html.escape(part), is_new) for part, is_new in differing(flat(other), flat(text)))
    return " ".join(f"<mark>{part}</mark>" if is_new else part for part, is_new in parts)
