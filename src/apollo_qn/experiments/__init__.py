"""The evaluation: recipe -> task -> engine -> run directory -> report, and nothing flows back.

Needs the extra ``apollo-qn[experiments]``; the optimizer never imports it.
"""
