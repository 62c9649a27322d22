"""The probes: what a training step really takes, on fake tensors or on the GPU at hand, beside memplan's estimate.

`trace` runs the real transformers, peft and bitsandbytes step on tensors without data; it needs no GPU. Everything
here needs the extra `memplan[probe]` and imports it only when asked.
"""
