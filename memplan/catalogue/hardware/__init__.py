"""Hardware: GPUs, links between them, their rates, and what driver and libraries take."""
