"""Step time, memory and bandwidth of Apollo's back ends against other optimizers."""
