"""Options that only the user may set, and no recipe, since a recipe may come from a stranger."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...model.hub_kernels import asks_for_kernel


# The allowed targets of metrics: none, or files of the output folder.
_LOCAL_REPORTS = ("none", "tensorboard")

Section = Mapping[str, Any]


def _is_true(section: Section, key: str) -> bool:
    return bool(section[key])


def _is_kernel(section: Section, key: str) -> bool:
    return asks_for_kernel(section[key])


def _pushes(section: Section, key: str) -> bool:
    return bool(section.get("push_to_hub"))


def _reports(section: Section, key: str) -> bool:
    services = section.get("report_to")
    services = services if isinstance(services, list) else [services]
    return any(service not in (None, *_LOCAL_REPORTS) for service in services)


# By section and key: whether it needs the user's permission, given all options of the section; and its effect.
_POWERS: dict[tuple[str, str], tuple[Callable[[Section, str], bool], str]] = {
    ("model", "trust_remote_code"): (_is_true, "runs code that comes with an encoder"),
    ("model", "attn_implementation"): (_is_kernel, "runs code of the Hub"),
    ("training", "push_to_hub"): (_is_true, "sends the model away"),
    ("training", "hub_model_id"): (_pushes, "sets where the model is sent"),
    ("training", "hub_token"): (_pushes, "sets the account that sends the model"),
    ("training", "report_to"): (_reports, "sends metrics away"),
    ("training", "trackio_space_id"): (_reports, "says where metrics are sent"),
    ("training", "trackio_bucket_id"): (_reports, "says where metrics are sent"),
    ("training", "trackio_static_space_id"): (_reports, "says where metrics are sent"),
    ("training", "deepspeed"): (_is_true, "names programs, files and services"),
}


def check_powers(asked: Mapping[str, Any], settled: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """
    Refuses recipe options that run code or send data away, unless the user has set them on the command line.

    Args:
        asked: the sections of the recipe file.
        settled: the same with the overrides.
        overrides: `section.key=value`, from the user.

    Raises:
        ValueError: one sentence with the option to add to the command.
    """
    said = {tuple(override.partition("=")[0].split(".")) for override in overrides}
    refused, wanted = [], []
    for (section, key), (is_used, does) in _POWERS.items():
        options, values = asked.get(section), settled.get(section)
        if not isinstance(options, Mapping) or not isinstance(values, Mapping) or options.get(key) is None:
            continue
        if (section,) in said or (section, key) in said or not is_used(values, key):
            continue
        value = "..." if key == "hub_token" else json.dumps(options[key], ensure_ascii=False, default=str)[:200]
        refused.append(f"{section}.{key}, which {does}")
        wanted.append("--trust-remote-code" if key == "trust_remote_code" else f"{section}.{key}={value}")
    if refused:
        raise ValueError(
            f"a recipe cannot ask for {', and '.join(refused)}: to allow it, add {' '.join(wanted)} to the command."
        )
