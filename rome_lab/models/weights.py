"""Weights wherever they are: with their module, or offloaded by accelerate to the CPU's memory or to disk.

device_of(module)              where the module computes
is_offloaded(module)           whether a weight of it, or of a module in it, is offloaded
read_weight(module)            its weight as stored
product_error_of(module)       how far what it says is from the product with its weight
write_weight(module, weight)   in the same place; a checkpoint on disk is never written to
every_weight(model)            all of them by name, one at a time

Between two calls of a module accelerate leaves no values in its offloaded weights, so nothing else here may read one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def hooks_of(module: nn.Module) -> list[AlignDevicesHook]:
    """What accelerate has attached to the module to bring weights and inputs to one device."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [x for x in hooks if isinstance(x, AlignDevicesHook)]


def device_of(module: nn.Module) -> torch.device:
    """The device on which the module, which has a weight of its own, computes and leaves what it says."""
    devices = [hook.execution_device for hook in hooks_of(module) if hook.execution_device is not None]
    return torch.device(devices[-1]) if devices else module.weight.device


def is_offloaded(module: nn.Module) -> bool:
    """Whether a weight of the module, or of a module in it, is kept elsewhere between calls."""
    return any(hook.offload for part in module.modules() for hook in hooks_of(part))


def offloaded_weights(module: nn.Module) -> Mapping[str, Tensor] | None:
    """The offloaded weights of the module by name; None where its weights are with it."""
    return next((hook.weights_map for hook in hooks_of(module) if hook.offload), None)


def read_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """The module's weight as stored; one that is offloaded comes from where it is kept, and is not kept here.

    Raises:
        ValueError: it has no values anywhere.
    """
    offloaded = offloaded_weights(module)
    weight = getattr(module, name) if offloaded is None else offloaded[name]
    if weight.is_meta:
        raise ValueError(f"a weight of {type(module).__name__} is on the meta device, without values; load the model.")
    return weight.detach()


@torch.no_grad()
def product_error_of(module: nn.Module) -> float:
    """How far what a matrix's module says of a few random keys is from W k and its bias, as a share; of a plain one, 0."""
    if type(module) in (nn.Linear, Conv1D):
        return 0.0
    weight = read_weight(module)
    W = (weight.T if isinstance(module, Conv1D) else weight).double()  # (D, H)
    k = torch.randn(4, W.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    bias = getattr(module, "bias", None)
    v = k.double() @ W.T + (0 if bias is None else bias.detach().to(W))
    output = module.forward(k)  # by which no hook is called
    return float(((output[0] if isinstance(output, tuple) else output).to(v) - v).norm() / v.norm())


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Give the module other values of its weight, in the place where it is kept.

    A weight that is kept on disk is in the CPU's memory as long as it is not what it is on disk.
    """
    place, name = offloaded_weights(module), "weight"
    if isinstance(place, PrefixedDataset):
        place, name = place.dataset, place.prefix + name
    if isinstance(place, OffloadedWeightsLoader) and name in place.index:  # on disk, after what is in `state_dict`
        place.state_dict.pop(name, None)
        if not torch.equal(place[name].cpu(), weight.cpu()):
            place.state_dict[name] = weight.to("cpu", copy=True)
    elif isinstance(place, OffloadedWeightsLoader):
        place.state_dict[name].detach().copy_(weight)
    else:
        (module.weight if place is None else place[name]).detach().copy_(weight)


def every_weight(
    model: nn.Module, instead: Mapping[nn.Module, Tensor] = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """Name and values of everything in the model's state_dict, sorted by name; what is offloaded is read one by one.

    Args: instead: by module, what to say of its `weight` instead of what it is.
    """
    for name, tensor in sorted(model.state_dict().items()):
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        if own == "weight" and module in instead:
            yield name, instead[module]
        else:
            yield name, read_weight(module, own) if tensor.is_meta else tensor
