"""`ablate`: measures the contribution of each modality."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.functional import pad
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat
from transformers.utils import logging

from ...data.collator import MMDataCollator
from ...data.sources import rows_of
from ...model.answers import check_tasks, evaluation_mode, unwrapped
from ...model.generation import repeatable, writing_tasks
from ...model.label_cells import as_scalar, is_null
from ...model.modeling_mm_transformer import MMTransformerForMultiTask, MMTransformerModelOutput
from ...model.pairs import PairTask
from ...model.predictions import Predictions
from ...model.processing_mm_transformer import MMTransformerProcessor
from ...model.table import TableEncoder
from ...model.tasks import Task
from ...training.metrics import MultiTaskMetrics, less_is_better
from ...training.metrics.mismatches import Unlabelled, mismatched_rows
from ...training.metrics.written_answers import losses_of_rows
from ..reliability import Reliability, reliability
from .contributions import additive_projection, perceptual_score, shapley_values, subsets
from .encoded_rows import EncodedRows, exchanged, pairs, shown_name
from .results import Ablation, Contribution, main_metric


ComputeMetrics = Callable[[EvalPrediction], dict[str, float]]
ALL, NOTHING = "all", "nothing"
# Modalities are exchanged among this number of rows, with all encoder outputs in memory. Not `batch_size`, since no
# score may depend on it.
_WINDOW = 256
_PAIRS_AT_ONCE = 256


@torch.no_grad()
def ablate(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    rows: Sequence[Mapping[str, Any]],
    tasks: Optional[Sequence[str]] = None,
    collator: Optional[MMDataCollator] = None,
    num_permutations: int = 5,
    num_additive_rows: int = 256,
    slices: Sequence[str] = (),
    batch_size: int = 64,
    seed: int = 0,
    compute_metrics: Optional[ComputeMetrics] = None,
    **generation_options: Any,
) -> Ablation:
    """
    Scores a model on the rows as they are, with one modality alone, with one missing, with none, and with one
    exchanged.

    The result shows what each modality contributes, what the interaction of modalities contributes, and whether the
    model is calibrated.

    The encoders run once per row; the variants run the fusion and the heads only. A missing modality stays missing in
    all variants. Without any input, the model answers from its priors. Rows are taken in a random order, and exchange
    modalities with others of the same 256 rows. Labels of words are not scored where the text is missing or exchanged.

    Of a table with more than 30 columns, 30 are left out one by one: those whose removal changes the answers to 64
    random rows most. The others are only left out with the whole table; a sentence in the result says so.

    [`Matching`] judges each pair and its mismatched pairs. Mismatched pairs are drawn from all rows, as [`MMTrainer`]
    draws them, and are encoded too. Rows with an exchanged text or picture have no score: such pairs are already
    mismatched, so their labels are meaningless.

    Contributions are gains: a positive value means that the modality improves the answers. This also holds for metrics
    that are better when smaller (losses, errors).

    Args:
        model ([`MMTransformerForMultiTask`]): Runs in evaluation mode, whatever its mode.
        processor ([`MMTransformerProcessor`]): The processor of the model.
        rows: a `datasets.Dataset` or a list of dicts, with the columns that the collator reads.
        tasks (`list[str]`, *optional*): The tasks to score; all by default.
        collator ([`MMDataCollator`], *optional*): Needed if the columns have other names.
        num_permutations (`int`, *optional*, defaults to 5): How often modalities are exchanged, for mean and spread.
        num_additive_rows (`int`, *optional*, defaults to 256):
            Number of rows in the random sample for EMAP, the nearest sum of a function of the text and one of the rest.
            Each text is paired with the other inputs of each row, so the fusion runs this number squared times. 0 turns
            EMAP off.
        slices (`list[str]`, *optional*): Columns; the rows of each of their values get scores of their own.
        batch_size (`int`, *optional*, defaults to 64): Rows at once; no result depends on it.
        seed (`int`, *optional*, defaults to 0): The seed of the order, the exchanges and the sample.
        compute_metrics (*optional*): Defaults to [`MultiTaskMetrics`].
        generation_options: for `model.generate`, if a task writes texts. Nothing is drawn at random without
            `do_sample=True`.

    Raises:
        ValueError: if there are no rows, or the model reads text alone; as the collator, if a row cannot be read.

    Example:

    ```python
    >>> ablation = ablate(model, processor, data["test"])
    >>> print(ablation.to_markdown())
    >>> ablation.plot().savefig("ablation.png")
    ```
    """
    model = unwrapped(model)
    modalities = model.config.read_modalities
    if len(modalities) < 2:
        raise ValueError(f"The model reads only {modalities[0]}, so there is no modality to leave out.")
    if len(rows) == 0:
        raise ValueError("There are no rows to score the model on.")
    num_additive_rows = num_additive_rows if model.config.reads_text else 0
    collator = collator or MMDataCollator(processor, model.config)
    rows, _ = rows_of(rows, collator)
    known = sorted(name for name in rows[0] if isinstance(name, str))
    for name in slices:
        if name not in known:
            raise ValueError(f"slices names the column {name!r}, but the columns are {', '.join(known)}.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    options = repeatable(model, generation_options)
    scores = _Scores(model, modalities, check_tasks(model, tasks), batch_size, options)
    # Windows of nearly equal size, since a single row has no other row for an exchange.
    windows = np.array_split(order, -(-len(rows) // _WINDOW))
    held = 0
    for numbers in logging.tqdm(windows, desc="ablate", disable=len(windows) <= 1):
        with evaluation_mode(model):
            window = scores.encode([rows[int(i)] for i in numbers], collator)
            scores.choose_columns(window)
            scores.add(window, rng, num_permutations)
            # The order is random, so its first rows are a random sample.
            held = scores.sample(window, min(num_additive_rows, len(rows)) - held) + held
    with evaluation_mode(model):
        scores.judge_mismatches(rows, order, collator, np.random.default_rng(seed), num_permutations)
    compute_metrics = compute_metrics or MultiTaskMetrics(model.config, processor)
    columns = {name: [_slice_name(rows[int(i)].get(name)) for i in order] for name in slices}
    return scores.result(compute_metrics, columns)


class _Scores:
    """Collects the answers to all variants of the rows, window by window."""

    def __init__(
        self,
        model: MMTransformerForMultiTask,
        modalities: list[str],
        wanted: list[str],
        batch_size: int,
        generation_options: dict[str, Any],
    ):
        self.model, self.modalities, self.generation_options = model, modalities, generation_options
        self.wanted, self.batch_size = wanted, batch_size
        self.tasks: dict[str, Task] = model.tasks
        self.answers: dict[str, Any] = {}
        self.labels: Any = None
        self.window_labels: Any = None
        self.window_references: Any = None
        self.sampled: list[EncodedRows] = []
        self.additive: dict[str, torch.Tensor] = {}
        # The columns that are left out one by one -> their token, and their features for linear probes.
        self.columns: dict[str, tuple[int, list[int]]] = _columns_of(model.config.table_config)
        self.num_columns = len(self.columns)
        self.num_additive = 0
        # Missing or exchanged modalities of a variant; words have no answer if the text is one of them.
        self.without_words: set[str] = set()
        self.unscored: dict[str, set[str]] = {}  # task -> variants in which its labels are meaningless

    def encode(self, rows: Sequence[Mapping[str, Any]], collator: Callable[[Any], dict[str, Any]]) -> EncodedRows:
        """The rows after the encoders; their labels are kept."""
        parts, labels, references = [], None, None
        if isinstance(collator, MMDataCollator):
            collator = collator.with_references()
        for numbers in self._chunks(len(rows)):
            batch = send_to_device(collator([rows[int(i)] for i in numbers]), self.model.device)
            given = {
                name: value.cpu() if name in self.wanted else _missing(value.cpu())
                for name, value in batch.pop("labels").items()
            }
            labels = given if labels is None else nested_concat(labels, given)
            told = send_to_device(batch.pop("references", {}), "cpu")
            references = told if references is None else nested_concat(references, told)
            parts.append(EncodedRows.of(self.model.model, batch))
        self.window_labels, self.window_references = labels, references
        self.labels = labels if self.labels is None else nested_concat(self.labels, labels)
        return EncodedRows.together(parts)

    def choose_columns(self, window: EncodedRows) -> None:
        """Keeps the columns whose removal changes the answers most, if there are too many to leave out each."""
        if len(self.columns) <= MOST_COLUMNS:
            return
        rows = np.arange(min(window.num_rows, _RANKED_ROWS))
        names = [name for name in self.wanted if not self.tasks[name].needs_decoder]

        def logits(encoded: EncodedRows) -> dict[str, torch.Tensor]:
            found = self.model(encoder_outputs=encoded.view(dict.fromkeys(self.modalities, rows))).logits
            return {name: found[name].float() for name in names}

        whole = logits(window) if names else {}
        effects = {}
        for column, place in self.columns.items():
            rest = logits(window.without_column(*place)) if names else {}
            # In units of the spread of the logits, so that tasks can be compared.
            changes = [
                float((rest[n] - whole[n]).norm() / (whole[n] - whole[n].mean(0)).norm().clamp(1e-9)) for n in names
            ]
            effects[column] = max(changes, default=0.0)
        most = set(sorted(effects, key=lambda column: -effects[column])[:MOST_COLUMNS] if names else ())
        self.columns = {column: place for column, place in self.columns.items() if column in most}

    def add(self, window: EncodedRows, rng: np.random.Generator, num_permutations: int) -> None:
        views = self._views(window, rng, num_permutations)
        columns = {name: window.without_column(*place) for name, place in self.columns.items()}
        for chunk in self._chunks(window.num_rows):
            labels, references = _select(self.window_labels, chunk), _select(self.window_references, chunk)
            for name, (kept, rows) in views.items():
                outputs = window.view({modality: theirs[chunk] for modality, theirs in rows.items()}, kept)
                self._keep(name, self._answers(outputs, labels, references))
            for name, rest in columns.items():
                outputs = rest.view(dict.fromkeys(self.modalities, chunk))
                self._keep(f"{_COLUMN}{name}", self._answers(outputs, labels, references))

    def judge_mismatches(
        self, rows: Any, order: np.ndarray, collator: MMDataCollator, rng: np.random.Generator, num_permutations: int
    ) -> None:
        """
        Judges, in each variant, the mismatched pairs with which [`MMTrainer`] evaluates tasks that need them.

        Args:
            rows: all rows.
            order: the numbers of the rows, in the order in which they were added.
        """
        places = np.argsort(order)
        for name in (name for name in self.wanted if self.tasks[name].needs_mismatches):
            task = cast(PairTask, self.tasks[name])
            compared = {shuffle_name(m, n) for m in ("text", task.modality) for n in range(num_permutations)}
            self.unscored[name] = compared  # it is unknown whether these pairs match
            scored = [v for v in self.answers if v not in compared and not v.startswith(_COLUMN)]
            # Mismatched pairs are not judged without single columns.
            self.unscored[name] |= {f"{_COLUMN}{column}" for column in self.columns}
            for variant in scored:
                self.answers[variant][name] = pad(self.answers[variant][name][:, :1], (0, 2), value=torch.nan)
            for column, numbers, changed in mismatched_rows(task, rows, self.labels[name][places], collator):
                for part in np.array_split(np.arange(len(numbers)), -(-len(numbers) // _WINDOW)):
                    window = self._encoded(changed.__getitems__(part.tolist()), Unlabelled(collator))
                    views = self._views(window, rng, num_permutations)
                    for chunk in self._chunks(window.num_rows):
                        for variant in scored:
                            kept, whose = views[variant]
                            outputs = window.view({modality: theirs[chunk] for modality, theirs in whose.items()}, kept)
                            logits = self.model(encoder_outputs=outputs).logits[name][:, 0]
                            self.answers[variant][name][places[numbers[part[chunk]]], column] = logits.float().cpu()

    def _chunks(self, num_rows: int) -> list[np.ndarray]:
        return np.array_split(np.arange(num_rows), -(-num_rows // self.batch_size))

    def _encoded(self, rows: Sequence[Mapping[str, Any]], collator: Callable[[Any], dict[str, Any]]) -> EncodedRows:
        batches = (collator([rows[int(i)] for i in chunk]) for chunk in self._chunks(len(rows)))
        model = self.model.model
        return EncodedRows.together([EncodedRows.of(model, send_to_device(b, self.model.device)) for b in batches])

    def _views(
        self, window: EncodedRows, rng: np.random.Generator, num_permutations: int
    ) -> dict[str, tuple[frozenset[str], dict[str, np.ndarray]]]:
        """Variant -> the kept modalities, and for each modality the rows that it comes from, (num_rows,)."""
        own = np.arange(window.num_rows)
        # In the order of the tables: all first, nothing last.
        views: dict[str, tuple[frozenset[str], dict[str, np.ndarray]]] = {}
        for kept in sorted(subsets(self.modalities), key=lambda kept: -len(kept)):
            views[subset_name(kept, self.modalities)] = kept, dict.fromkeys(self.modalities, own)
        everything = frozenset(self.modalities)
        self.without_words = {name for name, (kept, _) in views.items() if "text" not in kept}
        for modality in self.modalities:
            present = window.present(modality)
            for number in range(num_permutations):
                theirs = {**dict.fromkeys(self.modalities, own), modality: exchanged(present, rng)}
                views[shuffle_name(modality, number)] = everything, theirs
                if modality == "text":
                    self.without_words.add(shuffle_name(modality, number))
        return views

    def _keep(self, variant: str, answers: dict[str, Any]) -> None:
        before = self.answers.get(variant)
        self.answers[variant] = answers if before is None else nested_concat(before, answers)

    def _answers(
        self, outputs: MMTransformerModelOutput, labels: dict[str, torch.Tensor], references: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        predictions, writing = Predictions(self.model, outputs), writing_tasks(self.tasks)
        answers: dict[str, Any] = {}
        for name, task in self.tasks.items():
            if task.needs_decoder and name not in self.wanted:
                nothing = torch.zeros(len(labels[name]), 1)
                answers[name] = {"generated_ids": nothing.long(), "losses": nothing[:, 0]}
            elif task.needs_decoder:
                given = labels[name].to(outputs.attention_mask.device)
                read = predictions.labelled_logits(name, given)
                written = self.model.write(writing[name], outputs, **self.generation_options)
                answers[name] = {"generated_ids": written.cpu(), "losses": losses_of_rows(task, read, given).cpu()}
                if name in references:
                    answers[name]["references"] = references[name]
            else:
                answers[name] = predictions.logits[name].float().cpu()
        return answers

    def sample(self, window: EncodedRows, missing: int) -> int:
        """
        Holds the first rows of the window until the sample is complete, then computes the nearest sum.

        Args:
            missing: the number of rows that the sample lacks.

        Returns:
            The number of rows that were added.
        """
        taken = min(missing, window.num_rows)
        if taken > 0:
            self.sampled.append(window)
            self.num_additive += taken
            if taken == missing:
                self.additive = self._project(EncodedRows.together(self.sampled), self.num_additive)
                self.sampled = []
        return max(taken, 0)

    def _project(self, rows: EncodedRows, num_rows: int) -> dict[str, torch.Tensor]:
        """Logits of the nearest sum on the first `num_rows`, for tasks whose answer is one row of numbers."""
        names = [n for n, t in self.tasks.items() if not (t.needs_decoder or t.is_token_level or t.compares_rows)]
        of_texts: dict[str, torch.Tensor] = {}
        of_others: dict[str, torch.Tensor] = {}
        for texts, items in pairs(num_rows, _PAIRS_AT_ONCE):
            logits = self.model(
                encoder_outputs=rows.view({name: texts if name == "text" else items for name in self.modalities})
            ).logits
            for name in names:
                values = logits[name].double().cpu()
                for means, numbers in ((of_texts, texts), (of_others, items)):
                    if name not in means:
                        means[name] = values.new_zeros(num_rows, *values.shape[1:])
                    means[name].index_add_(0, numbers, values / num_rows)
        return {name: additive_projection(of_texts[name], of_others[name]).float() for name in of_texts}

    def result(
        self,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]],
        columns: dict[str, list[str]],
    ) -> Ablation:
        measured = {name: self._metrics(name, compute_metrics) for name in self.answers}
        variants = {n: metrics for n, metrics in measured.items() if not n.startswith((_SHUFFLED, _COLUMN))}
        spreads: dict[str, dict[str, float]] = {}
        for modality in self.modalities:
            runs = [m for name, m in measured.items() if name.startswith(f"{_SHUFFLED}{modality}/")]
            if runs:
                name = f"{shown_name(modality)} shuffled"
                variants[name] = {metric: float(np.mean([run[metric] for run in runs])) for metric in runs[0]}
                spreads[name] = {metric: float(np.std([run[metric] for run in runs])) for metric in runs[0]}
        result = Ablation(
            variants, spreads, self._majority(), tasks=self.tasks, num_rows=len(self.labels[next(iter(self.tasks))]),
            num_columns=self.num_columns,
        )  # fmt: skip
        self._add_contributions(result, compute_metrics, measured)
        result.calibration = {n: c for n, t in self.tasks.items() if (c := self._calibration(n, t)) is not None}
        shown = [
            ALL,
            *dict.fromkeys(subset_name(frozenset(self.modalities) - {m}, self.modalities) for m in self.modalities),
        ]
        for column, cells in columns.items():
            result.slices[column] = {
                value: {
                    name: self._metrics(name, compute_metrics, np.flatnonzero([cell == value for cell in cells]))
                    for name in shown
                }
                for value in dict.fromkeys(cells)
            }
        return result

    def _metrics(
        self, variant: str, compute_metrics: ComputeMetrics, rows: Optional[np.ndarray] = None
    ) -> dict[str, float]:
        answers, labels = self.answers[variant], self.labels
        if variant in self.without_words:
            labels = {n: _missing(v) if self.tasks[n].is_token_level else v for n, v in labels.items()}
            answers = {n: self.answers[ALL][n] if self.tasks[n].is_token_level else v for n, v in answers.items()}
        labels = {n: _missing(v) if variant in self.unscored.get(n, ()) else v for n, v in labels.items()}
        if rows is not None:
            answers, labels = _select(answers, rows), _select(labels, rows)
        found = compute_metrics(EvalPrediction(predictions=answers, label_ids=labels))
        return {key: float(value) for key, value in found.items()}

    def _add_contributions(
        self, result: Ablation, compute_metrics: ComputeMetrics, measured: Mapping[str, Mapping[str, float]]
    ) -> None:
        everything = frozenset(self.modalities)
        additive = self._additive_metrics(compute_metrics)
        for name in self.tasks:
            metric = main_metric(name, result.variants[ALL], self.tasks)
            worths = {kept: result.variants[subset_name(kept, self.modalities)] for kept in subsets(self.modalities)}
            if metric is None or any(metric not in worth for worth in worths.values()):
                continue
            less = getattr(compute_metrics, "less_is_better", less_is_better)(metric)
            sign = -1.0 if less else 1.0
            values = shapley_values(self.modalities, lambda kept: sign * worths[kept][metric])  # noqa: B023
            score = worths[everything][metric]
            lost = {
                modality: perceptual_score(score, shuffled[metric], less)
                for modality in self.modalities
                if (shuffled := result.variants.get(f"{shown_name(modality)} shuffled")) and metric in shuffled
            }
            is_summed = additive is not None and name in self.additive
            own, summed = (metrics.get(metric) for metrics in additive) if is_summed else (None, None)
            num_rows = self.num_additive if own is not None and summed is not None else 0
            result.columns[name] = {
                column: sign * (score - measured[f"{_COLUMN}{column}"][metric])
                for column in self.columns
                if metric in measured[f"{_COLUMN}{column}"]
            }
            result.contributions[name] = Contribution(metric, values, lost, own, summed, num_rows, less)

    def _additive_metrics(self, compute_metrics: ComputeMetrics) -> Optional[tuple[dict[str, float], dict[str, float]]]:
        """The metrics of the model and of the nearest sum, on the rows of the sample."""
        if not self.additive:
            return None
        rows = np.arange(self.num_additive)
        labels, own = _select(self.labels, rows), _select(self.answers[ALL], rows)
        summed = {**own, **self.additive}
        of_own, of_sum = (compute_metrics(EvalPrediction(predictions=p, label_ids=labels)) for p in (own, summed))
        return of_own, of_sum

    def _majority(self) -> dict[str, float]:
        shares = {}
        for name, task in self.tasks.items():
            share = task.majority_share(self.labels[name])
            if share is not None:
                shares[name] = share
        return shares

    def _calibration(self, name: str, task: Task) -> Optional[Reliability]:
        found = None if task.needs_decoder else task.confidences(self.answers[ALL][name], self.labels[name])
        if found is None or len(found[0]) == 0 or not found[0].isfinite().all():
            return None
        confidences, are_right = found
        return reliability(confidences.numpy(), are_right.numpy())


_SHUFFLED, _COLUMN = "shuffled/", "without column/"
# Each column that is left out costs one more pass over all rows.
MOST_COLUMNS = 30
# The rows on which more columns than that are compared.
_RANKED_ROWS = 64


def _columns_of(table: Any) -> dict[str, tuple[int, list[int]]]:
    """Column -> its token, and the numbers of its features for linear probes."""
    # With layers between the columns, the other tokens have read the column.
    if table is None or table.num_hidden_layers:
        return {}
    tokens = TableEncoder.linear_tokens(table)
    return {
        name: (place, [feature for feature, token in enumerate(tokens) if token == place])
        for place, name in enumerate(table.token_names)
    }


def shuffle_name(modality: str, number: int) -> str:
    return f"{_SHUFFLED}{modality}/{number}"


def subset_name(kept: frozenset[str], modalities: Sequence[str]) -> str:
    """ "all", "nothing", "text only", "without sound"."""
    missing = [name for name in modalities if name not in kept]
    if not missing:
        return ALL
    if not kept:
        return NOTHING
    if len(kept) == 1:
        return f"{shown_name(next(iter(kept)))} only"
    return f"without {' and '.join(map(shown_name, missing))}"


def _missing(labels: torch.Tensor) -> torch.Tensor:
    return torch.full_like(labels, torch.nan if labels.is_floating_point() else -100)


def _select(values: Any, rows: np.ndarray) -> Any:
    return {name: _select(v, rows) if isinstance(v, Mapping) else v[rows] for name, v in values.items()}


def _slice_name(cell: Any) -> str:
    return "(none)" if is_null(cell) else str(as_scalar(cell))
