"""Many runs: local processes, torchrun, Ray."""
