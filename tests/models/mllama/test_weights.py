from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.mapping import source_shapes
from mmchat.checkpoints.verify import check_entries
from mmchat.errors import CheckpointError
from mmchat.models.family import OtherConfigError
from mmchat.models.mllama.build import MllamaBuild
from mmchat.models.mllama.config import ImageProcessorConfig, MllamaConfig, TextConfig, VisionConfig
from mmchat.models.mllama.meta_format import meta_rules, shard_dims
from mmchat.models.mllama.tensor_names import hf_shapes
from tests.meta_checkpoint import meta_tensors, split_as_meta_does
from tests.models.mllama.test_parity_meta import CONFIG as GOLDEN_CONFIG
from tests.models.mllama.test_parity_meta import GOLDEN

BUILD = MllamaBuild()


def small_config(tile_size: int = 42, layers: int = 7) -> MllamaConfig:
    """Every axis along which shards are joined is a multiple of 8."""
    return MllamaConfig(
        vision_config=VisionConfig(
            hidden_size=24,
            intermediate_size=56,
            num_hidden_layers=3,
            num_global_layers=2,
            attention_heads=3,
            num_channels=3,
            image_size=tile_size,
            patch_size=14,
            max_num_tiles=4,
            intermediate_layers_indices=(0, 2),
            norm_eps=1e-5,
        ),
        text_config=TextConfig(
            vocab_size=104,
            hidden_size=64,
            intermediate_size=88,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=8,
            cross_attention_layers=(1, 4),
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=None,
            max_position_embeddings=256,
        ),
        image_processor=ImageProcessorConfig((0.5,) * 3, (0.5,) * 3, "checkpoint"),
    )


CONFIG = small_config()
POSITIONS = "vision_model.gated_positional_embedding.embedding"
Q_PROJ = "language_model.model.layers.2.self_attn.q_proj.weight"
NORM = "language_model.model.norm.weight"


def random_meta(config: MllamaConfig = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = source_shapes(meta_rules(config))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def to_hub(weights: dict[str, Tensor], config: MllamaConfig = CONFIG) -> dict[str, Tensor]:
    rules = meta_rules(config)
    return {r.target: r.transform([weights[name] for name in r.sources]) for r in rules}


@pytest.fixture(scope="module")
def hub() -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in to_hub(random_meta()).items()}


def save(folder: Path, weights: dict[str, Tensor]) -> Path:
    save_file(weights, folder / "model.safetensors")
    return folder


def load(path: Path, config: MllamaConfig = CONFIG, wanted: object = None) -> dict[str, Tensor]:
    with open_checkpoint(path, merge_rules=shard_dims) as checkpoint:
        weights = BUILD.iter_weights(checkpoint, config, wanted)  # type: ignore[arg-type]
        return {name: tensor.clone() for name, tensor in weights}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


# Translation


def test_meta_names_and_shapes_equal_those_that_metas_own_code_has():
    golden = load_file(GOLDEN / "mllama_meta_weights.safetensors")
    found = {name: tuple(tensor.shape) for name, tensor in golden.items()}
    assert found == source_shapes(meta_rules(GOLDEN_CONFIG))


def test_translated_tensors_have_the_models_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in to_hub(random_meta()).items()}
    assert shapes == hf_shapes(CONFIG)


def test_hub_to_meta_and_back_is_the_same(hub):
    assert_equal(to_hub(meta_tensors(hub, CONFIG)), hub)


def test_meta_to_hub_and_back_is_the_same_but_for_cells_outside_every_canvas():
    meta = random_meta()
    for name, tensor in meta.items():
        if tensor.ndim == 4:
            assert tensor.shape[:2] == (4, 4)
            for row in range(4):
                for column in range(4):
                    if (row + 1) * (column + 1) > 4:
                        meta[name][row, column] = 0
    assert_equal(meta_tensors(to_hub(meta), CONFIG), meta)


@pytest.mark.parametrize(
    ("target", "source", "tokens"),
    [
        ("gated_positional_embedding.tile_embedding", "gated_positional_embedding", 10),
        ("pre_tile_positional_embedding.embedding", "pre_tile_pos_embed.embedding", 1),
        ("post_tile_positional_embedding.embedding", "post_tile_pos_embed.embedding", 1),
    ],
)
def test_a_table_of_tiles_is_expanded_by_canvas(target, source, tokens):
    meta = random_meta()
    table = meta[f"vision_model.vision_encoder.{source}"]
    rows = to_hub(meta)[f"vision_model.{target}.weight"].view(9, 4, tokens, 24)
    canvases = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    assert rows[0].count_nonzero() == 0
    for number, (height, width) in enumerate(canvases, start=1):
        tiles = [table[y, x] for y in range(height) for x in range(width)]
        assert torch.equal(rows[number, : len(tiles)], torch.stack(tiles))
        assert rows[number, len(tiles) :].count_nonzero() == 0


def test_a_table_that_meta_cannot_hold_is_refused(hub):
    name = "vision_model.pre_tile_positional_embedding.embedding.weight"
    changed = hub | {name: hub[name] + 1}
    with pytest.raises(AssertionError, match="values for no picture"):
        meta_tensors(changed, CONFIG)


def test_only_rotary_projections_are_permuted():
    meta = random_meta()
    found = to_hub(meta)
    for layer, source in ((0, "layers.0"), (1, "cross_attention_layers.0")):
        kind = "cross_attn" if layer == 1 else "self_attn"
        for part in "qkvo":
            same = torch.equal(
                found[f"language_model.model.layers.{layer}.{kind}.{part}_proj.weight"],
                meta[f"text_model.{source}.attention.w{part}.weight"],
            )
            assert same is not (kind == "self_attn" and part in "qk")
    rows = meta["text_model.layers.0.attention.wk.weight"]  # 8 heads of 4 rows
    moved = found["language_model.model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(moved[4:8], rows[[4, 6, 5, 7]])


def test_one_key_value_head_is_permuted_as_any_other():
    """Meta rotates neighbouring rows of a head, the Hub those half a head apart."""
    config = replace(CONFIG, text_config=replace(CONFIG.text_config, num_key_value_heads=1))
    meta = random_meta(config)
    found = to_hub(meta, config)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == hf_shapes(config)
    moved = found["language_model.model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(moved, meta["text_model.layers.0.attention.wk.weight"][[0, 2, 1, 3]])
    crossed = found["language_model.model.layers.1.cross_attn.k_proj.weight"]
    assert torch.equal(crossed, meta["text_model.cross_attention_layers.0.attention.wk.weight"])
    assert_equal(to_hub(meta_tensors(found, config), config), found)


# Reading


def test_hub_files_are_read_as_they_are(tmp_path, hub):
    assert_equal(load(save(tmp_path, hub)), hub)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(tmp_path, hub, dtype):
    small = {name: tensor.to(dtype) for name, tensor in hub.items()}
    assert_equal(load(save(tmp_path, small)), small)


def newer_name(name: str) -> str:
    """As transformers 4.52 and later call a tensor in memory."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    name = name.replace("language_model.model.", "language_model.")
    return "model." + name


def test_the_newer_spelling_of_names_is_read(tmp_path, hub):
    newer = {newer_name(name): tensor for name, tensor in hub.items()}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in newer
    assert_equal(load(save(tmp_path, newer)), hub)


def test_two_spellings_of_one_tensor_are_refused(tmp_path, hub):
    with pytest.raises(CheckpointError, match="two spellings"):
        load(save(tmp_path, hub | {newer_name(NORM): hub[NORM].clone()}))


WRAPPED = {
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled in DDP": lambda name: f"module._orig_mod.{name}",
    "DDP, compiled": lambda name: f"_orig_mod.module.{name}",
    "compiled layers": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "FSDP": lambda name: "module." + name.replace(".1.", ".1._fsdp_wrapped_module."),
    "newer names in DDP": lambda name: f"module.{newer_name(name)}",
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_names_of_wrapped_models_are_read(tmp_path, hub, wrap):
    assert_equal(load(save(tmp_path, {wrap(name): t for name, t in hub.items()})), hub)
    meta = {wrap(name): tensor for name, tensor in random_meta().items()}
    (tmp_path / "meta").mkdir()
    torch.save(meta, tmp_path / "meta/consolidated.pth")
    if wrap is not WRAPPED["newer names in DDP"]:
        assert_equal(load(tmp_path / "meta"), hub)


def test_names_of_which_some_are_wrapped_are_refused(tmp_path, hub):
    some = {f"module.{n}" if "vision" in n else n: tensor for n, tensor in hub.items()}
    with pytest.raises(CheckpointError, match=r"unexpected: 'module\.vision_model"):
        load(save(tmp_path, some))
    with pytest.raises(CheckpointError, match="are two spellings of the same"):
        load(save(tmp_path, hub | {f"_orig_mod.{NORM}": hub[NORM].clone()}))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.original_inv_freq",
        "model.vision_model.embeddings.position_ids",
        "text_model.rope.freqs",
        "freqs_cis",
    ],
)
def test_buffers_that_others_store_are_passed_over_and_said(tmp_path, hub, name):
    path = save(tmp_path, hub | {name: torch.ones(7)})
    assert_equal(load(path), hub)
    with open_checkpoint(path) as opened:
        assert opened.remarks == (
            f"passed over {name!r}, which other libraries store and mmchat computes",
        )
        assert name not in opened.entries
    with pytest.raises(CheckpointError, match="1 unexpected: "):
        load(save(tmp_path, hub | {f"{name}_other": torch.ones(7)}))


def test_a_file_of_nothing_but_such_buffers_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="another kind of model"):
        load(save(tmp_path, {"rotary_emb.inv_freq": torch.ones(7)}))


@pytest.mark.parametrize("name", ["consolidated.pth", "consolidated.00.pth"])
def test_metas_file_is_translated(tmp_path, hub, name):
    extra = {"text_model.rope.freqs": torch.ones(2)}
    torch.save(random_meta() | extra, tmp_path / name)
    assert_equal(load(tmp_path), hub)
    assert_equal(load(tmp_path / name), hub)


def test_metas_gates_may_be_scalars_or_longer(tmp_path, hub):
    meta = random_meta()
    gates = [name for name, tensor in meta.items() if tensor.shape == (1,)]
    assert len(gates) == 2 * 2 + 2 * 2 + 3  # text, global vision layers, positions
    for number, name in enumerate(gates):
        meta[name] = meta[name][0].clone() if number % 2 else meta[name].repeat(8)
    torch.save(meta, tmp_path / "consolidated.pth")
    assert_equal(load(tmp_path), hub)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number, rank in enumerate(split_as_meta_does(random_meta(), 8)):
        torch.save(rank, folder / f"consolidated.{number:02d}.pth")
    return folder


def copy_of(shards: Path, folder: Path, count: int = 8) -> Path:
    for number in range(count):
        name = f"consolidated.{number:02d}.pth"
        (folder / name).write_bytes((shards / name).read_bytes())
    return folder


def test_eight_shards_are_joined_and_translated(shards, hub):
    assert_equal(load(shards), hub)
    assert_equal(load(shards / "consolidated.00.pth"), hub)


def test_missing_ranks_at_the_end_are_named(shards, tmp_path):
    with pytest.raises(CheckpointError, match=r"8 files; missing consolidated.07.pth$"):
        load(copy_of(shards, tmp_path, 7))
    (tmp_path / "one").mkdir()
    with pytest.raises(CheckpointError, match=r"missing consolidated.01.pth, .*consolidated.07"):
        load(copy_of(shards, tmp_path / "one", 1))


def test_only_wanted_tensors_are_read_and_needed(tmp_path, hub):
    wanted = {name for name in hub if name.startswith("language_model.")}
    text = {name: hub[name] for name in wanted}
    assert_equal(load(save(tmp_path, text), wanted=wanted), text)
    assert_equal(load(save(tmp_path, hub), wanted=wanted), text)
    meta = {n: t for n, t in random_meta().items() if n.startswith("text_model.")}
    (tmp_path / "meta").mkdir()
    torch.save(meta, tmp_path / "meta/consolidated.pth")
    assert_equal(load(tmp_path / "meta", wanted=wanted), text)
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path / "meta")


def test_tensors_come_in_the_order_of_the_file(tmp_path):
    torch.save(dict(reversed(random_meta().items())), tmp_path / "consolidated.pth")
    with open_checkpoint(tmp_path) as checkpoint:
        order = list(checkpoint.entries)
        names = [name for name, _ in BUILD.iter_weights(checkpoint, CONFIG)]
    places = {rule.target: order.index(rule.sources[0]) for rule in meta_rules(CONFIG)}
    assert names == sorted(places, key=places.__getitem__)


# Faults


def without(name: str):
    return lambda weights: {n: t for n, t in weights.items() if n != name}


def instead(name: str, tensor: Tensor):
    return lambda weights: weights | {name: tensor}


def renamed(old: str, new: str):
    return lambda weights: {(new if n == old else n): t for n, t in weights.items()}


FAULTS = {
    "missing": (without(NORM), [f"1 missing: '{NORM}'"]),
    "unexpected": (
        instead("extra.weight", torch.ones(2)),
        ["1 unexpected: 'extra.weight' in 'model.safetensors'"],
    ),
    "renamed": (
        renamed(Q_PROJ, Q_PROJ.replace("q_proj", "qproj")),
        [f"1 missing: '{Q_PROJ}' (is it '{Q_PROJ.replace('q_proj', 'qproj')}'?)", "1 unexpected"],
    ),
    "wrong shape": (
        instead(NORM, torch.ones(63)),
        [f"1 wrong: '{NORM}' in 'model.safetensors': expected [64], found [63] float32"],
    ),
    "transposed": (
        instead("multi_modal_projector.weight", torch.ones(72, 64)),
        ["expected [64, 72], found [72, 64]"],
    ),
    "another rank": (instead(NORM, torch.ones(64, 1)), ["expected [64], found [64, 1]"]),
    "gate of two numbers": (
        instead("vision_model.gated_positional_embedding.gate", torch.ones(2)),
        ["expected [1], found [2]"],
    ),
    "wrong dtype": (
        instead(NORM, torch.ones(64, dtype=torch.int8)),
        ["expected one of bfloat16, float16, float32, found [64] int8"],
    ),
    "float8": (
        instead(NORM, torch.ones(64).to(torch.float8_e4m3fn)),
        [f"'{NORM}'", "float8_e4m3fn"],
    ),
    "quantised": (
        lambda weights: without(Q_PROJ)(weights) | {Q_PROJ + ".absmax": torch.ones(2)},
        [f"1 missing: '{Q_PROJ}' (is it '{Q_PROJ}.absmax'?)"],
    ),
    "an escape sequence in a name": (
        instead("\x1b]0;owned\x07", torch.ones(2)),
        [r"'\x1b]0;owned\x07'"],
    ),
    "several": (
        lambda weights: without(NORM)(weights) | {Q_PROJ: torch.ones(3), "x": torch.ones(1)},
        [f"1 missing: '{NORM}'", "1 unexpected: 'x'", "1 wrong:", "expected [64, 64], found [3]"],
    ),
    "very many": (
        lambda weights: {n: t for n, t in weights.items() if ".layers." not in n},
        ["missing: ", " more", "the params describe"],
    ),
    "another model": (
        lambda weights: {"transformer.wte.weight": torch.ones(3, 4)},
        ["the checkpoint of another kind of model"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_before_any_tensor_is_read(tmp_path, hub, fault):
    change, expected = FAULTS[fault]
    with (
        open_checkpoint(save(tmp_path, change(hub))) as checkpoint,
        pytest.raises(CheckpointError) as caught,
    ):
        BUILD.iter_weights(checkpoint, CONFIG)  # not even the first is asked for
    message = str(caught.value)
    assert message.isprintable()
    assert "model.safetensors" in message
    for part in expected:
        assert part in message
    assert message.count("'language_model.") <= 22  # at most ten of each kind, with hints


def test_a_fault_in_metas_files_is_reported_by_metas_names(tmp_path):
    meta = random_meta()
    name = "text_model.layers.3.feed_forward.w2.weight"
    meta[name] = meta[name].T.contiguous()
    del meta["text_model.norm.weight"]
    torch.save(meta, tmp_path / "consolidated.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert "1 missing: 'text_model.norm.weight'" in str(caught.value)
    assert f"'{name}' in 'consolidated.pth': expected [64, 88], found [88, 64]" in str(caught.value)


def test_too_many_layers_in_the_params_are_reported(tmp_path, hub):
    with pytest.raises(CheckpointError, match=r"9 missing: '.*layers\.7\."):
        load(save(tmp_path, hub), small_config(layers=8))


def test_another_tile_size_is_named(tmp_path, hub):
    save(tmp_path, hub)
    with pytest.raises(OtherConfigError, match="tiles of 42 px, the params say 56") as caught:
        load(tmp_path, small_config(tile_size=56))
    assert caught.value.fitting == CONFIG
    torch.save(random_meta(), tmp_path / "consolidated.pth")
    with pytest.raises(OtherConfigError) as caught:
        load(tmp_path / "consolidated.pth", small_config(tile_size=28))
    assert caught.value.fitting == CONFIG


def test_another_tile_size_is_named_also_when_only_text_is_wanted(tmp_path, hub):
    text = {name for name in hub if name.startswith("language_model.")}
    with pytest.raises(OtherConfigError):
        load(save(tmp_path, hub), small_config(tile_size=56), wanted=text)


def test_a_table_of_an_impossible_size_is_a_wrong_shape(tmp_path, hub):
    with pytest.raises(CheckpointError, match=r"expected \[10, 24\], found \[11, 24\]"):
        load(save(tmp_path, hub | {POSITIONS: torch.ones(11, 24)}))


def test_files_too_small_for_the_parameters_are_refused(tmp_path, hub):
    with open_checkpoint(save(tmp_path, hub)) as checkpoint:
        expected = {"x": (10_642_941_475,)}
        with pytest.raises(CheckpointError, match="describe 10,642,941,475 parameters"):
            check_entries(checkpoint, checkpoint.entries, expected, expected)
