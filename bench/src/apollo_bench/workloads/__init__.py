"""The workloads: one package each, behind the contract in `workload`."""
