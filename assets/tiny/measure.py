"""Measure the built-in model on many held-out scenes in a few minutes.

    python assets/tiny/measure.py [--scenes 6000] [--wording plain|unseen] [--by type|canvas|...]

Greedy decoding gives the right answer exactly if every token of it is the most likely one after the
right ones before it. So one pass over questions and answers, many at a time, decides what
`mmchat eval scenes` finds out token by token.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from batches import Chat, make_batch
from safetensors.torch import load_file
from trainee import Trainee, plain_attention, tiny_config

from mmchat.evals.run import By, Report, Verdict, report
from mmchat.evals.scenes import Scene, heldout_scenes
from mmchat.evals.scenes.phrasings import Wording

HERE = Path(__file__).parent
SCENES_AT_ONCE = 32


def measure(trainee: Trainee, scenes: Iterable[Scene], chat: Chat, by: By = "type") -> Report:
    """Scores of the scenes, each with one question."""
    return report(sorted(_judge(trainee, scenes, chat), key=lambda v: v.scene.seed), by=by)


@torch.no_grad()
def _judge(trainee: Trainee, scenes: Iterable[Scene], chat: Chat) -> Iterator[Verdict]:
    """The verdict on each scene, in groups of equal tiles; wrong answers as far as they go."""
    groups: dict[tuple, list[Scene]] = defaultdict(list)
    for scene in scenes:
        tiles = scene.canvas and scene.canvas[0] * scene.canvas[1]
        groups[len(scene.views), tiles].append(scene)
    config = trainee.model.config
    device = next(trainee.parameters()).device
    for members in groups.values():
        for start in range(0, len(members), SCENES_AT_ONCE):
            asked = members[start : start + SCENES_AT_ONCE]
            batch = make_batch(asked, chat, config)
            with torch.autocast(device.type, torch.bfloat16):
                logits, _ = trainee(batch.to(device))
            likeliest = logits.argmax(-1).cpu().split([len(p.targets) for p in batch.parts])
            for part, found in zip(batch.parts, likeliest, strict=True):
                ids = torch.zeros_like(part.input_ids[:, 1:])
                ids[part.wanted[:, 1:]] = found
                for row, number in enumerate(part.numbers):
                    answer = ids[row][part.last_answer[row, 1:]].tolist()
                    (question,) = asked[number].questions
                    yield Verdict(asked[number], question, chat.answer(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the built-in model.")
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--wording", choices=get_args(Wording), default="plain")
    parser.add_argument("--by", choices=get_args(By), default="type")
    parser.add_argument("--model", type=Path, default=HERE, help="folder with the model's files")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chat = Chat(args.model / "tokenizer.model")
    trainee = Trainee(tiny_config(chat.vocab_size))
    trainee.model.load_state_dict(load_file(args.model / "model.safetensors"))
    with patch.object(F, "scaled_dot_product_attention", plain_attention):
        scenes = heldout_scenes(args.scenes, wording=args.wording)
        report = measure(trainee, scenes, chat, args.by)
    sys.stdout.write(f"| {args.by} | exact answers | of | 95 % interval |\n|---|---:|---:|---:|\n")
    for name, score in (*report.parts.items(), ("**all**", report.overall)):
        low, high = (100 * end for end in score.interval)
        cells = f"{100 * score.accuracy:.1f} % | {score.total} | {low:.1f} to {high:.1f} %"
        sys.stdout.write(f"| {name} | {cells} |\n")


if __name__ == "__main__":
    main()
