"""``python -m bake``: the same as the command ``bake``."""

from bake.cli import main

main()
