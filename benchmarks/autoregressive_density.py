"""Bits per dimension of normal chests under autoregressive densities: exact log P of whole grey values.

PneumoniaMNIST at 28 x 28, 8 bit, the same splits as `flow_density.py`: the checkpoint is chosen on a tenth of the
train split; the official val and test normals are only reported. A code's bound counts as its density.

    python benchmarks/autoregressive_density.py --minutes 20 --presets pixelcnn2d
"""

import time

from densities import Report, density_options, normals


def main() -> None:
    options, began = density_options("autoregressive_density", "pixelcnn2d"), time.monotonic()
    report = Report(normals())
    report.train(options)
    report.keep(options.name, began)


if __name__ == "__main__":
    main()
