"""Draws docs/sheet.jpg: prompts with their pictures from the embedded model, each the first seed, none picked.

Four ask for things in styles that training never showed them in, then ten for two things; the last sixteen are in words
as people write them.

python examples/sheet.py [docs/sheet.jpg]
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fulgurite import Pipeline

PROMPTS = """
a rocket | a red fox | a cat | a dog, flat style | a panda | a lion | a frog | a penguin on a blue background
an owl, flat style | a whale | a crab | a blue butterfly | a ladybug | a turtle | a dinosaur | an octopus
a pine tree | a cactus | a palm tree on a yellow background | a tulip | a sunflower | a mushroom | a rose | a rainbow
an apple | a banana | a pineapple | a slice of watermelon | a strawberry | grapes | a carrot, flat style | a tomato
a burger | a slice of pizza | a donut | a birthday cake on a pink background | a cup of coffee | a house | a castle
a ufo | the sun | a moon on a black background | a snowman | a purple balloon | a football | a guitar | a robot
a ghost | a green car | a fire truck | a plane | a sailboat on a teal background | an umbrella | a gift | a bee | a star
an elephant | a giraffe | a zebra | a shark | a duck | a parrot | a Christmas tree | a maple leaf
a peach | corn on a teal background | a croissant | a hot dog | a cupcake | an ice cream | a bus | a bicycle
a snowflake on a blue background | a cloud | a volcano | saturn | a lightning bolt | a basketball | a key | a crown
an astronaut | a wizard | a princess | a ninja | a superhero | santa claus | a man | a woman
a boy | a girl | a baby | a police officer | a chef, flat style | a builder | a vampire | a mermaid
a skull on a black background | a clown | a smiley | a red heart | a dragon | a squirrel | a deer | a camel
a kangaroo | a gorilla | a crocodile | a jellyfish | a sheep, flat style | a raccoon | a lobster | a sword
a book | a camera | a phone | a bell | a candle | a top hat | sunglasses | a backpack
a violin | a drum | a chair | a tent | a truck | a ship on a blue background | a dress | a pencil
a shield | a taco | a sandwich | pancakes | popcorn | a cocktail | a bomb | a detective
a fox, sticker | a rocket, sticker | a house, cartoon | a robot, cartoon style
a koala, sticker | a penguin, cartoon style | a snail, cartoon | a tulip, sticker
a cat and a dog | a fox on a car | a penguin in front of a castle | a wizard holding a sword | a girl with a balloon
a cat wearing a top hat | a house behind a tree | a unicorn under a rainbow | a bear on a bicycle | a shark and a boat
portrait of a majestic lion, cinematic lighting | a fluffy poodle sitting in the grass | an owl reading a book
a cosy cottage in the woods at night | an espresso on a wooden table | a crimson rose, macro shot, bokeh
an astronaut riding a horse | a turquoise butterfly, watercolor | a rubber duck in a bathtub | a grumpy toad with a hat
a delicious juicy burger, food photography | a limousine parked in the city | a sleepy feline on a purple background
a jet flying over the ocean, 4k | one shiny ruby on black | an old galleon in a storm
"""
SIDE, COLUMNS, CAPTION = 128, 10, 38


def main(path: Path) -> None:
    prompts = [prompt.strip() for prompt in PROMPTS.replace("\n", "|").strip("|").split("|")]
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    draw = Pipeline.load("fulgurite/spark")
    for i, prompt in enumerate(prompts):
        picture = draw(prompt, width=256, height=256, seed=0).image
        x, y = i % COLUMNS * SIDE, i // COLUMNS * (SIDE + CAPTION)
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        words, lines = prompt.split(), [""]
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if pen.textlength(longer, font) < SIDE else [*lines, word]
        pen.multiline_text(
            (x + SIDE / 2, y + SIDE + 2), "\n".join(lines), "black", font, anchor="ma", align="center", spacing=1
        )
    sheet.save(path, quality=90)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/sheet.jpg"))
