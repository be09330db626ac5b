"""The workloads: one package each, behind the contract of ``workload.py``."""
