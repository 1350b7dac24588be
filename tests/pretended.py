"""A GPU that is not there: it refuses what a real one refuses, and the CPU does its work.

    with PretendedDevice() as gpu:
        there = torch.ones(3, device="cuda")  # there.device is cuda:0
        there + torch.ones(3)  # RuntimeError: two devices
        gpu.uploaded  # bytes that were copied to it

Python code sees what it would see on a machine with one CUDA device: where a tensor is, operations that refuse tensors
of two memories, random numbers that differ from those of the CPU, `torch.cuda`'s answers, a memory that can be full.
A storage is the device's if it was made or moved there; views, parameters and changes in place follow from that.

Not pretended are speed, rounding, kernels that a GPU lacks, and code in C++ that asks a tensor where it is. Tensor
subclasses without a storage of their own count as being on the CPU.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ANYWHERE = {"__delete__", "__len__", "__set__", "_has_compatible_shallow_copy_type", "data_ptr", "dim", "element_size"}
ANYWHERE |= {"is_contiguous", "is_floating_point", "item", "numel", "size", "stride", "tolist", "untyped_storage"}
ACROSS = {"copy_", "__deepcopy__"}
NO_SCALARS = {"cat", "stack", "equal", "mm", "matmul", "linear", "addmm", "addmm_"}  # others take scalars of the CPU
INDEXING = {"__getitem__", "__setitem__", "index", "index_put", "index_put_"}  # by tensors of the CPU, too
RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "normal_"} | {
    "uniform_", "bernoulli", "bernoulli_", "multinomial", "exponential_", "random_", "dropout"
}  # fmt: skip
_PACKAGES = {"torch", "transformers", "bitsandbytes", "accelerate", "peft", "torchao", "hqq"}
TOTAL = 2**40
OTHER_SEED = 0x5DEECE66D  # the same seed gives other numbers than on the CPU


class _Generator(torch.Generator):
    """A generator that knows the device that it was asked for."""

    def __new__(cls, device: Any = "cpu") -> Self:
        made = super().__new__(cls, "cpu")
        made.place = GPU if torch.device(device).type == "cuda" else CPU
        return made.manual_seed(torch.default_generator.initial_seed())

    device = property(lambda self: self.place)

    def manual_seed(self, seed: int) -> Self:
        return super().manual_seed(seed ^ OTHER_SEED if self.place == GPU else seed)


class PretendedDevice(TorchFunctionMode):
    """See the module.

    Args:
        capacity: bytes of its memory that others leave; whoever wants more gets `torch.OutOfMemoryError`. All if None.

    Attributes:
        uploaded: bytes that were copied from the CPU so far.
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.capacity, self.uploaded = capacity, 0
        self._memory: dict[int, tuple[StorageWeakRef, int]] = {}  # weak: an address is not used again before it goes
        self._random = torch.Generator().manual_seed(0)

    def __enter__(self) -> Self:
        importlib.import_module("torch._dynamo")  # it looks at what is patched here when optimizers load it
        self._patches = ExitStack()
        # Its threads would not know of this device.
        self._patches.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        self._patches.enter_context(mock.patch.multiple(torch.cuda, **self._answers()))
        self._patches.enter_context(mock.patch.object(torch, "Generator", _Generator))
        self._patches.enter_context(mock.patch.object(torch, "autocast", _autocast))
        self._patches.enter_context(mock.patch.object(Tensor, "_make_wrapper_subclass", staticmethod(_wrapper)))
        return super().__enter__()

    def __exit__(self, *reason: object) -> None:
        self._patches.close()
        super().__exit__(*reason)

    def _answers(self) -> dict[str, Any]:
        """Return what `torch.cuda` says."""
        answers: dict[str, Any] = dict.fromkeys(("set_device", "synchronize", "empty_cache"), lambda *_: None)
        answers |= {"is_available": _told, "is_initialized": _told, "device_count": _told, "current_device": lambda: 0}
        answers |= {"mem_get_info": lambda *_: (self.free, TOTAL)}
        answers |= {"max_memory_allocated": lambda *_: self.used, "reset_peak_memory_stats": lambda *_: None}
        answers |= {"get_rng_state": lambda *_: self._random.get_state(), "manual_seed_all": self._seed}
        return answers

    @property
    def used(self) -> int:
        """Bytes of its memory that are in use."""
        self._memory = {key: kept for key, kept in self._memory.items() if not kept[0].expired()}
        return sum(size for _, size in self._memory.values())

    @property
    def free(self) -> int:
        """Bytes of its memory that are free."""
        return (TOTAL if self.capacity is None else self.capacity) - self.used

    def _seed(self, seed: int) -> None:
        self._random.manual_seed(seed ^ OTHER_SEED)

    def place(self, tensor: Tensor) -> torch.device:
        """Return where a tensor is."""
        return GPU if _address(tensor) in self._memory else tensor.device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        schema = getattr(func, "_schema", None)  # of operators that packages add
        name = schema.name.rpartition("::")[2] if schema else getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args[0])
        if name in ANYWHERE:
            return func(*args, **kwargs)
        if name in {"to", "cpu", "cuda"}:
            return self._moved(name, *args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(self.place(tensor) == GPU for tensor in given)
        if here and name in {"numpy", "__array__"}:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if here and name == "get_device":
            return 0
        asked = kwargs.get("device")
        if asked is not None:
            here = _device(asked) == GPU
            kwargs["device"] = CPU if here else asked
        elif name not in ACROSS:
            self._refuse_two_memories(name, args, given)
        kwargs.pop("pin_memory", None)
        result = self._drawn(func, name, here, args, kwargs)
        if here and name != "copy_":
            others = {_address(tensor) for tensor in given if self.place(tensor) != GPU}
            self._keep(each for each in _tensors(result) if _address(each) not in others)
        return result

    def _drawn(self, func: Any, name: str, here: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function; one that draws random numbers on the device draws those of the device."""
        generator = kwargs.get("generator")
        if generator is not None and (generator.device.type == GPU.type) != here:
            raise RuntimeError(f"Expected a generator for the device of {name}, got one for {generator.device}.")
        if generator is not None or not here or name not in RANDOM:
            return func(*args, **kwargs)
        before = torch.get_rng_state()
        torch.set_rng_state(self._random.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            self._random.set_state(torch.get_rng_state())
            torch.set_rng_state(before)

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        attribute, found = getattr(func.__self__, "__name__", ""), func(tensor)
        if attribute not in {"device", "is_cuda", "is_cpu", "grad"} or self.place(tensor) != GPU:
            return found  # what it returns lies in the tensor's own memory
        if attribute == "grad" and found is not None:  # the engine in C++ made it
            self._keep([found])
        return {"device": GPU, "is_cuda": True, "is_cpu": False}.get(attribute, found)

    def _moved(self, name: str, tensor: Tensor, *asked: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if name == "cuda":
            asked = (GPU,)
        elif name == "cpu":
            asked = (CPU,)
        elif asked and isinstance(asked[0], Tensor):
            asked = (self.place(asked[0]), asked[0].dtype, *asked[1:])
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = _device(kwargs["device"])
        asked = tuple(_device(each) if type(each) is int else each for each in asked)
        device, dtype, _, layout = torch._C._nn._parse_to(*asked, **kwargs)
        before = self.place(tensor)
        after = before if device is None else _device(device)
        if "meta" in {before.type, after.type}:
            return tensor.to(after, dtype)
        layout = {} if layout is None else {"memory_format": layout}
        copied = copy or True in asked[2:]
        result = tensor.to(CPU, dtype or tensor.dtype, copy=copied or before.type != after.type, **layout)
        if after == GPU:
            self._keep([result])
            self.uploaded += result.nbytes if before != GPU else 0
        return result

    def _refuse_two_memories(self, name: str, args: Any, given: list[Tensor]) -> None:
        places = {self.place(tensor) for tensor in given if tensor.ndim or name in NO_SCALARS}
        places |= {GPU for tensor in given if self.place(tensor) == GPU}
        if name in INDEXING and self.place(args[0]) == GPU:
            values = [each for each in args[2:] if isinstance(each, Tensor) and each.ndim]
            by_tensor = any(isinstance(each, Tensor) and each.ndim for each in tree_leaves(args[1]))
            places = {GPU, *(self.place(each) for each in values if by_tensor)}  # else the values are copied
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and args and isinstance(args[0], Tensor):  # a scalar cannot take what is elsewhere
            places.add(self.place(args[0]))
        if {CPU, GPU} <= places:
            found = ", ".join(f"{self.place(tensor)} {tuple(tensor.shape)}" for tensor in given)
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {found}.")

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            address = _address(tensor)
            if address and address not in self._memory and tensor.device == CPU:
                storage = tensor.untyped_storage()
                self._memory[address] = StorageWeakRef(storage), storage.nbytes()
                if self.capacity is not None and self.used > self.capacity:
                    del self._memory[address]
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes.")


def _address(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from others; 0 where it has none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def _device(asked: Any) -> torch.device:
    """Return the device that an argument means."""
    device = GPU if isinstance(asked, int) else torch.device(asked)
    return GPU if device.type == "cuda" else device


def _tensors(result: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _told() -> int:
    """Tell nobody but quailora and its tests of the GPU: packages keep for good what they find when they are loaded."""
    return int(sys._getframe(1).f_globals["__name__"].partition(".")[0] not in _PACKAGES)


def _autocast(device_type: str, *arguments: Any, _real: Any = torch.autocast, **options: Any) -> Any:
    return _real("cpu", *arguments, **options)


def _wrapper(*arguments: Any, _real: Any = Tensor._make_wrapper_subclass, **options: Any) -> Any:
    return _real(*arguments, **options | {"device": CPU})
