# SPDX-License-Identifier: Apache-2.0
"""Swap torch.nn's recurrent modules for ours, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from . import modules

_OURS: dict[type, type] = {
    getattr(nn, name): getattr(modules, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


@dataclass
class Report:
    """What `replace` did: names of the modules it swapped, and of those it did not, with the reason."""

    swapped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped {name}" for name in self.swapped]
        lines += [f"kept    {name}: {why}" for name, why in self.kept.items()]
        return "\n".join(lines) or "no recurrent modules found"


def replace(model: nn.Module) -> Report:
    """Make every torch.nn.{RNN,LSTM,GRU,RNNCell,LSTMCell,GRUCell} in the model one of ours, in place.

    The module objects stay the same (only their class changes), and so do parameters, hooks, buffers, training mode and
    state_dict: optimizers and other references go on working.

    >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    >>> print(fusedrnn.torch.replace(model))
    swapped 0
    >>> type(model[0])
    <class 'fusedrnn.torch.modules.LSTM'>
    """
    return _swap(model, _OURS)


def restore(model: nn.Module) -> Report:
    """The way back: every module of ours in the model becomes torch.nn's again.

    >>> model = fusedrnn.torch.GRU(3, 4)
    >>> print(fusedrnn.torch.restore(model))
    swapped (the model itself)
    """
    return _swap(model, _THEIRS)


def _swap(model: nn.Module, classes: dict[type, type]) -> Report:
    report = Report()
    for name, module in model.named_modules():
        name = name or "(the model itself)"
        to = classes.get(type(module))
        if to is not None:
            module.__class__ = to
            if isinstance(module, modules._Layer):
                module._prepare()
            report.swapped.append(name)
        elif any(isinstance(module, each) for each in classes):
            kind = type(module)
            why = (
                "is parametrized; replace it before"
                if hasattr(module, "parametrizations")
                else "is a subclass with code of its own"
            )
            report.kept[name] = f"{kind.__module__}.{kind.__qualname__} {why}"
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase) and type(module) not in classes.values():
            report.kept[name] = f"{type(module).__module__}.{type(module).__qualname__} is no module of torch.nn"
    return report
