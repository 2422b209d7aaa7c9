"""The command line: `rome_lab figures | trace | edit | evaluate | report | verify | train | suggest-layer`, or
`python -m rome_lab`.

A further command is a function that takes the parsed options, and its parser in `command_parser`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pandas as pd
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from rome_lab.base import check_file, package_versions
from rome_lab.editing import EDITORS, TRAINED, Training, suggest_layer, train_editor, verify
from rome_lab.facts import Fact
from rome_lab.lab.batch import (
    NotebookError,
    list_parameters,
    parser,
    read_parameters_file,
    run_all,
    shared_out,
    take_parameters,
)
from rome_lab.lab.growing import TRACED, draw_figures
from rome_lab.lab.plots import cell_table, heatmap, save_figure, save_table
from rome_lab.lab.reporting import report
from rome_lab.lab.trials import EditRequest, try_edit
from rome_lab.lab.typed_facts import fact_of
from rome_lab.models import IMPOSSIBLE, WRONG, LanguageModel, load_model
from rome_lab.tracing import KINDS, causal_trace

PROMPT = '"The Eiffel Tower is located in the city of" "Eiffel Tower"'
# The options that are parameters of notebooks, and the sizes that the commands take.
OPTIONS = ("model", "dtype", "dataset", "seed", "figures", "n_facts", "n_cases")
N_FACTS, N_CASES = 12, 25
PASSED_ON = (
    "What else is given goes to `python -m rome_lab.batch`: -p NAME VALUE for other parameters, --runs, --quiet."
)


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a notebook that failed, 2 for bad input, 130 for Ctrl-C."""
    parser = command_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.in_batch:
        parser.error(f"{options.command} does not know {' '.join(rest)}; see rome_lab {options.command} --help")
    options.rest = rest
    try:
        return options.run(options) or 0
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        print(f"rome_lab {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\n{error}" if error.args else "\nInterrupted.", file=sys.stderr)
        return 130


def command_parser() -> argparse.ArgumentParser:
    """All commands with their options, an example each."""
    parser = argparse.ArgumentParser(
        prog="rome_lab", description="Find where a language model keeps a fact, and change it."
    )
    parser.add_argument("--version", action="version", version=f"rome_lab {package_versions(['rome_lab'])['rome_lab']}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: object, about: str, example: str, in_batch: bool = False, of_prompt: bool = True
    ) -> argparse.ArgumentParser:
        epilog = f"example: rome_lab {name} {example}" + (f"\n\n{PASSED_ON}" if in_batch else "")
        layout = argparse.RawDescriptionHelpFormatter
        branch = commands.add_parser(name, help=about, description=about, epilog=epilog, formatter_class=layout)
        branch.set_defaults(run=run, in_batch=in_batch)
        # In batch what is not given is left to the file of parameters, if there is one, and else to the notebooks.
        default = argparse.SUPPRESS if in_batch else None
        about = "embedded, a hub id, or a folder (smollm2-135m)"
        branch.add_argument("--model", default=default or "smollm2-135m", help=about)
        branch.add_argument("--dtype", default=default or "float32", help="or bfloat16, float16 (float32)")
        if of_prompt and not in_batch:
            branch.add_argument(
                "prompt",
                help='the beginning of a sentence, which stops right before the answer; "{}" may stand for the subject',
            )
            branch.add_argument("subject", help="what the prompt is about")
        return branch

    branch = command(
        "figures",
        trace_and_draw,
        "trace known facts; draw Figures 1, 2, 3 and 7 and the claims table",
        "--n-facts 100 --figures mine",
        True,
    )
    add_notebook_options(branch, "n-facts", N_FACTS, "known facts to trace")

    branch = command(
        "trace", trace_prompt, "trace one prompt; write a heatmap with its numbers", f"{PROMPT} --kind mlp"
    )
    branch.add_argument("--kind", default="state", choices=list(KINDS), help="what is restored (%(default)s)")
    branch.add_argument("--samples", type=int, default=10, help="of the noise (%(default)s)")
    branch.add_argument("--out", type=Path, default=Path("trace"), help="name of the PDF, PNG and CSV (%(default)s)")

    branch = command(
        "edit",
        edit_prompt,
        "make the model say something else; save the edit as a small file",
        f"{PROMPT} Rome --out rome.safetensors",
    )
    branch.add_argument("target", help="what the model is to say")
    add_edit_options(branch)
    branch.add_argument("--out", type=Path, default=Path("edit.safetensors"), help="where the edit goes (%(default)s)")

    branch = command(
        "evaluate",
        evaluate_methods,
        "judge ROME beside other methods, and many edits in one model",
        "--n-cases 25 --edits 1,3,10",
        True,
    )
    add_notebook_options(branch, "n-cases", N_CASES, "known cases to judge")
    about = "numbers of edits in one model (1,3,10); none to leave that out"
    branch.add_argument("--edits", default=argparse.SUPPRESS, help=about)

    branch = command(
        "report",
        write_report,
        "write a page about one fact, with an edit where there is a target",
        f"{PROMPT} --target Rome",
    )
    branch.add_argument("--target", help="what the model is to say instead")
    add_edit_options(branch)
    branch.add_argument("--out", type=Path, default=Path("report.html"), help="where the page goes (%(default)s)")
    about = "compare traces and an edit of a model with plain runs; the exit status is 1 where one is wrong or none possible"
    command("verify", verify_model, about, "--model EleutherAI/pythia-160m", of_prompt=False)
    about = "train MEND and KE to edit a model, on facts that nothing is judged by (an hour)"
    branch = command("train", train, about, "--editors mend --steps 2000", of_prompt=False)
    branch.add_argument("--editors", default=",".join(TRAINED), help="which, with commas (%(default)s)")
    branch.add_argument(
        "--steps", type=int, help="of each training; evaluate has rows of editors with their own steps only"
    )
    branch.add_argument("--out", type=Path, default=Path("editors.csv"), help="where its course goes (%(default)s)")
    about = "try several layers on facts that the model knows, and say which to edit (minutes)"
    branch = command("suggest-layer", suggest, about, "--model EleutherAI/pythia-160m --layers 2,3,4", of_prompt=False)
    branch.add_argument("--layers", help="to try, such as 2,3,4; by default some of the lower half")
    branch.add_argument("--n-facts", type=int, default=8, help="known facts to edit (%(default)s)")
    return parser


def add_notebook_options(branch: argparse.ArgumentParser, number: str, default: int, about: str) -> None:
    """What the commands that run notebooks share."""
    left_out = {"default": argparse.SUPPRESS}
    where = "embedded, known_1000, counterfact, zsre, or a CSV or JSON file (embedded)"
    branch.add_argument("--dataset", **left_out, help=where)
    branch.add_argument(f"--{number}", type=int, **left_out, help=f"{about} ({default})")
    branch.add_argument("--seed", type=int, **left_out, help="of all that is chosen at random (0)")
    where = "folder for what is drawn; figures, or one below it where others are there"
    branch.add_argument("--figures", **left_out, help=where)


def add_edit_options(branch: argparse.ArgumentParser) -> None:
    """What the commands that edit share."""
    branch.add_argument("--layer", type=int, help="whose MLP to change; by default the model's own")
    about = "how to edit (%(default)s); all but rome change several layers, which end at that one"
    branch.add_argument("--method", default="rome", choices=EDITORS, help=about)
    branch.add_argument("--tokens", type=int, help="how many to measure C on; fewer are quicker")


def notebook_path(name: str) -> str:
    """Of one of the project's notebooks, which come with the package.

    Raises:
        FileNotFoundError: the package is installed without them.
    """
    path = files("rome_lab") / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no notebook {path}; install rome_lab anew, with `pip install .` in its checkout."
        )
    return str(path)


def batch_options(
    options: argparse.Namespace, names: Sequence[str], defaults: Mapping[str, object], **values: object
) -> tuple[argparse.Namespace, dict[str, object]]:
    """The options of the batch runner for these notebooks, and the parameters for all of them.

    What -p gives counts most; then the command's own options, and these values; then the file; then the defaults.
    """
    given, rest = take_parameters(options.rest)
    batch = parser().parse_args([*map(notebook_path, names), *rest])
    from_file = read_parameters_file(batch.params) if batch.params else {}
    own = {name: value for name, value in vars(options).items() if name in OPTIONS}
    return batch, {**defaults, **from_file, **own, **values, **given}


def trace_and_draw(options: argparse.Namespace) -> None:
    batch, parameters = batch_options(options, TRACED, {"n_facts": N_FACTS})
    if batch.list:
        return list_parameters(batch.notebooks)
    disable_progress_bar()  # one bar shows all
    executed = draw_figures(batch.notebooks[0].parent, parameters, batch.runs, not batch.quiet)
    print(f"The notebooks as they were run are in {executed.parent}, such as {executed}.")


def evaluate_methods(options: argparse.Namespace) -> None:
    names, defaults, values = ["evaluation"], {"n_cases": N_CASES}, {}
    edits = getattr(options, "edits", "")
    if edits != "none":
        names, defaults = [*names, "many_edits"], defaults | {"sizes": [1, 3, 10], "least": 10}
        values = {"sizes": whole_numbers("--edits", edits)} if "edits" in options else {}
    batch, parameters = batch_options(options, names, defaults, **values)
    if batch.list:
        return list_parameters(batch.notebooks)
    run_all(shared_out(batch.notebooks, parameters), batch.runs, not batch.quiet)


def model_and_fact(options: argparse.Namespace) -> tuple[LanguageModel, Fact]:
    lm = load_model(options.model, dtype=options.dtype)
    return lm, fact_of(lm, options.subject, options.prompt)


def trace_prompt(options: argparse.Namespace) -> None:
    ends = (".pdf", ".png", ".csv")
    stem = options.out.with_suffix("") if options.out.suffix in ends else options.out
    written = [Path(f"{stem}{end}") for end in ends] if stem.name else [stem]
    for path in written:
        check_file("trace", path)
    lm, fact = model_and_fact(options)
    kind, severed = KINDS[options.kind]
    trace = causal_trace(lm, fact.prompt, fact.subject, kind, samples=options.samples, severed=severed)
    print(trace)
    save_figure(heatmap(trace).figure, cell_table(trace), stem)
    print(*written, sep="\n")


def edit_prompt(options: argparse.Namespace) -> None:
    check_file("edit", options.out)
    lm, fact = model_and_fact(options)
    request = EditRequest(fact, options.target, options.layer, tokens=options.tokens, method=options.method)
    with tqdm(bar_format="{elapsed} {desc}") as line:
        tried = try_edit(lm, request, lambda doing, done: line.set_description_str(doing))
    print(tried)
    print(tried.edit.save(options.out))


def write_report(options: argparse.Namespace) -> None:
    check_file("report", options.out)
    lm, fact = model_and_fact(options)
    how = {"layer": options.layer, "tokens": options.tokens, "method": options.method}
    print(report(lm, fact, options.target, options.out, **how))


def whole_numbers(option: str, text: str, least: int = 1) -> list[int]:
    """What an option says, as numbers.

    Raises: ValueError: it does not say any, or one below the least.
    """
    numbers = [int(x) if x.strip().isdecimal() else -1 for x in text.split(",")]
    if min(numbers) < least:
        raise ValueError(f"{option} is {text!r}; write numbers from {least} with commas, such as 1,3,10.")
    return numbers


def suggest(options: argparse.Namespace) -> None:
    layers = None if options.layers is None else whole_numbers("--layers", options.layers, 0)
    suggestion = suggest_layer(load_model(options.model, dtype=options.dtype), layers=layers, n=options.n_facts)
    print(suggestion.for_people().to_string(index=False), suggestion, sep="\n\n")


def train(options: argparse.Namespace) -> None:
    check_file("train", options.out)
    trainings = [Training(name.strip()) for name in options.editors.split(",")]
    if options.steps is not None:
        trainings = [replace(training, steps=options.steps) for training in trainings]
    lm, histories = load_model(options.model, dtype=options.dtype), []
    for training in trainings:
        editor = train_editor(lm, training)
        print(editor)
        histories.append(editor.history.assign(editor=training.name, kept=editor.history["step"] == editor.best))
    save_table(pd.concat(histories, ignore_index=True).assign(model=lm.name), options.out)
    print(f"How the training went is in {options.out}.")


def verify_model(options: argparse.Namespace) -> int:
    table = verify(load_model(options.model, dtype=options.dtype))
    print(table.to_string(index=False))
    verdicts = set(table["verdict"])
    if verdicts == {IMPOSSIBLE}:
        print("Nothing could be verified; the remarks say why.", file=sys.stderr)
    return int(WRONG in verdicts or verdicts == {IMPOSSIBLE})
