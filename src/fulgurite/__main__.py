"""``python -m fulgurite``"""

from fulgurite.cli import app

app(prog_name="fulgurite")
