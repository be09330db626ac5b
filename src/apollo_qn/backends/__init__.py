"""Back ends: ways to carry out :func:`apollo_qn.algorithm.update` on many tensors."""
