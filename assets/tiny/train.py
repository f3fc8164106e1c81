"""Train the built-in model on drawn scenes, with the same model code that answers questions.

    python assets/tiny/train.py --out DIR [--steps 8000] [--resume] [--export FILE]

DIR gets state.pt (to resume from), loss.csv and accuracy.csv. Batches depend on the seed and their
number alone. The rate is constant and falls to zero over the last third of the steps; the weights
that are measured and exported are a moving average. Small heads on the vision features learn,
patch by patch, what is drawn there and are thrown away.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from batches import Batch, Chat, training_batch
from export import export
from measure import measure
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from trainee import Trainee, plain_attention, tiny_config
from widen import widen

from mmchat.evals.scenes import heldout_scenes
from mmchat.models.mllama.config import MllamaConfig

HERE = Path(__file__).parent


class Batches(IterableDataset):
    """Training batches from number `start` on."""

    def __init__(self, args: argparse.Namespace, config: MllamaConfig, start: int) -> None:
        self.args, self.config, self.start = args, config, start

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        step, first = (info.num_workers, info.id) if info else (1, 0)
        chat = Chat(HERE / "tokenizer.model")
        index = self.start + first
        while True:
            yield training_batch(index, chat, self.config, self.args.seed, self.args.larger)
            index += step


def optimizers(trainee: Trainee, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest.

    Patch embeddings have small weights and many readers: they get a third of the rate.
    """
    muon, patches, matrices, others = [], [], [], []
    for name, parameter in trainee.named_parameters():
        if (".layers." in name or "projector" in name) and parameter.ndim == 2:
            muon.append(parameter)
        elif "patch_embedding" in name:
            patches.append(parameter)
        else:
            (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
        {"params": patches, "weight_decay": 0.0, "lr": 0.3 * args.lr},
    ]
    return [
        torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True),
        torch.optim.Muon(
            muon,
            lr=args.muon_lr,
            weight_decay=0.05,
            ns_steps=3,
            adjust_lr_fn="match_rms_adamw",
        ),
    ]


class Run:
    """One training run: state, logs, schedule."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.threads)
        self.chat = Chat(HERE / "tokenizer.model")
        self.config = tiny_config(self.chat.vocab_size)
        self.trainee = Trainee(self.config)
        if args.start_from:
            old = load_file(args.start_from / "model.safetensors")
            widen(self.trainee, old, Chat(args.start_from / "tokenizer.model"), self.chat)
        self.trainee.to(args.device)
        self.average = copy.deepcopy(self.trainee)
        self.working = copy.deepcopy(self.trainee)  # in bfloat16: what computes
        for parameter in self.working.parameters():
            parameter.data = parameter.data.bfloat16()
        self.optimizers = optimizers(self.trainee, args)
        self.base_rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.step = self.pictures = 0
        args.out.mkdir(parents=True, exist_ok=True)
        if args.resume:
            self._resume()
        self._refresh()
        if args.compile:
            vision = self.working.model.vision_model
            text = self.working.model.language_model.model
            stacks = (vision.transformer, vision.global_transformer, text)
            for layer in (layer for stack in stacks for layer in stack.layers):
                layer.compile(dynamic=True)
        self.scenes = list(heldout_scenes(args.eval_scenes))

    def _resume(self) -> None:
        state = torch.load(self.args.out / "state.pt", weights_only=True)
        self.trainee.load_state_dict(state["trainee"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.pictures = state["step"], state["pictures"]

    def save(self) -> None:
        state = {
            "trainee": self.trainee.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "pictures": self.pictures,
        }
        torch.save(state, self.args.out / "state.new")
        (self.args.out / "state.new").replace(self.args.out / "state.pt")

    def learn(self) -> None:
        """Train until the schedule is over."""
        data = Batches(self.args, self.config, self.step)
        loader = DataLoader(data, batch_size=None, num_workers=self.args.workers, prefetch_factor=8)
        sums: dict[str, float] = defaultdict(float)
        saved = evaluated = clock = time.time()
        for batch in loader:
            for name, value in self._one_step(batch.to(self.args.device)).items():
                sums[name] += value
            sums["steps"] += 1
            if self.step % 50 == 0:
                loss, auxiliary = (sums[n] / sums["steps"] for n in ("loss", "auxiliary"))
                rate = sums["steps"] / (time.time() - clock)
                row = [self.pictures, round(loss, 4), round(auxiliary, 4), self.step]
                self._log("loss.csv", [*row, round(rate, 3)])
                sums.clear()
                clock = time.time()
            if time.time() - evaluated > 60 * self.args.eval_minutes:
                self.report()
                evaluated = time.time()
            if time.time() - saved > 150:
                self.save()
                saved = time.time()
            if self.step >= self.args.steps:
                break
        self.save()

    def rate(self) -> float:
        """Share of the full rate: a short rise, a plateau, a straight fall to zero."""
        left = (self.args.steps - self.step) / (self.args.steps * self.args.decay)
        return max(0.0, min(1.0, (self.step + 1) / 60, left))

    def _one_step(self, batch: Batch) -> dict[str, float]:
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.rate()
        logits, auxiliary = self.working(batch)
        loss = F.cross_entropy(logits, batch.targets)
        weight = self.args.auxiliary * max(0.1, 1 - self.step / self.args.steps)
        (loss + weight * auxiliary).backward()
        self._take_gradients()
        self.trainee.share_tile_gradients()
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._refresh()
        self.step += 1
        self.pictures += 0 if batch.tiles is None else len(batch.tiles)
        share = max(1 - self.args.average, 1 / (self.step + 1))
        with torch.no_grad():
            for averaged, own in zip(
                self.average.parameters(), self.trainee.parameters(), strict=True
            ):
                averaged.lerp_(own, share)
        return {"loss": float(loss.detach()), "auxiliary": float(auxiliary.detach())}

    def _take_gradients(self) -> None:
        """Move the gradients of the working copy to the weights in float32."""
        for own, working in zip(self.trainee.parameters(), self.working.parameters(), strict=True):
            own.grad = None if working.grad is None else working.grad.float()
            working.grad = None

    def _refresh(self) -> None:
        """Round the weights for the working copy."""
        with torch.no_grad():
            for working, own in zip(
                self.working.parameters(), self.trainee.parameters(), strict=True
            ):
                working.copy_(own)

    def report(self) -> None:
        """Held-out accuracy per type, to the log."""
        report = measure(self.average, self.scenes, self.chat)
        row = [f"{name}={score.accuracy:.3f}" for name, score in report.parts.items()]
        mean = report.overall.accuracy
        self._log("accuracy.csv", [self.pictures, round(mean, 4), self.step, *row])

    def _log(self, name: str, row: list) -> None:
        with (self.args.out / name).open("a", newline="") as stream:
            csv.writer(stream).writerow(row)
        print(time.strftime("%H:%M:%S"), *row, flush=True)  # noqa: T201


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and logs")
    parser.add_argument("--steps", type=int, default=8000, help="length of the schedule")
    parser.add_argument("--decay", type=float, default=0.35, help="share in which the rate falls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--larger", type=int, default=1, help="how many times larger batches")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--average", type=float, default=0.98, help="of the weights, per step")
    parser.add_argument("--auxiliary", type=float, default=0.5, help="weight of the patch labels")
    parser.add_argument("--eval-scenes", type=int, default=260)
    parser.add_argument("--eval-minutes", type=float, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start-from", type=Path, help="folder of a model of at most this size")
    parser.add_argument("--export", type=Path, help="write model.safetensors here at the end")
    return parser.parse_args()


def main() -> None:
    run = Run(parse())
    on_cpu = run.args.device == "cpu"
    attention = patch.object(F, "scaled_dot_product_attention", plain_attention)
    with attention if on_cpu else nullcontext():
        run.learn()
        run.report()
    if run.args.export:
        export(run.average.model, run.args.export)


if __name__ == "__main__":
    main()
