"""Training: one optimizer step for SFT and RL, the losses, packing, optimizers, checkpoints, and the two processes."""
