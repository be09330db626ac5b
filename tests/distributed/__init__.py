"""Tests on several ranks: real processes, gloo on loopback."""
