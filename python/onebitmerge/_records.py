"""What calls take and return that is more than text: dataclasses, whose module takes longer to import than the C core."""

from __future__ import annotations

import dataclasses
import os
from typing import Mapping, NamedTuple

from . import _calls


class Score(NamedTuple):
    """logprob: natural logarithm, summed over token_logprobs; perplexity = exp(-logprob / tokens)."""

    logprob: float
    token_logprobs: list[float]
    is_greedy: bool
    perplexity: float
    route: dict[str, float] | None


@dataclasses.dataclass
class RouterReport:
    """Of the held-out part: accuracy, expected calibration error (10 bins), confusion[true][predicted]."""

    accuracy: float
    calibration_error: float
    confusion: list[list[int]]
    tasks: list[str]
    layer: int
    n_train: int
    n_held_out: int

    def __str__(self):
        width = max(map(len, self.tasks + ["true \\ routed"]))
        lines = [f"router on layer {self.layer}: held-out accuracy {100 * self.accuracy:.1f} % of {self.n_held_out}, "
                 f"calibration error {self.calibration_error:.3f} ({self.n_train} training prompts)",
                 "true \\ routed".ljust(width) + "".join(f"{t:>10}" for t in self.tasks)]
        lines += [t.ljust(width) + "".join(f"{n:>10}" for n in row) for t, row in zip(self.tasks, self.confusion)]
        return "\n".join(lines)

    def _repr_html_(self):
        import html
        head = "".join(f"<th>{html.escape(t)}</th>" for t in self.tasks)
        rows = "".join(f"<tr><th>{html.escape(t)}</th>" + "".join(f"<td>{n}</td>" for n in row) + "</tr>"
                       for t, row in zip(self.tasks, self.confusion))
        return (f"<p>held-out accuracy {100 * self.accuracy:.1f} % of {self.n_held_out}, calibration error "
                f"{self.calibration_error:.3f}</p><table><tr><th>true \\ routed</th>{head}</tr>{rows}</table>")


@dataclasses.dataclass
class Expert:
    """An expert to compress: path, and how.

    policy: "linear" (default), "attention", "mlp", "paper", "full"; scale: "row" (default), "matrix", "group:N";
    planes: sign planes per matrix; map: {glob: "1bit" | "mask" | "full" | "drop"}, tried before the policy.
    """

    path: str | os.PathLike
    policy: str | None = None
    scale: str | None = None
    planes: int = 0
    map: Mapping[str, str] | None = None


Expert.__init__ = _calls.keywords(Expert.__init__)   # type: ignore[method-assign]
