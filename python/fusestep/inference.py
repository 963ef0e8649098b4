# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors made under torch.inference_mode(), which have no version counter. Outside of it torch writes none of them.

Their is_inference() does not tell when `.data` was set since, as by `module.to`.
"""

import torch


def has_version(tensor: torch.Tensor) -> bool:
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def is_read_only(tensor: torch.Tensor) -> bool:
    """Whether torch refuses to write it, and to have it require a gradient."""
    return not torch.is_inference_mode_enabled() and not has_version(tensor)


def tell_written(tensors: list[torch.Tensor]) -> None:
    """Tells autograd that tensors have changed, as far as there is somewhere to tell it."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        torch.autograd.graph.increment_version(list(filter(has_version, tensors)))
