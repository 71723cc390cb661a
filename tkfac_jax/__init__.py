"""TKFAC: trace-restricted Kronecker-factored natural gradient for Flax models, as an Optax transformation."""

from tkfac_jax import analysis
from tkfac_jax import linen as _linen  # noqa: F401 - registers the layers of Flax Linen
from tkfac_jax import nnx as _nnx  # noqa: F401 - and those of Flax NNX
from tkfac_jax.accumulation import multi_steps
from tkfac_jax.adaptation import AdaptiveState
from tkfac_jax.adaptive import adaptive_tkfac
from tkfac_jax.calls import (
    LayerCall,
    attend_call,
    conv_call,
    dense_call,
    embed_call,
    register_layer,
    tag,
)
from tkfac_jax.capture import LayerStatistics, independent, trace_restricted
from tkfac_jax.curvature import LayerFaults, Share, TkfacState
from tkfac_jax.damping import factored_damping, normal_damping, trace_damping
from tkfac_jax.diagnostics import LayerDiagnostics, diagnostics
from tkfac_jax.discovery import find_layers
from tkfac_jax.factors import KroneckerFactors
from tkfac_jax.gradients import value_and_grad_with_fisher
from tkfac_jax.inverses import KroneckerInverses, cholesky_inverse
from tkfac_jax.layers import Layers, LayerSpec
from tkfac_jax.likelihoods import Bernoulli, Categorical, Likelihood, Normal
from tkfac_jax.matrices import Convolution
from tkfac_jax.newton_schulz import newton_schulz_inverse
from tkfac_jax.shardings import state_shardings
from tkfac_jax.statistics import (
    Statistics,
    empirical_fisher,
    exact_fisher,
    sampled_fisher,
)
from tkfac_jax.train_state import TrainState
from tkfac_jax.training import make_train_step
from tkfac_jax.transform import kfac, scale_by_tkfac, tkfac

__all__ = [
    "AdaptiveState",
    "adaptive_tkfac",
    "Bernoulli",
    "Categorical",
    "KroneckerFactors",
    "Convolution",
    "KroneckerInverses",
    "LayerCall",
    "attend_call",
    "conv_call",
    "dense_call",
    "embed_call",
    "register_layer",
    "tag",
    "LayerDiagnostics",
    "LayerFaults",
    "LayerSpec",
    "analysis",
    "diagnostics",
    "LayerStatistics",
    "Layers",
    "Likelihood",
    "Normal",
    "Share",
    "Statistics",
    "TkfacState",
    "TrainState",
    "cholesky_inverse",
    "empirical_fisher",
    "exact_fisher",
    "factored_damping",
    "find_layers",
    "independent",
    "kfac",
    "make_train_step",
    "multi_steps",
    "newton_schulz_inverse",
    "normal_damping",
    "sampled_fisher",
    "scale_by_tkfac",
    "state_shardings",
    "tkfac",
    "trace_damping",
    "trace_restricted",
    "value_and_grad_with_fisher",
]
