"""What guidance costs on exact fields of real digits: `python -m experiments.exact PART ...`

ways:     of 1,000 digits a label, w = 1.5, 3, 8: what is left by each way to sample
starts:   the same, guided from t on, w = 3 and 8; and the mean of p_t(y|x) on held-out digits
same:     guided from t on: how many samples end as the same digit as without guidance
sizes:    of 50 to 5,421 digits a label (there are no more of 5), guided from t on; of twos
steps:    25, 100 and 400 steps, of 200 digits a label
width:    each digit a Gaussian, of the width that held-out digits like best
wrong:    30 % of labels wrong; or each label 70 % sure (soft): what guidance repairs
network:  z(x|y) - z(x) of the shipped U-Net and of 60,000 exact digits, on noised test digits
accuracy: the evaluator's label accuracy of exact samples, and their distance to test digits
"""
import math
import sys
from functools import partial

import torch
import torch.nn as nn

from cfg_min import NULL, euler, guided_field
from chapters.exact import (PATH, ExactNet, choose_digits, find_nearest, print_counts,
                            print_decided, print_first_free, ways_of)
from chapters.ways import interval_field
from experiments.measures import Measures, show, show_head
from support import checkpoint, mnist
from support.command import Parser, execute

STARTS = 0, 0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.28
DECIDED = 0.5           # after this t guidance does nothing, as x says which digit it is: less work


class Grouped(nn.Module):
    """The exact network of sure labels, each label's images apart: a third of the work."""

    def __init__(self, images, labels, **options):
        super().__init__()
        torch.set_flush_denormal(True)          # weights below 1e-38 are slow, and 0 here
        self.nets = nn.ModuleList(ExactNet(images[labels == y], labels[labels == y], **options)
                                  for y in range(NULL))
        self.nets.append(ExactNet(images, labels, **options))

    def forward(self, x, t, y):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        u = torch.empty_like(x)
        for label in y.unique():
            mine = y == label
            anything = torch.full_like(y[mine], NULL)
            u[mine] = self.nets[label](x[mine], t[mine], anything)
        return u


class Digits:
    """n training digits of each label, their exact network, and noise and labels of samples."""

    def __init__(self, n, samples, asked=range(10), **options):
        x_train, y_train, x_test, self.y_test = mnist.load()
        images, self.labels = choose_digits(x_train, y_train, n)
        seen = images.std(dim=0) > 0            # other pixels are the same in all digits
        self.images = images[:, seen]
        self.x_test = mnist.to_unit(x_test).flatten(1)[:, seen]
        self.net = Grouped(self.images, self.labels, **options)
        self.y = torch.tensor(asked).repeat_interleave(samples)
        torch.manual_seed(0)
        self.x = torch.randn(len(self.y), self.images.shape[1])

    def count(self, ways):
        return print_counts(ways, self.images, self.labels, self.y)

    def euler(self, w, low=0.0, steps=25, high=DECIDED):
        field = partial(interval_field, self.net, y=self.y, w=w, low=low, high=high)
        return partial(euler, field, self.x, steps)

    def count_starts(self, w, steps=25):
        setting = f"w = {w}, {steps} steps, {len(self.images) // 10} digits a label"
        print(f"guided from t on: {setting}")
        ways = {t: self.euler(w, t, steps) for t in STARTS}
        unguided, *counts = self.count({"no guidance": self.euler(1, steps=steps), **ways})
        print_first_free(ways, counts, unguided, setting)


def ways():
    digits = Digits(1000, 300)
    for w in (1.5, 3, 8):
        digits.count(ways_of(digits.net, digits.x, digits.y, w))


def starts():
    digits = Digits(1000, 500)
    for w in (3, 8):
        digits.count_starts(w)
    print_decided(digits.net.nets[NULL], digits.x_test[:2000], digits.y_test[:2000])


def same():
    digits = Digits(1000, 100)
    unguided = find_nearest(digits.images, digits.euler(1)())
    for w in (3, 8):
        for t in (0, 0.12, 0.16, 0.2, 0.24, 0.28, 0.36, 0.44):
            found = find_nearest(digits.images, digits.euler(w, t)())
            share = (found == unguided).double().mean()
            print(f"w = {w} from t = {t:.2f} on: {100 * share:.1f} % the same", flush=True)


def sizes():
    for n, samples in ((50, 1000), (200, 1000), (1000, 2000), (5421, 1500)):
        print(f"{n} digits a label, {samples} samples of 2")
        Digits(n, samples, asked=[2]).count_starts(3)


def steps():
    digits = Digits(200, 300)
    for steps in (25, 100, 400):
        print(f"{steps} steps")
        digits.count({f"w = {w}": digits.euler(w, steps=steps) for w in (1, 3, 8)})
    digits.count_starts(3, steps=100)


def width():
    digits = Digits(1000, 300)
    z = digits.x_test[:2000]
    distances = torch.cdist(z.double(), digits.images.double())**2
    for width in (0.25, 0.3, 0.35, 0.37, 0.4, 0.45, 0.5):
        log_p = (-distances / (2 * width**2)).logsumexp(dim=1) - z.shape[1] * math.log(width)
        print(f"width {width}: log-likelihood of held-out digits {log_p.mean():.1f} + constant")
    Digits(1000, 300, width=0.37).count_starts(3)


def wrong(share=0.3):
    """The last column counts samples whose nearest digit has the true label."""
    digits = Digits(1000, 300)
    true = digits.labels
    other = (true + torch.randint(1, 10, true.shape)) % 10
    given = torch.where(torch.rand(len(true)) < share, other, true)
    soft = torch.full((10, 10), share / 9).fill_diagonal_(1 - share)[true]      # p(y|i)
    for name, net in (("hard", Grouped(digits.images, given)),
                      ("soft", ExactNet(digits.images, soft))):
        digits.net = net
        digits.count({f"{name} labels, w = {w} from t = {low} on": digits.euler(w, low)
                      for w, low in ((1, 0.0), (3, 0.0), (8, 0.0), (3, 0.24))})


def network(n=1000):
    """Root mean square lengths, over n test digits."""
    x_train, y_train, x_test, y_test = mnist.load()
    shipped, _ = checkpoint.load("weights/unet.pt")
    exact = Grouped(mnist.to_unit(x_train).flatten(1), y_train)
    torch.manual_seed(0)
    places = torch.randperm(len(x_test))[:n]
    z, y = mnist.to_unit(x_test[places]), y_test[places]

    def gap(net, x, t):
        """z(x|y) - z(x), (n, D); as z = x + (1 - t) u on CondOT, it is 1 - t times that of u."""
        difference = net(x, t, y) - net(x, t, torch.full_like(y, NULL))
        return (1 - t) * difference.flatten(1)

    print("   t    exact  U-Net  their difference")
    for t in (0.05, 0.1, 0.15, 0.24, 0.4, 0.6, 0.8):
        x = PATH.sample(z, torch.randn_like(z), t)
        gaps = [gap(exact, x.flatten(1), t), gap(shipped, x, t)]
        lengths = [part.square().sum(dim=1).mean().sqrt() for part in (*gaps, gaps[0] - gaps[1])]
        print(f"{t:.2f}" + "".join(f"{length:8.2f}" for length in lengths), flush=True)


def accuracy(n=2000):
    """By the evaluator of experiments.measures, as of a network's samples."""
    measures = Measures()
    images, labels = choose_digits(measures.x, measures.y, 1000)
    y = torch.arange(n) % 10
    torch.manual_seed(0)
    x = torch.randn(n, images.shape[1])
    for w in (1, 3, 8):
        z = euler(partial(guided_field, Grouped(images, labels), y=y, w=w), x, 25)
        row = measures(mnist.to_bytes(z.view(n, 1, 32, 32)), y)
        if w == 1:
            show_head(measures, row, y)
        show(f"exact, w = {w}", row)


PARTS = {"ways": ways, "starts": starts, "same": same, "sizes": sizes, "steps": steps,
         "width": width, "wrong": wrong, "network": network, "accuracy": accuracy}


@torch.no_grad()
def main(argv=None):
    p = Parser(prog="python -m experiments.exact", epilog=__doc__,
               description="What guidance costs on exact fields of real digits.")
    p.add_argument("parts", nargs="+", choices=PARTS)
    for part in p.parse_args(argv).parts:
        PARTS[part]()


if __name__ == "__main__":
    sys.exit(execute(main))
