"""Ask one question about many pictures, four at a time; the answers come in the pictures' order.

A picture that cannot be read has its error in the place of an answer.

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
    questions = [(question, path) for path in paths]
    answers = model.generate_many(questions, sampling, rows=4, return_exceptions=True)
    for path, answer in zip(paths, answers, strict=True):
        failed = isinstance(answer, mmchat.MmchatError)
        print(f"{path}: {answer if failed else answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
