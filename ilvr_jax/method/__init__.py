"""The method: where latent slots stand, what the teacher selects, the losses, the stage 2 roll-out."""
