"""A model that is loaded in a thread while its chat is up already."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.loading.loader import LoadedModel
    from mmchat.loading.options import LoadOptions


@dataclass(eq=False)
class LoadingModel:
    """What is known of a model before it is there: `spec` and `options`, whose alpha is chosen.

    load: is given what takes its stages and notes (`show`, `note`), as console.Stages does. stage:
    the last one shown. notes: those that nobody has taken; none if quiet.
    """

    spec: ModelSpec
    options: LoadOptions
    stage: str
    load: Callable[[LoadingModel], LoadedModel]
    quiet: bool = False
    notes: list[str] = field(default_factory=list)
    _begun: bool = False
    _result: Future[LoadedModel] = field(default_factory=Future)

    def show(self, stage: str) -> None:
        self.stage = stage

    def note(self, text: str) -> None:
        if not self.quiet:
            self.notes.append(text)

    def begin(self) -> None:
        """Load in a thread that keeps no process alive; once."""
        if not self._begun:
            self._begun = True
            threading.Thread(target=self._run, name="loading", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result.set_result(self.load(self))
        except BaseException as error:
            self._result.set_exception(error)

    @property
    def is_over(self) -> bool:
        """Whether there is a model, or an error in its place."""
        return self._result.done()

    @property
    def is_busy(self) -> bool:
        """Whether the thread is at work, for which an ending process does not wait."""
        return self._begun and not self.is_over

    @property
    def error(self) -> BaseException | None:
        """Why there is no model and will be none."""
        return self._result.exception() if self.is_over else None

    def get(self) -> LoadedModel:
        """Wait for the model. Raises what loading raised."""
        self.begin()
        return self._result.result()
