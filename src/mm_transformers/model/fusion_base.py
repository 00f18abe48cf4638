"""The base class of fusion kinds, and their registry."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig

from .registry import registered


FUSION_KINDS: dict[str, type["Fusion"]] = {}

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Stream(NamedTuple):
    """
    The tokens of one modality beside the text: [`hidden_states`] and [`mask`], row by row.

    They are stored item by item (image, clip of sound). So operations on single tokens run once for an item that
    several rows share; see [`each`].

    Args:
        name: "vision".
        tokens (num_items, item_length, fusion_hidden_size): the tokens of the distinct items.
        token_mask (num_items, item_length) bool, *optional*: True at tokens, False at padding; by default True
            everywhere.
        item_index (batch, max_items) int64, *optional*: the items of each row, -1 for none. By default row i has item
            i, so `Stream(name, hidden_states, mask)` holds rows unchanged.
        offsets (batch, max_items, fusion_hidden_size), *optional*: added to the tokens of each item in each row.
        scales (batch, max_items, fusion_hidden_size), *optional*: the tokens are first multiplied by 1 plus these.
        is_full: whether every place of every row is known to hold a token, without reading the tensors.
        item_means (num_items, encoder width), *optional*: the mean of the encoder outputs of each item, for linear
            probes; 0 for a missing text. Of an encoder of ours, its linear features.
        token_ids (num_items, item_length) int64, *optional*: the ids of a text that a language model continues, or that
            its encoder reads beside the other modalities; -1 at the learned vector of a missing text.

    Example:

    ```python
    >>> Stream("vision", torch.zeros(2, 5, 8)).mask.shape  # two rows with one image of five tokens each
    torch.Size([2, 5])
    ```
    """

    name: str
    tokens: torch.Tensor
    token_mask: Optional[torch.Tensor] = None
    item_index: Optional[torch.Tensor] = None
    offsets: Optional[torch.Tensor] = None
    is_full: bool = False
    item_means: Optional[torch.Tensor] = None
    scales: Optional[torch.Tensor] = None
    token_ids: Optional[torch.Tensor] = None

    @property
    def differs_by_row(self) -> bool:
        """Whether an item that several rows share may have other tokens in each of them."""
        return self.offsets is not None or self.scales is not None

    @property
    def row_means(self) -> Optional[torch.Tensor]:
        """(batch, encoder width): the mean of `item_means` over the items of each row; 0 where a row has none."""
        if self.item_means is None or self.item_index is None:
            return self.item_means
        has_item = (self.item_index >= 0)[..., None]
        means = self.item_means.index_select(0, self.item_index.clamp(min=0).flatten())
        means = means.unflatten(0, self.item_index.shape)
        # Not multiplied by 0, since NaN * 0 is NaN.
        return torch.where(has_item, means, 0).sum(1) / has_item.sum(1).clamp(min=1)

    @property
    def hidden_states(self) -> torch.Tensor:
        """(batch, length, fusion_hidden_size): the tokens of all the items of each row, side by side."""
        states = self._by_row(self.tokens)
        if self.scales is not None:
            states = states * (1 + self.scales.repeat_interleave(self.tokens.shape[1], dim=1))
        if self.offsets is not None:
            states = states + self.offsets.repeat_interleave(self.tokens.shape[1], dim=1)
        return states

    @property
    def mask(self) -> torch.Tensor:
        """(batch, length) bool: True where there is a token; a row without an item has none."""
        items, length = self.tokens.shape[:2]
        token_mask = self.token_mask
        if token_mask is None and self.item_index is None:
            return torch.ones(items, length, dtype=torch.bool, device=self.tokens.device)
        if self.item_index is None:
            return token_mask
        has_item = (self.item_index >= 0).repeat_interleave(length, dim=1)
        return has_item if token_mask is None else self._by_row(token_mask) & has_item

    @property
    def row_ids(self) -> Optional[torch.Tensor]:
        """(batch, length) int64: `token_ids` row by row."""
        return None if self.token_ids is None else self._by_row(self.token_ids)

    @property
    def present(self) -> torch.Tensor:
        """(batch,) bool: the rows with an item in this stream."""
        return (self.mask if self.token_mask is not None or self.item_index is None else self.item_index >= 0).any(-1)

    def each(self, layer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """
        `layer(self.hidden_states)`, for a layer that treats every token on its own, such as a linear one.

        Masked places may have other values. (batch, length, output width of the layer)
        """
        if self.differs_by_row:
            return layer(self.hidden_states)
        return self._by_row(layer(self.tokens))

    def of_rows(self, rows: torch.Tensor) -> "Stream":
        """The stream of these rows, (num_rows,) int64."""
        if self.item_index is None:
            return self._replace(item_index=rows[:, None])
        of_places = {name: value[rows] for name in ("offsets", "scales") if (value := getattr(self, name)) is not None}
        return self._replace(item_index=self.item_index[rows], **of_places)

    def _by_row(self, of_items: torch.Tensor) -> torch.Tensor:
        """(num_items, item_length, ...) -> (batch, length, ...); arbitrary (masked) values for missing items."""
        if self.item_index is None:
            return of_items
        # Its gradient is several times as fast as that of `of_items[index]`.
        gathered = of_items.index_select(0, self.item_index.clamp(min=0).flatten())
        return gathered.unflatten(0, self.item_index.shape).flatten(1, 2)


class AttentionStep(NamedTuple):
    """
    One attention of a fusion, with its queries and keys.

    Args:
        queries, keys: the groups of tokens side by side: "text", names of streams, or further groups of a kind, such as
            "latents". Equal ones are a self-attention; otherwise the keys are those at the start of the layer.
        weights (batch, heads, length of the queries, length of the keys): the attention.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    weights: torch.Tensor


class FusionOutput(NamedTuple):
    """
    The output of a fusion.

    Args:
        hidden_states (batch, text_len, hidden_size): the fused states of the text tokens.
        all_hidden_states: the text states before and after each layer, if requested; `None` for layers that were not.
        layers: the attentions of each layer, in order, if requested.
    """

    hidden_states: torch.Tensor
    all_hidden_states: Optional[tuple[Optional[torch.Tensor], ...]] = None
    layers: tuple[tuple[AttentionStep, ...], ...] = ()

    @property
    def attentions(self) -> Optional[tuple[torch.Tensor, ...]]:
        """One (batch, heads, text_len, text_len) tensor per layer; in kinds with one sequence, of all its tokens."""
        return self._weights(lambda step: "text" in step.queries and step.keys == step.queries)

    @property
    def cross_attentions(self) -> Optional[tuple[torch.Tensor, ...]]:
        """One (batch, heads, text_len, length of all streams) tensor per layer, in kinds that have it."""
        return self._weights(lambda step: step.queries == ("text",) and step.keys != ("text",))

    def _weights(self, wanted: Callable[[AttentionStep], bool]) -> Optional[tuple[torch.Tensor, ...]]:
        return tuple(step.weights for steps in self.layers for step in steps if wanted(step)) or None


class FusionRecord:
    """Collects the requested outputs of a fusion while its layers run."""

    def __init__(self, attentions: bool = False, hidden_states: bool = False) -> None:
        self.keep_attentions, self.keep_hidden_states = attentions, hidden_states
        self.hidden_states: list[torch.Tensor] = []
        self.layers: list[tuple[AttentionStep, ...]] = []

    def add(
        self, hidden_states: torch.Tensor, *steps: tuple[Sequence[str], Sequence[str], Optional[torch.Tensor]]
    ) -> None:
        """
        Records a layer.

        Args:
            hidden_states: the text tokens after a layer, or before the first.
            steps: queries, keys and weights of each attention of the layer, in order; see [`AttentionStep`]. The
                weights are `None` if the implementation of attention does not return them.
        """
        if self.keep_hidden_states:
            self.hidden_states.append(hidden_states)
        shown = [AttentionStep(tuple(q), tuple(k), weights) for q, k, weights in steps if weights is not None]
        if self.keep_attentions and shown:
            self.layers.append(tuple(shown))

    def states_at(self, wanted: bool | list[int]) -> tuple[Optional[torch.Tensor], ...]:
        """The hidden states; given numbers of layers (negative ones from the end), `None` in the places of others."""
        count = len(self.hidden_states)
        kept = range(count) if wanted is True else {number % count for number in wanted if count}
        return tuple(state if number in kept else None for number, state in enumerate(self.hidden_states))


class Fusion(nn.Module):
    """
    The base class of fusions, in which text tokens attend to the tokens of other modalities.

    A kind subclasses it, sets `kind`, implements [`fuse`] and is decorated with [`register_fusion`]. Keyword arguments
    of its `__init__` after `text_hidden_size` are its options, given by `config.fusion_kwargs`.

    This class guarantees two properties. A row without any stream stays exactly unchanged, and the fused states have
    the width of the text encoder. Each kind must guarantee two more. [`fuse`] leaves the text states unchanged at
    initialisation (add to them through a [`Gate`] only), and masked tokens have no effect. A kind in which the fused
    state of a text token depends on no other text token sets `mixes_text = False`; then a language model can write
    behind it.

    Example:

    ```python
    >>> @register_fusion
    ... class AddedMeans(Fusion):
    ...     kind = "added_means"
    ...
    ...     def __init__(self, config, stream_names, text_hidden_size):
    ...         super().__init__(config, stream_names, text_hidden_size)
    ...         self.gate = Gate()
    ...
    ...     def fuse(self, text_states, text_mask, streams, record):
    ...         for stream in streams:
    ...             text_states = text_states + self.gate(masked_mean(stream.hidden_states, stream.mask))[:, None]
    ...         return text_states
    ```
    """

    kind: ClassVar[str]
    # False if the fused state of a token depends on no other text token. Then a language model can write behind it.
    mixes_text: ClassVar[bool] = True
    # True if the text encoder itself reads the other modalities, so that the fusion needs no layers behind it.
    is_read_by_text: ClassVar[bool] = False

    def __init__(self, config: PreTrainedConfig, stream_names: list[str], text_hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.stream_names = list(stream_names)
        width = config.fusion_hidden_size
        self.same_width = width == text_hidden_size
        if not self.same_width:
            self.down_proj = nn.Linear(text_hidden_size, width, bias=False)
            self.up_proj = nn.Linear(width, text_hidden_size, bias=False)

    def fuse(
        self, text_states: torch.Tensor, text_mask: torch.Tensor, streams: list[Stream], record: FusionRecord
    ) -> torch.Tensor:
        """
        The fused text states.

        Args:
            text_states: (batch, text_len, fusion_hidden_size).
            text_mask: (batch, text_len) bool.
            streams: at least one; in some rows all of their tokens may be masked.
            record: records requested outputs; see [`FusionRecord.add`].

        Returns:
            (batch, text_len, fusion_hidden_size)
        """
        raise NotImplementedError

    def forward(
        self,
        text_states: torch.Tensor,
        text_mask: torch.Tensor,
        streams: list[Stream],
        output_attentions: bool = False,
        output_hidden_states: bool | list[int] = False,
    ) -> FusionOutput:
        record = FusionRecord(output_attentions, output_hidden_states is not False)
        hidden_states = text_states
        if streams:
            inputs = text_states if self.same_width else self.down_proj(text_states)
            record.add(inputs)
            fused = self.fuse(inputs, text_mask, streams, record)
            if not self.same_width:
                # The residual is computed in the narrow space, so that a zero gate adds exactly nothing.
                fused = text_states + self.up_proj(fused - inputs)
            hidden_states = fused
            if not any(stream.is_full for stream in streams):
                present = torch.stack([stream.present for stream in streams]).any(0)
                hidden_states = torch.where(present[:, None, None], fused, text_states)
        return FusionOutput(
            hidden_states,
            None if output_hidden_states is False else record.states_at(output_hidden_states),
            tuple(record.layers),
        )


def computed_dtype(fusion: nn.Module) -> Optional[torch.dtype]:
    """The dtype in which a fusion computes: that of its matrices; `None` if it has none, or they are quantised."""
    for parameter in fusion.parameters():
        # Gates stay in float32, and quantised weights have dtypes of their own.
        if parameter.ndim > 1 and parameter.dtype in _COMPUTED:
            return parameter.dtype
    return None


def with_change(states: torch.Tensor, given: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """
    The states of a language model with what a fusion has changed, in their own dtype.

    A closed gate must not round them.

    Args:
        given: the states in the dtype of the fusion; the same object if it has the same dtype.
        fused: what the fusion made of these.
    """
    return fused if given is states else states + (fused - given).to(states.dtype)


def register_fusion(cls: type[Fusion]) -> type[Fusion]:
    """
    Class decorator that makes a fusion kind known, so that `config.fusion_type` can name it.

    Raises:
        ValueError: if `kind` is missing or is already taken by another class.

    Example:

    ```python
    >>> @register_fusion
    ... class MyFusion(Fusion):
    ...     kind = "my_fusion"  # as in MMTransformerConfig(fusion_type="my_fusion")
    ```
    """
    return registered(FUSION_KINDS, "fusion kind")(cls)


def fusion_class(kind: str, options: dict[str, Any]) -> type[Fusion]:
    """
    The class of a fusion kind, after checking that it has these options.

    Raises:
        ValueError: if the kind or one of its options is unknown.
    """
    if kind not in FUSION_KINDS:
        raise ValueError(
            f"Unknown fusion_type {kind!r}; known are {', '.join(sorted(FUSION_KINDS))}. Import the module of your "
            "own kind (with @register_fusion) before you use it."
        )
    cls = FUSION_KINDS[kind]
    known = list(inspect.signature(cls.__init__).parameters)[4:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"fusion_type {kind!r} has no option {unknown[0]!r} in fusion_kwargs; "
            f"its options are {', '.join(known) if known else 'none'}."
        )
    return cls
