"""From statistics to preconditioned gradients. Imports `layers`, `linalg`, and of `fisher` the types of statistics.

Factors and their averages, damping, inverses, the state that holds them and how it stands in memory and on meshes;
`transitions` says how statistics and inverses enter that state, and `precondition` how gradients are multiplied.
"""
