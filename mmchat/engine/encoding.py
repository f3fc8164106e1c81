"""Pictures that are encoded together, slice by slice, for the rows that wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mmchat.hardware.allocation import memory_error

if TYPE_CHECKING:
    from mmchat.engine.row import Row
    from mmchat.models.base import Cache
    from mmchat.models.prompt import Media
    from mmchat.runtime.base import Runtime


class Encoding:
    """media: what is offered to the model, which takes the first and as many others as it likes;
    once it is begun, what was taken."""

    def __init__(self, media: Sequence[Media]) -> None:
        self.media = media
        self._slices: Iterator[Sequence[Media]] | None = None
        self._is_last_try = False

    def is_for(self, row: Row) -> bool:
        """Whether the row waits for any of these pictures."""
        hashes = {media.content_hash for media in self.media}
        return any(media.content_hash in hashes for media in row.unseen)

    def step(self, runtime: Runtime, cache: Cache, release: Callable[[], object]) -> bool:
        """One slice; whether there are more. Raises what fails twice.

        The second try is the first picture alone, where there were others or memory ran out, which
        `release` may give back.
        """
        out_of_memory = None
        try:
            if self._slices is None:
                self._slices = runtime.encode(self.media, cache)
            taken = next(self._slices, None)
            self.media = taken or self.media
            return taken is not None
        except Exception as error:
            out_of_memory = memory_error(error)
            if self._is_last_try or not (out_of_memory or len(self.media) > 1):
                raise
        if out_of_memory:
            release()
        self.media, self._slices, self._is_last_try = self.media[:1], None, True
        return True
