"""Build modules whose weights come later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoInitialValues(TorchFunctionMode):
    """Leaves tensors as they are where torch.nn.init would fill them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules built within are on the meta device: they have shapes, and no values.

    Filling a meta tensor does nothing, but torch loads its compiler to do it, which takes longer
    than the built-in model does.
    """
    with torch.device("meta"), _NoInitialValues():
        yield
