"""Training: the program of a step, pipeline schedules, saving, and the allocator's replay."""
