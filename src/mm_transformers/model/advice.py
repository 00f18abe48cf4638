"""Which missing part would help a row most, by calibration rows that had it hidden."""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Optional

from .modalities import ENCODERS


def advice_for(tables: Mapping[str, Any], confidence: Optional[float]) -> list[dict[str, Any]]:
    """
    The expected gain of each missing modality, the highest first.

    Args:
        tables: missing modality -> its table: bins of rows by their confidence without it, between the `"edges"`. Each
            bin has the mean `"measure"` without (`"now"`) and with the modality (`"then"`), and the number of `"rows"`.
        confidence: of the answer; `None` for answers without one.

    Returns:
        For each missing modality a dict with `"add"`, `"measure"` (`"right"` or `"error"`), `"now"`, `"then"`,
        `"rows"` and a `"text"` for people.
    """
    found = []
    for name, table in tables.items():
        place = bisect_right(table["edges"], confidence) if confidence is not None else 0
        now, then = table["now"][place], table["then"][place]
        told = {"add": name, "measure": table["measure"], "now": now, "then": then, "rows": table["rows"][place]}
        found.append({**told, "text": _sentence(told)})
    return sorted(found, key=lambda one: one["now"] - one["then"] if one["measure"] == "right" else
                  one["then"] - one["now"])  # fmt: skip


def _sentence(told: Mapping[str, Any]) -> str:
    noun = ENCODERS[told["add"]].noun if told["add"] in ENCODERS else told["add"]
    article = "an" if noun[0] in "aeiou" else "a"
    if told["measure"] == "right":
        change = f"{told['then']:.0%} of such rows are right instead of {told['now']:.0%}"
    else:
        change = f"the mean error of such rows is {told['then']:.3g} instead of {told['now']:.3g}"
    return f"With {article} {noun}, {change} ({told['rows']} rows)."
