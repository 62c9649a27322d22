"""The training script that probes trace and measure, on the real libraries."""
