"""Converts the cells of an audio column into waveforms."""

import contextlib
import io
import math
import numbers
import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Optional

from .downloads import fetch, is_url
from .file_contents import cast_of, check_file, content_key, content_of, describe, not_there
from .label_cells import shorten
from .limits import limits, named


class _Bytes(io.BytesIO):
    """A file in memory for libsndfile, which prints a traceback where a damaged file sends it before the beginning."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with contextlib.suppress(ValueError):
            return super().seek(offset, whence)
        return self.tell()


class AudioError(ValueError):
    """A clip of sound that cannot be used; the message names it and the reason, in one sentence."""


def audio_key(clip: Any) -> Hashable:
    """Equal for two cells with the same clip for certain: the same object, path or bytes."""
    # A decoder returns a new array each time, whose id is meaningless.
    return id(clip) if hasattr(clip, "get_all_samples") else content_key(clip, _content(clip))


def load_audio(
    clip: Any,
    sampling_rate: int,
    source_rate: Optional[int] = None,
    fetch: Callable[[str], bytes] = fetch,
) -> Any:
    """
    A waveform of one channel, resampled: a float32 NumPy array (samples,), mostly between -1 and 1.

    Channels are averaged. Integers are scaled by the largest value of their type. Wider types such as int64 come from
    no recorder, so their values must show whether they have 16 or 32 bits.

    Args:
        clip: a path, `file://` or http(s) address; the bytes of an audio file, also as base64 or `data:` address; a
            cell of `datasets.Audio`, decoded or not, perhaps with `"cast": {"sampling_rate": 8000}` for the options of
            that feature; a dict with "array" and "sampling_rate"; or an array or tensor, (samples,), (samples,
            channels) or (channels, samples).
        sampling_rate (`int`): The wanted rate, in Hz.
        source_rate (`int`, *optional*): The rate, in Hz, of arrays that come without one.
        fetch: turns an http(s) address into bytes, or raises `OSError` or `ValueError`.

    Raises:
        AudioError: if there is no such file, or it is no readable sound, is empty, or holds NaN or infinity. Also if
            the scale of its values is unclear, its sampling rate is unknown, or it exceeds one of the [`Limits`].
        ImportError: if a library of the extra `audio` is needed and not installed.
    """
    name, cast = describe(clip, "sound"), cast_of(clip)
    clip = _undecoded(clip)
    if isinstance(clip, Mapping) and clip.get("array") is not None:
        waveform, rate = clip["array"], clip.get("sampling_rate")
    elif hasattr(clip, "shape") or isinstance(clip, (list, tuple)):
        waveform, rate = clip, source_rate
    else:
        waveform, rate = _read(_content(clip), name, fetch)
    if rate is None:
        raise AudioError(
            f"{name} has no sampling rate: give {{'array': ..., 'sampling_rate': ...}}, a file, or one rate for all "
            "arrays by sampling_rate="
        )
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or rate != rate // 1 or rate <= 0:
        raise AudioError(f"{name} has the sampling rate {rate!r}, but it must be a whole number of samples per second")
    rate = int(float(rate))
    for other in (rate, cast.get("sampling_rate") or rate, sampling_rate):
        _check_rate(other, name)
    if hasattr(waveform, "shape"):
        _check_length(max(waveform.shape, default=0), math.prod(waveform.shape), rate, name)
    waveform = _one_channel(waveform, name)
    _check_length(len(waveform), len(waveform), rate, name)
    if cast.get("stream_index"):
        raise AudioError(
            f"{name}: stream {cast['stream_index']} of the file is requested, but only the first stream is read"
        )
    if cast.get("sampling_rate"):
        # As in the data set: with the frequencies of that rate only.
        waveform, rate = _resample(waveform, rate, int(cast["sampling_rate"]), name), int(cast["sampling_rate"])
    return _resample(waveform, rate, sampling_rate, name)


def _check_rate(rate: Any, name: str) -> None:
    for limit, exceeds in (("lowest_sampling_rate", rate < limits().lowest_sampling_rate),
                           ("highest_sampling_rate", rate > limits().highest_sampling_rate)):  # fmt: skip
        if exceeds:
            raise AudioError(f"{name}: {rate:,} Hz is {'below' if limit.startswith('low') else 'above'} {named(limit)}")


def _check_length(num_frames: int, num_samples: int, rate: int, name: str) -> None:
    """
    Checks that a clip is not longer than the limits.

    Args:
        num_frames: samples of one channel.
        num_samples: those of all channels.
    """
    if num_frames > limits().audio_seconds * rate:
        raise AudioError(f"{name} lasts {num_frames / rate:,.1f} s, longer than {named('audio_seconds')}")
    if num_samples > limits().audio_samples:
        raise AudioError(f"{name} has {num_samples:,} samples, more than {named('audio_samples')}")


def _undecoded(clip: Any) -> Any:
    """The output of a decoder of `datasets.Audio`, as a dict with an array."""
    if hasattr(clip, "get_all_samples"):
        return {"array": clip["array"], "sampling_rate": clip["sampling_rate"]}
    return clip


def _content(clip: Any) -> Any:
    """The array, bytes or path of a clip."""
    has_array = isinstance(clip, Mapping) and clip.get("array") is not None
    return clip["array"] if has_array else content_of(clip)


def _read(content: Any, name: str, fetch: Callable[[str], bytes]) -> tuple[Any, int]:
    """A file's samples, (samples, channels), and its sampling rate."""
    if is_url(content):
        try:
            content = fetch(content)
        except (OSError, ValueError) as error:
            raise AudioError(f"{name} cannot be fetched ({error})") from error
    if not isinstance(content, (str, os.PathLike, bytes)):
        raise AudioError(
            "a sound must be a path, bytes, an array or a dict with 'array' and 'sampling_rate', 'bytes' or 'path', "
            f"but is of type {type(content).__name__}"
        )
    try:
        check_file(content)
    except FileNotFoundError:
        raise AudioError(not_there(content, "sound")) from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{name} cannot be read ({error})") from error
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Reading audio needs `soundfile`: pip install mm-transformers[audio]") from error
    try:
        with soundfile.SoundFile(_Bytes(content) if isinstance(content, bytes) else content) as file:
            _check_rate(file.samplerate, name)
            _check_length(file.frames, file.frames * file.channels, file.samplerate, name)
            return file.read(dtype="float32", always_2d=True), file.samplerate
    except AudioError:
        raise
    except Exception as error:  # soundfile's own errors, and those of files: OSError, RuntimeError, TypeError
        raise AudioError(f"{name} cannot be read ({shorten(' '.join(str(error).split()))})") from error


def _one_channel(waveform: Any, name: str) -> Any:
    import numpy as np

    waveform = np.asarray(waveform.detach().cpu() if hasattr(waveform, "detach") else waveform)
    if not (np.issubdtype(waveform.dtype, np.floating) or np.issubdtype(waveform.dtype, np.integer)):
        raise AudioError(f"{name} must hold numbers, but is of {waveform.dtype}")
    if waveform.ndim not in (1, 2):
        raise AudioError(f"{name} has the shape {waveform.shape}, not (samples,) or (samples, channels)")
    if waveform.size == 0:
        raise AudioError(f"{name} is empty")
    if np.issubdtype(waveform.dtype, np.integer):
        waveform = waveform_of_integers(waveform, name)
    elif np.isfinite(waveform).all():
        _check_range(waveform, name)
    if waveform.ndim == 2:
        # A clip always has more samples than channels.
        waveform = waveform.mean(int(np.argmin(waveform.shape)))
    if not np.isfinite(waveform).all():
        raise AudioError(f"{name} holds NaN or infinity")
    return waveform.astype(np.float32)


def waveform_of_integers(samples: Any, name: str) -> Any:
    """Integers of any width, scaled to -1 to 1."""
    import numpy as np

    limits = np.iinfo(samples.dtype)
    if limits.bits <= 16:
        middle = 0 if limits.min < 0 else (limits.max + 1) / 2
        return (samples - middle) / (limits.max + 1 - middle)
    low, high = int(samples.min()), int(samples.max())
    loudest = max(-low, high)
    if loudest == 0:
        return samples.astype(np.float64)
    if 2**23 < loudest <= 2**31:
        return samples / 2**31
    # No recorder writes 64 bits, so such samples were of a narrower type; 32 bits may be just that.
    if limits.bits == 64 and loudest <= 2**15 and not -128 <= low <= high <= 255:
        return samples / 2**15
    raise AudioError(
        f"{name} holds {samples.dtype} samples from {low:,} to {high:,}, so the number of bits (8, 16, 24 or 32) is "
        "not known: convert it to int16, or to floats from -1 to 1"
    )


def _check_range(samples: Any, name: str) -> None:
    """Checks that floats are scaled: they may exceed 1, but not like unscaled integers."""
    loudest = max(samples.max(), -samples.min())
    if loudest > 64 or (loudest > 1 and (samples == samples.round()).all()):
        raise AudioError(
            f"{name} holds floats up to {loudest:g}, but the largest value is 1: divide 16-bit samples by 32,768"
        )


def _resample(waveform: Any, rate: int, wanted: int, name: str) -> Any:
    if rate == wanted:
        return waveform
    num_samples = len(waveform) * wanted // rate
    _check_length(num_samples, num_samples, wanted, name)
    try:
        import soxr
    except ImportError as error:
        raise ImportError(
            f"Resampling from {rate:,} to {wanted:,} Hz needs `soxr`: pip install mm-transformers[audio]"
        ) from error
    return soxr.resample(waveform, rate, wanted)
