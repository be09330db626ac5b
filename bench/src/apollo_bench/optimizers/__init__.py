"""The registry of optimizers, and those that PyTorch does not have."""
