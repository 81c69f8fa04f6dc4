"""What is chosen for masked FP8 x MXFP4, against every candidate that was measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from narrowgemm.arch import get_arch
from narrowgemm.tuning import report, sweep

SWEEP = Path(__file__).parents[2] / "benchmarks" / "results" / "h100" / "2026-11-26-mxfp4-masked-spread-sweep.json"

STAGES = {32: 7, 96: 7, 160: 6}      # of that sweep, by tokens of a tile


def as_measured(chosen: str) -> str:
    """That sweep had slots of one K block, where tiles have slots of two now: three of them in 32 x 128 are 1 to 13% faster."""
    kernel, _, config = chosen.partition(" ")
    fields = json.loads(config)
    if fields.pop("box", 1) == 2:
        fields.pop("stream", None)
        fields["num_stages"] = STAGES[fields["block_m"]]
    return f"{kernel} {json.dumps(fields, sort_keys=True)}"


def test_choices_are_close_to_the_best_that_was_measured() -> None:
    """From 1 to 64 groups of 1 to 2048 rows. Sizes of groups are the device's: where they are far from their mean, or a round of tiles more or
    less hangs on them, another candidate can be a third faster. What decides is that most choices are within 5%, which those of fitted
    figures alone were not."""
    data = sweep.read(SWEEP)
    choose = report.current(get_arch(data["arch"]))
    losses = []
    for record in data["cases"]:
        field = {sweep.name(c): c["us"] for c in sweep.timed(record)}
        if (chosen := as_measured(choose(record))) in field:
            losses.append(field[chosen] / min(field.values()))
    assert len(losses) >= 0.95 * len(data["cases"]) >= 140
    assert statistics.geometric_mean(losses) < 1.04 and max(losses) < 1.4
    assert sum(x <= 1.05 for x in losses) >= 0.78 * len(losses)
