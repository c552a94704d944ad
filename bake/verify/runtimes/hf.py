"""transformers: a fresh process that loads what any user would load."""

from bake.verify.runtimes.runtime import Runtime

WORKER = "_hf_worker.py"
PACKAGES = ("numpy", "torch", "transformers")
TRANSFORMERS = Runtime("transformers", "transformers", ("checkpoint", "merge"), WORKER, PACKAGES)
