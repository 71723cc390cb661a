"""Matrices that know nothing of layers: nothing else of the package is imported.

How a factor is stored (whole, in blocks, as its diagonal), its inverse by Cholesky factors or by Newton and Schulz,
what happens when an inversion fails, how stacks of matrices are divided among devices, meshes and the arrays on
them, finiteness, condition numbers, and the threads of the LAPACK library.
"""
