"""Where cases come from, and which of them a model can be judged by.

load_cases    from the embedded facts, from CounterFact or zsRE, or from a user's file
known_cases   those whose facts a model knows
check         those whose targets a model can tell from the true objects
set_apart     those to search settings on, and those to report
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from rome_lab.base import Store, mentions, seed_from
from rome_lab.evaluation.rewriting import rewrite_prompts
from rome_lab.facts import (
    CHOICES,
    Case,
    Cases,
    Parsed,
    RecordForm,
    Unusable,
    build_cases,
    build_questions,
    completions,
    identity_by,
    known_facts,
    load_facts,
    open_set,
    read_counterfact,
    read_each,
    read_zsre,
    shares_first_token,
    text_at,
    with_dependents,
)
from rome_lab.models import LanguageModel

logger = logging.getLogger(__name__)

CASE_WAVE = 16  # cases whose rewrite prompts are read together
UNKNOWN = "the model does not complete the fact"
OWN_WORDS = "the model completes the fact only after words that fit no other object"
NOT_PREFERRED = "the model does not prefer the true object to the target"
SHARED_TOKEN = "the target shares its first token with the true object"


def load_cases(source: str | Path = "embedded", seed: int = 0) -> Cases:
    """All cases of a source, whatever a model knows.

    Args:
        source: as in `load_facts`, or "questions", the embedded facts as questions in the form of zsRE. CounterFact and
            zsRE, by name or as a file of their form, hold whole cases; of other facts cases are built by `build_cases`.
        seed: of the cases that are built.

    Returns: Cases; what gives none is counted by reason.

    Raises:
        FileNotFoundError, ConnectionError: as in `load_facts`.
        ValueError: the file is at fault, or not one of its records gives a case; the message says why.
    """
    cases = read_cases(source)
    if cases is None:
        cases = build_cases(load_facts(source), seed=seed)
    if not cases:
        raise ValueError(f"load_cases: {str(source)!r} holds nothing to judge an edit by{cases.reasons()}.")
    return cases


def known_cases(
    lm: LanguageModel,
    source: str | Path | Cases = "embedded",
    n: int | None = 200,
    seed: int = 0,
    store: Store | str | Path | None = None,
    progress: bool = True,
    known_only: bool = True,
) -> Cases:
    """A random sample of the cases whose facts `lm` knows and whose targets it can tell from the true objects.

    Where cases are built from facts, those facts are known that `known_facts` finds, the rewrite prompt is one that the
    model completes (see `rewrite_prompts`), and neighbours that it knows are preferred. Where a source holds whole cases,
    as CounterFact, the model knows those at whose rewrite prompt the true object is more probable than the target (log P
    of the whole text).
    zsRE's facts are to be taught, not changed; none of them need be known. Cases of embedded relations get the prompts whose
    answers follow from their edit, or stay, of those that the model answers right (`rome_lab.facts.with_dependents`).

    Args:
        source: as in `load_cases`, or cases.
        n: number of cases; None for all. Where there are fewer, all of them are returned, with a warning.
        seed: of the sample, and of the cases that are built.
        store: folder of results, in which the search for known facts is kept and found again.
        known_only: False keeps the cases of unknown facts too, as the paper does on CounterFact and zsRE.

    Returns: Cases, in random order, of which a smaller n gives the beginning. Unknown facts are counted with the dropped; of
        cases, those after the last one kept do not count.

    Raises:
        ValueError: n is below 1, the model knows none of the facts, or as in `load_cases`.
    """
    return with_dependents(lm, sampled_cases(lm, source, n, seed, store, progress, known_only))


def sampled_cases(
    lm: LanguageModel,
    source: str | Path | Cases,
    n: int | None,
    seed: int,
    store: Store | str | Path | None,
    progress: bool,
    known_only: bool,
) -> Cases:
    """The cases of `known_cases`, without what follows from their edits."""
    if not (n is None or (isinstance(n, int) and n >= 1)):
        raise ValueError(f"known_cases: n is {n!r}; expected a whole number of at least 1, or None for all.")
    cases = source if isinstance(source, Cases) else read_cases(source)
    if cases is None and known_only:
        tried = build_known(lm, source, seed, store, progress)
        kept = select(lm, tried, n, ask=False, progress=progress)
    else:
        tried = load_cases(source, seed) if cases is None else cases
        order = sorted(tried, key=lambda case: seed_from(json.dumps([seed, case.id])))
        kept = select(lm, Cases(tuple(order), tried.dropped), n, ask=known_only, progress=progress)
    if not kept:
        raise ValueError(
            f"known_cases: of the {len(tried)} cases, not one can be judged with {lm.name}{kept.reasons()}."
        )
    if len(kept) < (n or 1):
        logger.warning("known_cases: %d cases were asked for, but there are only %s", n, kept)
    return kept


def build_known(
    lm: LanguageModel, source: str | Path, seed: int, store: Store | str | Path | None, progress: bool
) -> Cases:
    """Cases of all facts that `lm` knows and whose prompts fit the target, in random order; the others count as dropped."""
    facts = load_facts(source)
    known = known_facts(lm, facts, n=None, seed=seed, progress=progress, store=store)
    if not known:
        raise ValueError(
            f"known_cases: {lm.name} knows none of the {len(facts)} facts of {str(source)!r}, so there is nothing to "
            "change; choose another model or other facts, or take all cases with known_only=False."
        )
    prompts = rewrite_prompts(lm, known, facts, seed, store, progress)
    cases = build_cases(prompts, pool=facts, seed=seed)
    unknown = {UNKNOWN: len(facts) - len(known), OWN_WORDS: len(known) - len(prompts)}
    return Cases(cases.cases, dict(+Counter(unknown)) | cases.dropped)


def select(lm: LanguageModel, cases: Cases, n: int | None, ask: bool, progress: bool) -> Cases:
    """The first n cases that pass `check` and, with `ask`, whose true object the model prefers to the target."""
    kept: list[Case] = []
    dropped = Counter(cases.dropped)
    most = len(cases) if n is None else n
    with tqdm(total=most, desc="known cases", disable=not (progress and ask)) as bar:
        for begin in range(0, len(cases), CASE_WAVE):
            wave = cases[begin : begin + CASE_WAVE]
            for case, reason in zip(wave, objections(lm, wave, ask), strict=True):
                if len(kept) == most:
                    return Cases(tuple(kept), dict(dropped))  # whatever comes after the last one kept is chance
                if reason:
                    dropped[reason] += 1
                else:
                    kept.append(case)
            bar.update(len(kept) - bar.n)
    return Cases(tuple(kept), dict(dropped))


def objections(lm: LanguageModel, cases: Sequence[Case], ask: bool) -> list[str]:
    """For each case the reason why the model cannot be judged by it; "" where there is none."""
    shared = [shares_first_token(lm, case) for case in cases]
    rest = [case for case, is_shared in zip(cases, shared, strict=True) if not is_shared]
    known = iter(prefers_true(lm, rest) if ask else [True] * len(rest))
    return [SHARED_TOKEN if is_shared else "" if next(known) else NOT_PREFERRED for is_shared in shared]


def check(lm: LanguageModel, cases: Cases) -> Cases:
    """The cases without those whose target shares its first token with the true object, by the tokenizer of `lm`."""
    kept = tuple(case for case in cases if not shares_first_token(lm, case))
    return Cases(kept, dict(Counter(cases.dropped) + Counter({SHARED_TOKEN: len(cases) - len(kept)})))


def prefers_true(lm: LanguageModel, cases: Sequence[Case]) -> list[bool]:
    """For each case, whether log P of the true object at the rewrite prompt exceeds that of the target; True in zsRE."""
    to_change = [case for case in cases if case.form != "zsre"]
    pairs = [(case.fact.prompt, text) for case in to_change for text in (case.fact.object, case.target)]
    totals = [answer.total for answer in completions(lm, pairs, "load_cases")]
    preferred = {case.id: true > new for case, true, new in zip(to_change, totals[::2], totals[1::2], strict=True)}
    return [preferred.get(case.id, True) for case in cases]


def read_cases(source: str | Path) -> Cases | None:
    """The cases that a source holds; None where it holds facts only."""
    if str(source) == "embedded":
        return None
    if str(source) == "questions":
        return build_questions(load_facts("embedded"))
    records, form, _ = open_set(str(source))
    if form not in CASE_FORMS:
        return None
    numbered = [record | {"number": i} if isinstance(record, dict) else record for i, record in enumerate(records)]
    cases, problems = read_each(numbered, CASE_FORMS[form])
    reasons = Counter(re.sub(r" of record \d+$", "", reason) for _, reason in problems)
    usable = Cases(with_choices(cases), dict(reasons))
    if problems:
        logger.warning("load_cases: %s: %s", source, usable)
    return usable


def with_choices(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Cases with objects and targets of others of their relation to choose among; nothing says what else is true of them."""
    objects: dict[str, set[str]] = {}
    for case in cases:
        if case.fact.relation and case.form != "zsre":
            objects.setdefault(case.fact.relation, set()).update((case.fact.object, case.target))

    several = {relation: sorted(own) for relation, own in objects.items()}

    def drawn(case: Case) -> tuple[str, ...]:
        own = {case.fact.object, case.target, *case.neighbour_answers}
        others = [text for text in several.get(case.fact.relation, ()) if text not in own]
        return tuple(random.Random(seed_from(case.id)).sample(others, min(CHOICES, len(others))))

    return tuple(replace(case, choices=drawn(case)) for case in cases)


def read_counterfact_case(record: Parsed) -> Case:
    """A case of a CounterFact record.

    The authors publish the texts for RS beside the set. Differs: as references stand the attribute prompts, which are about
    subjects of which the target is true, each completed by the target; without them a case has no references.
    """
    target = text_at(record, "requested_rewrite.target_new.str").strip()
    if "{}" not in text_at(record, "requested_rewrite.prompt"):
        raise Unusable("the subject is not in the prompt")
    fact = read_counterfact(record)
    if target == fact.object:
        raise Unusable("the target is the true object")
    neighbours = texts_at(record, "neighborhood_prompts")
    if any(mentions(prompt, fact.subject) for prompt in neighbours):
        raise Unusable("a neighbourhood prompt contains the subject")
    attributes = texts_at(record, "attribute_prompts") if record.get("attribute_prompts") else ()
    return Case(
        id=f"counterfact/{record.get('case_id', record['number'])}",
        fact=fact,
        target=target,
        paraphrases=texts_at(record, "paraphrase_prompts"),
        neighbours=neighbours,
        neighbour_answers=(fact.object,) * len(neighbours),
        generation_prompts=texts_at(record, "generation_prompts"),
        references=tuple(f"{prompt} {target}." for prompt in attributes),
    )


def read_zsre_case(record: Parsed) -> Case:
    """A case of a zsRE record: the question, the first of its answers, another wording, and an unrelated question.

    As in the authors' evaluation, the model is taught the first answer (not MEND's `alt`), and the unrelated question keeps
    its "nq question: " and gets the question mark that it lacks.
    """
    if text_at(record, "subject").strip() not in text_at(record, "src"):
        raise Unusable("the subject is not in the prompt")
    fact = read_zsre(record)
    question = text_at(record, "loc").strip()
    if mentions(question, fact.subject):
        raise Unusable("a neighbourhood prompt contains the subject")
    return Case(
        id=f"zsre/{record['number']}",
        fact=fact,
        target=fact.object,
        paraphrases=(text_at(record, "rephrase").strip(),),
        neighbours=(question if question.endswith("?") else f"{question}?",),
        neighbour_answers=(text_at(record, "loc_ans").strip(),),
        form="zsre",
    )


def texts_at(record: Parsed, name: str) -> tuple[str, ...]:
    """The texts of a field that is a list of them; Unusable where there are none, or one is empty."""
    texts = record.get(name)
    if not isinstance(texts, list) or not texts:
        raise Unusable(f"the field {name} is {'empty' if texts == [] else 'missing'}")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise Unusable(f"the field {name} holds what is empty or not text")
    return tuple(text.strip() for text in texts)


CASE_FORMS: dict[str, RecordForm[Case]] = {
    "counterfact": RecordForm(read_counterfact_case, identity_by("case_id")),
    "zsre": RecordForm(read_zsre_case, identity=lambda record, case: replace(case, id="")),
}
APART = 0  # seed by which cases are set apart, whatever the seed of those that are reported
SEARCHED = 20  # cases that the defaults for the embedded model were searched on


def set_apart(
    lm: LanguageModel,
    source: str | Path,
    n_search: int,
    n_cases: int,
    seed: int = 0,
    store: Store | str | Path | None = None,
    known_only: bool = True,
) -> tuple[Cases, Cases]:
    """Cases to search settings on and cases to report, such that no subject is in both.

    The first `n_search` known cases by the seed `APART` are for the search: the same whatever is reported, and by whatever
    seed. Fewer than `SEARCHED` would leave some to be reported on which the defaults were found; there is a warning.

    Args: as for `known_cases`; the seed is that of the cases to report.

    Returns: both, the second with the counts of what was dropped; it is shorter than `n_cases` where there are too few.

    Raises: ValueError: nothing is left to report; see also `known_cases`.
    """
    if source == "embedded" and n_search < SEARCHED:
        logger.warning(
            "set_apart: %d cases are set apart, but the embedded model's defaults were searched on the first %d, so some "
            "of those may be reported; give n_search %d.", n_search, SEARCHED, SEARCHED,
        )  # fmt: skip

    def known(n: int, seed: int) -> Cases:
        # The known facts of the embedded set are looked for all at once in any case; elsewhere each case costs its own.
        return sampled_cases(lm, source, None if source == "embedded" else n, seed, store, True, known_only)

    cases = known(2 * n_search + n_cases, seed)
    apart = (cases if seed == APART else known(n_search, APART))[:n_search]
    searched = {case.fact.subject for case in apart}
    left = tuple(case for case in cases if case.fact.subject not in searched)
    if not left:
        raise ValueError(
            f"set_apart: all {len(cases)} cases would go to the search; give n_search less than {n_search}."
        )
    if len(left) < n_cases:
        logger.warning("set_apart: there are %d cases besides those of the search, not %d", len(left), n_cases)
    return with_dependents(lm, Cases(apart)), with_dependents(lm, Cases(left[:n_cases], cases.dropped))
