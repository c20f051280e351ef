"""Train state and step, the loop over stages, checkpoints, metrics and the configuration."""
