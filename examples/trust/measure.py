"""
How far can the answers be trusted? Coverage of sets and intervals, calibration errors, odd rows and advice, from what
`answers.py` has stored.

    python examples/trust/measure.py --answers trust --output docs/results/trust.json

For each of many random splits, half of the held-out rows calibrate and the other half measures. A row is in three
groups: whole, without its picture, and without its text.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from mm_transformers import Task
from mm_transformers.analysis.calibration.cells import advice_tables
from mm_transformers.analysis.calibration.hidden_parts import GroupRows
from mm_transformers.analysis.calibration.labelled_rows import has_outcome
from mm_transformers.analysis.calibration.measures import accuracy_at, class_wise_error, risk_coverage
from mm_transformers.analysis.calibration.odd_rows import fit_oddness
from mm_transformers.analysis.calibration.temperatures import fit_temperatures, tempered
from mm_transformers.analysis.reliability import chance_error, reliability
from mm_transformers.model.task_base import task_from_dict


COVERAGES = (0.8, 0.9, 0.95)
# Splits in which temperatures are fitted; thresholds are fitted in all.
FITTED_SPLITS = 5
Groups = dict[str, GroupRows]


def halves(num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    return order[: num_rows // 2], order[num_rows // 2 :]


def of(groups: Groups, task: Task, group: str, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and labels of the labelled rows with these numbers."""
    rows = groups[group].chosen(torch.isin(groups[group].numbers, numbers))
    known = has_outcome(rows.labels[task.name])
    return rows.logits[task.name][known], rows.labels[task.name][known]


def regions(task: Task, logits: torch.Tensor, labels: torch.Tensor, threshold: float) -> tuple[float, float, float]:
    """
    The share of the rows whose set or interval holds the truth, and the mean size. Last the share without the rule that
    a set is never empty: with it, a set of a task that is right more often than promised holds the truth more often.
    """
    probabilities = task.probabilities(logits)
    if probabilities is None:
        held = float(((logits - labels).abs() <= threshold).float().mean())
        return held, 2 * threshold, held
    # As `Task.add_region` does for one row after the other.
    within = 1 - probabilities <= threshold
    exact = within.gather(1, labels[:, None]).float().mean()
    within |= torch.nn.functional.one_hot(probabilities.argmax(1), within.shape[1]).bool()
    held = within.gather(1, labels[:, None]).float().mean()
    return float(held), float(within.sum(1).float().mean()), float(exact)


def coverage(task: Task, known: Groups, new: Groups, num_splits: int) -> dict[str, Any]:
    """Group -> coverage -> what was measured, with one threshold by group, and with one for all groups."""
    num_rows = int(max(rows.numbers.max() for rows in new.values())) + 1
    found: dict[str, Any] = {}
    for split in range(num_splits):
        first, second = halves(num_rows, split)
        parts = {group: of(known, task, group, first) for group in known}
        shared, _ = task.conformal_thresholds(
            *(torch.cat(part) for part in zip(*parts.values(), strict=True)), COVERAGES
        )
        for group, part in parts.items():
            own, count = task.conformal_thresholds(*part, COVERAGES)
            logits, labels = of(new, task, group, second)
            for place, level in enumerate(COVERAGES):
                one = found.setdefault(group, {}).setdefault(str(level), {"rows": count, "own": [], "shared": []})
                one["own"].append(regions(task, logits, labels, own[place]))
                one["shared"].append(regions(task, logits, labels, shared[place]))
    return {group: {level: _summary(one) for level, one in levels.items()} for group, levels in found.items()}


def _summary(one: dict[str, Any]) -> dict[str, Any]:
    result = {"calibration_rows": one["rows"]}
    for kind in ("own", "shared"):
        covered, sizes, exact = np.array(one[kind]).T
        result |= {f"{kind}_coverage": covered.mean(), f"{kind}_spread": covered.std(), f"{kind}_size": sizes.mean()}
        result[f"{kind}_exact"] = exact.mean()
    return result


def errors(task: Task, groups: Groups) -> dict[str, Any]:
    """
    Group -> calibration errors before and after; under "mixed" the accuracy of the surest 70%.

    Each row is measured with temperatures of the other half. In "mixed", each row is in one group, drawn at random.
    """
    found: dict[str, list[Any]] = {group: [] for group in groups}
    mixed = []
    num_rows = int(max(rows.numbers.max() for rows in groups.values())) + 1
    for split in range(FITTED_SPLITS):
        parts = halves(num_rows, 1000 + split)
        confidences: dict[str, Any] = {}
        for group, rows in groups.items():
            raw = rows.logits[task.name]
            own, shared = raw.clone(), raw.clone()
            labels = rows.labels[task.name]
            for fitted_on, applied_to in (parts, parts[::-1]):
                there = torch.isin(rows.numbers, applied_to)
                own[there] = tempered(task, raw[there], fit_temperatures(task, *of(groups, task, group, fitted_on)))
                pooled = [of(groups, task, other, fitted_on) for other in groups]
                shared[there] = tempered(
                    task, raw[there], fit_temperatures(task, *(torch.cat(part) for part in zip(*pooled, strict=True)))
                )
            found[group].append([value for logits in (raw, own) for value in _errors(task, logits, labels)])
            confidences[group] = {name: task.confidences(logits, labels) for name, logits in
                                  (("none", raw), ("shared", shared), ("by group", own))}  # fmt: skip
        drawn = np.random.default_rng(split).integers(0, len(groups), num_rows)
        mixed.append({name: _surest(confidences, name, drawn) for name in ("none", "shared", "by group")})
    names = ("before", "class_wise_before", "chance_before", "after", "class_wise_after", "chance_after")
    result: dict[str, Any] = {
        group: dict(zip(names, np.mean(values, axis=0).tolist(), strict=True)) for group, values in found.items()
    }
    for group, rows in groups.items():
        right = task.confidences(rows.logits[task.name], rows.labels[task.name])[1]
        result[group]["accuracy"] = float(right.float().mean())
    result["mixed"] = {name: np.mean([one[name] for one in mixed], axis=0).tolist() for name in mixed[0]}
    return result


def _errors(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
    confidence, right = task.confidences(logits, labels)
    values = confidence.double().numpy()
    by_label = class_wise_error(task.probabilities(logits), labels)
    return reliability(values, right.numpy()).ece, by_label, chance_error(values)


def _surest(confidences: dict[str, Any], name: str, drawn: np.ndarray) -> list[float]:
    """The accuracy of the surest 50, 70 and 90%."""
    together = [
        (confidence.numpy()[drawn == number], right.numpy()[drawn == number])
        for number, (confidence, right) in enumerate(one[name] for one in confidences.values())
    ]
    curve = risk_coverage(*(np.concatenate(part) for part in zip(*together, strict=True)))
    return [accuracy_at(curve, share) for share in (0.5, 0.7, 0.9)]


def odd_rows(groups: Groups, train: Groups, foreign: Groups, with_training: bool) -> dict[str, Any]:
    """Group -> AUROC of other rows against those of the other data set, and the shares that get a warning."""
    num_rows = int(max(rows.numbers.max() for rows in groups.values())) + 1
    first, second = halves(num_rows, 0)
    known = {group: rows.chosen(torch.isin(rows.numbers, first)) for group, rows in groups.items()}
    oddness = fit_oddness(known, train if with_training else None)
    found = {}
    for group, rows in groups.items():
        own = rows.chosen(torch.isin(rows.numbers, second))
        scores = [[odd.score for odd in oddness(part.vectors, [group] * len(part.numbers))]
                  for part in (own, foreign[group])]  # fmt: skip
        truth = [0] * len(scores[0]) + [1] * len(scores[1])
        warned = [float(np.mean(np.array(values) > 1)) for values in scores]
        found[group] = {"auroc": float(roc_auc_score(truth, scores[0] + scores[1])), "false_alarms": warned[0],
                        "found": warned[1]}  # fmt: skip
    return found


def advice(task: Task, groups: Groups) -> dict[str, Any]:
    """Group -> the mean gap between promised and measured share of right answers (or error), bin by bin."""
    num_rows = int(max(rows.numbers.max() for rows in groups.values())) + 1
    gaps: dict[str, list[list[float]]] = {}
    for split in range(FITTED_SPLITS):
        told = []
        for numbers in halves(num_rows, 2000 + split):
            part = {group: rows.chosen(torch.isin(rows.numbers, numbers)) for group, rows in groups.items()}
            told.append((part, advice_tables(task, part, {})))
        (_, tables), (new, _) = told
        for group, found in tables.items():
            whole = new["text + vision"]
            for table in found.values():
                rows = new[group]
                confidences = task.answer_confidences(rows.logits[task.name])
                places = np.zeros(len(rows.numbers), int) if confidences is None else np.searchsorted(
                    table["edges"], confidences.double().numpy(), side="right")  # fmt: skip
                now = task.outcomes(rows.logits[task.name], rows.labels[task.name])[1].numpy()
                then = task.outcomes(whole.logits[task.name], whole.labels[task.name])[1].numpy()
                for number in range(len(table["now"])):
                    there = (places == number) & ~np.isnan(now)
                    if there.any():
                        one = [table["now"][number], now[there].mean(), table["then"][number], then[there].mean()]
                        gaps.setdefault(f"{group}, bin {number + 1}", []).append(one)
    names = ("now_told", "now_measured", "then_told", "then_measured")
    return {name: dict(zip(names, np.mean(values, axis=0).tolist(), strict=True)) for name, values in gaps.items()}


def one_model(file: Path, num_splits: int) -> dict[str, Any]:
    stored = torch.load(file, weights_only=True)
    read: Callable[[Any], Groups] = lambda part: {group: GroupRows(**rows) for group, rows in part.items()}  # noqa: E731
    held_out = {name: read(part) for name, part in stored["held_out"].items()}
    train, foreign = read(stored["train"]), read(stored["foreign"])
    result: dict[str, Any] = {}
    first = next(iter(held_out.values()))
    for task in map(task_from_dict, stored["tasks"]):
        found = result.setdefault(task.name, {"coverage": {}})
        for calibrated_on, known in held_out.items():
            for measured_on, new in held_out.items():
                found["coverage"][f"{calibrated_on} -> {measured_on}"] = coverage(task, known, new, num_splits)
        if task.label_names:
            found["errors"] = {name: errors(task, groups) for name, groups in held_out.items()}
        found["advice"] = advice(task, first)
    result["odd rows"] = {str(flag): odd_rows(first, train, foreign, flag) for flag in (True, False)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, default=Path("trust"), help="folder of answers.py (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("trust.json"), help="where to write (%(default)s)")
    parser.add_argument("--splits", type=int, default=200, help="random splits (%(default)s)")
    args = parser.parse_args()
    found = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for file in sorted(args.answers.glob("*.pt")):
        if file.stem not in found:
            found[file.stem] = one_model(file, args.splits)
            args.output.write_text(json.dumps(_rounded(found), indent=1) + "\n")
            print(f"measured {file.stem}", flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(float(value), 4) if isinstance(value, (float, np.floating)) else value


if __name__ == "__main__":
    main()
