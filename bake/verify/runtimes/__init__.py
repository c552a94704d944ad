"""The runtimes that serve a baked artifact, each in its own process and its own environment.

`base` says what is asked of a runtime and what it answers; `hf`, `vllm` and `llamacpp` ask; the
`_*_worker` files are the scripts that run in the other environment and import nothing of bake.
"""
