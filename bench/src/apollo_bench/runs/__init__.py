"""Run directories and archives: written, checked and loaded."""
