"""Edit after edit: `sequence` makes one change after the other, each found on the model with those before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rome_lab.methods import Method, Proposal, Request
from rome_lab.models import LanguageModel
from rome_lab.optimised import Optimised


def sequence(
    lm: LanguageModel, requests: Sequence[Request], method: Method, optimised: Optimised | None = None
) -> Iterator[Proposal]:
    """One change after the other, each found on the model with all before it in place.

    C and the prefixes are measured once, on the model as it is. `lm` is changed only while the next change is found:
    between two of them, and after the last, after an exception too, it is bit for bit what it was.

    Args:
        optimised: for `lm` as it is; a new one that stores nothing by default.

    Yields: after each request the sum of the changes so far, with the remark of the last one. Where a change comes to
        nothing, or the method fails with a ValueError, the sum stays as it was.
    """
    optimised = optimised or Optimised(lm)
    method = method.settled(lm)
    total = Proposal()
    for request in requests:
        # The first change that needs C or the prefixes finds nothing in place yet: they are those of `lm` as it is.
        try:
            with total.applied(lm):
                found = method.change(lm, [request], optimised.anew())
        except ValueError as error:
            found = Proposal(remark=str(error), failed=True)
        deltas = [x.delta for x in (total, found) if x.delta is not None]
        layer = total.layer if found.layer is None else found.layer
        total = Proposal(
            layer, sum(deltas) if deltas else None, total.preamble + found.preamble, found.remark, found.failed
        )
        yield total
