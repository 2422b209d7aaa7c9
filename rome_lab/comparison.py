"""What a model says of a fact before and after an edit: the same questions asked twice, and the answers side by side.

probe_of(lm, fact, target)    the questions: the prompt, its paraphrases and neighbours
fact_of(lm, subject, prompt)  a fact that was typed in
look(lm, probe)               the model's answers, as it is now
side_by_side(probe, looks)    several looks as HTML, a column each
"""

from __future__ import annotations

import difflib
import html
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.answers import continuation_p, next_log_p
from rome_lab.corruption import seed_from
from rome_lab.facts import Fact, load_facts, load_relations, template_of
from rome_lab.models import LanguageModel
from rome_lab.plots import visible
from rome_lab.prompts import continuation_ids, read_prompt
from rome_lab.texts import continue_randomly, uniform

logger = logging.getLogger(__name__)

NEIGHBOURS = 6  # most that are asked about
CANDIDATES = 24  # embedded facts among which neighbours are sought
BARS = 6  # next tokens that are shown
WORD = 5  # tokens in which the first word of an answer is sought
SAMPLES, LENGTH, CHOICES = 3, 20, 10  # continuations, their tokens, and the tokens among which each is drawn

STYLE = """<style>
.rl-look {font-size: 13px; line-height: 1.45; max-width: 920px; color: var(--jp-ui-font-color1, #222)}
.rl-look h4, .rl-look .title {font-size: 13px; margin: 12px 0 4px; font-weight: 600}

.rl-look .title ~ .head {margin: 12px 0 4px}
.rl-look .grid {display: grid; column-gap: 20px; row-gap: 3px; align-items: center}
.rl-look .text {align-items: start; row-gap: 6px}
.rl-look .head, .rl-look .dim {color: var(--jp-ui-font-color2, #666)}
.rl-look .bar {display: flex; height: 11px; background: var(--jp-layout-color2, #eee); border-radius: 2px; overflow: hidden}
.rl-look .bar i {display: block; height: 100%}
.rl-look .token {display: grid; grid-template-columns: 110px 1fr 44px; column-gap: 8px; align-items: center}
.rl-look .token code {text-align: right; overflow: hidden; white-space: nowrap; text-overflow: ellipsis}
.rl-look .p {text-align: right; font-variant-numeric: tabular-nums}
.rl-look .object {color: #0072b2} .rl-look .target {color: #d55e00} .rl-look .other {color: #999}
.rl-look .bar .object {background: #0072b2} .rl-look .bar .target {background: #d55e00}
.rl-look .bar .other {background: #999}
</style>"""


@dataclass(frozen=True, eq=False)
class Probe:
    """What a model is asked before and after an edit; chosen once, so that both times it is the same.

    Attributes:
        fact, target: what is edited.
        paraphrases: the fact in the other templates of its relation.
        neighbours: facts about other subjects that the model knew when they were chosen, in the fact's own template.
    """

    fact: Fact
    target: str
    paraphrases: tuple[Fact, ...]
    neighbours: tuple[Fact, ...]


@dataclass(frozen=True, eq=False)
class Look:
    """What a model answered.

    Attributes:
        next_tokens: the most probable next tokens of the prompt, with their probabilities.
        continuations: texts that follow the prompt; the same seeds for every look.
        table: a row a question; kind (prompt, paraphrase or neighbour), text, object, p_object and p_target, the
            probabilities of all tokens of its own object and of the target.
        log_p: (questions, V), the next-token log probabilities of each.
    """

    next_tokens: tuple[tuple[str, float], ...]
    continuations: tuple[str, ...]
    table: pd.DataFrame
    log_p: Float[Tensor, "Q V"]

    def more_probable(self, kind: str, column: str) -> tuple[int, int]:
        """In how many of the questions of one kind p_object or p_target is the larger of the two, and of how many."""
        rows = self.table[self.table["kind"] == kind]
        other = {"p_object": "p_target", "p_target": "p_object"}[column]
        return int((rows[column] > rows[other]).sum()), len(rows)


def known(lm: LanguageModel, facts: Sequence[Fact]) -> list[Fact]:
    """Those of the facts whose object's first token is what the model finds most probable next."""
    ids = [read_prompt(lm, fact).ids.tolist() for fact in facts]
    said = [int(log_p[-1].argmax()) for log_p in next_log_p(lm, ids, "comparison")]
    return [x for x, token in zip(facts, said, strict=True) if continuation_ids(lm, x.prompt, x.object)[0] == token]


def best_known(lm: LanguageModel, fact: Fact) -> Fact:
    """The fact in the first of its templates in which the model knows it, or as it is where there is none."""
    return next(iter(known(lm, [replace(fact, template=template) for template in fact.templates])), fact)


def fact_of(lm: LanguageModel, subject: str, prompt: str) -> Fact:
    """The fact that a prompt asks for. An embedded one brings its relation; the object of any other is what `lm` says now.

    Blanks around either do not count. A subject much like an embedded one of the prompt's relation is warned of, as a
    slip of the pen.

    Args:
        prompt: with the subject in it, or "{}" in its place.

    Raises:
        ValueError: the subject or the prompt is empty, or the subject is not in the prompt.
    """
    subject, prompt = subject.strip(), prompt.strip()
    for name, text in {"subject": subject, "prompt": prompt}.items():
        if not text:
            raise ValueError(f"The {name} is empty; write it out.")
    template = prompt if "{}" in prompt and subject not in prompt else template_of(prompt, subject)
    relation = next((x for x in load_relations().values() if template in x.statements), None)
    objects = [x.object for x in relation.facts if x.subject == subject] if relation else []
    found = objects[0] if objects else answer(lm, template.replace("{}", subject, 1))
    subjects = [x.subject for x in relation.facts] if relation and not objects else []
    if alike := difflib.get_close_matches(subject, subjects, n=1):
        logger.warning(
            "%r is not among the embedded facts, but %r is; if that is meant, correct it. The old object is what %s says "
            "now: %r.", subject, alike[0], lm.name, found,
        )  # fmt: skip
    return Fact(subject, template, found, relation and relation.name, relation.statements if relation else ())


def answer(lm: LanguageModel, prompt: str) -> str:
    """The first word that the model finds most probable after the prompt.

    Raises:
        ValueError: no word follows within a few tokens.
    """
    ids = lm.tokenizer(prompt)["input_ids"]
    (text,) = continue_randomly(lm, [ids], torch.zeros(1, room(lm, ids, WORD)), top_k=1)
    words = lm.tokenizer.decode(text[len(ids) :], skip_special_tokens=True).split()
    if not words:
        raise ValueError(f"{lm.name} says no word after {prompt!r}; end the prompt where a word has to follow.")
    return words[0].strip(".,;:!?\"'()") or words[0]


def probe_of(lm: LanguageModel, fact: Fact, target: str) -> Probe:
    """What to ask of the model about an edit.

    Neighbours are embedded facts of the same relation, or, where there is none, of any: those with the same object first,
    in an order that depends on nothing but their subjects. Facts whose object is the target say nothing and are left out.
    """
    others = [
        x for x in load_facts("embedded") if x.subject != fact.subject and x.object not in {target} - {fact.object}
    ]
    related = [replace(x, template=fact.template) for x in others if fact.relation and x.relation == fact.relation]
    ordered = sorted(related or others, key=lambda x: (x.object != fact.object, seed_from(x.subject)))
    paraphrases = tuple(replace(fact, template=x) for x in fact.templates if x != fact.template)
    return Probe(fact, target, paraphrases, tuple(known(lm, ordered[:CANDIDATES])[:NEIGHBOURS]))


def look(lm: LanguageModel, probe: Probe) -> Look:
    """The model's answers, as it is now."""
    asked = {"prompt": (probe.fact,), "paraphrase": probe.paraphrases, "neighbour": probe.neighbours}
    facts = [fact for group in asked.values() for fact in group]
    p_object, following = probabilities(lm, [(fact, fact.object) for fact in facts])
    p_target, _ = probabilities(lm, [(fact, probe.target) for fact in facts])
    table = pd.DataFrame(
        {
            "kind": [kind for kind, group in asked.items() for _ in group],
            "text": [fact.prompt for fact in facts],
            "object": [fact.object for fact in facts],
            "p_object": p_object,
            "p_target": p_target,
        }
    )
    p, ids = following[0].exp().topk(BARS)
    next_tokens = tuple(zip((lm.tokenizer.decode([i]) for i in ids.tolist()), p.tolist(), strict=True))
    return Look(next_tokens, continuations(lm, probe.fact.prompt), table, following)


def probabilities(lm: LanguageModel, asked: Sequence[tuple[Fact, str]]) -> tuple[list[float], Float[Tensor, "Q V"]]:
    """Of each text behind its fact's prompt: the probability of all its tokens; and the log probabilities of the first."""
    pairs = [(read_prompt(lm, fact).ids.tolist(), continuation_ids(lm, fact.prompt, text)) for fact, text in asked]
    return continuation_p(lm, pairs, "comparison")


def continuations(lm: LanguageModel, prompt: str) -> tuple[str, ...]:
    """`SAMPLES` texts that follow the prompt, each drawn with a seed of its own number and the prompt alone."""
    ids = lm.tokenizer(prompt)["input_ids"]
    length = room(lm, ids, LENGTH)
    draws = torch.stack([uniform(length, "continuation", number, prompt) for number in range(SAMPLES)])
    texts = continue_randomly(lm, [ids] * SAMPLES, draws, CHOICES)
    return tuple(lm.tokenizer.decode(text[len(ids) :], skip_special_tokens=True).rstrip("\ufffd") for text in texts)


def room(lm: LanguageModel, ids: Sequence[int], more: int) -> int:
    """Length of a text that goes on from `ids` by `more` tokens, or by as many as the model can still read.

    Raises:
        ValueError: the model can't read `ids` to their end.
    """
    lm.check_length(len(ids), "comparison")
    return min(len(ids) + more, lm.context_length)


def side_by_side(probe: Probe, looks: Mapping[str, Look]) -> str:
    """HTML of several looks with the same questions, a column each, under the names that they are given."""
    columns = list(looks.values())
    words = (f'<b class="{kind}">{html.escape(text)}</b>' for kind, text in words_of(probe).items())
    heading = f'{html.escape(probe.fact.prompt)} <span class="dim">…</span> {" or ".join(words)}'
    names = "".join(f'<div class="head">{html.escape(name)}</div>' for name in looks)
    tokens = ("".join(token_bar(probe, *x) for x in look.next_tokens) for look in columns)
    bars = "".join(f'<div class="tokens">{x}</div>' for x in tokens)
    rows = zip(*(look.continuations for look in columns), strict=True)
    texts = "".join(f'<div><span class="dim">…</span>{one_line(text)}</div>' for row in rows for text in row)
    split = f"grid-template-columns: repeat({len(columns)}, minmax(0, 1fr))"
    return f"""{STYLE}<div class="rl-look">
<h4>{heading}</h4>
<div class="grid" style="{split}">{names}{bars}</div>
<h4>Continuations <span class="dim">(the same random numbers each time)</span></h4>
<div class="grid text" style="{split}">{texts}</div>
{questions("paraphrase", probe, columns)}{questions("neighbour", probe, columns)}
</div>"""


def words_of(probe: Probe) -> dict[str, str]:
    """The words that have a colour: the object and, where it is another word, the target."""
    words = {"object": probe.fact.object, "target": probe.target}
    return words if probe.target != probe.fact.object else {"object": probe.fact.object}


def token_bar(probe: Probe, token: str, p: float) -> str:
    """One next token: in the colour of the object or the target where that begins with it."""
    word = token.strip()
    kind = next((kind for kind, text in words_of(probe).items() if word and text.startswith(word)), "other")
    name = html.escape(visible(word or token))
    bar = f'<div class="bar"><i class="{kind}" style="width: {p:.2%}"></i></div>'
    return f'<div class="token"><code class="{kind}">{name}</code>{bar}<span class="p">{p:.3f}</span></div>'


def questions(kind: str, probe: Probe, looks: Sequence[Look]) -> str:
    """The questions of one kind, a row each, and in each look a bar with the probabilities of object and target."""
    rows = [look.table[look.table["kind"] == kind] for look in looks]
    if rows[0].empty:
        return ""
    title, verb, column = {
        "paraphrase": ("Paraphrases", "follow", "p_target"),
        "neighbour": ("Neighbours", "stay", "p_object"),
    }[kind]
    words = words_of(probe)
    counts = [
        f"{n} of {of} {verb}" if len(words) > 1 else "" for n, of in (x.more_probable(kind, column) for x in looks)
    ]
    cells = [f'<div class="title">{title}</div>', *(f'<div class="head">{count}</div>' for count in counts)]
    for number, asked in enumerate(rows[0].itertuples()):
        own = f' <span class="object">{html.escape(asked.object)}</span>' if kind == "neighbour" else ""
        cells.append(f"<div>{html.escape(asked.text)}{own}</div>")
        cells += [parts(table.iloc[number], words) for table in rows]
    split = f"grid-template-columns: minmax(0, 1fr) repeat({len(looks)}, 170px)"
    return f'<div class="grid" style="{split}">{"".join(cells)}</div>'


def parts(row: pd.Series, words: Iterable[str]) -> str:
    """One bar of which the object takes a part, and the target another."""
    said = ", ".join(f"{word} {row[f'p_{word}']:.3f}" for word in words)
    bars = "".join(f'<i class="{word}" style="width: {row[f"p_{word}"]:.2%}"></i>' for word in words)
    return f'<div class="bar" title="{said}">{bars}</div>'


def one_line(text: str) -> str:
    return html.escape(" ↵ ".join(part for part in (x.strip() for x in text.split("\n")) if part))
