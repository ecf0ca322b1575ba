"""MUFAC and MUCAC in miniature: coloured squares in the layout and under the names of the real files."""

from __future__ import annotations

import csv

import numpy as np
from PIL import Image

NAMES = ["5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young"]  # fmt: skip
"""The 40 attributes of CelebA in their order."""
HOUSEHOLDS = {"train": range(1, 7), "val": range(801, 803), "test": range(851, 853)}
PEOPLE = {3: 3, 189: 3, 190: 6, 700: 6, 1249: 6, 1250: 9, 4854: 9, 4855: 9, 6217: 9}
"""Images by identity of the miniature of MUCAC: 60, with people at both ends of every side."""


def square(path, random, side=16):
    """A noisy square of one colour, as JPEG."""
    colour = random.integers(0, 256, (1, 1, 3)) + random.integers(-9, 10, (side, side, 3))
    Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(path, quality=95)


def write_mufac(root, side=16):
    """60 faces: 6 families of two people with three pictures each to train on, 2 to test on, 2 unseen."""
    random = np.random.default_rng(0)
    for name, households in HOUSEHOLDS.items():
        folder = root / f"{name}_images"
        folder.mkdir(parents=True)
        rows = []
        for household in households:
            for member, age in (("F", 44), ("D", 18)):
                for n, letter in enumerate(random.choice(list("abcdefgh"), 3), 1):
                    rows.append((f"F{household:04}_AGE_{member}_{age}_{letter}{n}.jpg", letter))
        for file, _ in rows:
            square(folder / file, random, side)
        with (root / f"custom_{name}_dataset.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_path", "age_class", "family_id"])
            writer.writerows((f, letter, f[:5]) for f, letter in rows)
    return root


def write_mucac(root, side=16):
    """60 faces of nine people; answers to the questions follow the number of the picture."""
    random = np.random.default_rng(0)
    folder = root / "CelebAMask-HQ" / "CelebA-HQ-img"
    folder.mkdir(parents=True)
    owners = [who for who, count in PEOPLE.items() for _ in range(count)]
    random.shuffle(owners)
    answers = []
    for n, _ in enumerate(owners):
        square(folder / f"{n}.jpg", random, side)
        said = dict.fromkeys(NAMES, -1) | {
            "Male": n & 1,
            "Smiling": n >> 1 & 1,
            "Young": n >> 2 & 1,
        }
        answers.append([1 if v == 1 else -1 for v in said.values()])
    (root / "CelebA-HQ-identity.txt").write_text(
        "".join(f"{n}.jpg {who}\n" for n, who in enumerate(owners))
    )
    lines = [str(len(owners)), " ".join(NAMES)]
    lines += [f"{n}.jpg  {' '.join(map(str, a))}" for n, a in enumerate(answers)]
    (root / "CelebA-HQ-attribute.txt").write_text("\n".join(lines) + "\n")
    return root, owners
