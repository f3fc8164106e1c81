import pytest

from mmchat.errors import NotFoundError, UsageError
from mmchat.hub.client import HubFile
from mmchat.hub.selection import select

META_LLAMA = [
    ".gitattributes", "LICENSE.txt", "README.md", "USE_POLICY.md", "chat_template.json",
    "config.json", "generation_config.json", "model-00001-of-00005.safetensors",
    "model-00002-of-00005.safetensors", "model-00003-of-00005.safetensors",
    "model-00004-of-00005.safetensors", "model-00005-of-00005.safetensors",
    "model.safetensors.index.json", "original/consolidated.pth", "original/params.json",
    "original/tokenizer.model", "original/checklist.chk", "preprocessor_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


def chosen(names, *args, **options):
    files = [HubFile(name, 1, "0" * 40) for name in names]
    return {file.path for file in select(files, "acme/x", *args, **options)}


def test_of_metas_repository_the_weights_are_chosen_once():
    found = chosen(META_LLAMA)
    assert {name for name in META_LLAMA if "/" not in name} - found == {
        ".gitattributes", "README.md"
    }  # fmt: skip
    assert not any(name.startswith("original/") for name in found)


def test_the_original_format_is_metas_folder():
    assert chosen(META_LLAMA, "original") == {
        "original/consolidated.pth", "original/params.json", "original/tokenizer.model",
        "original/checklist.chk", "LICENSE.txt", "USE_POLICY.md",
    }  # fmt: skip


def test_eight_shards_at_the_top_are_the_original_format():
    shards = {f"consolidated.{rank:02d}.pth" for rank in range(8)}
    names = [*shards, "params.json", "tokenizer.model", "config.json"]
    assert chosen(names, "original") == {*shards, "params.json", "tokenizer.model"}


def test_weights_of_other_programs_are_left_out():
    others = ["pytorch_model.bin", "consolidated.safetensors", "model.gguf", "onnx/model.onnx"]
    names = [*others, "model.safetensors", "config.json", "tokenizer.json"]
    assert chosen(names) == {"model.safetensors", "config.json", "tokenizer.json"}


def test_a_tokenizer_in_metas_folder_is_taken_where_there_is_no_other():
    names = ["model.safetensors", "config.json", "original/tokenizer.model"]
    assert chosen(names) == set(names)


@pytest.mark.parametrize("weights_format", ["safetensors", "original"])
def test_a_repository_without_the_format_is_refused(weights_format):
    with pytest.raises(NotFoundError, match=f"no weights in the {weights_format} format"):
        chosen(["config.json", "model.gguf"], weights_format)


def test_older_files_are_taken_where_there_are_no_safetensors():
    shards = {f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)}
    names = {*shards, "pytorch_model.bin.index.json", "config.json", "tokenizer.model"}
    assert chosen([*names, "mm_projector.bin", "tf_model.h5"]) == names


def test_every_pattern_must_match():
    assert chosen(META_LLAMA, include=["*.md"]) == {"README.md", "USE_POLICY.md"}
    with pytest.raises(UsageError, match=r"--include '\*\.gguf' matches no file"):
        chosen(META_LLAMA, include=["*.md", "*.gguf"])
    with pytest.raises(UsageError, match=r"--exclude 'original/\*' matches no file"):
        chosen(META_LLAMA, exclude=["original/*"])
