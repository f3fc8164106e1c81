"""Hold a conversation: each question reads only what is new, and pictures may come in any turn.

python examples/chat.py
python examples/chat.py llama3.2-11B
"""

import sys

import mmchat

QUESTIONS = [
    ("What animal is this?", ["assets/dog.jpg"]),
    ("What colour is it?", []),
    ("And what animal is this?", ["assets/fish.jpg"]),
]


def main(name: str = "tiny") -> None:
    session = mmchat.load(name).chat()
    sampling = mmchat.SamplingParams(temperature=0, max_new_tokens=64)
    for question, images in QUESTIONS:
        *_, end = session.send(question, images, sampling)
        if isinstance(end, mmchat.Finished):
            new = end.usage.prompt_tokens - end.usage.cached_tokens
            print(f"{question} {end.text} (read {new} of {end.usage.prompt_tokens} tokens)")
    print(f"Taken back: {session.undo().answer} {len(session.messages)} messages are left.")


if __name__ == "__main__":
    main(*sys.argv[1:])
