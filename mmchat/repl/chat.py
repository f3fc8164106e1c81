"""The chat without its terminal: what a line of input does to the session."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import KW_ONLY, InitVar, asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.catalog.adapters import find_adapters
from mmchat.conversation import Conversation, Turn, edited, question
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import (
    ContextLengthExceeded,
    ImageError,
    MemoryError_,
    MmchatError,
    RankError,
    UsageError,
)
from mmchat.input_text import checked
from mmchat.repl import facts, paths, saving
from mmchat.repl.chats import Keeper
from mmchat.words import plural

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.chat.session import Budget, ChatSession
    from mmchat.conversation import Image, Message
    from mmchat.engine.events import Finished
    from mmchat.loading.loader import LoadedModel
    from mmchat.repl.loading import LoadingModel
    from mmchat.repl.screen import PlainScreen

ANSWER_ROOM = 128  # positions to leave for an answer when old turns have to go


class Leave(Exception):  # noqa: N818 - not an error
    """The user wants to go."""


@dataclass(eq=False)
class Chat:
    """A session with pictures attached for the next question, settings, and a screen.

    Every line either takes effect as a whole or leaves things as they were and says so.
    chats, saves: of its Keeper. loading: the model, if it is not that of `session` already; what
    needs it waits. first_error: exit code of the first line that failed, 0 if none did.
    """

    session: ChatSession
    screen: PlainScreen
    sampling: SamplingParams
    chats: InitVar[Path]
    _: KW_ONLY
    saves: InitVar[bool] = False
    loading: LoadingModel | None = None
    attached: list[Image] = field(default_factory=list)
    image_tags: bool = False  # whether a question may open the pictures that it names in tags
    last: Finished | None = None
    first_error: int = 0
    written: set[tuple[str, Path]] = field(default_factory=set)  # kinds and files, by commands
    addresses: list[str] = field(default_factory=list)  # pictures from the network, for completion
    keeper: Keeper = field(init=False)
    # As it was given, and perhaps without its adapters
    _models: list[LoadedModel] = field(default_factory=list)
    _answered_with: tuple[Conversation, SamplingParams] | None = None
    _budget: tuple[Conversation, Budget] | None = None

    def __post_init__(self, chats: Path, saves: bool) -> None:
        self.keeper = Keeper(chats, self.as_saved, self.screen.note, saves=saves)

    @property
    def spec(self) -> ModelSpec:
        return self._known.spec

    @property
    def _known(self) -> LoadingModel | LoadedModel:
        """What need not be waited for."""
        return self.loading or self.session.loaded

    @property
    def is_loading(self) -> bool:
        """Whether what needs the model would have to wait."""
        return self.loading is not None and not self.loading.is_over

    def as_saved(self, chat: Conversation) -> saving.SavedChat:
        """`chat` with what else is saved of it: the model and the settings that were changed."""
        defaults = SamplingParams(**asdict(self.spec.generation))
        values = {name: getattr(self.sampling, name) for name in saving.SETTINGS}
        changed = {n: v for n, v in values.items() if v is not None and v != getattr(defaults, n)}
        return saving.SavedChat(chat, self.spec.name, changed)

    def budget(self) -> Budget:
        """Context in use; counted once per state of the conversation."""
        chat = self.session.conversation
        if self._budget is None or self._budget[0] is not chat:
            self._budget = chat, self.session.budget()
        return self._budget[1]

    def line(self, text: str) -> None:
        """Do what a line says. Raises Leave; errors are shown."""
        from mmchat.repl import commands

        try:
            text = checked(text, "the line")
            found = commands.find(text)
            if found is not None:
                command, argument = found
                command.run(self, argument)
            elif text.strip():
                if reason := paths.folder_named(text):
                    raise UsageError(f"{reason}; nothing was sent")
                self.take(paths.read_line(text))
        except MmchatError as error:
            has_model = self.loading is None or self.loading.error is None
            if isinstance(error, RankError) or not has_model:  # there is nothing to talk to
                raise
            self.fail(error)
        except KeyboardInterrupt:
            if not self.screen.interactive:
                raise
            self.screen.note("stopped")

    def use_adapter(self, wanted: bool | None) -> str:
        """Answer from now on with the adapters or without; says which. None: as before.

        Raises UsageError if there are none, MemoryError_ if the other model does not fit.
        """
        self._models = self._models or [self.session.loaded]
        merged = self._models[0]
        if not merged.adapters:
            raise UsageError("no adapter is merged; start with --adapter PATH|REPO")
        if wanted is False and len(self._models) == 1:
            from mmchat.loading.loader import load_with

            said = "loading what the adapter changed"
            model = self.screen.wait(said, lambda: load_with(merged, ()))
            self._models.append(model)
        if wanted is not None:
            self.session.loaded = self._models[0 if wanted else 1]
            self._answered_with = None
        with_it = self.session.loaded is merged
        names = ", ".join(paths.one_line(one.name) for one in find_adapters(merged.adapters))
        return f"answers come {'with' if with_it else 'without'} {names}; \\retry compares"

    def fail(self, error: MmchatError) -> None:
        self.first_error = self.first_error or error.exit_code
        self.screen.error(str(error))

    def take(self, found: paths.Found) -> None:
        """Attach what a text names and ask its question: both, or neither."""
        as_is = "nothing was sent (\\say TEXT sends as is)"
        if found.missing:
            raise UsageError(f"{facts.no_such(found.missing)}; {as_is}")
        before = list(self.attached)
        if found.sources:
            try:
                self.attach(found.sources)
            except (ImageError, MemoryError_) as error:
                raise type(error)(f"{error}; {as_is}") from None
        if found.mentioned:
            names = facts.some(found.mentioned)
            self.screen.note(f"without a picture: {names}; \\image PATH|URL attaches one")
        if not found.text:
            return
        try:
            self.ask(found.text)
        except BaseException:
            self.attached = before
            raise

    def say_notes(self) -> None:
        """What has been noted while the model was loaded."""
        while self.loading and self.loading.notes:
            self.screen.note(self.loading.notes.pop(0))

    def say_unasked(self) -> None:
        """Say that attached pictures are no part of what is saved, if there are any."""
        if self.attached:
            pictures = plural(len(self.attached), "picture")
            self.screen.note(f"{pictures} attached and not asked about; not saved")

    def attach(self, sources: Sequence[str]) -> None:
        """Load pictures for the next question: all of them or none. Raises ImageError, …"""
        loaded = self.load(sources, self.pictures())
        is_first, self.attached = not self.attached, self.attached + loaded
        for image in loaded:
            self.show_picture(image)
        sees_earlier = self.spec.family.describe(self.spec.config).sees_earlier
        if is_first and self.session.conversation.images and not sees_earlier:
            self.screen.note(facts.OUT_OF_SIGHT)

    def load(self, sources: Sequence[str], beside: Iterable[Image]) -> list[Image]:
        """Pictures by path, address or "clipboard", which the chat will hold beside others."""
        known = self._known.options
        if known.text_only:
            raise UsageError("the model was loaded with --text-only; start again without it")
        from mmchat.images import load_images
        from mmchat.images.clipboard import clipboard

        alpha = known.alpha or self.session.loaded.processor.alpha
        found = [clipboard() if source == paths.CLIPBOARD else source for source in sources]
        names = [None if isinstance(source, str) else paths.CLIPBOARD for source in found]
        one = paths.short_name(sources[0])
        what = one if len(sources) == 1 else f"{len(sources)} pictures"
        images = self.screen.wait(
            f"reading {what}",
            lambda: load_images(found, alpha=alpha, names=names, beside=beside),
        )
        for source in sources:
            if source.startswith(("http:", "https:")) and source not in self.addresses:
                self.addresses.append(source)
        return images

    def show_picture(self, image: Image, done: str = "attached") -> None:
        name = f"{done} {paths.short_name(image.source)}"
        self.screen.picture(image.pixels, name, facts.picture_facts(image, self.spec))

    def ask(self, text: str) -> None:
        """Send a message with the attached pictures."""
        processor, attached = self.session.loaded.processor, self.attached
        opened = {}
        if self.image_tags:
            from mmchat.chat.session import open_named

            opened = open_named(processor, text, attached, self.pictures())
        message = question(
            text,
            attached,
            marks=bool(attached),
            tag=self._tag(attached),
            names=processor.name_tags if attached or self.image_tags else None,
            opened=opened,
        )
        if self._answered(message, self.sampling, replaces=False):
            self.attached = []

    def retry(self, sampling: SamplingParams) -> None:
        last = self.session.last_turn()
        is_fixed = sampling.is_greedy or sampling.seed is not None
        is_same = self._answered_with == (self.session.conversation, sampling)
        if is_fixed and is_same and last.reason != "interrupted":
            self.screen.note(facts.same_again(sampling))
        self._answered(last.question, sampling, replaces=True)

    def edit(self, text: str) -> None:
        """Ask `text` in place of the last question, with the same pictures."""
        old = self.session.last_turn().question
        names = self.session.loaded.processor.name_tags if old.images else None
        message = edited(old, checked(text, "the line"), tag=self._tag(old.images), names=names)
        self._answered(message, self.sampling, replaces=True)

    def _tag(self, images: Sequence[Image]) -> str:
        """Where nothing is attached, nobody means a picture by it."""
        return self.session.loaded.processor.image_tag if images else ""

    def _answered(self, message: Message, sampling: SamplingParams, *, replaces: bool) -> bool:
        """Write an answer; offers to drop old turns if the context is full. True if it was kept.

        replaces: the last question is asked anew.
        """
        _ = self.session.loaded  # waited for here, where that can be seen
        try:
            return self._answer(message, sampling, replaces)
        except ContextLengthExceeded as error:
            count = self._turns_to_drop(message, len(self.session.conversation.turns) - replaces)
            if not count:
                raise
            turns = f"the {count} oldest turns" if count > 1 else "the oldest turn"
            turns += facts.with_pictures(self.session.conversation.turns[:count])
            self.screen.error(str(error))
            if not self.screen.confirm(f"Drop {turns} and ask again?"):
                raise ContextLengthExceeded(
                    f"nothing was sent; \\forget {count} drops {turns} to make room"
                ) from None
            self.change(self.session.conversation.without_first(count))
            return self._answer(message, sampling, replaces)

    def _turns_to_drop(self, message: Message, most: int) -> int | None:
        """Turns that must go, at most so many."""
        room = min(self.sampling.max_new_tokens, ANSWER_ROOM)
        for wanted in (room, 1):
            count = self.session.turns_over_budget(message, wanted)
            if count is not None:
                return min(count, most)
        return None

    def _answer(self, message: Message, sampling: SamplingParams, replaces: bool) -> bool:
        before = self.session.conversation
        base = before.without_last() if replaces else before
        text: list[str] = []

        def unfinished() -> Conversation:
            return base.plus(Turn(message, "".join(text), "interrupted"))

        def on_text(piece: str) -> None:
            text.append(piece)
            self.keeper.save_sometimes(unfinished)

        self.keeper.save(unfinished())
        ask = self.session.edit if replaces else self.session.ask
        events = ask(message, sampling)
        try:
            self.last = self.screen.answer(
                events, self.session.interrupt, on_text, is_json=sampling.schema is not None
            )
        except MmchatError:
            self.keeper.save(before)
            raise
        except BaseException:  # the program ends; what was said so far is kept
            self.keeper.save(unfinished())
            raise
        self.keeper.save(self.session.conversation)
        kept = self.session.conversation is not before
        positions = self.session.loaded.max_seq_len
        self._answered_with = self.session.conversation, sampling
        if note := facts.ending(self.last, sampling, positions, kept=kept):
            self.screen.note(note)
        return kept

    def resume(self, saved: saving.SavedChat, path: Path, given: Collection[str] = ()) -> None:
        """Go on with the chat that was saved at `path`, and its settings.

        What follows is saved there if that is in the folder of chats, else as a new chat. given:
        settings that stay as they are.
        """
        self.written = {("chat", path.resolve())}
        if path.parent == self.keeper.chats:
            self.keeper.go_on(path)
        else:
            self.keeper.start_new()
        taken = {name: value for name, value in saved.settings.items() if name not in given}
        self.sampling = replace(self.sampling, **taken)
        self.session.conversation = saved.conversation  # saved with the first change
        turns, images = saved.conversation.turns, saved.conversation.images
        counts = f"{plural(len(turns), 'turn')} with {plural(len(images), 'picture')}"
        self.screen.note(f"going on after {counts}")
        if taken:
            shown = ", ".join(f"{name} {facts.shown(value)}" for name, value in taken.items())
            self.screen.note(f"as before: {shown}")
        if saved.model != self.spec.name:
            self.screen.note(f"the answers so far are by {saved.model}")
        if turns and turns[-1].reason == "interrupted":
            self.screen.note("the last answer is not complete; \\retry answers again")
        if turns:
            self.screen.turn(facts.question_line(turns[-1].question), turns[-1].answer)

    def change(self, chat: Conversation) -> None:
        """Another state of the conversation, saved at once."""
        self.session.conversation = chat
        self.keeper.save(chat)

    def pictures(self) -> list[Image]:
        """All pictures by number: those of the conversation, then those attached."""
        return self.session.conversation.images + self.attached

    def exchange(self, number: int, image: Image | None) -> None:
        """Replace picture `number` or take it out."""
        pictures, asked = self.pictures(), len(self.session.conversation.images)
        if not 1 <= number <= len(pictures):
            raise UsageError(f"there is no picture {number}; \\images lists them")
        if number <= asked:
            self.change(self.session.conversation.with_image(number, image))
        else:
            at = number - asked - 1
            self.attached[at : at + 1] = [image] if image else []
        if image:
            self.show_picture(image, f"picture {number} is now")
        else:
            out = paths.short_name(pictures[number - 1].source)
            self.screen.note(f"picture {number}, {out}, is out")
        if number <= asked:
            stay = "earlier answers stay as they are"
            self.screen.note(f"{stay}; \\retry answers the last question again")
