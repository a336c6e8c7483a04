"""A GPU without a GPU: a torch device whose tensors compute on the CPU.

As on CUDA, an operation on tensors of both devices raises, and so does whatever waits for the GPU while a graph is
recorded. Where the program waits is counted by line. Compiled code cannot run here, memory is not limited, and
`no_grad` has to stand in for `inference_mode`, under which operations are not taken apart.
"""

import functools
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import capkit

NAME = "fakegpu"
DEVICE = torch.device("privateuseone", 0)  # is called by the name above once it is registered
SOURCES = str(Path(capkit.__file__).parent)
aten = torch.ops.aten
READS = {  # whose result the CPU needs, or whose result's size
    *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.allclose.default),
    *(aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default),
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}


class MixedDevices(RuntimeError):
    """CUDA would say: expected all tensors to be on the same device."""


class _Absent(_DummyBackendModule):
    def is_available(self):
        return False  # else torch would offer it to all as the machine's accelerator


@functools.cache
def _register():
    """For the rest of the process, so not before it is needed."""
    _setup_privateuseone_for_python_backend(NAME, _Absent())


class GpuTensor(torch.Tensor):
    """A tensor on the device, around the CPU tensor that holds its values."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=DEVICE)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of `with FakeGpu()`")

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def __repr__(self):
        return f"GpuTensor({self.inner!r})"


class FakeGpu(TorchDispatchMode):
    """Inside a `with`, this thread may use the device.

    Attributes:
        counts: by (kind, line): "read" and "copy" wait, for results or until a CPU tensor is on the GPU; "sent" is a
            copy, either way, that does not wait.
        graph: the one that is being recorded.
    """

    def __init__(self, counts=None):
        _register()
        super().__init__()
        self.counts, self.graph, self._functions = Counter() if counts is None else counts, None, _Functions()

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def total(self, kind):
        return sum(count for (one, _), count in self.counts.items() if one == kind)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in _leaves([args, *kwargs.values()]) if isinstance(leaf, torch.Tensor)]
        on_gpu = [one for one in tensors if isinstance(one, GpuTensor)]
        on_cpu = [one for one in tensors if one.device.type == "cpu" and one.dim()]  # numbers may be anywhere
        device = kwargs.get("device", args[0].device if func is aten.copy_.default else None)
        goes_to_gpu = bool(on_gpu) if device is None else torch.device(device).type == NAME
        if func in COPIES:
            if bool(on_gpu) != goes_to_gpu or (on_gpu and on_cpu):
                self._count("sent" if kwargs.get("non_blocking") else "copy" if goes_to_gpu else "read")
        elif on_gpu:
            self._check(func, args, on_cpu)
        args, kwargs = _map(_inner, args), {name: _map(_inner, value) for name, value in kwargs.items()}
        if self.graph:
            self.graph.note_what_changes(func, args)
        result = func(*args, **kwargs)
        if self.graph:
            self.graph.operations.append((func, args, kwargs, result))
        known = {id(tensor.inner): tensor for tensor in on_gpu}  # operations in place return what they were given

        def wrap(value):
            if id(value) in known:
                return known[id(value)]
            return GpuTensor(value) if isinstance(value, torch.Tensor) else value

        return _map(wrap, result) if goes_to_gpu else result

    def _check(self, func, args, on_cpu):
        indices = [index for index in args[1] if index is not None] if func in INDEXING else []
        if func in READS or any(index.dtype == torch.bool for index in indices):
            self._count("read")
        for tensor in on_cpu:
            if not isinstance(args[0], GpuTensor) or not any(tensor is index for index in indices):
                raise MixedDevices(f"{func}, with a CPU tensor of shape {tuple(tensor.shape)}, at {_line()}")
            self._count("copy")

    def _count(self, kind):
        if self.graph and kind != "sent":
            raise RuntimeError(f"{kind} while a graph is recorded, at {_line()}")
        self.counts[kind, _line()] += 1


class _Functions(TorchFunctionMode):
    """What does not come to `FakeGpu` as operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.tolist:
            return func(args[0].cpu())
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if not isinstance(args[0], GpuTensor) and any(isinstance(one, GpuTensor) for one in index):
                raise MixedDevices(f"a CPU tensor with an index on the GPU, at {_line()}")
            index = tuple(torch.tensor(one) if isinstance(one, list) else one for one in index)
            args = args[0], index, *args[2:]
        return func(*args, **kwargs)


class FakeGraph:
    """Stands in for `torch.cuda.CUDAGraph`: operations are noted while recording, and done at each replay."""

    def __init__(self):
        self.operations, self._before = [], []

    def note_what_changes(self, func, args):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before.append((value, value.clone()))

    @staticmethod
    @contextmanager
    def record(graph, *args, **kwargs):
        """Stands in for `torch.cuda.graph`."""
        gpu = _get_current_dispatch_mode()
        gpu.graph = graph
        try:
            yield
        finally:
            gpu.graph = None
            for value, before in reversed(graph._before):  # while recording, nothing is computed
                value.copy_(before)

    def replay(self):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for func, args, kwargs, result in self.operations:
                for old, new in zip(_leaves(result), _leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def move_to_gpu(model):
    """Replace parameters and buffers, in place; they keep their memory."""
    with FakeGpu():
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(GpuTensor(weight.data), requires_grad=False)
            module._buffers.update({name: GpuTensor(one) for name, one in module._buffers.items() if one is not None})
    return model


def _inner(value):
    """What is on the fake device, as it is on the CPU: a tensor or the device itself."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, GpuTensor) else value


def _map(function, value):
    return type(value)([_map(function, one) for one in value]) if isinstance(value, (list, tuple)) else function(value)


def _leaves(value):
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, (list, tuple)) else [value]


def _line():
    """The innermost line of capkit's that led here; if there is none, of another library than torch."""
    frame, found = sys._getframe(1), None
    while frame and not (found and found.startswith(SOURCES)):
        name = frame.f_code.co_filename
        if name.startswith(SOURCES) or not found and name != __file__ and "/torch/" not in name:
            found = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return found
