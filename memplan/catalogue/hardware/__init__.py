"""Hardware: GPUs, the links between them, their rates, and the memory that driver and libraries take."""
