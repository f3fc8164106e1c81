"""Conversations change as a whole or not at all, and reuse of the cache changes no logits."""

import random

import pytest
import torch
from PIL import Image as PILImage

import mmchat
from mmchat.chat.session import ChatSession
from mmchat.conversation import (
    Conversation,
    Image,
    Message,
    Text,
    ToolCall,
    Turn,
    arranged,
    edited,
    question,
)
from mmchat.engine.events import Finished, TextDelta
from mmchat.engine.reading import encode, rest_of
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import ImageError, PromptError, UsageError
from mmchat.images import from_pil
from tests.fake_model import fake_model
from tests.loading.test_loader import small_config, write_hf_folder
from tests.models.mllama.oracle import random_weights

CONVERSATIONS = 50
SIZES = ((70, 40), (30, 90), (42, 42), (200, 60))  # width, height: four different canvases


def finish(events):
    *_, last = events
    assert isinstance(last, Finished)
    return last


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small_config()
    folder = tmp_path_factory.mktemp("models") / "random"
    return mmchat.load(write_hf_folder(folder, config, random_weights(config)), device="cpu")


@pytest.fixture(scope="module")
def pictures():
    made = [PILImage.effect_noise(size, 60).convert("RGB") for size in SIZES]
    return [from_pil(picture, source=f"{i}.png") for i, picture in enumerate(made)]


class Talk:
    """A session under random use; every prompt that it reads is read afresh too, and compared."""

    def __init__(self, model, pictures, seed):
        self.random = random.Random(seed)
        self.model, self.pictures = model, pictures
        self.session = ChatSession(model, system=self.random.choice([None, "Be brief."]))
        self.first_logits = None
        self.encoded = self.compared = self.cached = 0

    def watch(self, monkeypatch):
        runtime, cache = self.model.runtime, self.model.engine.cache
        encode, forward, begin = runtime.encode, runtime.forward, cache.begin

        def counted(media, into):
            self.encoded += into is cache
            return encode(media, into)

        def opened(*given):
            self.first_logits = None
            begin(*given)

        def kept(batch, read):
            logits = forward(batch, read)
            if read is cache and self.first_logits is None:
                self.first_logits = logits
            return logits

        monkeypatch.setattr(runtime, "encode", counted)
        monkeypatch.setattr(runtime, "forward", kept)
        monkeypatch.setattr(cache, "begin", opened)

    def step(self):
        turns = len(self.session.conversation.turns)
        moves = ["ask"] * 4 + ["fail"] + ["undo", "retry", "edit", "drop", "replace"] * (turns > 0)
        getattr(self, self.random.choice(moves))()

    def ask(self):
        chosen = self.random.choices(self.pictures, k=self.random.choice([0, 0, 1, 2]))
        text = self.random.choice(["What is it?", "And <|image|>now?", "x" * 30])
        self.answer(self.session.ask(question(text, chosen, marks=len(chosen) > 0)))

    def retry(self):
        self.answer(self.session.retry(self.sampling()))

    def edit(self):
        message = self.session.conversation.turns[-1].question
        self.answer(self.session.edit(edited(message, "Say it again"), self.sampling()))

    def undo(self):
        self.session.undo()

    def drop(self):
        self.exchange(None)

    def replace(self):
        self.exchange(self.random.choice(self.pictures))

    def exchange(self, image):
        chat = self.session.conversation
        if chat.images:
            number = self.random.randint(1, len(chat.images))
            self.session.conversation = chat.with_image(number, image)

    def fail(self):
        before = self.session.conversation
        with pytest.raises(ImageError):
            finish(self.session.send("Hi", [b"no picture"]))
        assert self.session.conversation is before

    def sampling(self):
        return SamplingParams(temperature=1.0, max_new_tokens=8, seed=self.random.randrange(99))

    def answer(self, events):
        """Read the answer, stopping it after a random number of tokens half of the time."""
        stop_after = self.random.choice([None, self.random.randint(1, 7)])
        tokens = 0
        for event in events:
            if isinstance(event, TextDelta):
                tokens += 1
                if tokens == stop_after:
                    self.session.interrupt()
        assert isinstance(event, Finished)
        if stop_after and event.reason == "interrupted":
            assert len(event.output_ids) <= stop_after + 1
        self.compare(event)

    def compare(self, finished):
        """The logits of the prompt's last position, cached and from a fresh prefill."""
        processor, runtime = self.model.processor, self.model.runtime
        turns = self.session.conversation.turns
        last = [turns[-1].question] if turns else []
        before = self.session.conversation.without_last().messages + last
        prompt = processor.chat(before)
        if prompt.token_ids != finished.prompt_ids:  # said nothing, so that it was not kept
            return
        cache = runtime.new_cache(1, 64)
        encode(runtime, prompt, cache)
        fresh = runtime.forward(rest_of(prompt, cache, runtime.device), cache)
        torch.testing.assert_close(self.first_logits, fresh, atol=1e-4, rtol=1e-4)
        self.compared += 1
        self.cached += finished.usage.cached_tokens


@pytest.mark.parametrize(
    "seeds",
    [
        range(4),
        pytest.param(range(4, CONVERSATIONS), marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_cached_turns_have_the_logits_of_a_fresh_prefill(seeds, model, pictures, monkeypatch):
    """Pictures, undo, retry, edit, exchanged pictures, failures and interruptions, at random."""
    compared = cached = 0
    model_defaults = SamplingParams(temperature=1.0, max_new_tokens=8, seed=1)
    object.__setattr__(model, "sampling_defaults", model_defaults)
    for seed in seeds:
        with monkeypatch.context() as patch:
            talk = Talk(model, pictures, seed)
            talk.watch(patch)
            for _ in range(7):
                talk.step()
            assert talk.encoded <= len(pictures)  # each content once in a conversation
            compared += talk.compared
            cached += talk.cached
    assert compared > 2 * len(seeds)
    assert cached > 10 * compared  # the cache was in use


def test_a_cache_that_kept_a_stale_position_would_be_seen(model, pictures, monkeypatch):
    """The comparison above fails when truncation forgets to drop what differs."""
    talk = Talk(model, pictures, 0)
    talk.watch(monkeypatch)
    talk.answer(talk.session.ask(question("What is it?", pictures[:1]), talk.sampling()))
    talk.session.conversation = talk.session.conversation.with_image(1, pictures[1])
    prompt = model.processor.chat(talk.session.messages[:-1])
    [slot] = model.engine.prefixes.slots
    slot.marks = list(prompt.fingerprint)  # as if the new picture had been read
    with pytest.raises((AssertionError, KeyError)):  # it was never encoded, either
        talk.answer(talk.session.retry(talk.sampling()))


def test_undo_takes_back_one_turn():
    session = ChatSession(fake_model(b"one", b"two"))
    finish(session.send("Hi"))
    first = session.conversation
    finish(session.send("Go"))
    assert session.undo().answer == "two"
    assert session.conversation == first
    session.undo()
    with pytest.raises(UsageError, match="nothing has been asked"):
        session.undo()


def test_retry_replaces_the_answer_and_keeps_the_old_one_if_it_fails():
    model = fake_model(b"one", b"two", b"broken")
    session = ChatSession(model)
    finish(session.send("Hi"))
    finish(session.retry())
    assert [m.text for m in session.messages] == ["Hi", "two"]
    model.runtime.fail_at = 3
    with pytest.raises(RuntimeError, match="scripted"):
        finish(session.retry())
    assert [m.text for m in session.messages] == ["Hi", "two"]


def test_edit_asks_another_question_in_place_of_the_last():
    session = ChatSession(fake_model(b"one", b"two", b"three"))
    finish(session.send("Hi"))
    finish(session.send("Go"))
    finish(session.edit(edited(session.conversation.turns[-1].question, "Stay")))
    assert [m.text for m in session.messages] == ["Hi", "one", "Stay", "three"]


def test_edit_takes_a_text_and_keeps_the_pictures():
    session = ChatSession(fake_model(b"one", b"two"))
    image = from_pil(PILImage.new("RGB", (3, 2)))
    finish(session.send("Hi", image))
    finish(session.edit("Stay"))
    [turn] = session.conversation.turns
    assert (turn.question.text, turn.answer, turn.question.images) == ("Stay", "two", (image,))


def test_an_interrupted_answer_is_marked_and_an_empty_one_is_not_kept():
    session = ChatSession(fake_model(b"A long answer", b"\xf0\x9f\x90\xb6", b"x"))
    for event in session.send("Hi"):
        if isinstance(event, TextDelta):
            session.interrupt()
    assert session.conversation.turns[-1].reason == "interrupted"
    before = session.conversation
    events = session.send("Go")
    session.interrupt()  # before it has begun
    finished = finish(events)
    assert finished.reason == "interrupted"
    assert finished.output_ids == ()
    assert session.conversation is before


def test_the_budget_counts_what_a_message_would_take():
    session = ChatSession(fake_model(b"one", max_seq_len=20))
    assert session.budget().used == 0
    finish(session.send("Hi"))
    assert session.budget().used == len("Hi.one.")
    assert session.budget(Message("user", (Text("Go"),))).used == len("Hi.one.Go.")
    assert session.budget().limit == 20


def test_the_oldest_turns_that_would_have_to_go_are_counted():
    session = ChatSession(fake_model(max_seq_len=20))
    turn = Turn(Message("user", (Text("Hi"),)), "one")  # 7 positions
    session.conversation = Conversation(None, (turn, turn))
    assert session.turns_over_budget(question("x" * 4, [])) == 0
    assert session.turns_over_budget(question("x" * 5, [])) == 1
    assert session.turns_over_budget(question("x" * 12, [])) == 2
    assert session.turns_over_budget(question("x" * 19, [])) is None


def test_pictures_stand_before_the_text_or_at_their_marks(pictures):
    first, second, *_ = pictures
    assert question("What?", [first]).content == (first, Text("What?"))
    marked = question("Is <|image|> like <|image|>?", [first, second], marks=True).content
    assert marked == (Text("Is "), first, Text(" like "), second, Text("?"))
    assert question("See <|image|>", [first, second], marks=True).content == (
        first,
        Text("See "),
        second,
    )
    assert question("<|image|>", [first]).text == "<|image|>"
    with pytest.raises(PromptError, match=r"the text has 2 .* marks for 1 pictures"):
        question("<|image|><|image|>", [first], marks=True)


def test_pictures_stand_at_the_tags_of_their_family(pictures):
    first, second, *_ = pictures
    tagged = question("Is <image> like <image>?", [first, second], tag="<image>")
    assert tagged.content == (Text("Is "), first, Text(" like "), second, Text("?"))
    assert question("<image>?", [first], tag="<image>").content == (Text(""), first, Text("?"))
    assert question("<image>?", [first]).content == (first, Text("<image>?"))
    assert edited(tagged, "See <image>", tag="").text == "See <image>"
    with pytest.raises(PromptError, match="the text has 1 <image> tag, and there are 2 pictures"):
        edited(tagged, "See <image>", tag="<image>")


def test_marks_of_programs_are_places_of_as_many_pictures(pictures):
    first, second, *_ = pictures
    marks = ("<|image|>", "<image>")
    pages = [[first, second], "See <image>", "!"]
    assert arranged(pages, marks) == (Text("See "), first, second, Text("!"))
    assert arranged([[first], "<|image|>See"], marks) == (first, Text("See"))
    for text in ("See", "<image> or <image>", "<|image|><|image|>"):
        assert arranged([[first], text], marks) == (first, Text(text))
        assert arranged([text], marks) == (Text(text),)
    torn = [[first], "<ima", "ge>"]  # a mark is within one text
    assert arranged(torn, marks) == (first, Text("<ima"), Text("ge>"))


def test_pictures_are_exchanged_by_number_in_any_turn(pictures):
    first, second, third, _ = pictures
    chat = Conversation(None, (Turn(question("a", [first, second]), "1"),))
    chat = chat.plus(Turn(question("b", [first]), "2"))
    assert chat.with_image(3, third).images == [first, second, third]
    assert chat.with_image(1, None).images == [second, first]
    assert chat.images == [first, second, first]
    assert not any(isinstance(p, Image) for p in chat.with_image(3, None).turns[1].question.content)
    with pytest.raises(PromptError, match="no picture 4; there are 3"):
        chat.with_image(4, None)


def test_messages_in_another_order_are_no_conversation():
    with pytest.raises(PromptError, match="in turn"):
        Conversation.of([Message("user", (Text("a"),))])


def test_only_the_assistant_calls_tools_and_no_conversation_holds_calls():
    call = ToolCall("weather", "{}")
    with pytest.raises(UsageError, match="only the assistant calls tools, not a message of user"):
        Message("user", "x", (call,))
    with pytest.raises(UsageError, match="a call of a message must be a ToolCall"):
        Message("assistant", "x", ("weather",))
    with pytest.raises(PromptError, match="holds no calls of tools"):
        Conversation.of([Message("user", "x"), Message("assistant", "y", (call,))])
