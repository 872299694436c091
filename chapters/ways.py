"""Other ways than Algorithm 8, as options of sample.py name them: a field, and what follows it.

A way is a guidance, which makes the field (classifier-free, a classifier's, or a classifier's in
the mean of each step), and a sampler, which follows it. Any guidance goes with any sampler, but for
the last one, which is a part of DDPM's ancestral step.
"""
from functools import partial

from cfg_min import NULL, guided_field
from chapters.classifier import classifier_gradient, classifier_guided_field


def interval_field(net, x, t, y, w, low=0.0, high=1.0, away_from=NULL):
    """The guided field for t in [low, high], and that of w = 1 outside.

    With a label y' as away_from, guidance leads away from y': y' takes the place of null, so the
    field is u_t(x|y) + (w - 1) (u_t(x|y) - u_t(x|y')). By Bayes' rule for y and for y', the
    difference is b_t (grad log p_t(y|x) - grad log p_t(y'|x)).
    """
    inside = low - 1e-9 < t < high + 1e-9       # t is rounded
    return guided_field(net, x, t, y, w if inside else 1.0, away_from)


def push_mean(classifier, x, t, y, w):
    """w grad log p_t(y|x), which ddim, times sigma^2, adds to the mean of each step."""
    return w * classifier_gradient(classifier, x, t, y)


def draw_samples(net, y, w, steps, randn, low=0.0, high=1.0, *, sampler, takes, guidance="cfg",
                 away_from=NULL, path, sigma=None, classifier=None):
    """Samples (B, ...) of the labels y (B,) by sampler(field, noise, steps, ...).

    takes: which of path, sigma, randn, t0, push and corrector the sampler takes. One with a
    corrector draws with u_t(x|y), and corrects with the guided field.
    """
    more = dict(path=path, sigma=sigma, randn=randn)
    if guidance == "cfg":
        field = partial(interval_field, net, y=y, w=w, low=low, high=high, away_from=away_from)
    elif guidance == "classifier":
        field = partial(classifier_guided_field, net, classifier, path, y=y, w=w)
        more["t0"] = 0.01                       # b_t is infinite where alpha is 0
    else:                                       # "mean": the field is unconditional
        field = partial(guided_field, net, y=y, w=0)
        more["push"] = partial(push_mean, classifier, y=y, w=w)
    if "corrector" in takes:
        more["corrector"] = field
        field = partial(field, w=1.0)
    return sampler(field, randn(), steps, **{k: more[k] for k in takes if k in more})
