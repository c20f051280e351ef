"""The method: the layout of latent slots, the teacher's selection, the losses and the stage 2 roll-out."""
