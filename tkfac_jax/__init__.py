"""TKFAC: trace-restricted Kronecker-factored natural gradient for Flax models, as an Optax transformation."""

from tkfac_jax import analysis
from tkfac_jax.curvature.damping import (
    factored_damping,
    normal_damping,
    relative_damping,
    trace_damping,
)
from tkfac_jax.curvature.factors import KroneckerFactors
from tkfac_jax.curvature.inverses import KroneckerInverses, Share
from tkfac_jax.curvature.shardings import state_shardings
from tkfac_jax.curvature.state import LayerFaults, TkfacState
from tkfac_jax.fisher.fisher_functions import empirical_fisher, exact_fisher, sampled_fisher
from tkfac_jax.fisher.layer_statistics import (
    IndependentStatistics,
    LayerStatistics,
    Statistics,
    independent,
    trace_restricted,
)
from tkfac_jax.fisher.likelihoods import Bernoulli, Categorical, Likelihood, Normal
from tkfac_jax.fisher.value_and_grad import value_and_grad_with_fisher
from tkfac_jax.layer_diagnostics import LayerDiagnostics, diagnostics, diagnostics_table
from tkfac_jax.layers import flax_linen as _flax_linen  # noqa: F401 - registers the layers of Flax Linen
from tkfac_jax.layers import flax_nnx as _flax_nnx  # noqa: F401 - and those of Flax NNX
from tkfac_jax.layers.discovery import find_layers
from tkfac_jax.layers.layer_call import LayerCall, attend_call, conv_call, dense_call, embed_call
from tkfac_jax.layers.register import register_layer, tag
from tkfac_jax.layers.row_forms import Convolution
from tkfac_jax.layers.spec import Layers, LayerSpec
from tkfac_jax.linalg.cholesky import cholesky_inverse
from tkfac_jax.linalg.lapack_threads import limit_lapack_threads
from tkfac_jax.linalg.newton_schulz import newton_schulz_inverse
from tkfac_jax.optimizers.accumulation import multi_steps
from tkfac_jax.optimizers.adaptive import adaptive_tkfac
from tkfac_jax.optimizers.adaptive_state import AdaptiveState
from tkfac_jax.optimizers.homogeneous import tkfacw
from tkfac_jax.optimizers.layer_lengths import (
    NormBallState,
    keep_in_norm_ball,
    scale_by_layer_norm_ratio,
)
from tkfac_jax.optimizers.plan import Plan
from tkfac_jax.optimizers.preconditioner import scale_by_tkfac
from tkfac_jax.optimizers.tkfac_and_kfac import kfac, tkfac
from tkfac_jax.training.train_state import TrainState
from tkfac_jax.training.train_step import make_train_step

__all__ = [
    "adaptive_tkfac",
    "AdaptiveState",
    "analysis",
    "attend_call",
    "Bernoulli",
    "Categorical",
    "cholesky_inverse",
    "conv_call",
    "Convolution",
    "dense_call",
    "diagnostics",
    "diagnostics_table",
    "embed_call",
    "empirical_fisher",
    "exact_fisher",
    "factored_damping",
    "find_layers",
    "independent",
    "IndependentStatistics",
    "keep_in_norm_ball",
    "kfac",
    "KroneckerFactors",
    "KroneckerInverses",
    "LayerCall",
    "LayerDiagnostics",
    "LayerFaults",
    "Layers",
    "LayerSpec",
    "LayerStatistics",
    "Likelihood",
    "limit_lapack_threads",
    "make_train_step",
    "multi_steps",
    "newton_schulz_inverse",
    "Normal",
    "normal_damping",
    "NormBallState",
    "Plan",
    "register_layer",
    "relative_damping",
    "sampled_fisher",
    "scale_by_layer_norm_ratio",
    "scale_by_tkfac",
    "Share",
    "state_shardings",
    "Statistics",
    "tag",
    "tkfac",
    "tkfacw",
    "TkfacState",
    "trace_damping",
    "trace_restricted",
    "TrainState",
    "value_and_grad_with_fisher",
]
