"""The training script that is traced and measured, on the real libraries."""
