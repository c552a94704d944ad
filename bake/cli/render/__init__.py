"""Results as tables for a reader. What a table says is in the objects; nothing is computed here."""
