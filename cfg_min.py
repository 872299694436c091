"""Classifier-free guidance, whole: losses, guidance rule, guided fields, samplers. Copy this file.

One net u_t(x|y) learns to be conditional and unconditional: while training, y becomes NULL with
probability eta, so that u_t(x) = u_t(x|NULL). "Lecture 4" is 000_9a64053bb9e2e45b.txt.
x, z, eps: (B, ...). t: (B,) or a number, 0 noise, 1 data. y: (B,) int64. net(x, t, y) -> (B, ...).
`python cfg_min.py` guides with exact fields, on two Gaussians, and prints what w does.
"""
from itertools import pairwise

import torch
import torch.nn.functional as F

from paths import CondOT

NULL = 10       # the label for "no label", after MNIST's 0 ... 9

def drop_labels(y, eta):
    """y <- NULL with probability eta, each sample by itself, a new tensor; Lecture 4, L_CFM^CFG."""
    return torch.where(torch.rand(len(y), device=y.device) < eta, NULL, y)

def logit_normal(n, device=None, mean=-1.0):
    """t with logit(t) ~ N(mean, 1): often where the label is decided; Esser et al. 2024, 3.1."""
    return (mean + torch.randn(n, device=device)).sigmoid()

def draw(path, z, y, eta, share=slice(None), draw_t=torch.rand):
    """What the losses average over: y <- NULL with probability eta, t ~ U[0, 1), x ~ p_t(x|z).
    Processes that divide a batch all draw for the whole of it, and keep their shares."""
    y, t, eps = drop_labels(y, eta), draw_t(len(z), device=z.device), torch.randn_like(z)
    z, y, t, eps = z[share], y[share], t[share], eps[share]
    return path.sample(z, eps, t), t, y, z, eps

def cfg_cfm_loss(net, path, z, y, eta=0.1, **options):
    """L_CFM^CFG = E || u_theta(x|y) - u_t(x|z) ||^2, mean over pixels; Lecture 4, "Training"."""
    x, t, y, z, eps = draw(path, z, y, eta, **options)
    return F.mse_loss(net(x, t, y), path.target(z, eps, t))

def cfg_dsm_loss(net, path, z, y, eta=0.1, **options):
    """E || eps_theta(x|y) - eps ||^2: DDPM's L_simple (003_da10c6c8947a0fc6.txt), labels dropped.
    As score = -eps/beta_t, it is L_DSM^CFG (002_49842480371d0be4.txt) times beta_t^2."""
    x, t, y, _, eps = draw(path, z, y, eta, **options)
    return F.mse_loss(net(x, t, y), eps)

def classifier_loss(classifier, path, z, y, share=slice(None)):
    """-E log p_theta(y|x_t), for "noised samples"; 003_da10c6c8947a0fc6.txt."""
    x, t, y, _, _ = draw(path, z, y, 0.0, share)
    return F.cross_entropy(classifier(x, t), y)

def guide(cond, uncond, w):
    """Classifier-free guidance: (1 - w) u_t(x|null) + w u_t(x|y).
    Two predictions of one kind (u, score, eps or z), of one shape; w = 1 is cond, w = 0 uncond.
    Lecture 4, "Classifier-free guidance"; Ho & Salimans 2022, eq. 6, whose w is ours minus 1."""
    return uncond + w * (cond - uncond)

def guided_field(net, x, t, y, w):
    """The field of Lecture 4, Algorithm 8: one call of net on 2B, or on B alone for w = 0 or 1."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
    null = torch.full_like(y, NULL)
    if w == 1: return net(x, t, y)      # Algorithm 7
    if w == 0: return net(x, t, null)   # unguided
    cond, uncond = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
    return guide(cond, uncond, w)

def classifier_guided_field(net, classifier, path, x, t, y, w):
    """u_t(x|null) + w b_t grad log p_t(y|x); Lecture 4, "guidance with classifier".
    classifier(x, t) -> logits (B, 10). For alpha_t > 0. Where y is NULL, nothing is added."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
    with torch.enable_grad():
        x_ = x.detach().requires_grad_()
        log_p = -F.cross_entropy(classifier(x_, t), y, ignore_index=NULL, reduction="sum")
        grad_log_p, = torch.autograd.grad(log_p, x_)                        # of log p_t(y|x)
    return net(x, t, torch.full_like(y, NULL)) + w * path.a_b(t, x)[1] * grad_log_p

# The samplers go from noise x at t0 to t = 1 in equal steps; field(x, t) -> u is any field above.
# t0 > 0 is for a field that is 0/0 at alpha = 0. randn(x) is noise of the shape of x.

def times(steps, t0=0.0):
    """The pairs (t, s) of the steps, s = t + h."""
    return pairwise([t0 + (1 - t0) * k / steps for k in range(steps)] + [1.0])

def euler(field, x, steps, t0=0.0):
    """X_{t+h} = X_t + h u_t(X_t); Lecture 4, Algorithms 7 and 8."""
    for t, s in times(steps, t0): x = x + (s - t) * field(x, t)
    return x

def heun(field, x, steps, t0=0.0):
    """Order 2: Euler's step, redone with the mean of u at both ends; 2 steps - 1 calls.
    The last step stays Euler's, as u may be infinite at t = 1; Karras et al. 2022, Algorithm 1."""
    for t, s in times(steps, t0):
        u = field(x, t)
        if s < 1: u = (u + field(x + (s - t) * u, s)) / 2
        x = x + (s - t) * u
    return x

def euler_maruyama(field, x, steps, path=CondOT(), sigma=None, t0=0.0, randn=torch.randn_like):
    """dX = [u + sigma_t^2/2 score] dt + sigma_t dW; 002_49842480371d0be4.txt, "Sampling Algorithm".
    With sigma_t^2 = 2 beta_t k_t the score term is -k_t eps. sigma None is k_t = 1: no singularity
    (CondOT: sigma_t = sqrt(2 (1 - t)), drift (1 + t) u - x); a number is sigma_t itself. sigma_t is
    at most sqrt(2/h) beta_{t+h}: a step must not put in more noise than the path has left."""
    for t, s in times(steps, t0):
        h, beta, beta_s = s - t, path.at(t, x)[1], path.at(s, x)[1]
        sigma_t = (2 * beta).sqrt() if sigma is None else torch.full_like(beta, sigma)
        sigma_t = sigma_t.minimum((2 / h)**0.5 * beta_s)
        u = field(x, t)
        drift = u - sigma_t**2 / (2 * beta) * path.u_to_eps(u, x, t)
        x = x + h * drift + h**0.5 * sigma_t * randn(x)
    return x

def ddim(field, x, steps, path=CondOT(), noise=0.0, t0=0.0, randn=torch.randn_like):
    """X_s = alpha_s z + sqrt(beta_s^2 - sigma^2) eps + sigma xi, with z and eps predicted at t.
    noise = 0 is DDIM, on CondOT exactly Euler. noise = 1 is DDPM's sampler: sigma^2 is beta~, the
    variance of q(x_s|x_t, z). Song et al. 2021 (DDIM), eq. 12, 16; 003_da10c6c8947a0fc6.txt."""
    for t, s in times(steps, t0):
        (alpha, beta, _, _), (alpha_s, beta_s, _, _) = path.at(t, x), path.at(s, x)
        z, eps = path.solve(field(x, t), x, t)
        var = (beta_s / beta)**2 * (beta**2 - (alpha / alpha_s * beta_s)**2)            # beta~
        sigma = noise * var.clamp(min=0).sqrt()
        xi = randn(x) if noise else 0
        x = alpha_s * z + (beta_s**2 - sigma**2).sqrt() * eps + sigma * xi
    return x

SAMPLERS = {"euler": euler, "heun": heun, "em": euler_maruyama, "ddim": ddim}

def two_gaussians(x, t, y):
    """The exact net on CondOT of two equal classes, N(-1, 0.5^2) and N(1, 0.5^2); x: (B, 1)."""
    alpha, beta, d_alpha, d_beta = CondOT().at(t, x)
    m, var = torch.tensor([-1.0, 1.0]).to(x), (alpha / 2)**2 + beta**2
    off = x - alpha * m                                     # (B, 2): p_t(x|y) = N(alpha m, var)
    u = d_alpha * m + (alpha * d_alpha / 4 + beta * d_beta) / var * off     # u_t(x|y)
    p = F.softmax(-off**2 / (2 * var), dim=1)               # p_t(y|x)
    p = torch.where(y[:, None] == NULL, p, F.one_hot(y.clamp(max=1), 2))
    return (u * p).sum(dim=1, keepdim=True)

def main(n=4000, steps=100):
    """What w does, exactly: guided samples against two laws that they are said to follow."""
    torch.manual_seed(0)
    y, grid = torch.ones(n, dtype=torch.int64), torch.linspace(-4, 8, 4001)[:, None]
    log_p = -2 * (grid - torch.tensor([-1.0, 1.0]))**2      # of N(-1, 0.5^2) and N(1, 0.5^2)
    print("two Gaussians at -1 and +1, std 0.5; y = +1; mean and standard deviation of\n"
          "   w    guided ODE     guided SDE   p(.|y)^w p^(1-w)   best mixture of p(.|y) and p")
    for w in (0, 1, 2, 3, 5, 8):
        field = lambda x, t: guided_field(two_gaussians, x, t, y, w)
        ode, sde = (f(field, torch.randn(n, 1), steps) for f in (euler, euler_maruyama))
        tilted = (w * log_p[:, 1:] + (1 - w) * log_p.logsumexp(1, keepdim=True)).softmax(0)
        mean = (tilted * grid).sum()
        std = (tilted * (grid - mean)**2).sum().sqrt()
        share = ode.mean().clamp(0, 1)      # of p(.|y), of mean 1; p has mean 0, variance 1.25
        print(f"{w:4d}  {ode.mean():6.2f} {ode.std():5.2f}  {sde.mean():6.2f} {sde.std():5.2f}   "
              f"{mean:8.2f} {std:5.2f}   {share:12.2f} {(1.25 - share**2).sqrt():5.2f}")

if __name__ == "__main__": main()
