"""Likelihoods, and the statistics that a backward pass leaves behind. Imports `layers` and `linalg`.

`layer_statistics` holds the sums over rows, for TKFAC and for KFAC; `tagging` inserts them into a backward pass;
`estimators` says which derivatives are pulled back. `fisher_functions` and `value_and_grad` are what users call.
"""
