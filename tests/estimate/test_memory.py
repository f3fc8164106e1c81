"""What a model needs before it is loaded, by hand-made sums, and what is offered in its place."""

from dataclasses import replace

import pytest

from mmchat.catalog.known import find_spec
from mmchat.errors import MemoryError_
from mmchat.estimate.memory import OVERHEAD, Setup, Workload, check_memory
from mmchat.limits import MIB
from mmchat.quant.schemes import SCHEMES

GIB = 1024 * MIB
B11, B90, TINY = (find_spec(name) for name in ("llama3.2-11B", "llama3.2-90B", "tiny"))
LLAVA = find_spec("llava-1.5-7b")
# linear layers of the 11B: text 8.724e9 weights, head, vision encoder and projector
SELF = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
CROSS = 8 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
HEAD = 128256 * 4096
VISION = 40 * (4 * 1280 * 1280 + 2 * 5120 * 1280) + 4096 * 7680
PARAMETERS = 10_670_220_835


def setup(spec=B11, device="cpu", item_bytes=2, **options):
    options.setdefault("from_file", device == "cpu")
    return Setup(spec, device, item_bytes, **options)


def picture(tiles):
    return B11.family.facts(B11.config, 560, tiles * 560)


def message(wanted, available):
    with pytest.raises(MemoryError_) as caught:
        check_memory(wanted, available)
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_the_11b_in_int4_fits_into_8_gib():
    """4.5 bits for a weight of the text layers, 8 for those of head and vision; the embedding and
    the tables of positions are read from the file, a row at a time."""
    need = setup(quantize="int4").need()
    scales = 4 * (128256 + 40 * (4 * 1280 + 5120 + 1280) + 4096)  # one a row of int8
    norms = 2 * (40 * 2 * 4096 + 4096 + 8 * 2 * 128 + 8 * 2)
    weights = (SELF + CROSS) * 4.5 / 8 + HEAD + VISION + scales + norms
    assert need.weights == weights < 5.9 * GIB
    assert need.cache == 4096 * 131_072  # 512 MiB for 4,096 tokens
    assert need.pictures == 4 * 1601 * 32_768  # 200 MiB for 4 tiles
    assert OVERHEAD["cpu"] < need.working < 0.75 * GIB
    assert need.total < 7.3 * GIB
    check_memory(setup(quantize="int4"), 8 * GIB)


def test_keys_and_values_in_int8_take_a_byte_each_and_four_a_head():
    long = {"max_seq_len": 131_072, "workload": None}
    assert setup(**long).need().cache == 131_072 * 131_072  # 17.2 GB
    need = setup(**long, kv="int8").need()
    assert need.cache == 131_072 * 2 * 32 * 8 * (128 + 4)  # 8.9 GB
    assert need.pictures == 4 * 1601 * 2 * 8 * 8 * (128 + 4)
    assert need.working == setup(**long).need().working
    assert setup(spec=B90, **long, kv="int8").need().cache == 131_072 * 2 * 80 * 8 * (128 + 4)
    embeddings = replace(setup(), spec=LLAVA), replace(setup(kv="int8"), spec=LLAVA)
    plain, rounded = (one.need() for one in embeddings)
    assert plain.pictures == rounded.pictures  # embeddings, in the dtype of the model
    assert rounded.cache * 2 * 128 == plain.cache * (128 + 4)
    each = setup(**long, kv="int8", ranks=4).need()
    assert (each.cache, each.pictures) == (need.cache // 4, need.pictures // 4)


def test_unquantised_weights_are_the_parameters_in_the_dtype():
    need = setup(device="cuda").need()
    assert (need.weights, need.in_file) == (2 * PARAMETERS, 0)
    assert setup(device="cuda", item_bytes=4).need().weights == 4 * PARAMETERS


def test_weights_that_stay_in_the_file_and_are_read_seldom_do_not_count():
    need, copied = setup().need(), setup(from_file=False).need()
    seldom = 128264 * 4096 + 863_567_379 + 4096 * 7680 + 4096
    assert need.in_file == 2 * seldom
    assert copied.in_file == 0
    assert need.weights + need.in_file == copied.weights == 2 * PARAMETERS
    assert copied.total - need.total == need.in_file


def test_int8_has_a_scale_for_each_row():
    layer = setup(quantize="int8").linear_bytes("text", 4096, 14336)
    assert layer == 4096 * 14336 + 4 * 4096


@pytest.mark.parametrize(("scheme", "group"), [("int4-g32", 32), ("int4", 64), ("int4-g128", 128)])
def test_int4_has_a_scale_and_a_zero_for_each_group(scheme, group):
    layer = setup(quantize=scheme).linear_bytes("text", 4096, 14336)
    assert layer == 4096 * 14336 * (4 + 32 / group) / 8


def test_parts_that_are_kept_count_in_the_dtype():
    kept = setup(quantize="int8", keep=("vision",)).need()
    everything = setup(quantize="int8").need()
    assert kept.in_file > everything.in_file  # the vision encoder stays in the file
    on_gpu = setup(device="cuda", quantize="int8", keep=("head",)).need().weights
    assert on_gpu - setup(device="cuda", quantize="int8").need().weights == HEAD - 4 * 128256


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("spec", [TINY, B11, B90], ids=lambda spec: spec.name)
def test_every_scheme_is_smaller_than_none(spec, scheme):
    plain = setup(spec, "cuda").need()
    assert setup(spec, "cuda", quantize=scheme).need().weights <= plain.weights


def test_text_only_needs_no_vision_and_no_pictures():
    need = setup(text_only=True).need()
    assert need.pictures == 0
    assert need.weights + need.in_file < 2 * (PARAMETERS - 863_567_379 - CROSS)


def test_a_context_that_was_asked_for_counts_in_full():
    assert setup(max_seq_len=131_072).need().cache == 16 * GIB
    assert setup(max_seq_len=512).need().cache == 512 * 131_072


def test_a_known_question_counts_as_it_is():
    asked = setup(workload=Workload(300, 100, (picture(1), picture(4)))).need()
    assert asked.cache == 300 * 131_072
    assert asked.pictures == 5 * 1601 * 32_768
    longer = setup(workload=Workload(300_000, 100)).need()
    assert longer.cache == 131_072 * 131_072  # no more than the context


def test_what_fits_is_let_through_and_unknown_memory_too():
    wanted = setup(quantize="int4")
    assert check_memory(wanted, wanted.need().total) == wanted.need()
    assert check_memory(setup(B90), None) == setup(B90).need()


def test_too_little_is_said_with_the_numbers_and_the_scheme_that_fits():
    assert message(setup(), 8 * GIB) == (
        "Llama-3.2-11B-Vision-Instruct needs 18.7 GiB on cpu (weights 17.2 GiB, cache 512.0 MiB for"
        " 4,096 tokens, pictures 200.1 MiB, working memory 747.0 MiB), and 8.0 GiB are free;"
        " --quantize int4 needs 7.2 GiB and fits"
    )


def test_the_most_exact_scheme_that_fits_is_offered():
    assert "; --quantize int8 needs 10.8 GiB and fits" in message(setup(), 12 * GIB)
    assert "; --quantize int4 --kv int8 needs 6.9 GiB and fits" in message(setup(), 7 * GIB)
    assert "; --quantize int4-g128 needs" in message(setup(kv="int8"), 6.85 * GIB)


def test_float32_is_told_of_bfloat16_first():
    assert "; --dtype bfloat16 needs" in message(setup(item_bytes=4, from_file=False), 23 * GIB)
    assert "; --dtype bfloat16 --quantize int8 needs" in message(
        setup(item_bytes=4, from_file=False), 13 * GIB
    )


def test_a_shorter_context_is_offered_where_it_is_the_context_that_does_not_fit():
    wanted = setup(quantize="int4", max_seq_len=65_536, kv="int8")
    assert message(wanted, 8 * GIB).endswith("8.0 GiB are free; --max-seq-len 16384 fits")


def test_keys_and_values_in_int8_are_offered_where_they_make_a_context_fit():
    wanted = setup(quantize="int4", max_seq_len=65_536)
    said = message(wanted, 12 * GIB)
    assert said.endswith("; --max-seq-len 32768 fits, and so does --kv int8")
    asked = setup(quantize="int4", workload=Workload(65_536, 100))
    assert "; --kv int8 needs 10.2 GiB and fits" in message(asked, 12 * GIB)
    assert "--kv" not in message(replace(asked, kv="int8"), 9 * GIB)


def test_both_are_offered_where_both_fit():
    said = message(setup(max_seq_len=65_536), 20 * GIB)
    assert said.endswith("; --max-seq-len 8192 fits, and so does --quantize int8")


def test_text_only_is_offered_where_no_scheme_fits():
    assert "; --quantize int4 --text-only needs" in message(setup(), 6.2 * GIB)
    with_pictures = setup(workload=Workload(300, 100, (picture(4),)))
    assert "--text-only" not in message(with_pictures, 6 * GIB)


def test_how_many_of_the_pictures_fit_is_said():
    pictures = tuple(picture(4) for _ in range(6))
    wanted = setup(workload=Workload(300, 100, pictures))
    enough = setup(workload=Workload(300, 100, pictures[:4])).need().total
    assert message(wanted, enough).endswith(
        "; the first 4 of its 6 pictures would fit (of a document: paper.pdf#1-4)"
    )
    assert "of its 6 pictures" not in message(wanted, 3 * GIB)


def test_where_nothing_fits_the_least_is_said():
    said = message(setup(B90, "cuda"), 8 * GIB)
    assert "; even --quantize int4-g128 --kv int8 --text-only needs" in said
    assert said.endswith("use a smaller model or another --device, or free some memory")


def test_what_is_offered_fits():
    wanted = setup()
    for gib in (6.5, 7, 8, 10, 11, 14, 18):
        said = message(wanted, int(gib * GIB))
        scheme = said.partition("--quantize ")[2].partition(" ")[0]
        smaller = replace(wanted, quantize=scheme, text_only="--text-only" in said)
        smaller = replace(smaller, kv="int8" if "--kv int8" in said else "auto")
        check_memory(smaller, int(gib * GIB))
