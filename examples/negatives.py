"""Draws docs/negatives.jpg: prompts that leave open what is drawn, without a negative prompt and with one that names
what was drawn, by the student of 4 steps and the undistilled model in 8. The first seeds, none picked.

python examples/negatives.py [docs/negatives.jpg]
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fulgurite import Pipeline

MODELS = (("fulgurite/spark-lightning", 4, "student"), ("fulgurite/spark", 8, "undistilled"))
PROMPTS = (
    ("a flower", "tulip"), ("an insect", "butterfly"), ("a fruit", "strawberry"), ("a vehicle", "car"),
    ("an instrument", "violin"), ("a monster", "robot"), ("a child", "boy"), ("a building", "castle"),
)  # fmt: skip
SIDE, WORDS, HEAD, GAP, SEEDS = 80, 110, 20, 8, 3


def main(path: Path) -> None:
    block = SEEDS * SIDE + GAP
    sheet = Image.new("RGB", (WORDS + 2 * len(MODELS) * block, HEAD + len(PROMPTS) * SIDE), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, (prompt, negative) in enumerate(PROMPTS):
        pen.multiline_text((4, HEAD + (row + 0.5) * SIDE), f"{prompt}\nnot: {negative}", "black", font, anchor="lm")
    for i, (model, steps, name) in enumerate(MODELS):
        draw = Pipeline.load(model, steps=steps)
        for j, head in enumerate((f"{name}, {steps} steps", "with the negative prompt")):
            left = WORDS + (2 * i + j) * block
            pen.text((left + block / 2, HEAD / 2), head, "black", font, anchor="mm")
            for row, (prompt, negative) in enumerate(PROMPTS):
                for seed in range(SEEDS):
                    picture = draw(
                        prompt, negative_prompt=negative * j, width=256, height=256, num_steps=steps, seed=seed
                    ).image
                    small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                    sheet.paste(small, (left + seed * SIDE, HEAD + row * SIDE))
    sheet.save(path, quality=85)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/negatives.jpg"))
