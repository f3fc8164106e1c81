"""Ask one question about many pictures, four at a time; the answers come in the pictures' order.

python examples/many_pictures.py
python examples/many_pictures.py "What is printed here?" scans/*.png
"""

import sys

import mmchat

PICTURES = ("assets/dog.jpg", "assets/fish.jpg", "assets/street.jpg", "assets/shapes.jpg")


def main(question: str = "What's in this image?", *pictures: str) -> None:
    model = mmchat.load("tiny")
    paths = pictures or PICTURES
    sampling = mmchat.SamplingParams(temperature=0, max_new_tokens=64)
    answers = model.generate_many([(question, path) for path in paths], sampling, rows=4)
    for path, answer in zip(paths, answers, strict=True):
        print(f"{path}: {answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
