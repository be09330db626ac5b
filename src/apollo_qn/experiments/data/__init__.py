"""Reading and preparing each corpus; ``embedded/`` holds small real data."""
