"""transformers: a fresh process that loads what any user would load."""

from bake.verify.runtimes.runtime import Runtime

WORKER = "_hf_worker.py"
TRANSFORMERS = Runtime("transformers", "transformers", ("checkpoint", "merge"), WORKER)
