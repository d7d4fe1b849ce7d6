"""Training: the DeepSpeed loop (``engine``), its schedule, the log, and the stages that a run is
made of."""
