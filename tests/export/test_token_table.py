"""The table of tokens that an export writes for programs that are not Python."""

import json
import sys
import unicodedata

from mmchat.export.token_table import TABLE_NAME, write_token_table
from mmchat.tokenizers import open_tokenizer
from tests.synthetic_tokenizer import hub_tokenizer, tiktoken_lines, trained_tokens


def written(tmp_path, tokenizer):
    write_token_table(tmp_path, tokenizer)
    return [line.split(" ") for line in (tmp_path / TABLE_NAME).read_text().splitlines()]


def test_the_table_holds_every_token_and_every_letter(tmp_path):
    tokens = trained_tokens()
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_lines(tokens))
    tokenizer = open_tokenizer(tmp_path)
    head, letters, numbers, *rows = written(tmp_path, tokenizer)
    assert head == ["mmchat", "tokens", "1"]
    assert [(i, bytes.fromhex(t)) for what, i, t in rows if what == "token"] == [
        (str(i), token) for i, token in enumerate(tokens)
    ]
    specials = {name: int(i) for what, i, name in rows if what == "special"}
    assert specials == tokenizer.special_tokens
    for (name, *ranges), kind in ((letters, "L"), (numbers, "N")):
        ends = [[int(end, 16) for end in pair.split("-")] for pair in ranges]
        members = {i for first, last in ends for i in range(first, last + 1)}
        everything = range(sys.maxunicode + 1)
        assert members == {i for i in everything if unicodedata.category(chr(i))[0] == kind}, name


def test_a_tokenizer_that_a_table_does_not_describe_writes_none(tmp_path):
    found = hub_tokenizer(trained_tokens(), [])  # no merges: ranks would merge, this one does not
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    write_token_table(tmp_path, tokenizer)
    assert type(tokenizer).__name__ == "LibraryTokenizer"
    assert not (tmp_path / TABLE_NAME).exists()
