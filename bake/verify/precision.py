"""Float64 evaluation of models whose code casts to float32 on the way.

The classes of transformers compute norms, softmax and router scores in float32 whatever the dtype
of the model, which is more precise than float16 and less precise than float64. A comparison in
float64 would then measure those casts, about 1e-7, and hide everything below.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

# Casts and nothing else: what they return of a float64 tensor is that tensor, on their device.
_CASTS = frozenset(
    {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16}
)
# A dtype here says how to read the bits, not how precisely to compute.
_REINTERPRETS = frozenset({Tensor.view})
# What takes tensors of one dtype only: a router that its class keeps in float32, as Hunyuan's
# mixtures do, would have got its input in float32 as well.
_OF_ONE_DTYPE = frozenset({F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__})


@contextmanager
def double_precision() -> Iterator[None]:
    """Evaluate float64 tensors in float64 throughout, although the code asks for less.

    Inside the context no operation turns a float64 tensor into a narrower float: ``x.float()``,
    ``x.to(torch.float32)``, ``x.type_as(y)`` return x, and ``softmax(x, dtype=torch.float32)``
    computes in float64. Tensors of other dtypes are untouched, so integer positions still become
    float32 (the tables of rotary embeddings stay what they are), and a model in float32 or bfloat16
    evaluates as it does outside.

    Load the model with ``from_pretrained(..., dtype=torch.float64)``: ``model.double()`` widens
    buffers that were rounded to float32 before, such as the scale of Gemma's embeddings. A mixture
    of experts needs ``experts_implementation="eager"`` as well, since grouped kernels take no
    float64. Hooks that steer a narrower model cast their float64 maps down, so run those outside.
    """
    with _NoNarrowing():
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 numbers on a GPU as float32 numbers inside the context.

    By itself cuDNN takes ten bits of each for a convolution (TF32), as a mixer of a state-space
    model has one: an error of 2⁻¹¹ beside which a bound for float32 would mean nothing. cuBLAS does
    where the process has asked for it.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class _NoNarrowing(TorchFunctionMode):
    """Intercepts every torch function called from Python."""

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = {} if kwargs is None else kwargs
        # Hundreds of calls a forward pass name no type: they are handed on at once.
        named = torch.dtype in map(type, (*args, *keywords.values()))
        if not named and func not in _CASTS and func not in _OF_ONE_DTYPE:
            return func(*args, **keywords)
        tensor = args[0] if args else keywords.get("input")
        if not isinstance(tensor, Tensor) or tensor.dtype is not torch.float64:
            return func(*args, **keywords)
        if func in _CASTS:
            result = func(*args, **keywords)
            narrowed = isinstance(result, Tensor) and _is_narrower(result.dtype)
            return tensor.to(result.device) if narrowed else result
        if func in _REINTERPRETS:
            return func(*args, **keywords)
        widened = _in_double if func in _OF_ONE_DTYPE else _widened
        return func(
            *(widened(argument) for argument in args),
            **{name: widened(argument) for name, argument in keywords.items()},
        )


def _widened(argument: Any) -> Any:
    return torch.float64 if _is_narrower(argument) else argument


def _in_double(argument: Any) -> Any:
    narrow = isinstance(argument, Tensor) and _is_narrower(argument.dtype)
    return argument.double() if narrow else argument


def _is_narrower(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point and value is not torch.float64
