"""PEFT adapters merged into their base."""
