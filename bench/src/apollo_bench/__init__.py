"""The evaluation: recipe -> workload -> training -> run directory -> report; nothing flows back."""
