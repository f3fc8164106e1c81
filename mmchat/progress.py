"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

# progress(stage, done, total) while a model is loaded: "weights" in tensors, "compile" in layers,
# "kernels" (0 of 1, 1 of 1) if those of the CPU are compiled, as they are once on a machine
ProgressCallback = Callable[[str, int, int], None]

# report(file, bytes of it that were read or arrived; negative when a start is made again)
BytesCallback = Callable[[str, int], None]
