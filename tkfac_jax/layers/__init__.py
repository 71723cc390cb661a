"""What a layer is, and how the layers of Linen, of NNX and of users are found and judged. Imports `linalg`.

A `LayerSpec` says what is known of a layer without looking at numbers, a `LayerCall` which arrays one call used.
Kernels are matrices (`kernel_matrix`), inputs and output gradients their rows (`row_forms`). `discovery` finds layers;
`routes`, `kernel_values`, `per_example` tell which parameter one uses, whether as it stands, and example by example.
"""
