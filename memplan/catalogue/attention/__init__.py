"""Attention: its kernels, latent and compressed keys and values, rotary tables of older versions."""
