"""Train the built-in model on drawn scenes, with the same model code that answers questions.

    python assets/tiny/train.py --out DIR [--minutes 120] [--threads 2] [--resume] [--export]

The schedule follows the clock and ends after `--minutes`. DIR gets state.pt (to resume from),
loss.csv and accuracy.csv; `--export` writes model.safetensors beside this file at the end.
Small heads on the vision features learn, patch by patch, what is drawn there; they speed up the
first phase and are thrown away.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from batches import AUXILIARY, Batch, Chat, make_batch, training_batch
from export import export
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mmchat.evals.scenes import Scene, heldout_scenes
from mmchat.models.mllama.config import MllamaConfig, RopeScaling, TextConfig, VisionConfig
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.mllama.tiling import choose_layout

HERE = Path(__file__).parent
AUXILIARY_WEIGHTS = {
    "kind": 2.0, "colour": 1.0, "cell": 1.0, "count": 1.0, "word": 0.5, "tens": 0.3, "units": 0.3,
}  # fmt: skip


def tiny_config(vocab_size: int) -> MllamaConfig:
    """The built-in model's architecture; model_params/tiny.json says the same."""
    vision = VisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_global_layers=2,
        attention_heads=5,
        num_channels=3,
        image_size=112,
        patch_size=14,
        max_num_tiles=4,
        intermediate_layers_indices=(1, 3),
        norm_eps=1e-5,
    )
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        cross_attention_layers=(1, 4),
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
    )
    return MllamaConfig(vision, text)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as matrix products; the CPU's fused kernel takes twice as long backwards."""
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_causal:
        scores = scores + scores.new_full(scores.shape[-2:], -1e4).triu(1)
    if attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    return torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value


class Trainee(nn.Module):
    """The model and the auxiliary heads on its vision features."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.model = MllamaForConditionalGeneration(config)
        size = config.vision_config.output_dim
        self.heads = nn.ModuleDict({name: nn.Linear(size, n) for name, n in AUXILIARY.items()})
        initialise(self)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits that predict ids 1.., [B, S - 1, V], and the auxiliary loss."""
        states, auxiliary = (), torch.zeros(())
        if batch.tiles is not None:
            features = self.model.vision_model(batch.tiles, batch.aspect_ratio_ids)
            states = tuple(self.model.multi_modal_projector(features))
            auxiliary = self._auxiliary_loss(features, batch.labels)
        return self.model(batch.input_ids[:, :-1], batch.segments, states), auxiliary

    def _auxiliary_loss(self, features: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of each head over the patches that have its label, summed."""
        total = torch.zeros(())
        for name, head in self.heads.items():
            label = labels[name]
            known = label >= 0
            if name == "kind":
                known &= (label > 0) | (torch.rand(label.shape) < 0.1)
            if known.any():
                loss = F.cross_entropy(head(features[known]).float(), label[known])
                total = total + AUXILIARY_WEIGHTS[name] * loss
        return total


def initialise(trainee: Trainee) -> None:
    """Random weights, every gate at 1, positions of the canvas as sines and cosines."""
    for name, parameter in trainee.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            nn.init.ones_(parameter)
        elif "embed_tokens" in name or "lm_head" in name or "tile_positional" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            residual = any(part in name for part in ("o_proj", "down_proj", "fc2"))
            nn.init.normal_(parameter, std=(0.3 if residual else 0.7) * fan_in**-0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    config = trainee.model.config.vision_config
    positions = trainee.model.vision_model.gated_positional_embedding
    grid = config.patches_per_side
    with torch.no_grad():
        positions.embedding.copy_(_waves(grid, 0, 0, config.hidden_size))
        table = positions.tile_embedding.weight
        table.zero_()
        for row, (tiles_h, tiles_w) in enumerate(config.aspect_ratios, start=1):
            tiles = [
                _waves(grid, r * grid, c * grid, config.hidden_size)
                for r in range(tiles_h)
                for c in range(tiles_w)
            ]
            flat = torch.stack(tiles).flatten()
            table[row, : flat.numel()] = flat


def _waves(grid: int, top: int, left: int, size: int) -> Tensor:
    """Two-dimensional sine positions of one tile and a zero for the class token: [P, E]."""
    frequencies = 2 * math.pi / (4 * 20 ** torch.linspace(0, 1, size // 4))
    rows = (torch.arange(grid) + top)[:, None] * frequencies
    columns = (torch.arange(grid) + left)[:, None] * frequencies
    rows = torch.cat((rows.sin(), rows.cos()), 1)[:, None].expand(grid, grid, -1)
    columns = torch.cat((columns.sin(), columns.cos()), 1)[None].expand(grid, grid, -1)
    waves = torch.cat((rows, columns), -1).flatten(0, 1)
    return 0.3 * torch.cat((torch.zeros(1, size), waves))


class Batches(IterableDataset):
    """Training batches from number `start` on; the stage follows the clock."""

    def __init__(self, args: argparse.Namespace, config: VisionConfig, start: int) -> None:
        self.args, self.config, self.start = args, config, start
        self.began, self.done = time.time(), args.done

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        chat = Chat(HERE / "tokenizer.model")
        index = self.start
        while True:
            spent = self.done + (time.time() - self.began) / 60 / self.args.minutes
            stage = self.args.stage if self.args.stage is not None else spent
            yield training_batch(index, stage, chat, self.config, self.args.seed)
            index += 1


def language_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy over the answers' tokens."""
    wanted = batch.wanted[:, 1:]
    return F.cross_entropy(logits[wanted], batch.input_ids[:, 1:][wanted])


@torch.no_grad()
def accuracy(trainee: Trainee, scenes: list[Scene], chat: Chat, config: VisionConfig) -> dict:
    """Share of exactly right answers per question type.

    Greedy decoding gives the right answer exactly if every token of it is the most likely one
    after the right ones before it, so one pass over question and answer decides.
    """
    groups = defaultdict(list)
    for scene in scenes:
        tiles = tuple(choose_layout(v.height, v.width, 112, 4).num_tiles for v in scene.views)
        groups[tiles].append(scene)
    right: dict[str, list[float]] = defaultdict(list)
    trainee.eval()
    for members in groups.values():
        for start in range(0, len(members), 32):
            batch = make_batch(members[start : start + 32], chat, config)
            with torch.autocast("cpu", torch.bfloat16):
                logits, _ = trainee(batch)
            hit = (logits.argmax(-1) == batch.input_ids[:, 1:]) | ~batch.wanted[:, 1:]
            for type_, row in zip(batch.types, hit.all(1).tolist(), strict=True):
                right[type_].append(row)
    trainee.train()
    return {type_: sum(rows) / len(rows) for type_, rows in right.items()}


def optimizers(trainee: Trainee, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; or AdamW for all.

    Patch embeddings have small weights and many readers: they get a third of the rate.
    """
    muon, patches, matrices, others = [], [], [], []
    for name, parameter in trainee.named_parameters():
        in_layer = (".layers." in name or "projector" in name) and parameter.ndim == 2
        if args.optimizer == "muon" and in_layer:
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
    adam = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)
    if not muon:
        return [adam]
    second = torch.optim.Muon(
        muon, lr=args.muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    return [adam, second]


class Run:
    """One training run: state, logs, schedule."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.threads)
        self.chat = Chat(HERE / "tokenizer.model")
        self.config = tiny_config(self.chat.vocab_size)
        self.trainee = Trainee(self.config)
        self.optimizers = optimizers(self.trainee, args)
        self.base_rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.step = self.pictures = 0
        args.out.mkdir(parents=True, exist_ok=True)
        args.done = 0.0
        if args.resume:
            self._resume()
        if args.compile:
            vision = self.trainee.model.vision_model
            text = self.trainee.model.language_model.model
            stacks = (vision.transformer, vision.global_transformer, text)
            for layer in (layer for stack in stacks for layer in stack.layers):
                layer.compile(dynamic=True)
        self.first_step = self.step if args.restart_schedule else 0
        self.scenes = list(heldout_scenes(args.eval_scenes))
        self.began = time.time()

    def _resume(self) -> None:
        state = torch.load(self.args.out / "state.pt", weights_only=True)
        own = self.trainee.state_dict()
        fitting = {n: w for n, w in state["trainee"].items() if w.shape == own[n].shape}
        self.trainee.load_state_dict(fitting, strict=False)
        if not self.args.restart_schedule:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=False):
                optimizer.load_state_dict(saved)
            self.args.done = state["done"]
        self.step, self.pictures = state["step"], state["pictures"]

    def spent(self) -> float:
        """Share of the schedule that is over."""
        return self.args.done + (time.time() - self.began) / 60 / self.args.minutes

    def save(self) -> None:
        state = {
            "trainee": self.trainee.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "pictures": self.pictures,
            "done": self.spent(),
        }
        torch.save(state, self.args.out / "state.new")
        (self.args.out / "state.new").replace(self.args.out / "state.pt")

    def learn(self) -> None:
        """Train until the schedule is over."""
        data = Batches(self.args, self.config.vision_config, self.step)
        loader = DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=8)
        sums: dict[str, float] = defaultdict(float)
        saved = evaluated = clock = time.time()
        for batch in loader:
            for name, value in self._one_step(batch).items():
                sums[name] += value
            if self.step % 50 == 0:
                now = time.time()
                row = [self.step, self.pictures, round(self.spent(), 4)]
                row += [round(sums[n] / 50, 4) for n in ("loss", "auxiliary")]
                self._log("loss.csv", [*row, round(50 / (now - clock), 3)])
                sums.clear()
                clock = now
            if time.time() - evaluated > 60 * self.args.eval_minutes:
                self.report()
                evaluated = time.time()
            if time.time() - saved > 150:
                self.save()
                saved = time.time()
            if self.spent() >= 1:
                break
        self.save()

    def _one_step(self, batch: Batch) -> dict[str, float]:
        spent = self.spent()
        warm = min(1.0, (self.step - self.first_step + 1) / 60)
        scale = warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, spent))))
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.args.float32):
            logits, auxiliary = self.trainee(batch)
        loss = language_loss(logits, batch)
        weight = self.args.auxiliary * max(0.1, 1 - spent)
        (loss + weight * auxiliary).backward()
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.pictures += 0 if batch.tiles is None else len(batch.tiles)
        return {"loss": float(loss.detach()), "auxiliary": float(auxiliary.detach())}

    def report(self) -> None:
        """Held-out accuracy per type, to the log."""
        rates = accuracy(self.trainee, self.scenes, self.chat, self.config.vision_config)
        row = [f"{name}={rate:.3f}" for name, rate in rates.items()]
        mean = sum(rates.values()) / len(rates)
        self._log("accuracy.csv", [self.step, self.pictures, f"all={mean:.3f}", *row])

    def _log(self, name: str, row: list) -> None:
        with (self.args.out / name).open("a", newline="") as stream:
            csv.writer(stream).writerow(row)
        print(*row, flush=True)  # noqa: T201


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and logs")
    parser.add_argument("--minutes", type=float, default=120, help="length of the schedule")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--auxiliary", type=float, default=0.5, help="weight of the patch labels")
    parser.add_argument("--stage", type=float, help="fix the curriculum at 0..1")
    parser.add_argument("--eval-scenes", type=int, default=156)
    parser.add_argument("--eval-minutes", type=float, default=4)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--restart-schedule", action="store_true", help="resume weights only")
    parser.add_argument("--export", type=Path, help="write model.safetensors here at the end")
    return parser.parse_args()


def main() -> None:
    run = Run(parse())
    with patch.object(F, "scaled_dot_product_attention", plain_attention):
        if run.spent() < 1:
            run.learn()
    run.report()
    if run.args.export:
        export(run.trainee.model, run.args.export)


if __name__ == "__main__":
    main()
