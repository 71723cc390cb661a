"""Optax transformations: `scale_by_tkfac`, `tkfac`, `kfac`, `adaptive_tkfac`, `multi_steps`. Imports all rooms before.

`refresh_schedule` says when new statistics and inverses are due, `plan` what an optimizer tells a training step about
itself. The adaptive optimizer chooses its lengths by a quadratic model of an objective.
"""
