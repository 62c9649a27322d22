"""Probes: the memory a training step really takes, traced on fake tensors or measured on the local GPU.

`trace` runs the real transformers, peft and bitsandbytes step on tensors without data; it needs no GPU. Everything
here needs the extra `memplan[probe]`, which is imported only on use.
"""
