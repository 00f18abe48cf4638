"""Turns whatever a table holds in its audio column into waveforms."""

import io
import numbers
import os
from collections.abc import Mapping
from typing import Any, Optional

from .files import content_key, content_of, describe, fetch, is_url, not_there


class AudioError(ValueError):
    """A clip of sound that cannot be used; the message says which and why, in one sentence."""


def audio_key(clip: Any):
    """Equal for two cells that surely hold the same clip: the same object, path or bytes."""
    # Each time that a decoder is asked, it makes a new array, whose id would say nothing.
    return id(clip) if hasattr(clip, "get_all_samples") else content_key(_content(clip))


def load_audio(clip: Any, sampling_rate: int, source_rate: Optional[int] = None):
    """
    A waveform of one channel, resampled: a float32 NumPy array (samples,), mostly between -1 and 1.

    Channels are averaged. Integers are scaled by the largest that their type can hold.

    Args:
        clip: a path or http(s) address; the bytes of an audio file; what `datasets.Audio` gives, decoded or not; a dict
            with "array" and "sampling_rate"; or an array or tensor, (samples,), (samples, channels) or (channels,
            samples).
        sampling_rate (`int`): The wanted rate, in Hz.
        source_rate (`int`, *optional*): The rate, in Hz, of arrays that come without one.

    Raises:
        AudioError: if there is no such file, it is no sound that can be read, it is empty, it holds NaN or infinity, or
            its sampling rate is not known.
        ImportError: if a library of the extra `audio` is needed and not installed.
    """
    name = describe(clip, "sound")
    clip = _undecoded(clip)
    if isinstance(clip, Mapping) and clip.get("array") is not None:
        waveform, rate = clip["array"], clip.get("sampling_rate")
    elif hasattr(clip, "shape") or isinstance(clip, (list, tuple)):
        waveform, rate = clip, source_rate
    else:
        waveform, rate = _read(_content(clip), name)
    if rate is None:
        raise AudioError(
            f"{name} comes without a sampling rate: give {{'array': ..., 'sampling_rate': ...}}, a file, or the rate "
            "of all arrays by sampling_rate="
        )
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or rate != rate // 1 or rate <= 0:
        raise AudioError(f"{name} has the sampling rate {rate!r}, but it must be a whole number of samples per second")
    return _resample(_one_channel(waveform, name), int(float(rate)), sampling_rate)


def _undecoded(clip: Any) -> Any:
    """What a decoder of `datasets.Audio` decodes, as a dict with an array."""
    if hasattr(clip, "get_all_samples"):
        return {"array": clip["array"], "sampling_rate": clip["sampling_rate"]}
    return clip


def _content(clip: Any) -> Any:
    """The array, bytes or path that a clip is given by."""
    has_array = isinstance(clip, Mapping) and clip.get("array") is not None
    return clip["array"] if has_array else content_of(clip)


def _read(content: Any, name: str) -> tuple[Any, int]:
    """A file's samples, (samples, channels), and its sampling rate."""
    if is_url(content):
        try:
            content = fetch(content)
        except OSError as error:
            raise AudioError(f"{name} cannot be fetched ({error})") from error
    if not isinstance(content, (str, os.PathLike, bytes)):
        raise AudioError(
            "a sound must be a path, bytes, an array or a dict with 'array' and 'sampling_rate', 'bytes' or 'path', "
            f"but is of type {type(content).__name__}"
        )
    if not isinstance(content, bytes) and not os.path.exists(content):
        raise AudioError(not_there(content, "sound"))
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Reading files of sound needs a package more: pip install mm-transformers[audio]") from error
    try:
        return soundfile.read(
            io.BytesIO(content) if isinstance(content, bytes) else content, dtype="float32", always_2d=True
        )
    except Exception as error:  # soundfile's own errors, and those of files: OSError, RuntimeError, TypeError
        raise AudioError(f"{name} cannot be read ({' '.join(str(error).split())})") from error


def _one_channel(waveform: Any, name: str):
    import numpy as np

    waveform = np.asarray(waveform.detach().cpu() if hasattr(waveform, "detach") else waveform)
    if not (np.issubdtype(waveform.dtype, np.floating) or np.issubdtype(waveform.dtype, np.integer)):
        raise AudioError(f"{name} must hold numbers, but is of {waveform.dtype}")
    if np.issubdtype(waveform.dtype, np.integer):
        limits = np.iinfo(waveform.dtype)
        middle = 0 if limits.min < 0 else (limits.max + 1) / 2
        waveform = (waveform - middle) / (limits.max + 1 - middle)
    if waveform.ndim not in (1, 2):
        raise AudioError(f"{name} has the shape {waveform.shape}, not (samples,) or (samples, channels)")
    if waveform.size == 0:
        raise AudioError(f"{name} is empty")
    if waveform.ndim == 2:
        # There are always more samples than channels.
        waveform = waveform.mean(int(np.argmin(waveform.shape)))
    if not np.isfinite(waveform).all():
        raise AudioError(f"{name} holds NaN or infinity")
    return waveform.astype(np.float32)


def _resample(waveform, rate: int, wanted: int):
    if rate == wanted:
        return waveform
    try:
        import soxr
    except ImportError as error:
        raise ImportError(
            f"Resampling from {rate:,} to {wanted:,} Hz needs a package more: pip install mm-transformers[audio]"
        ) from error
    return soxr.resample(waveform, rate, wanted)
