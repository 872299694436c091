"""How good samples are: `python -m experiments.measures FILE.npz ...`, files of sample.py.

label accuracy  % of samples to which the evaluator gives their label. The evaluator is a classifier
                of clean digits, which has seen real training digits only
Frechet         distance of samples and real test digits in the evaluator's last hidden layer
                (Heusel et al. 2017)
diversity       mean distance of two samples of a class, over that of real digits
CAS             % of real test digits that a classifier, trained on the samples alone, gets right
                (classification accuracy score, Ravuri & Vinyals 2019). Both classifiers train with
                faint noise, so that they look at shapes, not at greys that no eye sees
grey            % of samples whose label is read from their outer two pixels alone, where no stroke
                comes and real digits are black; chance is 10 (read_grey; in experiments.guidance)

The row of real digits is of test digits, as many of each label. The distance is always to other
test digits. All are shuffled first, as the first half of MNIST's test digits is easier.
"""
import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
from support import checkpoint, mnist
from support.command import BadInput, Parser, execute, write_whole
from support.sampling import Noise, choose_labels, find_way, parse_options

EVALUATOR = Path(__file__).parent / "evaluator.pt"          # kept after the first run
NOISE = 0.1             # the largest standard deviation of the noise in training: 13 grey levels


# ---------------------------------------------------------------- small classifiers

def halve(c, d):
    """(B, c, H, W) -> (B, d, H/2, W/2)."""
    convolution = nn.Conv2d(c, d, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(d), nn.ReLU())


def make_classifier(classes, c=16):
    """A plain convolutional classifier, (B, 1, 32, 32) -> (B, classes)."""
    return nn.Sequential(
        nn.Conv2d(1, c, 3, padding=1),
        nn.ReLU(),
        halve(c, 2 * c),                        # (B, 2 c, 16, 16)
        halve(2 * c, 4 * c),                    # (B, 4 c, 8, 8)
        halve(4 * c, 4 * c),                    # (B, 4 c, 4, 4)
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),                           # (B, 4 c)
        nn.Linear(4 * c, classes))


@torch.enable_grad()
def fit(net, images, labels, steps, batch=100, noise=0.0):
    """Train a classifier on (N, 1, 32, 32) uint8: AdamW, a rate that rises to 4e-3 and falls to 0.

    noise: the largest standard deviation of an image's noise; each image draws its own.
    """
    net.train()
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        x, y = mnist.draw_batch(images, labels, batch)
        x = x + noise * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def apply(net, images):
    """net's answers to images (N, 1, 32, 32) uint8, (N, ...)."""
    return torch.cat([net(mnist.to_unit(x)) for x in images.split(500)])


def load_evaluator(x_train, y_train, steps=2400):
    """The evaluator, trained on real digits once, then kept in EVALUATOR.

    It trains with faint noise, of up to 13 grey levels, so that it looks at shapes, not at grey
    levels that no eye tells from black.
    """
    torch.manual_seed(0)
    net = make_classifier(10)
    of = [checkpoint.checksum_of([x_train, y_train]), steps, str(net)]
    try:
        saved = torch.load(EVALUATOR, weights_only=True)
        if saved["of"] == of and saved["checksum"] == checkpoint.checksum_of(saved["weights"]):
            net.load_state_dict(saved["weights"])
            return net.eval()
    except Exception:                           # not there, of another version, or damaged
        pass
    print("training the evaluator, once: a minute or two", flush=True)
    fit(net, x_train, y_train, steps, noise=NOISE)
    weights = net.state_dict()
    buffer = io.BytesIO()
    torch.save(dict(of=of, checksum=checkpoint.checksum_of(weights), weights=weights), buffer)
    write_whole({EVALUATOR: buffer.getvalue()})
    return net


# ---------------------------------------------------------------- the measures

def frechet(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), a squared distance.

    a, b: features (N, D), (M, D). Heusel et al. 2017.
    """
    a = a.double()
    b = b.double()
    if min(len(a), len(b)) < 2 or not torch.cat([a, b]).isfinite().all():
        raise ValueError("features that are not finite, or of one sample alone")
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    # the trace of a square root is the sum of the eigenvalues' roots; these are real and >= 0
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()).item()


def read_grey(images, labels, width=2):
    """% of labels that are read from the outer pixels alone, width of them at each side.

    images: (N, 1, 32, 32) uint8; labels (N,), of N samples. A linear classifier of these pixels
    learns from the first half and reads the other, so more samples give more; chance is 10. Real
    digits are black in the outer two pixels, so what is read there is no shape. Compare at equal N.
    """
    torch.manual_seed(0)
    edge = images.clone()
    edge[..., width:-width, width:-width] = 0
    learned, read = edge.chunk(2)
    y, truth = labels.chunk(2)
    # each pixel is scaled by its own deviation: greys are faint
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32 * 32), nn.Linear(32 * 32, 10))
    fit(net, learned, y, steps=300)
    return 100 * (apply(net, read).argmax(1) == truth).double().mean().item()


class Measures:
    """All measures against one data set: measures(images, labels) -> {name: number}.

    asked: the labels (N,) of each set to be measured. Raises BadInput, before the evaluator trains,
    where there are not enough real digits of them.
    """

    def __init__(self, data=mnist.FILE, asked=()):
        self.x, self.y, x_test, y_test = mnist.load(data)
        order = torch.randperm(len(x_test), generator=torch.Generator().manual_seed(0))
        self.x_test = x_test[order]
        self.y_test = y_test[order]
        for labels in asked:
            self.split(labels)
        self.evaluator = load_evaluator(self.x, self.y)
        self.features = apply(self.evaluator[:-1], self.x_test)
        self.diversity = mnist.diversity(self.x_test, self.y_test)

    def split(self, labels):
        """Places of test digits of these labels, in their order; places of others, as many of
        each label. Raises BadInput."""
        if len(labels) < 20:
            raise BadInput(f"{len(labels)} samples: at least 20 are needed")
        places = torch.empty_like(labels)
        rest = []
        for label in labels.unique():
            of_label = (self.y_test == label).nonzero()[:, 0]
            asked = (labels == label).sum()
            if asked > len(of_label) - 100:
                raise BadInput(f"{asked} samples of {label}: at most {len(of_label) - 100}")
            places[labels == label] = of_label[:asked]
            rest.append(of_label[asked:])
        fewest = min(len(part) for part in rest)
        return places, torch.cat([part[:fewest] for part in rest])

    def real_digits(self, labels):
        """Real test digits of these labels (N,): the best samples that there can be."""
        places, _ = self.split(labels)
        return self.x_test[places]

    def __call__(self, images, labels):
        """The fast measures of images (N, 1, 32, 32) uint8 and labels (N,). Raises BadInput."""
        _, rest = self.split(labels)
        features = apply(self.evaluator[:-1], images)
        guesses = self.evaluator[-1](features).argmax(1)
        return {
            "label accuracy": 100 * (guesses == labels).double().mean().item(),
            "Frechet": frechet(features, self.features[rest]),
            "diversity": mnist.diversity(images, labels) / self.diversity,
        }

    def sureness(self, images):
        """The largest of the evaluator's ten probabilities, (N,)."""
        return apply(self.evaluator, images).softmax(1).amax(1)

    def training_digits(self, labels):
        """Real training digits of these labels (N,)."""
        images = torch.empty(len(labels), 1, 32, 32, dtype=torch.uint8)
        for label in labels.unique():
            images[labels == label] = self.x[self.y == label][:(labels == label).sum()]
        return images

    def cas(self, images, labels, seed=0):
        """Classification accuracy score: trained on the samples, tested on all test digits."""
        torch.manual_seed(seed)
        net = fit(make_classifier(10), images, labels, steps=1500, noise=NOISE)
        guesses = apply(net, self.x_test).argmax(1)
        return 100 * (guesses == self.y_test).double().mean().item()


def read_samples(file):
    """images (N, 1, 32, 32) uint8 and labels (N,) of an .npz of sample.py. Raises BadInput."""
    if not Path(file).is_file():                # a pipe would be read without end
        raise BadInput(f"{file}: not a file; wanted is an .npz of sample.py")
    try:
        with np.load(file, allow_pickle=False) as npz:
            images = npz["images"]
            labels = npz["labels"]
    except Exception as error:                  # numpy, zipfile, zlib: each raises its own
        raise BadInput(f"{file}: {error}; wanted is an .npz of sample.py") from None
    shapes = images.shape[1:] == (32, 32) and labels.shape == images.shape[:1]
    if not shapes or images.dtype != np.uint8 or not np.isin(labels, range(10)).all():
        raise BadInput(f"{file}: wanted are images (N, 32, 32) uint8 and labels (N,) of 0..9")
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64))


@torch.no_grad()
def draw(ckpt, w, n, *options, sigma=None):
    """images (N, 1, 32, 32) uint8 and labels (N,) of n samples, as sample.py draws them.

    sigma: a function of t for --sampler em, which has no option for one.
    """
    options = parse_options([f"--w={w}", "--n", str(n), *map(str, options)])
    options.sigma = sigma
    net, config = checkpoint.load(ckpt)
    vae = checkpoint.load_autoencoder(ckpt) if config["latent"] else None
    y = choose_labels(options)
    way = find_way(options, config) or sample.draw_samples
    images = sample.draw_images(way, net, vae, y, w, options)
    return images[:, None], y


@torch.no_grad()
def count_calls(ckpt, w, *options, sigma=None):
    """How often the network is called for one sample; a call on 2B counts as two."""
    options = parse_options([f"--w={w}", *map(str, options)])
    options.sigma = sigma
    net, config = checkpoint.load(ckpt)
    calls = []
    net.register_forward_hook(lambda net, inputs, output: calls.append(len(output)))
    randn = Noise(0, [0], bool(config["latent"]))
    way = find_way(options, config) or sample.draw_samples
    way(net, torch.tensor([0]), w, options.steps, randn, *options.interval)
    return sum(calls)


DECIMALS = {"Frechet": 3, "diversity": 2, "seconds": 0, "calls": 0}     # of others: 1


def show(name, row):
    """Print a row of measures."""
    cells = "".join(f"{value:16.{DECIMALS.get(key, 1)}f}" for key, value in row.items())
    print(f"{name:44s}{cells}", flush=True)


def show_head(measures, row, labels):
    """Print the names of the measures, and what they say of real digits."""
    print(" " * 44 + "".join(f"{key:>16s}" for key in row))
    real = measures.real_digits(labels)
    show(f"{len(labels)} real digits", measures(real, labels))


def main(argv=None):
    p = Parser(prog="python -m experiments.measures", description="Measure samples.",
               epilog=__doc__)
    p.add_argument("files", nargs="+", metavar="FILE.npz")
    p.add_argument("--data", default=mnist.FILE, help="what the samples are compared with (MNIST)")
    p.add_argument("--slow", action="store_true", help="CAS as well: a network is trained")
    options = p.parse_args(argv)
    samples = [read_samples(file) for file in options.files]
    measures = Measures(options.data, [labels for _, labels in samples])
    for k, (file, (images, labels)) in enumerate(zip(options.files, samples)):
        row = measures(images, labels)
        if options.slow:
            row["CAS"] = measures.cas(images, labels)
        if k == 0:
            show_head(measures, row, labels)
        show(file, row)


if __name__ == "__main__":
    sys.exit(execute(main))
