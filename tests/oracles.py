"""Slow, obvious references in NumPy float64. They share no code with the package."""

import numpy as np


def explicit_padding(size, span, stride, padding, axis):
    """Low and high padding of one spatial axis, from the definitions of the padding names."""
    if padding == "VALID":
        return 0, 0
    if padding == "SAME":
        outputs = -(-size // stride)
        total = max((outputs - 1) * stride + span - size, 0)
        return total // 2, total - total // 2
    if padding in ("CIRCULAR", "REFLECT"):
        return (span - 1) // 2, span // 2
    if isinstance(padding, int):
        return padding, padding
    pad = padding[axis]
    return (pad, pad) if isinstance(pad, int) else pad


def patches(image, window, strides, padding, dilation):
    """What each output location of a convolution sees: `(locations, taps * channels)`."""
    image = np.asarray(image, np.float64)
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    pads = [explicit_padding(image.shape[i], spans[i], strides[i], padding, i) for i in range(2)]
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(str(padding), "constant")
    padded = np.pad(image, [*pads, (0, 0)], mode=mode)
    rows = []
    for top in range(0, padded.shape[0] - spans[0] + 1, strides[0]):
        for left in range(0, padded.shape[1] - spans[1] + 1, strides[1]):
            taps = [
                padded[top + i * dilation[0], left + j * dilation[1]]
                for i in range(window[0])
                for j in range(window[1])
            ]
            rows.append(np.concatenate(taps))
    return np.stack(rows)


def with_one(rows):
    """Appends the homogeneous coordinate of a bias."""
    return np.concatenate([rows, np.ones((*rows.shape[:-1], 1))], axis=-1)


def trace_restricted(inputs, gradients):
    """Eqs. (4.9) and (4.13): example by example, location by location.

    Args:
      inputs: `(batch, locations, d_in)`.
      gradients: `(batch, locations, d_out)`.
    """
    inputs, gradients = np.asarray(inputs, np.float64), np.asarray(gradients, np.float64)
    input_moment = np.zeros((inputs.shape[-1],) * 2)
    output_moment = np.zeros((gradients.shape[-1],) * 2)
    trace = 0.0
    for example_inputs, example_gradients in zip(inputs, gradients, strict=True):
        for a, u in zip(example_inputs, example_gradients, strict=True):
            lambda_, gamma = np.outer(a, a), np.outer(u, u)
            input_moment += np.trace(gamma) * lambda_
            output_moment += np.trace(lambda_) * gamma
            trace += np.trace(lambda_) * np.trace(gamma)
    return input_moment / len(inputs), output_moment / len(inputs), trace / len(inputs)


def independent(inputs, gradients):
    """KFAC: sums over locations for the inputs, means over locations for the gradients."""
    inputs, gradients = np.asarray(inputs, np.float64), np.asarray(gradients, np.float64)
    input_moment = np.mean([a.T @ a for a in inputs], axis=0)
    output_moment = np.mean([u.T @ u / len(u) for u in gradients], axis=0)
    return input_moment, output_moment, 1.0


def fisher_block(inputs, gradients):
    """The block under the assumption of uncorrelated locations, Eqs. (4.2) and (4.11)."""
    block = 0.0
    for example_inputs, example_gradients in zip(inputs, gradients, strict=True):
        for a, u in zip(example_inputs, example_gradients, strict=True):
            block = block + np.kron(np.outer(a, a), np.outer(u, u))
    return block / len(inputs)


def output_fisher(likelihood, outputs):
    """The Fisher of one position's distribution, with respect to its parameters."""
    outputs = np.asarray(outputs, np.float64)
    if likelihood == "categorical":
        p = np.exp(outputs - outputs.max())
        p /= p.sum()
        return np.diag(p) - np.outer(p, p)
    if likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-outputs))
        return np.diag(p * (1 - p))
    variance = likelihood
    return np.eye(len(outputs)) / variance


def example_fisher(likelihood, outputs, mask=None, average=False):
    """The Fisher of all outputs of one example, flattened: a block for each position that is not padding.

    Args:
      likelihood: see `output_fisher`.
      outputs: `(positions, classes)`; but for a categorical distribution every number is a position of its own.
      mask: zero where a position is padding.
      average: whether the Fisher is that of one position.
    """
    rows = outputs if likelihood == "categorical" else outputs.reshape(-1, 1)
    mask = np.ones(len(rows)) if mask is None else np.ravel(mask).astype(float)
    scale = max(mask.sum(), 1) if average else 1
    fisher, size = np.zeros((outputs.size, outputs.size)), rows.shape[1]
    for i, row in enumerate(rows):
        here = slice(i * size, (i + 1) * size)
        fisher[here, here] = mask[i] * output_fisher(likelihood, row) / scale
    return fisher


def mlp(params, x):
    """The network `networks.Mlp`, also for complex parameters."""
    x = np.tanh(x @ params["Dense_0/kernel"] + params["Dense_0/bias"])
    x = np.tanh(x @ params["Dense_1/kernel"])
    return x @ params["Dense_2/kernel"] + params["Dense_2/bias"]


def jacobian(function, params):
    """The derivatives of a function by each number of the parameters, the last axis, in the order of these.

    A complex step takes no difference and so loses nothing; the function has to be analytic.
    """
    columns = []
    for name, array in params.items():
        for place in np.ndindex(array.shape):
            moved = {n: a.astype(complex) for n, a in params.items()}
            moved[name][place] += 1e-30j
            columns.append(np.imag(function(moved)) / 1e-30)
    return np.stack(columns, axis=-1)


def gauss_newton(jacobian, fishers, weights):
    """The mean over examples of `J^T F J`, each with its weight."""
    matrix = 0.0
    for rows, fisher, weight in zip(jacobian, fishers, weights, strict=True):
        rows = rows.reshape(len(fisher), -1)
        matrix = matrix + weight * rows.T @ fisher @ rows
    return matrix / len(jacobian)


def in_one_vector(arrays, params):
    """Arrays of some of the parameters as one vector of all: zero where there is none."""
    parts = [np.asarray(arrays.get(name, np.zeros(a.shape))) for name, a in params.items()]
    return np.concatenate([part.ravel() for part in parts])


def normalised(moments):
    """Phi, Psi and delta of Eq. (4.9)."""
    input_moment, output_moment, trace = moments
    return input_moment / trace, output_moment / trace, trace


def normal_damping(factors, damping):
    """Eq. (5.15)."""
    phi, psi, delta = factors
    return (
        np.sqrt(delta) * phi + np.sqrt(damping) * np.eye(len(phi)),
        np.sqrt(delta) * psi + np.sqrt(damping) * np.eye(len(psi)),
    )


def trace_damping(factors, kinds, floor, dense_damping):
    """Eqs. (5.16) and (5.17): for each layer its damped factors."""
    beta = max(max(floor, delta) / delta for _, _, delta in factors.values())
    damped = {}
    for name, (phi, psi, delta) in factors.items():
        if kinds[name] == "dense":
            damped[name] = normal_damping((phi, psi, beta * delta), dense_damping)
        else:
            d = max(floor, delta)
            damped[name] = (
                np.sqrt(d) * phi + d / len(phi) * np.eye(len(phi)),
                np.sqrt(d) * psi + d / len(psi) * np.eye(len(psi)),
            )
    return damped


def algorithm_1(
    params, gradients_at, statistics_at, damp, steps, alpha, tau, epsilon, t_fim, t_inv
):
    """Algorithm 1 of the paper, for layers given as matrices `(d_in, d_out)`.

    Args:
      params: from a layer's name to its matrix.
      gradients_at: from params to gradients, of the same form.
      statistics_at: from params to the layers' moments.
      damp: from normalised factors to damped ones, by layer.
      steps, alpha, tau, epsilon, t_fim, t_inv: as in the paper.
    """
    averaged, inverses = None, None
    momentum = {name: np.zeros_like(w) for name, w in params.items()}
    for t in range(steps):
        if t % t_fim == 0:
            moments = statistics_at(params)
            new = damp({name: normalised(m) for name, m in moments.items()})
            if averaged is None:
                averaged = new
            else:
                averaged = {
                    name: tuple(
                        epsilon * old + (1 - epsilon) * fresh
                        for old, fresh in zip(averaged[name], new[name], strict=True)
                    )
                    for name in new
                }
        if t % t_inv == 0:
            inverses = {
                name: (np.linalg.inv(phi), np.linalg.inv(psi))
                for name, (phi, psi) in averaged.items()
            }
        gradients = gradients_at(params)
        params = dict(params)
        for name, gradient in gradients.items():
            phi_inverse, psi_inverse = inverses[name]
            zeta = -alpha * phi_inverse @ gradient @ psi_inverse
            momentum[name] = tau * momentum[name] + zeta
            params[name] = params[name] + momentum[name]
    return params


def tkfacw(
    params,
    others,
    gradients_at,
    statistics_at,
    *,
    steps,
    rate,
    momentum,
    share,
    floor,
    radius,
    cap,
    t_fim,
    t_inv,
    weight_decay,
    vectors=(),
    outputs=(),
    growth=0.3,
):
    """The optimizer of that name, for layers given as matrices whose last row is the bias.

    Args:
      params: from a layer's name to its matrix.
      others: from the name of another parameter to its array.
      gradients_at: from params, others and the step to the gradients of both.
      statistics_at: from params to the layers' moments.
      steps: how many.
      rate: from a step to its learning rate.
      momentum, share, floor, radius, weight_decay: numbers.
      cap: the largest weight of the old average.
      t_fim, t_inv: steps between statistics and inverses.
      vectors: names of the others that are no matrices.
      outputs: names of the layers whose balls grow.
      growth: by what share of what a step out of them goes outwards.
    """
    params, others = dict(params), dict(others)
    balls = {
        name: max(np.linalg.norm(w), radius * w.shape[-1] ** 0.5)
        for name, w in (params | others).items()
        if name not in vectors
    }
    traces = {name: np.zeros_like(w) for name, w in params.items()}
    first, second = ({name: np.zeros_like(w) for name, w in others.items()} for _ in range(2))
    averaged, updates = {}, 0

    def kept(weights, step, ball):
        end = weights + step
        return end * min(1, ball / np.linalg.norm(end))

    for t in range(steps):
        if t % t_fim == 0:
            weight = min(cap, 1 - 1 / (updates + 1))
            updates += 1
            for name, moments in statistics_at(params).items():
                damped = [m / np.trace(m) + share / len(m) * np.eye(len(m)) for m in moments[:2]]
                old = averaged.get(name, damped)
                averaged[name] = [
                    weight * a + (1 - weight) * b for a, b in zip(old, damped, strict=True)
                ]
        if t % t_inv == 0:
            inverses = {n: [np.linalg.inv(m) for m in both] for n, both in averaged.items()}
        gradients, other_gradients = gradients_at(params, others, t)
        for name, w in list(params.items()):
            traces[name] = momentum * traces[name] + gradients[name]
            ahead = momentum * traces[name] + gradients[name]
            direction = inverses[name][0] @ ahead @ inverses[name][1]
            kernel = max(np.linalg.norm(w[:-1]), floor * w.shape[1] ** 0.5)
            bias = max(np.linalg.norm(w[-1]), kernel)
            lengths = np.array([kernel] * (len(w) - 1) + [bias])[:, None]
            step = direction / np.linalg.norm(direction) * lengths
            step = -rate(t) * (step + weight_decay * w)
            if name in outputs and np.linalg.norm(w + step) > balls[name]:
                balls[name] += growth * max(np.sum(step * w), 0) / np.linalg.norm(w)
            params[name] = kept(w, step, balls[name])
        for name, w in list(others.items()):
            g = other_gradients[name]
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.99 * second[name] + 0.01 * g**2
            seen = second[name] > 0
            root = np.sqrt(second[name] / (1 - 0.99 ** (t + 1)), where=seen, out=np.ones_like(w))
            step = np.where(seen, first[name] / (1 - 0.9 ** (t + 1)) / root, 0)
            if name in balls:
                length = max(np.linalg.norm(w), floor * w.shape[-1] ** 0.5)
                step = step / np.linalg.norm(step) * length
            step = -rate(t) * (step + weight_decay * w)
            others[name] = kept(w, step, balls[name]) if name in balls else w + step
    return params, others
