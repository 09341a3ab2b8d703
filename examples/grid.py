"""Draws docs/grid.jpg: a prompt a row, by the undistilled model in 20 steps, its students in 8, 4, 2 and 1, and by the
undistilled model in 4, 2 and 1 for comparison. The first seed everywhere, none picked.

python examples/grid.py [docs/grid.jpg]
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fulgurite import Pipeline

SPARK, LIGHTNING = "fulgurite/spark", "fulgurite/spark-lightning"
COLUMNS = (
    (SPARK, 20),
    (LIGHTNING, 8),
    (LIGHTNING, 4),
    (LIGHTNING, 2),
    (LIGHTNING, 1),
    (SPARK, 4),
    (SPARK, 2),
    (SPARK, 1),
)
PROMPTS = (
    "a rocket", "a red fox", "a panda, flat style", "a penguin on a blue background", "an octopus", "a sunflower",
    "a slice of pizza", "a castle", "a green car", "a guitar on a yellow background", "a robot",
    "an astronaut riding a horse",
)  # fmt: skip
SIDE, WORDS, HEAD = 128, 136, 20


def main(path: Path) -> None:
    grid = Image.new("RGB", (WORDS + len(COLUMNS) * SIDE, HEAD + len(PROMPTS) * SIDE), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for column, (model, steps) in enumerate(COLUMNS):
        left = WORDS + column * SIDE
        name = f"{'student' if model == LIGHTNING else 'undistilled'}, {steps}"
        pen.text((left + SIDE / 2, HEAD / 2), name, "black", font, anchor="mm")
        draw = Pipeline.load(model, steps=steps)
        for row, prompt in enumerate(PROMPTS):
            picture = draw(prompt, width=256, height=256, num_steps=steps, seed=0).image
            grid.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, HEAD + row * SIDE))
    for row, prompt in enumerate(PROMPTS):
        text = prompt.replace(" on a ", "\non a ").replace(", ", ",\n")
        pen.multiline_text((4, HEAD + (row + 0.5) * SIDE), text, "black", font, anchor="lm")
    grid.save(path, quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/grid.jpg"))
