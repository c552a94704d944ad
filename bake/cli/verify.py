"""``bake verify``: the baked model against the same edits as hooks on its base."""
