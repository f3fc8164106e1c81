"""Models that ranks share give what whole ones give, in every family and scheme."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mmchat
from mmchat.catalog.find import find_model
from mmchat.checkpoints.adapter import Adapters
from mmchat.checkpoints.mapped_file import TensorEntry
from mmchat.conversation import question
from mmchat.engine.driver import run
from mmchat.engine.events import Finished
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import RankError, UsageError
from mmchat.loading.options import LoadOptions
from mmchat.loading.prepared import Prepared
from mmchat.nn.kv_cache import LayerCache
from mmchat.parallel.launch import join, launched_rank
from mmchat.parallel.slices import Shares
from mmchat.quant.formats.int4 import Int4
from mmchat.quant.kernels import ops, reference
from mmchat.runtime.mirrored import Driver
from tests.models.llava import folders as llava
from tests.models.qwen_vl import folders as qwen_vl
from tests.parallel.scenario import SMALL, TALL, WIDE, logits
from tests.parallel.thread_group import Board, ThreadGroup, ranks_of

SAMPLED = SamplingParams(temperature=1.0, seed=3, max_new_tokens=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str | None]:
    root = tmp_path_factory.mktemp("models")
    return {
        "tiny": None,
        "llava": str(llava.write_hub_folder(root / "llava")),
        "qwen_vl": str(qwen_vl.write_folder(root / "qwen")),
    }


def widened(operator: str, kernel: object, x: Tensor, *held: Tensor) -> Tensor:
    """In place of `ops.run`: products that do not round activations, which would hide the rest."""
    widen = reference.widen_int8 if len(held) == 2 else reference.widen_int4
    return x @ widen(*held).to(x.dtype).T


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < 1e-5 * expected.std().clamp(min=1)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ranks"), [("tiny", 2), ("tiny", 4), ("llava", 2), ("llava", 4), ("qwen_vl", 2)]
)
def test_logits_are_those_of_the_whole_model(family, ranks, folders):
    expected = logits(mmchat.load(folders[family], dtype="float32"))
    with ranks_of(ranks):
        assert_near(logits(mmchat.load(folders[family], dtype="float32", parallel=ranks)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_rounded_weights_are_parts_of_those_of_the_whole_model(scheme, ranks, monkeypatch):
    monkeypatch.setattr(ops, "run", widened)
    monkeypatch.setattr(Int4, "repack", lambda *_: None)
    whole = mmchat.load(dtype="float32", quantize=scheme)
    cuts = whole.spec.family.cuts(whole.spec.config)
    with ranks_of(ranks) as loaded:
        shared = mmchat.load(dtype="float32", quantize=scheme, parallel=ranks)
        assert_near(logits(shared), logits(whole))
        models = [shared.runtime.own.model, *(loaded[rank].model for rank in range(1, ranks))]
        for rank, model in enumerate(models):
            shares, own = Shares(cuts, rank, ranks), model.state_dict()
            for name, tensor in whole.runtime.model.state_dict().items():
                assert torch.equal(own[name], shares.of(name, tensor)), (rank, name)


@pytest.mark.slow
def test_conversations_and_many_rows_say_the_same(folders):
    """Undo, seeds, drafts, a schema, several pictures, rows that are cancelled, a second model."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}

    def said(model: mmchat.Model) -> list[str]:
        chat = model.chat(system="Be short.")
        found = [read(chat.send("What is in this picture?", [WIDE], SAMPLED))]
        found.append(read(chat.send("How many are there?", [], SAMPLED)))
        chat.undo()
        found.append(read(chat.send("And in these?", [TALL, SMALL], SAMPLED)))
        stopped = chat.send("Tell me more.", [], SAMPLED)
        next(stopped)
        stopped.close()
        found.append(read(chat.send("Go on.", [], replace(SAMPLED, speculate=4))))
        found.append(model.ask("How many?", WIDE, schema=schema))
        many = [("What is it?", [one]) for one in (WIDE, TALL, SMALL)] + ["Who are you?", "Hello"]
        return found + [one.text for one in model.generate_many(many, SAMPLED, rows=3)]

    expected = said(mmchat.load())
    with ranks_of(2):
        model = mmchat.load(parallel=2)
        assert said(model) == expected
        del model
        assert said(mmchat.load(parallel=2)) == expected


def test_scores_of_a_prompt_are_those_of_one_process():
    """As `mmchat find`, and the tasks of lm_eval, ask for them."""

    def scores(model: mmchat.Model) -> Tensor:
        message = question("A dog?", [WIDE], tag=model.processor.image_tag)
        prompt, engine = model.processor.chat([message]), model.engine_of(2)
        request = model.request(prompt, replace(SAMPLED, logprobs=1))
        request = replace(request, score_from=prompt.media[0].end)
        [*_, (_, end)] = run(engine, [engine.submit(request)])
        assert isinstance(end, Finished)
        return torch.tensor([token.logprob for token in end.prompt_logprobs])

    expected = scores(mmchat.load(dtype="float32"))
    with ranks_of(2):
        found = scores(mmchat.load(dtype="float32", parallel=2))
    assert len(found) > 5
    assert (found - expected).abs().max() < 1e-4


def test_a_pass_that_one_rank_has_no_memory_for_is_tried_again_by_all(monkeypatch):
    """The first has none to grow, once; the other has grown by then, and cannot shrink."""
    grow, first, failed = LayerCache.grow, threading.current_thread(), []

    def growing(layer: LayerCache, slot: int, capacity: int) -> None:
        if threading.current_thread() is first and not failed:
            failed.append(capacity)
            raise MemoryError
        grow(layer, slot, capacity)

    def shrinking(layer: LayerCache, slot: int, capacity: int) -> None:
        if threading.current_thread() is not first:
            raise MemoryError

    question, params = "What is this? " * 60, replace(SAMPLED, temperature=0.0)
    expected = mmchat.load().ask(question, WIDE, sampling=params)
    with ranks_of(2):
        model = mmchat.load(parallel=2)
        monkeypatch.setattr(LayerCache, "grow", growing)
        monkeypatch.setattr(LayerCache, "shrink", shrinking)
        assert model.ask(question, WIDE, sampling=params) == expected
    assert failed


def test_the_end_says_nothing_of_a_rank_that_is_gone_by_then():
    class Gone(ThreadGroup):
        def announce(self, head: Tensor) -> None:
            raise RankError("rank 1 is gone")

    group = Gone(Board(2), 0)
    Driver(group).stop()  # when Python ends, where it would be a traceback
    assert group.lost is not None


def test_no_sign_of_life_is_given_when_the_end_has_been_told():
    """Python ends then, and a thread within torch's code would abort the process."""

    def lives() -> bool:
        return any(thread.name == "mmchat ranks" for thread in threading.enumerate())

    class Alone(ThreadGroup):
        def announce(self, head: Tensor) -> None: ...

    driver = Driver(Alone(Board(2), 0))
    driver.show_life()
    assert lives()
    driver.stop()
    assert not lives()


def test_a_picture_is_held_while_the_first_of_its_equals_is():
    class Picture:
        content_hash, tensors = "equal", ()

    driver = Driver(ThreadGroup(Board(2), 0))
    one, two = Picture(), Picture()
    gone, number = weakref.ref(one), driver.picture(one)[1]
    keeper, again, is_new = driver.picture(two)
    assert (keeper, again, is_new) == (one, number, False)
    del one
    assert gone() is not None  # until it is told that they are to read it
    del keeper
    assert gone() is None
    assert not driver._pictures
    _, later, is_new = driver.picture(two)
    assert is_new
    assert later != number


@pytest.mark.parametrize("rank", ["x", "2", "-1"])
def test_a_rank_that_a_launcher_cannot_mean_is_refused(rank):
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched_rank(given) == 1
    with pytest.raises(UsageError, match=f"RANK '{rank}' is none of 0 to 1"):
        launched_rank({**given, "RANK": rank})


@pytest.mark.parametrize("port", ["http", "0", "65536"])
def test_a_port_that_is_none_is_refused(port, monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"MASTER_PORT '{port}' is no port"):
        join(1, 1)


def test_ranks_compare_small_tensors_of_any_shape():
    def identity(scale: float) -> str:
        tensors = {"logit_scale": torch.tensor(scale), "norm": torch.ones(3, dtype=torch.bfloat16)}
        files = SimpleNamespace(
            read=tensors.get,
            entries={n: TensorEntry(n, "", tuple(t.shape), Path()) for n, t in tensors.items()},
        )
        return replace(prepared, files=files).identity  # type: ignore[arg-type]

    spec, options = find_model().spec, LoadOptions(device="cpu")
    placement = options.placement(spec)
    prepared: Any = Prepared(None, spec, options, placement, None, Adapters(()))  # type: ignore[arg-type]
    assert identity(1.0) == identity(1.0) != identity(2.0)


def read(events) -> str:
    [finished] = [event for event in events if isinstance(event, Finished)]
    return finished.text
