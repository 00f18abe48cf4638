"""Runs frozen encoders once per image, text or sound, not once per epoch."""

import contextlib
import copy
import os
import re
import shutil
import uuid
import weakref
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, is_initialized
from torch.utils.data import IterableDataset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ..model.distributed import is_sharded
from ..model.encoders import encoder_width
from ..model.modalities import ENCODERS, TEXT, modalities_of
from .collator import MMDataCollator
from .feature_build import Builder
from .feature_keys import ItemHash, checksum, hash_of_encoder
from .feature_reading import CachedFeatures
from .feature_store import FeatureStore, in_use, remove_store, size_of


logger = logging.get_logger(__name__)

GIGABYTE = 10**9
# Only folders with such names are ever removed.
_FOLDER = re.compile(r"(text|vision|audio|removed)-[0-9a-f]{32}")


class FeatureCache:
    """
    Stores the token features of frozen encoders on disk: one entry per distinct image, video, text and sound.

    An entry is found by the hash of its content. Epochs, runs and hyperparameter searches share the entries.

    Each encoder has its own folder. The name of the folder is a hash of the weights, the config, the preprocessing
    options, the stored dtype and the release of transformers. So outdated features are never read. Features have the
    precision of the encoder, without autocast. An interrupted build resumes where it stopped; several processes share
    the work.

    Args:
        cache_dir (`str` or `Path`): The folder of the cache; created if it does not exist.
        max_size_gb (`float`, *optional*):
            The largest size of the folder, in GB (10^9 bytes). If a build needs more, the least recently used encoders
            lose their features, but none that a living process uses.
        dtype (`str`, *optional*):
            `"bfloat16"` or `"float16"` to store half as much as `"float32"`. By default the dtype of the encoder
            outputs, which changes nothing.

    Example:

    ```python
    >>> model = MMTransformerForMultiTask.from_encoders(**encoders, freeze=["vision"])
    >>> cache = FeatureCache("features", max_size_gb=50)
    >>> trainer = MMTrainer(model, args, processing_class=processor, train_dataset=rows, feature_cache=cache)
    ```
    """

    def __init__(
        self, cache_dir: str | os.PathLike[str], max_size_gb: Optional[float] = None, dtype: Optional[str] = None
    ):
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"The dtype of a feature cache must be 'float32', 'bfloat16' or 'float16', but is {dtype!r}."
            )
        if max_size_gb is not None and not max_size_gb > 0:
            raise ValueError(f"max_size_gb must be more than 0, but is {max_size_gb}.")
        self.cache_dir, self.max_size_gb = Path(cache_dir), max_size_gb
        self.dtype = None if dtype is None else getattr(torch, dtype)
        # By modality: the encoder (weakly, since another may come to lie at the same address), what it was when it was
        # hashed, and the store.
        self._stores: dict[str, tuple[weakref.ref[torch.nn.Module], Any, FeatureStore]] = {}

    @classmethod
    def of(cls, cache: Any) -> Optional["FeatureCache"]:
        """The cache in a folder; a cache, or `None`, as it is."""
        return cls(cache) if isinstance(cache, (str, os.PathLike)) else cache

    def modalities(self, model: Any, collator: Any) -> list[str]:
        """
        The modalities that can be cached for a [`MMTransformerForMultiTask`]: those with a completely frozen encoder.

        Raises:
            ValueError: if there is none, or the collator is not an [`MMDataCollator`].
        """
        if not isinstance(collator, MMDataCollator):
            raise ValueError(f"A feature cache needs an MMDataCollator, not a {type(collator).__name__}.")
        # Encoders of ours are small, and trained from new weights.
        known = ["text", *(name for name in model.config.modalities if ENCODERS[name].own is None)]
        frozen = [modality for modality in known if model.model.is_frozen(modality)]
        if "text" in frozen and model.model.reads_jointly:
            told = "The text encoder reads the other modalities of a row, so its outputs depend on more than the text"
            frozen.remove("text")
            if not frozen:
                raise ValueError(
                    f"{told} and cannot be cached, and no other encoder is frozen: leave out feature_cache."
                )
            logger.warning_once(f"{told} and are not cached. Those of {' and '.join(frozen)} are.")
        if not frozen:
            raise ValueError(
                "A feature cache needs an encoder that is frozen as a whole, but this model has none: give the model "
                f"freeze=[...] with some of {', '.join(map(repr, known))}, or leave out feature_cache (an encoder "
                "with adapters is not frozen as a whole)."
            )
        is_fsdp = is_initialized() and AcceleratorState().distributed_type == DistributedType.FSDP
        if is_fsdp or is_deepspeed_zero3_enabled() or is_sharded(model):
            raise ValueError(
                "A feature cache needs whole encoders, but FSDP and ZeRO-3 split them: train with DDP. Frozen "
                "encoders have no gradients and no optimizer states, so splitting them saves little memory."
            )
        return frozen

    def prepare(
        self, model: Any, collator: MMDataCollator, dataset: Any, batch_size: int = 32, num_workers: int = 0
    ) -> MMDataCollator:
        """
        Encodes the missing items of a data set, and returns the collator whose batches hold features.

        All processes must call it.

        Args:
            model: a [`MMTransformerForMultiTask`].
            collator: as it is for training without a cache, or one that this method has returned.
            dataset: rows, by number.
            batch_size, num_workers: of encoding.

        Raises:
            ValueError: one sentence, if nothing is frozen, the data set is a stream, an item cannot be read, or there
                is no room for the features.
            OSError: if the folder cannot be written to.
        """
        collator = collator.uncached
        modalities = self.modalities(model, collator)
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise ValueError(
                "A feature cache needs a data set whose rows can be read by number, but this one is a stream: load it "
                "without streaming=True, or leave out feature_cache."
            )
        encoders = {modality: model.model.encoder(modality) for modality in modalities}
        dtype = {modality: self.dtype or encoder.dtype for modality, encoder in encoders.items()}
        stores = {m: self._store(m, encoders[m], collator.processor, dtype[m]) for m in modalities}
        hashes = {
            part.argument: ItemHash(
                part, collator.media[part.argument].load, str(collator.processor.num_frames) * part.is_sequence
            )
            for modality in modalities
            for part in modalities_of(modality)
        }
        # A data set is scanned once, not before each evaluation.
        fingerprint = getattr(dataset, "fingerprint", None)
        if fingerprint is None or not all((fingerprint, collator) in store.searched for store in stores.values()):
            builder = Builder(model.model, collator, stores, hashes, dtype, self._make_room, batch_size, num_workers)
            builder.build(dataset)
            for store in stores.values():
                store.searched.add((fingerprint, collator))
        cached = copy.copy(collator)
        width = encoder_width(model.config.text_config)
        cached.cached = CachedFeatures(stores, hashes, width, dtype.get("text", torch.float32))
        cached.media = cached.cached.with_lookup(collator.media)
        cached.uncached = collator
        return cached

    def _store(self, modality: str, encoder: Any, processor: Any, dtype: torch.dtype) -> FeatureStore:
        # Texts are stored by their token ids.
        preprocessing = None if modality == TEXT.name else getattr(processor, str(ENCODERS[modality].processor_part))
        options = [part.to_json_string() for part in (encoder.config, preprocessing) if part is not None]
        version = (checksum(encoder.state_dict().values()), options, dtype)
        known = self._stores.get(modality)
        if known is not None and known[0]() is encoder and known[1] == version:
            store = known[2]
        else:
            folder = self.cache_dir / f"{modality}-{hash_of_encoder(encoder, preprocessing, dtype)}"
            if known is not None and known[2].folder == folder:
                store = known[2]
            else:
                about = {"modality": modality, "encoder": encoder.config.model_type, "dtype": str(dtype)}
                store = FeatureStore(folder, about, encoder_width(encoder.config))
            self._stores[modality] = (weakref.ref(encoder), version, store)
        store.touch()
        store.refresh()
        return store

    def _make_room(self, counts: dict[str, int], needed: int) -> None:
        """
        Removes stored features until there is room; those that were not used for the longest time go first.

        Args:
            counts: modality -> the number of items to encode.
            needed: how many bytes they are expected to take.
        """
        what = " and ".join(f"{count:,} {ENCODERS[modality].plural}" for modality, count in counts.items())
        message = f"The features of {what} need about {_gigabytes(needed)} in {self.cache_dir}, but "
        advice = (
            "store them in half the space by FeatureCache(..., dtype='bfloat16'), or freeze and cache fewer encoders."
        )
        folders = [path for path in self.cache_dir.iterdir() if _is_store(path)]
        sizes = {path: size_of(path) for path in folders}
        idle = sorted((path for path in folders if not in_use(path)), key=_last_used)
        if self.max_size_gb is not None:
            limit = int(self.max_size_gb * GIGABYTE)
            left = limit - sum(size for path, size in sizes.items() if path not in idle)
            if needed > left:
                raise ValueError(
                    f"{message}max_size_gb={self.max_size_gb:g} leaves {_gigabytes(max(left, 0))}: set a larger "
                    f"limit, {advice}"
                )
            while idle and needed > limit - sum(sizes.values()):
                sizes.pop(_evict(idle.pop(0)))
        free = shutil.disk_usage(self.cache_dir).free
        if needed > free:
            raise ValueError(f"{message}{_gigabytes(free)} are free on that disk: make room, {advice}")


def _evict(folder: Path) -> Path:
    logger.warning(f"{folder} is the least recently used folder of the feature cache; it is removed to free space.")
    # Renamed first, so that no process finds a half-deleted store.
    doomed = folder.with_name(f"removed-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        folder.rename(doomed)
        remove_store(doomed)
        if doomed.exists():  # a user keeps other files there
            doomed.rename(folder)
    return folder


def _is_store(path: Path) -> bool:
    return _FOLDER.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def _last_used(folder: Path) -> float:
    marker = folder / "last_used"
    return marker.stat().st_mtime if marker.exists() else 0.0


def _gigabytes(size: int) -> str:
    return f"{size / GIGABYTE:.3g} GB"


__all__ = ["FeatureCache"]
