"""Warnings about a module that cannot learn: one that is frozen, is in no optimizer, or gets one sample at a time.

The first two happened in the published code, without any message. The optimizer check starts with the first module that
is trained, not at import.
"""

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# A copy of a module is another key than the module, so it is checked again and warns for itself.
_checked: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_told: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()
# Modules whose parameters no optimizer has updated yet, with the optimizers that made a step without them.
_unclaimed: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Any]]" = weakref.WeakKeyDictionary()
# Modules that ran in training since the last optimizer step; a step says nothing about a module that did not run.
_ran: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_hook: Any = None


class BatchFormerWarning(UserWarning):
    """Warning that training goes on although the module cannot do its work."""


def check_training_pass(module: nn.Module, *, alone: bool) -> None:
    """Check a module at the start of a pass in training; ``alone`` says that the batch is one sample on one process.

    The module has the attributes ``label``, its name in messages, and ``frozen``, true if it is frozen on purpose.
    """
    global _hook
    if module not in _checked:
        _checked.add(module)
        parameters = list(module.parameters())
        if not module.frozen:
            if parameters and not any(p.requires_grad for p in parameters):
                warn_once(
                    module,
                    "is in training but all of its parameters are frozen (requires_grad=False): it mixes samples with "
                    "random weights. Unfreeze them, or call freeze() on it if that is the control you want.",
                )
            _hook = _hook or register_optimizer_step_post_hook(_after_step)
            _unclaimed[module] = weakref.WeakSet()
    if module in _unclaimed:
        _ran.add(module)
    if alone:
        warn_once(
            module,
            "got a batch of one sample, which has no other sample to attend to. Use larger batches (drop_last=True "
            "drops a last small one), or gather='all' on several ranks.",
        )


def warn_once(module: nn.Module, problem: str) -> None:
    """Warn with ``module.label`` and the problem, unless this module gave the same warning before."""
    told = _told.setdefault(module, set())
    if problem not in told:
        told.add(problem)
        warnings.warn(f"{module.label} {problem}", BatchFormerWarning, stacklevel=4)


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
            # Two optimizers may alternate (GANs). The same one, twice without the module, is the sign.
            if optimizer in stepped_without:
                del _unclaimed[module]
                warn_once(
                    module,
                    "gets gradients but no optimizer holds its parameters, so it is not trained. Create the optimizer "
                    "after the module is in the model, from model.parameters() for example.",
                )
            else:
                stepped_without.add(optimizer)
