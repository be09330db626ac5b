"""Tables, statistics, figures and one page, from finished or running runs."""
