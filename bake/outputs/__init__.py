"""Outputs: each executes a plan and decides nothing."""
