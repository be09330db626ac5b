"""Step time, memory and bandwidth of Apollo's back ends beside other optimizers."""
