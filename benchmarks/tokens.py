"""How many tokens does C need? `python -m benchmarks.tokens [--tokens 8192 49152] [--cases 200] [--minutes 30]`.

ROME with the model's defaults, and C measured on each number of tokens, all on the same cases; `0` is ROME without C, which
tells what C buys at all. The cases are built with a seed of their own from facts that neither the search nor the README's
table has used, see `fresh_facts`. Results are kept in a store: stop it, or give it minutes, and the next run goes on.

Prints a table and writes it as CSV: a row a number of tokens and metric, with the mean over cases, its 95% interval, and the
difference to the most tokens, paired within the case.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.measure import line
from rome_lab import Fact, LanguageModel, load_facts, load_model
from rome_lab.base import mean_ci
from rome_lab.base.files import write_atomically
from rome_lab.editing import Method, Rome
from rome_lab.editing.methods import IdentityRome
from rome_lab.evaluation import SCORES_ONLY, Cases, evaluate, summarise
from rome_lab.evaluation.cases import check
from rome_lab.evaluation.rewriting import rewrite_prompts
from rome_lab.facts.built_cases import build_cases
from rome_lab.facts.known import KnownFacts, known_facts, rank
from rome_lab.studies.evaluation.paper import paired

USED_SEED, USED_CASES = 0, 20 + 200  # of the search and of the README's table
USED_SHARE = 0.55  # of all facts, in the order of that seed, behind which none of those cases can be
SPARE = 1.6  # known facts for each case that is wanted: not each of them gives one
AT_ONCE = 4  # cases judged between two looks at the clock
METRICS = ("S", "ES", "PS", "NS", "EM", "PM", "NM", "known")


def fresh_facts(facts: Sequence[Fact]) -> list[Fact]:
    """Those about subjects of which none is among the first facts in the order in which the used cases were drawn."""
    order = sorted(dict.fromkeys(facts), key=lambda fact: rank(USED_SEED, fact))
    used = {fact.subject for fact in order[: round(USED_SHARE * len(order))]}
    return [fact for fact in order if fact.subject not in used]


def fresh_cases(lm: LanguageModel, n: int, seed: int, store: Path) -> tuple[Cases, KnownFacts]:
    """At most n cases that nothing was settled on, in random order, and the known facts that they are made of.

    Raises:
        ValueError: the facts set apart may not be all that were used.
    """
    facts = load_facts("embedded")
    fresh = fresh_facts(facts)
    known = known_facts(lm, fresh, n=round(SPARE * n), seed=seed, store=store)
    prompts = rewrite_prompts(lm, known, facts, seed, store)
    cases = check(lm, build_cases(prompts, pool=facts, seed=seed))
    used = USED_SHARE * len(facts) * len(cases) / known.report.tried
    if used < 1.5 * USED_CASES:
        raise ValueError(
            f"fresh_cases: some {used:.0f} cases come of the facts set apart, but {USED_CASES} were used; raise USED_SHARE."
        )
    return Cases(cases.cases[:n], cases.dropped), known


def methods_by_tokens(tokens: Sequence[int]) -> list[Method]:
    """ROME with the model's defaults and C of each number of tokens; without C for 0."""
    return [Rome(str(n), tokens=n) if n else IdentityRome("0") for n in tokens]


def judged(
    lm: LanguageModel, cases: Cases, known: Sequence[Fact], tokens: Sequence[int], store: Path, minutes: float
) -> pd.DataFrame:
    """A row a case and number of tokens, of so many cases as the minutes allow; those in the store take none."""
    until, parts = time.monotonic() + 60 * minutes, []
    for begin in range(0, len(cases), AT_ONCE):
        if parts and time.monotonic() > until:
            break
        part = cases.cases[begin : begin + AT_ONCE]
        parts.append(
            evaluate(
                lm, part, methods_by_tokens(tokens), store=store, settings=SCORES_ONLY, unrelated=known, progress=False
            )
        )
        print(f"{begin + len(part)} of {len(cases)} cases", file=sys.stderr, flush=True)
    return pd.concat(parts, ignore_index=True)


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """Means by number of tokens, and their differences to the most tokens, each with its interval; a row a metric."""
    numbers = sorted(map(int, table["method"].unique()))
    summary = summarise(table).drop(columns="over").query("metric in @METRICS").rename(columns={"method": "tokens"})
    rows = []
    for row in summary.to_dict("records"):
        apart = mean_ci(paired(table, row["metric"], row["tokens"], str(numbers[-1])))
        difference = dict(zip(("difference", "difference_low", "difference_high"), map(float, apart[:3]), strict=True))
        rows.append(row | {"tokens": int(row["tokens"])} | difference)
    order = {metric: place for place, metric in enumerate(METRICS)}
    found = pd.DataFrame(rows)
    return found.sort_values(["tokens", "metric"], key=lambda x: x.map(order) if x.name == "metric" else x)


def page(found: pd.DataFrame, about: str, command: str) -> str:
    """The table as Markdown: a line a number of tokens, a column a metric, the difference below its mean."""
    most = found["tokens"].max()
    lines = ["# How many tokens does C need?", "", f"By `{command}`, which writes this page: {about}", ""]
    lines += [
        "ROME with the model's defaults, but for the number of sampled tokens that C is measured on. `0` is ROME without C.",
        f"In %, with 95% intervals over cases; then the difference to {most:,} tokens, paired within the case.",
        "",
        line(["tokens", *METRICS]),
        line("---" for _ in range(1 + len(METRICS))),
    ]
    for tokens, part in found.groupby("tokens"):
        cells = part.set_index("metric")
        means = [
            f"{x['mean']:.1f} ({x['ci_low']:.1f} to {x['ci_high']:.1f})" for _, x in cells.loc[list(METRICS)].iterrows()
        ]
        apart = [
            f"{x['difference']:+.2f} ({x['difference_low']:+.2f} to {x['difference_high']:+.2f})"
            for _, x in cells.loc[list(METRICS)].iterrows()
        ]
        lines.append(line([f"{tokens:,}", *means]))
        lines += [line(["", *apart])] if tokens != most else []
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description="How many tokens C needs.")
    parser.add_argument("--model", default="smollm2-135m", help="one with defaults of its own (%(default)s)")
    parser.add_argument("--tokens", nargs="+", type=int, default=(0, 4096, 8192, 16384, 32768, 49152, 100_000))
    parser.add_argument("--cases", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the cases (%(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no more cases are begun")
    parser.add_argument("--store", type=Path, default=Path("results"), help="where results are kept (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/tokens.csv"), help="the table (%(default)s)"
    )
    parser.add_argument("--page", type=Path, help="write the table as Markdown, too")
    given = parser.parse_args(arguments)
    lm = load_model(given.model)
    cases, known = fresh_cases(lm, given.cases, given.seed, given.store)
    print(f"{len(cases)} cases of {len(known)} known facts of {known.report.tried} tried", file=sys.stderr, flush=True)
    table = judged(lm, cases, known, given.tokens, given.store, given.minutes)
    found = compared(table)
    print(found.to_string(index=False, float_format="{:.3g}".format))
    write_atomically(given.out, lambda temporary: found.to_csv(temporary, index=False, float_format="%.5g"))
    if given.page:
        command = shlex.join(["python", "-m", "benchmarks.tokens", *(sys.argv[1:] if arguments is None else arguments)])
        about = f"{lm.name}, layer {Rome().settled(lm).layer}, {table['case'].nunique()} cases of seed {given.seed}."
        write_atomically(given.page, lambda temporary: temporary.write_text(page(found, about, command)))


if __name__ == "__main__":
    main()
