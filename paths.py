"""Gaussian probability paths: how data become noise, and four ways to say where a point moves.

A path joins noise eps ~ N(0, I), at time t = 0, to a data point z, at t = 1:

    x = alpha_t z + beta_t eps              alpha goes from 0 to 1, beta from 1 to 0;
                                            on the straight line alpha = t, beta = 1 - t.

So x given z has the distribution p_t(x|z) = N(x; alpha_t z, beta_t^2 I). It moves with the velocity

    u_t(x|z) = alpha'_t z + beta'_t eps     the conditional vector field; ' is d/dt.

Many pairs (z, eps) meet in one x. The mean of their velocities, E[u_t(x|z) | x], is the marginal
vector field u_t(x). A network learns it, because its ODE carries the noise to the data. The loss
needs no more than this: `sample` gives x, and `target` gives u_t(x|z).

The rest says the same in other words. p_t(x) is the density of x when z is drawn from the data, and
its score is grad log p_t(x) = E[grad log p_t(x|z) | x]. For one pair, x and u are two linear
equations in z and eps, and D is their determinant. Solved, they give z and eps from u; and eps
gives the score, which for the Gaussian p_t(x|z) is -(x - alpha z) / beta^2 = -eps / beta. A linear
formula holds for means too, so it turns the marginal field into E[z|x], E[eps|x] and the score:

    D = alpha' beta - alpha beta'           1 for CondOT, pi/2 for Cosine
    z = (beta u - beta' x) / D              E[z|x], if u is the marginal field
    eps = (alpha' x - alpha u) / D          E[eps|x]
    score = -eps / beta
    u = a x + b score                       the lecture's way: a and b are functions of t (`a_b`)

Lecture 4, "Classifier-free guidance".
Shapes: x, z, eps, u and score are (B, ...), all of one shape; t is (B,) or one number, in [0, 1].
Other shapes raise ValueError.
"""
import math

import torch
import torch.nn as nn


def require_same_shape(a, b):
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")


def one_per_sample(t, x):
    """t as (B,), one for each sample of x (B, ...), in float32 or wider. t: (B,) or a number."""
    wide = torch.promote_types(x.dtype, torch.float32)      # bfloat16 would round t
    t = torch.as_tensor(t, dtype=wide, device=x.device)
    if t.ndim > 0 and t.shape != x.shape[:1]:
        raise ValueError(f"t of shape {tuple(t.shape)}: expected a number or ({len(x)},)")
    return t.expand(len(x))


class GaussianPath:
    """What all paths share. A path itself is four functions of t: alpha, beta, d_alpha, d_beta."""

    def at(self, t, x, *functions):
        """Each function at t, (B, 1, ..., 1), with as many axes as x; by default the path's four.

        They are computed in float32 or wider, then take the type of x (float32 for integers).
        """
        t = one_per_sample(t, x)
        t = t.view(-1, *[1] * (x.ndim - 1))     # (B,) -> (B, 1, ..., 1)
        kind = x.dtype if x.is_floating_point() else t.dtype
        functions = functions or (self.alpha, self.beta, self.d_alpha, self.d_beta)
        return [f(t).to(kind) for f in functions]

    # ------------------------------------------------ what the loss needs

    def sample(self, z, eps, t):
        """x = alpha z + beta eps: a draw from p_t(x|z) if eps is a draw from N(0, I)."""
        require_same_shape(z, eps)
        alpha, beta = self.at(t, z, self.alpha, self.beta)
        return alpha * z + beta * eps

    def target(self, z, eps, t):
        """u_t(x|z) = alpha' z + beta' eps at x = alpha z + beta eps."""
        require_same_shape(z, eps)
        d_alpha, d_beta = self.at(t, z, self.d_alpha, self.d_beta)
        return d_alpha * z + d_beta * eps

    # ------------------------------------------------ conversions

    def D(self, t):
        """The determinant alpha' beta - alpha beta'. Where it is 0, u does not give z and eps."""
        return self.d_alpha(t) * self.beta(t) - self.alpha(t) * self.d_beta(t)

    def refuse_zero(self, divisor, t):
        """Raise ValueError where t is a Python number at which divisor (alpha, beta or D) is 0.

        The values of a tensor t are not looked at: vmap and compile could not follow.
        """
        if isinstance(t, (int, float)) and divisor(torch.tensor(t, dtype=torch.float64)) == 0:
            raise ValueError(f"{type(self).__name__}: {divisor.__name__} is 0 at t = {t}, and this "
                             "conversion divides by it: start later (t0) or stop earlier")

    def u_to_data(self, u, x, t):
        """z = (beta u - beta' x) / D."""
        require_same_shape(u, x)
        self.refuse_zero(self.D, t)
        beta, d_beta, D = self.at(t, x, self.beta, self.d_beta, self.D)
        return (beta * u - d_beta * x) / D

    def u_to_eps(self, u, x, t):
        """eps = (alpha' x - alpha u) / D."""
        require_same_shape(u, x)
        self.refuse_zero(self.D, t)
        alpha, d_alpha, D = self.at(t, x, self.alpha, self.d_alpha, self.D)
        return (d_alpha * x - alpha * u) / D

    def u_to_score(self, u, x, t):
        """grad log p_t(x) = -eps / beta; infinite at t = 1."""
        self.refuse_zero(self.beta, t)
        (beta,) = self.at(t, x, self.beta)
        return -self.u_to_eps(u, x, t) / beta

    def eps_to_u(self, eps, x, t):
        """u = (alpha' x - D eps) / alpha; 0/0 at alpha = 0, where eps = x whatever z is."""
        require_same_shape(eps, x)
        self.refuse_zero(self.alpha, t)
        alpha, d_alpha, D = self.at(t, x, self.alpha, self.d_alpha, self.D)
        return (d_alpha * x - D * eps) / alpha

    def eps_to_data(self, eps, x, t):
        """z = (x - beta eps) / alpha; infinite at alpha = 0."""
        require_same_shape(eps, x)
        self.refuse_zero(self.alpha, t)
        alpha, beta = self.at(t, x, self.alpha, self.beta)
        return (x - beta * eps) / alpha

    def data_to_u(self, z, x, t):
        """u = (D z + beta' x) / beta, on CondOT (z - x) / (1 - t); 0/0 at t = 1, where x = z."""
        require_same_shape(z, x)
        self.refuse_zero(self.beta, t)
        beta, d_beta, D = self.at(t, x, self.beta, self.d_beta, self.D)
        return (D * z + d_beta * x) / beta

    def a_b(self, t, x):
        """a = alpha'/alpha and b = (alpha' beta^2 - beta' beta alpha)/alpha; Lecture 4, FACT.

        The slides print b without the beta of its second term. Infinite at alpha = 0.
        """
        self.refuse_zero(self.alpha, t)
        alpha, beta, d_alpha, d_beta = self.at(t, x)
        a = d_alpha / alpha
        b = (d_alpha * beta**2 - d_beta * beta * alpha) / alpha
        return a, b

    def score_to_u(self, score, x, t):
        """u = a_t x + b_t score, for alpha > 0; Lecture 4, FACT."""
        require_same_shape(score, x)
        a, b = self.a_b(t, x)
        return a * x + b * score


class CondOT(GaussianPath):
    """The straight line x = t z + (1 - t) eps, so u = z - eps; Lipman et al. 2023."""

    def alpha(self, t): return t
    def beta(self, t): return 1 - t
    def d_alpha(self, t): return torch.ones_like(t)
    def d_beta(self, t): return -torch.ones_like(t)


class Cosine(GaussianPath):
    """alpha = sin(pi t / 2), beta = cos(pi t / 2): variance-preserving, alpha^2 + beta^2 = 1."""

    def alpha(self, t): return torch.sin(math.pi / 2 * t)
    def beta(self, t): return torch.sin(math.pi / 2 * (1 - t))      # cos, but exactly 0 at t = 1
    def d_alpha(self, t): return math.pi / 2 * self.beta(t)
    def d_beta(self, t): return -math.pi / 2 * self.alpha(t)


class DDPM(GaussianPath):
    """Ho et al. 2020: alpha = sqrt(abar), beta = sqrt(1 - abar), s = 1 - t = t_DDPM / T.

    Their noise rates 1e-4 ... 0.02 at T = 1000 are rate(s) = 0.1 + 19.9 s in continuous time, and
    abar = exp(-int_0^s rate) (Song et al. 2021, arXiv 2011.13456). alpha_0 is 0.0066: x at t = 0 is
    almost pure noise. beta' = -alpha alpha' / beta is infinite at t = 1, where beta = 0. There the
    code divides by 1e-3.
    """

    def rate(self, t): return 0.1 + 19.9 * (1 - t)
    def integral(self, t): return 0.1 * (1 - t) + 9.95 * (1 - t)**2

    def alpha(self, t): return torch.exp(-self.integral(t) / 2)
    def beta(self, t): return torch.sqrt(-torch.expm1(-self.integral(t).clamp(min=0)))
    def d_alpha(self, t): return self.alpha(t) * self.rate(t) / 2
    def d_beta(self, t): return -self.alpha(t) * self.d_alpha(t) / self.beta(t).clamp(min=1e-3)


PATHS = {"condot": CondOT(), "cosine": Cosine(), "ddpm": DDPM()}


# ---------------------------------------------------------------- networks that predict z or eps
#
# Whatever a network predicts, it is used as a vector field. The formulas divide by beta or alpha,
# which are 0 at the ends, so beyond last_t (or before first_t) they take last_t (first_t) for t;
# net gets the true t. In the loss last_t is 0.98, because nearer to 1 an error of z would be
# divided by a tiny beta. In sampling last_t must lie beyond the start of the last step; otherwise
# that step does not end at z, and noise is left.

class DataField(nn.Module):
    """A network that predicts z, as a vector field: u = (D z + beta' x) / beta."""

    def __init__(self, net, path, last_t):
        super().__init__()
        self.net = net
        self.path = path
        self.last_t = last_t

    def forward(self, x, t, y):
        z = self.net(x, t, y)
        t = one_per_sample(t, x).clamp(max=self.last_t)
        return self.path.data_to_u(z, x, t)


class EpsField(nn.Module):
    """A network that predicts eps, as a vector field: eps gives z, and z, clamped, gives u.

    Where alpha is small, a small error of eps is a large one of z. So z is clamped to
    [-bound, bound], the range of the data, as Ho et al. 2020 do.
    """

    def __init__(self, net, path, bound, first_t=0.001, last_t=0.9999):
        super().__init__()
        self.net = net
        self.path = path
        self.bound = bound
        self.first_t = first_t
        self.last_t = last_t

    def forward(self, x, t, y):
        eps = self.net(x, t, y)
        t = one_per_sample(t, x).clamp(self.first_t, self.last_t)
        z = self.path.eps_to_data(eps, x, t).clamp(-self.bound, self.bound)
        return self.path.data_to_u(z, x, t)
