"""Draw the pictures of README.md and docs: held-out scenes, which the built-in model never saw.

python assets/draw_pictures.py
"""

from __future__ import annotations

from pathlib import Path

from mmchat.evals.scenes import Kind, make_scene

# File name -> seed of the held-out scene, its kind and its canvas (tiles_h, tiles_w).
PICTURES: dict[str, tuple[int, Kind, tuple[int, int]]] = {
    "dog.jpg": (500, "objects", (2, 2)),
    "street.jpg": (10420, "objects", (1, 3)),
    "shapes.jpg": (2990, "objects", (1, 2)),
    "fish.jpg": (164, "count", (1, 2)),
    "sign.jpg": (60, "text", (2, 2)),
}
# File names of the two pictures of one held-out pair -> its seed.
PAIRS: dict[tuple[str, str], int] = {("before.jpg", "after.jpg"): 276}


def main() -> None:
    folder = Path(__file__).parent
    for name, (seed, kind, canvas) in PICTURES.items():
        (picture,) = make_scene(seed, "heldout", kind=kind, canvas=canvas).pictures
        picture.save(folder / name, quality=92)
    for names, seed in PAIRS.items():
        for name, picture in zip(
            names, make_scene(seed, "heldout", kind="pair").pictures, strict=True
        ):
            picture.save(folder / name, quality=92)


if __name__ == "__main__":
    main()
