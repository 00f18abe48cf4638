"""Rows of several processes, and models that are sharded over them."""

import torch
import torch.distributed as dist
from torch import nn


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """
    The rows of all processes, in order of rank; gradients flow back to the process of each row.

    Processes may have different numbers of rows. With one process, the rows are returned unchanged.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
    if rows.requires_grad:
        parts = all_gather(padded)
    else:
        parts = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights are sharded over processes (FSDP, ZeRO-3), so that all must run the module, or none."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    kinds = {cls.__name__ for part in module.modules() for cls in type(part).__mro__}
    return bool(kinds & {"FullyShardedDataParallel", "FSDPModule"}) or any(
        hasattr(parameter, "ds_id") for parameter in module.parameters()
    )
