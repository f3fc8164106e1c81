"""Ask one question about a picture, and print the answer as it is written.

python examples/ask.py
python examples/ask.py "How many fish are there?" assets/fish.jpg
python examples/ask.py "Describe it." photo.jpg llama3.2-11B
"""

import sys

import mmchat


def main(
    question: str = "What's in this image?", image: str = "assets/dog.jpg", name: str = "tiny"
) -> None:
    model = mmchat.load(name)
    for event in model.chat().send(question, images=[image]):
        if isinstance(event, mmchat.TextDelta):
            print(event.text, end="", flush=True)
        elif isinstance(event, mmchat.Finished):
            seconds = event.timings.time_to_first_token
            print(f"\n({event.reason}; {seconds:.2f} s to the first token)")


if __name__ == "__main__":
    main(*sys.argv[1:])
