"""The settings of a server, and the way to its worker processes: a variable of the environment."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any, Optional


VARIABLE = "MM_TRANSFORMERS_SERVE"


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """
    How a server uses its machine. What clients may send is bounded by [`~mm_transformers.model.limits.Limits`].

    Args:
        batch_rows (`int`): The most rows of one forward pass.
        batch_seconds (`float`): How long a row waits for others that share its forward pass.
        waiting_rows (`int`): Rows that may wait in one worker. Further requests get the status 429.
        timeout (`float`): Seconds of one request. Then it gets the status 503.
        streams (`int`): Texts that one worker may stream at the same time. Further requests get the status 429.
        threads (`int`, *optional*): Threads of torch in one worker. By default the cores are shared by the workers.
        device (`str`, *optional*): Such as `"cuda:0"`. By default the GPU, if there is one.

    Raises:
        ValueError: one sentence, if a number is too small or not finite.

    Example:

    ```python
    >>> ServeSettings(batch_rows=64).timeout
    30.0
    ```
    """

    batch_rows: int = 32
    batch_seconds: float = 0.003
    waiting_rows: int = 512
    timeout: float = 30.0
    streams: int = 4
    threads: Optional[int] = None
    device: Optional[str] = None

    def __post_init__(self) -> None:
        for name in ("batch_rows", "waiting_rows", "streams", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value!r}.")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be finite and above 0, but is {self.timeout!r}.")
        if not 0 <= self.batch_seconds < math.inf:
            raise ValueError(f"batch_seconds must be finite and at least 0, but is {self.batch_seconds!r}.")


@dataclasses.dataclass(frozen=True)
class WorkerPlan:
    """
    What a worker process needs to know.

    Args:
        model: folder or Hub id.
        settings: of the server.
        limits: the limits of the process that starts it.
        modules: modules with kinds of the user's own, which are imported first.
    """

    model: str
    settings: ServeSettings
    limits: Mapping[str, Any]
    modules: tuple[str, ...] = ()

    def write(self) -> None:
        """Puts the plan into the environment, which worker processes inherit."""
        os.environ[VARIABLE] = json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls) -> "WorkerPlan":
        """The plan in the environment."""
        found = json.loads(os.environ[VARIABLE])
        settings = ServeSettings(**found["settings"])
        return cls(found["model"], settings, found["limits"], tuple(found["modules"]))
