"""Warnings about a module that cannot learn: frozen, or absent from every optimizer. Both happened in the published
code, silently. The optimizer check starts with the first BatchFormer that is built, not at import."""

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Modules whose parameters no optimizer has stepped yet, with the optimizers that stepped without them.
_unclaimed: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Any]]" = weakref.WeakKeyDictionary()
# Those that ran in training since the last optimizer step: an optimizer says nothing about a module that did not.
_ran: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_hook: Any = None


class BatchFormerWarning(UserWarning):
    """Training goes on, but the module cannot do what it is there for."""


def watch_optimizers(module: nn.Module) -> None:
    """Warn once when an optimizer steps twice while ``module`` gets gradients that no optimizer uses."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
    _unclaimed[module] = weakref.WeakSet()


def note_training_pass(module: nn.Module) -> None:
    """The next optimizer step is expected to train ``module``, if none has so far."""
    if module in _unclaimed:
        _ran.add(module)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _unclaimed:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module, stepped_without in list(_unclaimed.items()):
        parameters = list(module.parameters())
        if any(id(p) in held for p in parameters):
            del _unclaimed[module]
        elif module in _ran and any(p.grad is not None for p in parameters):
            _ran.discard(module)
            # Two optimizers may take turns (GANs): one that comes round again without the module is the sign.
            if optimizer in stepped_without:
                del _unclaimed[module]
                warnings.warn(
                    f"{label(module)} gets gradients but no optimizer holds its parameters, so it is not trained. "
                    "Build the optimizer after inserting, for example from batchformer.param_groups(model, lr=...).",
                    BatchFormerWarning,
                    stacklevel=4,
                )
            else:
                stepped_without.add(optimizer)


def warn_if_frozen(module: nn.Module) -> None:
    """Warn when a module in training has parameters and none of them is trained."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        warnings.warn(
            f"{label(module)} is in training but all of its parameters are frozen (requires_grad=False): it mixes "
            "samples at random. Unfreeze them, or silence this warning if that is the control you want.",
            BatchFormerWarning,
            stacklevel=4,
        )


def label(module: nn.Module) -> str:
    """The name that messages use: the place of insertion where there is one."""
    name = getattr(module, "inserted_at", "")
    return f"BatchFormer ({name})" if name else "BatchFormer"
