"""What a perfect network would return: exact fields of a labelled mixture of Gaussians.

`python oracle.py` guides with these fields and prints what w does; no network, no training.

The data are K Gaussians, component k with probability weight_k and label label_k:

    z ~ N(mu_k, std_k^2 I).

On a path, x = alpha z + beta eps is Gaussian for each k too, of mean alpha mu_k and variance

    var_k = alpha^2 std_k^2 + beta^2.

Given k and x, the score and the means of z and eps are linear in offset_k = x - alpha mu_k. Without
k they are averaged over the components, with the weights p_t(k|x, y) of Bayes' rule.

Shapes: x (B, D); t (B,) or a number; y (B,) int64, NULL for "any label"; paths as in paths.py.
"""
import math

import torch
import torch.nn.functional as F

from cfg_min import NULL, euler, euler_maruyama, guided_field
from paths import CondOT


class Mixture:
    """sum_k weight_k N(z; mu_k, std_k^2 I), component k of class label_k.

    mu (K, D), std (K,) > 0, weight (K,) with sum 1, label (K,) in 0..9. Computes in x's precision.
    """

    def __init__(self, mu, std, weight, label):
        self.mu = torch.as_tensor(mu, dtype=torch.float64)
        self.std = torch.as_tensor(std, dtype=torch.float64)
        self.weight = torch.as_tensor(weight, dtype=torch.float64)
        self.label = torch.as_tensor(label)
        y = torch.arange(NULL + 1)
        outside = (y != self.label[:, None]) & (y != NULL)
        weight = self.weight[:, None].masked_fill(outside, 0)           # (K, 11)
        self.log_weight = (weight / weight.sum(dim=0)).log()            # of k within class y

    def offset_and_var(self, path, x, t):
        """x - alpha mu_k (K, B, D), and var_k (K, B, 1)."""
        alpha, beta, _, _ = path.at(t, x)                       # (B, 1)
        offset = x - alpha * self.mu.to(x)[:, None]
        var = alpha**2 * self.std.to(x)[:, None, None]**2 + beta**2
        return offset, var

    def log_joint(self, offset, var, y):
        """log(weight_k p_t(x|k)) within class y, (K, B); -inf where k is of another class."""
        log_p = -(offset**2 / var + (2 * math.pi * var).log()) / 2      # (K, B, D)
        return self.log_weight.to(offset)[:, y] + log_p.sum(dim=2)

    def log_p(self, path, x, t, y):
        """log p_t(x|y), (B,)."""
        offset, var = self.offset_and_var(path, x, t)
        return self.log_joint(offset, var, y).logsumexp(dim=0)

    def p(self, offset, var, y):
        """p_t(k|x, y), (K, B, 1): the weights of all means over the components."""
        return self.log_joint(offset, var, y).softmax(dim=0)[:, :, None]

    def score(self, path, x, t, y):
        """grad log p_t(x|y): the mean of the components' scores, -offset_k / var_k."""
        offset, var = self.offset_and_var(path, x, t)
        return (self.p(offset, var, y) * -offset / var).sum(dim=0)

    def data_and_eps(self, path, x, t, y):
        """E[z|x, y] and E[eps|x, y], each (B, D).

        Given k they are mu_k + alpha std_k^2 / var_k offset_k and beta / var_k offset_k.
        """
        offset, var = self.offset_and_var(path, x, t)
        alpha, beta, _, _ = path.at(t, x)                       # (B, 1)
        variance = self.std.to(x)[:, None, None]**2             # (K, 1, 1)
        data = self.mu.to(x)[:, None] + alpha * variance / var * offset
        eps = beta / var * offset
        p = self.p(offset, var, y)
        return (p * data).sum(dim=0), (p * eps).sum(dim=0)

    def u(self, path, x, t, y):
        """u_t(x|y) = alpha' E[z|x, y] + beta' E[eps|x, y]: the mean of all u_t(x|z)."""
        data, eps = self.data_and_eps(path, x, t, y)
        return path.target(data, eps, t)

    def posterior(self, path, x, t):
        """p_t(y|x) of the labels 0..9, (B, 10)."""
        anything = torch.full((len(x),), NULL)
        offset, var = self.offset_and_var(path, x, t)
        p = self.p(offset, var, anything)[:, :, 0]              # p_t(k|x), (K, B)
        of_class = F.one_hot(self.label, 10).to(x)              # (K, 10)
        return p.T @ of_class

    def net(self, path):
        """The perfect network of this path, net(x, t, y) -> u."""
        return lambda x, t, y: self.u(path, x, t, y)

    def classifier(self, path):
        """The perfect noisy classifier, (x, t) -> log p_t(y|x), (B, 10)."""
        return lambda x, t: self.posterior(path, x, t).clamp(min=torch.finfo(x.dtype).tiny).log()

    def draw(self, n, y=NULL):
        """n points of class y, or of the whole mixture, (n, D)."""
        weight = self.log_weight[:, y].exp()
        k = torch.multinomial(weight, n, replacement=True)
        return self.mu[k] + self.std[k, None] * torch.randn(n, self.mu.shape[1])


TWO = Mixture(mu=[[-1.0], [1.0]], std=[0.5, 0.5], weight=[0.5, 0.5], label=[0, 1])


def moments(x):
    """Mean and standard deviation of samples (n, 1)."""
    return x.mean().item(), x.std().item()


def tilted_moments(mixture, y, w):
    """Mean and standard deviation of the law p(.|y)^w p^(1-w), normalised on a grid of the line."""
    grid = torch.linspace(-4, 8, 4001).double()[:, None]
    given = torch.full((len(grid),), y)
    anything = torch.full((len(grid),), NULL)
    log_p_y = mixture.log_p(CondOT(), grid, 1.0, given)
    log_p = mixture.log_p(CondOT(), grid, 1.0, anything)
    p = (w * log_p_y + (1 - w) * log_p).softmax(dim=0)
    mean = (p * grid[:, 0]).sum()
    var = (p * (grid[:, 0] - mean)**2).sum()
    return mean.item(), var.sqrt().item()


def best_mixture_moments(mean):
    """Mean and std of the mixture of p(.|y), mean 1, and p, mean 0, that is nearest to a mean."""
    share = min(max(mean, 0), 1)                # of p(.|y); both have E[x^2] = 1.25
    return share, math.sqrt(1.25 - share**2)


def table(scales=(0, 1, 2, 3, 5, 8), n=4000, steps=100):
    """What w does, exactly: rows of w and (mean, std) of guided samples and of the laws that they
    are said to follow: ODE, SDE, tilted law, best mixture."""
    torch.manual_seed(0)
    y = torch.ones(n, dtype=torch.int64)
    rows = []
    for w in scales:
        def field(x, t):
            return guided_field(TWO.net(CondOT()), x, t, y, w)
        ode = moments(euler(field, torch.randn(n, 1), steps))
        sde = moments(euler_maruyama(field, torch.randn(n, 1), steps, CondOT()))
        rows.append((w, ode, sde, tilted_moments(TWO, 1, w), best_mixture_moments(ode[0])))
    return rows


def main():
    print("two Gaussians at -1 and +1, std 0.5; y = +1; mean and standard deviation of\n"
          "   w    guided ODE     guided SDE   p(.|y)^w p^(1-w)   best mixture of p(.|y) and p")
    for w, ode, sde, tilted, mixture in table():
        print(f"{w:4d}  {ode[0]:6.2f} {ode[1]:5.2f}  {sde[0]:6.2f} {sde[1]:5.2f}   "
              f"{tilted[0]:8.2f} {tilted[1]:5.2f}   {mixture[0]:12.2f} {mixture[1]:5.2f}")


if __name__ == "__main__":
    main()
