"""Work that makes many objects and no cycles of them, without the collector that looks for cycles.

Every object that is kept makes Python look through all that are: of the plan of a mixture with
100,000 tensors that is two thirds of the time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Put off the search for cycles; what is counted out of use is freed as ever."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
