"""The search for settings: ranges, trials, selection."""
