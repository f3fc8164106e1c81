"""Slices of all released models join to the whole, and are what estimates count."""

from __future__ import annotations

import math

import pytest
import torch

from mmchat.catalog.known import find_spec
from mmchat.errors import UsageError
from mmchat.estimate.memory import Setup
from mmchat.loading.shares import check_groups, cut_rounded
from mmchat.nn.linear import Linear, set_formats
from mmchat.nn.shapes_only import shapes_only
from mmchat.parallel.slices import Cut, Shares, check_ranks, share_shape, shared_counts
from mmchat.quant.formats.blocks import BLOCKS4, BLOCKS6, BLOCKS8
from mmchat.quant.formats.int4 import Int4
from mmchat.quant.formats.int8 import INT8
from mmchat.quant.schemes import make_plan
from tests.parallel.thread_group import Board, ThreadGroup

NAMES = ("tiny", "llama3.2-11B", "llama3.2-90B", "llava", "llava:13b", "qwen-vl-chat")


def known(name: str):
    spec = find_spec(name)
    assert spec is not None
    return spec


def able(spec) -> list[int]:
    common = math.gcd(*shared_counts(spec.family.cuts(spec.config)).values())
    return [n for n in (2, 4, 8) if common % n == 0]


CASES = [(name, ranks) for name in NAMES for ranks in able(known(name))]


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_every_row_and_column_is_held_once(name, ranks):
    spec = known(name)
    cuts = spec.family.cuts(spec.config)
    of_ranks = [Shares(cuts, rank, ranks) for rank in range(ranks)]
    used = set()
    for tensor, shape in spec.family.shapes(spec.config).items():
        cut = of_ranks[0].cut(tensor)
        if cut is None:
            assert tensor.endswith(WHOLE), tensor
            continue
        if cut.axis == 1 and len(shape) == 1:
            continue
        assert sum(cut.parts) == shape[cut.axis]
        used.add(cut)
    for cut in used:
        size = sum(cut.parts)
        spans = [span for shares in of_ranks for span in cut.spans(shares.rank, ranks)]
        assert all(begin < end for begin, end in spans)
        held = sorted(at for begin, end in spans for at in range(begin, end))
        assert held == list(range(size))


# What every rank holds whole: norms, gates, tables, and the matrix behind Qwen-VL's resampler.
WHOLE = (
    "norm.weight", "norm1.weight", "norm2.weight", "norm.bias", "norm1.bias", "norm2.bias",
    "layernorm_pre.weight", "layernorm_pre.bias", "layernorm_post.weight", "layernorm_post.bias",
    "gate", "gate_attn", "gate_ffn", "embed_tokens.weight", "embedding.weight", "embedding",
    "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "ln_f.weight", "wte.weight",
    "ln_q.weight", "ln_q.bias", "ln_kv.weight", "ln_kv.bias", "ln_pre.weight", "ln_pre.bias",
    "ln_post.weight", "ln_post.bias", "conv1.weight", "positional_embedding", "pos_embed",
    "query", "visual.proj", "pre_layrnorm.weight", "pre_layrnorm.bias",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [(name, able(known(name))[-1]) for name in NAMES])
@pytest.mark.parametrize("scheme", ["none", "int8", "int4-g32"])
def test_a_rank_holds_what_the_estimate_counts(name, ranks, scheme):
    """Counted from a model on the meta device, whose every tensor is cut."""
    spec = known(name)
    with shapes_only():
        model = spec.family.build().model(spec.config)
    set_formats(model, make_plan(scheme))
    of_ranks = [Shares(spec.family.cuts(spec.config), rank, ranks) for rank in range(ranks)]
    wanted, rounded = set(model.weight_names(text_only=False)), dict(model.named_buffers())
    stored = {name: like for name, like in model.state_dict().items() if name in wanted}

    def held(shares: Shares) -> int:
        return sum(
            math.prod(share_of(shares, tensor, like)) * (like.itemsize if tensor in rounded else 2)
            for tensor, like in stored.items()
        )

    need = Setup(spec, "cuda", 2, quantize=scheme, ranks=ranks).need()
    assert need.weights == max(map(held, of_ranks))


def share_of(shares: Shares, name: str, like: torch.Tensor) -> tuple[int, ...]:
    if like.dim() != 2 or not shares.cuts_columns(name):
        return share_shape(shares, name, like.shape)
    return tuple(shares.of(name, like).shape)


def test_other_numbers_of_ranks_are_refused_with_those_that_work():
    spec = known("llama3.2-90B")
    with pytest.raises(UsageError) as caught:
        check_ranks(spec.name, 3, spec.family.cuts(spec.config))
    assert str(caught.value) == (
        "--parallel 3: Llama-3.2-90B-Vision-Instruct has 64 heads; use 2 or 4 or 8"
    )


def test_groups_are_not_cut_in_two():
    spec = known("tiny")
    with shapes_only():
        model = spec.family.build().model(spec.config)
    set_formats(model, make_plan("int4-g128"))
    with pytest.raises(UsageError, match="--parallel 4 would cut groups of 128 weights of 'lang"):
        check_groups(model, Shares(spec.family.cuts(spec.config), 1, 4))


@pytest.mark.parametrize("format", [BLOCKS4, BLOCKS6, BLOCKS8, Int4(32), INT8])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_share_of_a_rounded_weight_is_that_of_what_it_stands_for(format, axis):
    weight = torch.randn(32, 1024, generator=torch.Generator().manual_seed(0))
    layers, cuts = [], {"x": Cut(axis, (weight.shape[axis],))}
    for rank in range(2):
        layer = Linear(1024, 32, bias=False)
        layer.set_format(format)
        layer.quantize(weight)
        whole = format.widen(*layer.held())
        cut_rounded(Shares(cuts, rank, 2), "x.weight", layer)
        layers.append(format.widen(*layer.held()))
        assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
    assert torch.equal(torch.cat(layers, axis), whole)


def test_columns_and_rows_of_blocks_are_not_cut_apart():
    by_columns, by_rows = ({"x": Cut(axis, (1024,), 128)} for axis in (1, 0))
    assert not Shares(by_columns, 1, 4).splits("x.weight", *BLOCKS4.whole)
    assert Shares(by_columns, 1, 8).splits("x.weight", *BLOCKS4.whole)
    assert not Shares(by_rows, 1, 8).splits("x.weight", *BLOCKS4.whole)
    assert Shares({"x": Cut(0, (20,))}, 0, 2).splits("x.weight", *BLOCKS4.whole)


@pytest.mark.parametrize("name", ["llama3.2-11B", "llama3.2-90B"])
def test_released_models_in_blocks_are_shared_by_any_number_of_ranks(name):
    spec = known(name)
    with shapes_only():
        model = spec.family.build().model(spec.config)
    parts = model.linear_parts().items()
    formats = {
        layer: BLOCKS6 if part == "head" else BLOCKS4 for layer, part in parts if part != "vision"
    }
    set_formats(model, make_plan("int4-b32"), formats)
    for ranks in able(spec):
        for rank in range(ranks):
            check_groups(model, Shares(spec.family.cuts(spec.config), rank, ranks))


@pytest.mark.parametrize(("said", "here"), [(None, 4), ("", 4), ("two", 4), ("2", 2)])
def test_ranks_of_this_machine_are_all_unless_the_launcher_says_how_many(monkeypatch, said, here):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if said is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    assert ThreadGroup(Board(4), 0).ranks_here == here
