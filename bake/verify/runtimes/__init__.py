"""The runtimes that serve a baked artifact, each in its own process and its own environment.

`base` says what is asked of a runtime and what it answers; `vllm` and `llamacpp` ask; `_process`
starts a script in another environment; the `_*_worker` files are those scripts and import nothing
of bake; `converter` calls llama.cpp's own checkpoint converter.
"""
