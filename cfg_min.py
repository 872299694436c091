"""Classifier-free guidance, whole: losses, the guidance rule, guided fields, samplers.

Copy this file: it works alone. A path (paths.py, or yours) is an argument. "Lecture 4" is
000_9a64053bb9e2e45b.txt, one of the notes that README.md names; paths.py introduces x, z, eps, u
and the score.

The aim: images of class y, and more decidedly so than the data are. One network u_t(x|y) learns to
be conditional and unconditional at once: while it trains, y becomes NULL with probability eta, so
that u_t(x|NULL) is u_t(x). The guided field goes from u_t(x|NULL) to u_t(x|y), and on:

    (1 - w) u_t(x|NULL) + w u_t(x|y)        w is the guidance scale: 0 unconditional,
                                            1 conditional, > 1 guided.

Shapes: x, z, eps (B, ...); t (B,) or a number, 0 noise, 1 data; y (B,) int64;
net(x, t, y) -> (B, ...), like x.
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F

NULL = 10       # the label for "no label", after MNIST's 0 ... 9


# ---------------------------------------------------------------- training

def drop_labels(y, eta):
    """y <- NULL with probability eta, independently for each sample, as a new tensor; Lecture 4,
    L_CFM^CFG."""
    dropped = torch.rand(len(y), device=y.device) < eta
    return torch.where(dropped, NULL, y)


def cfg_cfm_loss(net, path, z, y, eta=0.1, t=None):
    """L_CFM^CFG = E || u_theta(x|y) - u_t(x|z) ||^2, mean over pixels; Lecture 4, "Training".

    net(x, t, y) -> u. t: (B,), drawn as one likes, or None for the lecture's U[0, 1).
    """
    y = drop_labels(y, eta)                     # with probability eta, y <- null
    if t is None:
        t = torch.rand(len(z), device=z.device)
    eps = torch.randn_like(z)
    x = path.sample(z, eps, t)                  # x ~ p_t(x|z)
    return F.mse_loss(net(x, t, y), path.target(z, eps, t))


def cfg_dsm_loss(net, path, z, y, eta=0.1):
    """E || eps_theta(x|y) - eps ||^2, y dropped as above: L_simple of 003_da10c6c8947a0fc6.txt.

    net(x, t, y) -> eps. As score = -eps / beta_t, an error of eps is beta_t times that of the
    score: this is L_DSM^CFG (002_49842480371d0be4.txt), each t weighted by beta_t^2.
    """
    y = drop_labels(y, eta)
    t = torch.rand(len(z), device=z.device)
    eps = torch.randn_like(z)
    x = path.sample(z, eps, t)
    return F.mse_loss(net(x, t, y), eps)


def classifier_loss(classifier, path, z, y):
    """-E log p_theta(y|x_t), for "noised samples" x_t; 003_da10c6c8947a0fc6.txt."""
    t = torch.rand(len(z), device=z.device)
    x = path.sample(z, torch.randn_like(z), t)
    return F.cross_entropy(classifier(x, t), y)


def logit_normal(n, mean, std, device=None):
    """Draws t (n,) with logit(t) ~ N(mean, std^2): dense around one time.

    Esser et al. 2024, section 3.1, whose t runs the other way: their mean is ours negated.
    """
    return (mean + std * torch.randn(n, device=device)).sigmoid()


# ---------------------------------------------------------------- what a network predicts
#
# u, or eps, or z: paths.py turns each into u, so the choice is free. But errors grow on the way:
# that of eps by D/alpha, which is large while t is small, that of z by D/beta, large near t = 1.
# Data lie between low and high, and so does E[z|x]: z is held (clamped) there; Ho et al. 2020.

def held(z, low, high):
    """z within [low, high]; the gradient passes as if it were not held, so that what lies outside
    can learn to return (straight through, Bengio et al. 2013)."""
    return z + (z.clamp(low, high) - z).detach()


def u_from_z(net, path, low=-math.inf, high=math.inf, last_t=0.999):
    """net(x, t, y) -> z as a vector field: returns field(x, t, y) -> u = (D z + beta' x) / beta.

    beta is 0 at t = 1, where a solver may ask: after last_t the formula uses last_t. net gets the
    true t.
    """
    def field(x, t, y):
        z = held(net(x, t, y), low, high)
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        return path.data_to_u(z, x, t.clamp(max=last_t))
    return field


def u_from_eps(net, path, low, high, first_t=0.001):
    """net(x, t, y) -> eps as a vector field: eps gives z = (x - beta eps) / alpha, and z, held, u.

    alpha goes to 0 at t = 0, where an error of eps is an error of z without bound: so z has to be
    held here, and before first_t the formula uses first_t.
    """
    def implied_z(x, t, y):
        eps = net(x, t, y)
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).clamp(min=first_t)
        u = path.eps_to_u(eps, x, t)
        return path.u_to_data(u, x, t)
    return u_from_z(implied_z, path, low, high)


# ---------------------------------------------------------------- guidance

def guide(cond, uncond, w):
    """Classifier-free guidance: (1 - w) u_t(x|null) + w u_t(x|y).

    Any two predictions of one kind (u, score, eps or z), same shape; w = 1 is cond, w = 0 uncond.
    For all kinds it is the same guidance: at a given x, t each is a x + b times another, and the
    weights 1 - w and w add to 1.
    Lecture 4, "Classifier-free guidance"; Ho & Salimans 2022, eq. 6, whose w is ours minus 1.
    """
    return uncond + w * (cond - uncond)


def guided_field(net, x, t, y, w, away_from=NULL):
    """The field of Lecture 4, Algorithm 8: one call of net on 2B, or on B alone for w = 0 or 1.

    With away_from a label y', this takes the place of null, and the field is
    u_t(x|y) + (w - 1) (u_t(x|y) - u_t(x|y')). As u = a_t x + b_t score, and by Bayes' rule for y
    and for y', the difference is b_t (grad log p_t(y|x) - grad log p_t(y'|x)): it makes y more
    probable and y' less. w = 0 is then u_t(x|y').
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
    other = torch.full_like(y, away_from)
    if w == 1:
        return net(x, t, y)                     # Algorithm 7
    if w == 0:
        return net(x, t, other)
    both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, other]))     # (2B, ...)
    cond, uncond = both.chunk(2)
    return guide(cond, uncond, w)


def classifier_gradient(classifier, x, t, y):
    """grad log p_t(y|x), like x; 0 where y is NULL. classifier(x, t) -> logits (B, 10)."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        # a sum over the samples: each one's gradient is that of its own term
        log_p = -F.cross_entropy(classifier(x, t), y, ignore_index=NULL, reduction="sum")
        gradient = torch.autograd.grad(log_p, x)[0]
    return gradient


def classifier_guided_field(net, classifier, path, x, t, y, w):
    """u_t(x|null) + w b_t grad log p_t(y|x); Lecture 4, "guidance with classifier"; alpha_t > 0.

    b_t is that of u = a_t x + b_t score. The second "Guided sampling" in 003_da10c6c8947a0fc6.txt
    is the same: there eps is corrected, by -w beta_t grad log p_t(y|x).
    """
    null = torch.full_like(y, NULL)
    _, b = path.a_b(t, x)
    return net(x, t, null) + w * b * classifier_gradient(classifier, x, t, y)


# ---------------------------------------------------------------- samplers
#
# All but langevin go from noise x at t0 to a sample at t = 1, in steps from t to s = t + h, which
# times makes, equal or not. field(x, t) -> u is any field above, its y and w filled in. t0 > 0 is
# for a field that is 0/0 at alpha = 0. randn(x) is noise of the shape of x. watch(t, x) sees x
# before each step.

def ignore(t, x):
    """The watch that sees nothing."""


def times(steps, t0=0.0, last=None):
    """The steps, as pairs (t, s): equal ones or, given last, the smaller the later. Then the last
    one goes from t = last to 1, however many there are (but if there is only one).

    So sqrt(1 - t) falls evenly: Karras et al. 2022, eq. 5, with rho = 2 and 1 - t for sigma. Late
    steps decide the grey of single pixels; but at t near 1 a network has seldom been trained.
    """
    if last is None or steps == 1:
        ts = [t0 + (1 - t0) * k / steps for k in range(steps)]
    else:
        start = math.sqrt(1 - t0)
        end = math.sqrt(1 - last)
        roots = [start + (end - start) * k / (steps - 1) for k in range(steps)]     # sqrt(1 - t)
        ts = [1 - root**2 for root in roots]
    return pairwise([*ts, 1.0])                 # exactly 1, not nearly: samplers ask if s < 1


def euler(field, x, steps, t0=0.0, last=None, watch=ignore):
    """X_s = X_t + h u_t(X_t); Lecture 4, Algorithms 7 and 8."""
    for t, s in times(steps, t0, last):
        watch(t, x)
        x = x + (s - t) * field(x, t)
    return x


def heun(field, x, steps, t0=0.0, last=None, watch=ignore):
    """Order 2: Euler's step, redone with the mean of u at both its ends; 2*steps - 1 calls.

    The last step stays Euler's, as u may be infinite at t = 1; Karras et al. 2022, Algorithm 1.
    """
    for t, s in times(steps, t0, last):
        watch(t, x)
        u = field(x, t)
        if s < 1:
            u_end = field(x + (s - t) * u, s)
            u = (u + u_end) / 2
        x = x + (s - t) * u
    return x


def adams_bashforth(field, x, steps, t0=0.0, last=None, watch=ignore):
    """Order 2 with one call a step: u in the middle of the step is extrapolated from its last two
    values. Hairer et al. 1993, section III.5.

    The first step is Euler's, and so is the last: u is least certain near t = 1, and without
    extrapolation the end, on CondOT, is the E[z|x] that u implies.
    """
    t_before = None
    u_before = None
    for t, s in times(steps, t0, last):
        watch(t, x)
        h = s - t
        u = field(x, t)
        u_middle = u
        if u_before is not None and s < 1:
            slope = (u - u_before) / (t - t_before)         # du/dt along the way
            u_middle = u + h / 2 * slope
        x = x + h * u_middle
        t_before = t
        u_before = u
    return x


def euler_maruyama(field, x, steps, path, sigma=None, t0=0.0, last=None, randn=torch.randn_like,
                   watch=ignore):
    """dX = [u + sigma_t^2/2 score] dt + sigma_t dW; 002_49842480371d0be4.txt, "Sampling Algorithm".

    As score = -eps / beta_t, the drift is u - k_t eps with k_t = sigma_t^2 / (2 beta_t).
    sigma = None: k_t = 1, so sigma_t = sqrt(2 beta_t), and nothing is infinite at t = 1.
    sigma a number: sigma_t is this number at all t.
    Either is cut to beta_s / sqrt(h), in the noise and in the drift: a step adds noise of variance
    h sigma_t^2, and all the noise that x_s should have is of variance beta_s^2.
    """
    for t, s in times(steps, t0, last):
        watch(t, x)
        h = s - t
        _, beta, _, _ = path.at(t, x)
        _, beta_s, _, _ = path.at(s, x)
        if sigma is None:
            sigma_t = (2 * beta).sqrt()
        else:
            sigma_t = torch.full_like(beta, sigma)
        sigma_t = sigma_t.minimum(beta_s / h**0.5)
        k = sigma_t**2 / (2 * beta)
        u = field(x, t)
        drift = u - k * path.u_to_eps(u, x, t)
        x = x + h * drift + h**0.5 * sigma_t * randn(x)
    return x


def ddim(field, x, steps, path, noise=0.0, push=None, t0=0.0, last=None,
         randn=torch.randn_like, watch=ignore):
    """X_s = mean + sigma xi, mean = alpha_s z + sqrt(beta_s^2 - sigma^2) eps, xi ~ N(0, I).

    z and eps are those that the field implies at (x, t). noise scales sigma:
    0 is DDIM, without new noise, on CondOT exactly Euler;
    1 is DDPM's ancestral sampler, whose sigma^2 is beta~, the variance of q(x_s|x_t, z).
    Song, Meng & Ermon 2021 (DDIM), eq. 12 and 16 (noise is their eta).

    push(mean, s) -> w grad log p_s(y|mean) is classifier guidance of each step: sigma^2 push is
    added to the mean, nothing for noise = 0; 003_da10c6c8947a0fc6.txt, first "Guided sampling",
    which prints sigma for sigma^2.
    """
    for t, s in times(steps, t0, last):
        watch(t, x)
        alpha, beta, _, _ = path.at(t, x)
        alpha_s, beta_s, _, _ = path.at(s, x)
        u = field(x, t)
        z = path.u_to_data(u, x, t)
        eps = path.u_to_eps(u, x, t)
        # towards noise, x_t = (alpha / alpha_s) x_s + new noise, of this variance:
        added = beta**2 - (alpha / alpha_s * beta_s)**2
        variance = (beta_s / beta)**2 * added                   # beta~ = Var(x_s|x_t, z)
        sigma = noise * variance.clamp(min=0).sqrt()
        kept = (beta_s**2 - sigma**2).clamp(min=0)              # rounding may leave less than 0
        mean = alpha_s * z + kept.sqrt() * eps
        if push is not None:
            mean = mean + sigma**2 * push(mean, s)
        x = mean
        if noise:
            x = x + sigma * randn(x)
    return x


def langevin(field, x, t, path, steps, randn=torch.randn_like):
    """x <- x + h score + sqrt(2h) xi, several times: t stands still, and x comes to follow the law
    that has this score.

    h = beta_t^2 / 10, so that h score = (alpha_t E[z|x] - x) / 10 is a tenth of the way to where x
    would be without its noise. So no step is large, though near t = 1 the score itself is.
    """
    _, beta, _, _ = path.at(t, x)
    h = beta**2 / 10
    for _ in range(steps):
        score = path.u_to_score(field(x, t), x, t)
        x = x + h * score + (2 * h).sqrt() * randn(x)
    return x


def predictor_corrector(field, corrector, x, steps, path, corrections=1, t0=0.0,
                        last=None, randn=torch.randn_like, watch=ignore):
    """Euler's step on field, then Langevin steps with the score of corrector at the new time.

    Both are fields (x, t) -> u. For guidance field is u_t(x|y), and corrector the guided field,
    which has, at each t, the score of the tilted law p_t(x|y)^w p_t(x)^(1-w). Euler on the guided
    field does not end in the tilted law, as its flow does not carry that of t into that of s
    (oracle.py shows it). Langevin steps at s lead there: the nearer, the more corrections and
    steps. Bradley & Nakkiran 2024; Song et al. 2021 (SDE), section 4.2.
    """
    for t, s in times(steps, t0, last):
        watch(t, x)
        x = x + (s - t) * field(x, t)
        if s < 1:                               # at t = 1 the score is infinite
            x = langevin(corrector, x, s, path, corrections, randn)
    return x
