"""From statistics to preconditioned gradients. Imports `layers`, `linalg`, of `fisher` only `layer_statistics`.

Factors and their averages, damping, inverses, the state that holds them and how it stands in memory and on meshes;
`transitions` says how statistics and inverses enter that state, and `precondition` how gradients are multiplied.
"""
