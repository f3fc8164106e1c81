"""`--schema` and `\\set schema`: what is refused, when, and what comes out."""

import json

import pytest

CAT = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"enum": ["cat"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
)
ANSWER = b'{"a":"cat"}'


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "a cat.json"
    file.write_text(CAT)
    return file


def test_the_answer_obeys_a_schema_of_a_file_or_of_the_command_line(mmchat_command, file):
    mmchat_command.use(ANSWER + b",", b"A cat? " + ANSWER)
    for schema in (str(file), CAT):
        done = mmchat_command("generate", "-q", "-p", "x", "--schema", schema, "-n", "40")
        assert json.loads(done.stdout) == {"a": "cat"}
        assert done.exit_code == 0


def test_json_holds_the_answer_as_text(mmchat_command, file):
    mmchat_command.use(ANSWER)
    done = mmchat_command("generate", "-p", "x", "--schema", str(file), "--json")
    record = json.loads(done.stdout)
    assert (json.loads(record["text"]), record["finish_reason"]) == ({"a": "cat"}, "stop")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"items": {"not": {}}}', 'schema: items: "not" cannot be enforced; leave it out'),
        ("{", "schema: not valid JSON: Expecting property name"),
        ("gone.json", "gone.json: no such file"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_before_a_model_is_loaded(
    mmchat_command, schema, message
):
    for command in (("generate", "-p", "x"), ("chat",)):
        done = mmchat_command(*command, "--schema", schema)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(f"mmchat: error: {message}")
    assert not mmchat_command.loaded


def test_the_chat_takes_a_schema_and_lets_it_go(mmchat_command, file):
    mmchat_command.use(b"It is " + ANSWER, b"A dog.")
    typed = f"\\set schema '{file}'\nWhat?\n\\set schema none\nAnd?\n\\set schema {{\n"
    done = mmchat_command("chat", stdin=typed)
    *answer, free = done.stdout.splitlines()
    assert (json.loads("".join(answer)), free) == ({"a": "cat"}, "A dog.")
    assert "schema is {" in done.stderr
    assert "schema is none" in done.stderr
    assert "error: schema: not valid JSON" in done.stderr
