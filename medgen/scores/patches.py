"""Distance of the features that a model's own encoder finds at each place from those of healthy scans."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.models.abilities import Ability
from medgen.models.base import Model
from medgen.scores.base import Found, Healthy, Known, Models, Score, hidden
from medgen.scores.filters import tail_mean
from medgen.scores.reference import enough, fingerprints, left_out, own_rows

# Places of the common grid of feature maps, at most, and patches among which a memory is chosen.
_MOST_PLACES, _MOST_PATCHES = 2**14, 2**14
_RIDGE = 1e-3
_ROWS = 4096


class Patches(Score):
    """Distance of patch features from healthy ones, worst patches first.

    The encoder's feature maps of all levels are brought to one grid, scaled, and projected on few random directions.

        mahalanobis   sqrt((f - m)' C^-1 (f - m) / d), a Gaussian at each place (Defard et al. 2021, "PaDiM",
                      equation 2), its covariance drawn towards the mean covariance of all places as if d more scans
                      had shown that
        knn           distance to the nearest patch of a memory that covers the healthy patches (Roth et al. 2022,
                      "Towards total recall in industrial anomaly detection", equation 6, algorithm 1)

    The value is the mean of the highest half per cent of the map.

    Args:
        how: which distance.
        features: d, directions that features are projected on.
        bank: patches of the memory.
        seed: of the projection and of the patches among which the memory is chosen.
    """

    do: Literal["patches"] = "patches"
    how: Literal["mahalanobis", "knn"] = "mahalanobis"
    features: int = Field(default=24, ge=1)
    bank: int = Field(default=1024, ge=2)
    seed: int = 0

    @property
    def needs(self) -> tuple[Ability, ...]:
        """A model that encodes."""
        return ("encodes",)

    def check(self, models: Models) -> None:
        """Refuse models without a convolutional encoder.

        Raises:
            CapabilityError: there is no such model, it does not encode, or not by an encoder with levels.
        """
        super().check(models)
        if not isinstance(getattr(getattr(models[self.of], "encoder", None), "body", None), nn.Sequential):
            raise CapabilityError(
                f"The score 'patches' looks at the feature maps of a model's encoder; {models[self.of].config.kind} "
                "has no such encoder. Models that do: autoencoder, vae, vqvae."
            )

    @torch.no_grad()
    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """The projection, and a Gaussian a place or the memory."""
        model = models[self.of]
        prints = []
        total, squares, places = torch.zeros(()), torch.zeros(()), 0
        for batch in healthy.train():
            maps = feature_maps(model, batch.x).double().cpu()
            total, squares = total + maps.flatten(2).sum((0, 2)), squares + maps.square().flatten(2).sum((0, 2))
            places += maps[:, 0].numel()
            prints.append(fingerprints(batch.x))
        own = torch.cat(prints) if prints else torch.zeros(0, 2)
        enough(len(own), 3, self.do)
        mean = total / places
        sd = (squares / places - mean.square()).clamp(min=1e-12).sqrt()
        generator = torch.Generator().manual_seed(self.seed)
        few = len(sd) <= self.features
        turn = torch.eye(len(sd)) if few else torch.randn(len(sd), self.features, generator=generator)
        projection = (turn / (1 if few else len(sd) ** 0.5)).double() / sd[:, None]
        known = {"projection": projection.float().contiguous(), "own": own}
        batches = (self._projected(model, batch, known).cpu() for batch in healthy.train())
        if self.how == "mahalanobis":
            return known | _gaussians(batches)
        return known | _memory(batches, self.bank, -(-_MOST_PATCHES // len(own)), generator)

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Its map of distances and the map's tail."""
        model = models[self.of]
        batch = batch.to(model.device)
        own = own_rows(batch.x, known["own"]).to(model.device)
        rows = self._projected(model, batch, known)
        known = {name: known[name].to(model.device) for name in known if name != "own"}
        if self.how == "mahalanobis":
            centred = rows - known["mean"]
            squared = torch.einsum("b...d,...de,b...e->b...", centred, known["precision"], centred).clamp(min=0)
            share, count = known["shrinkage"].tolist()
            coarse = (left_out(squared, own >= 0, share, count) / rows.shape[-1]).sqrt()
        else:
            coarse = torch.stack([
                _nearest(one.flatten(0, -2), known["bank"], known["whose"] == mine).reshape(one.shape[:-1])
                for one, mine in zip(rows, own, strict=True)
            ])  # fmt: skip
        mode = "bilinear" if batch.x.ndim == 4 else "trilinear"
        shown = functional.interpolate(coarse[:, None], batch.x.shape[2:], mode=mode)[:, 0]
        return Found(tail_mean(coarse)[:, None], hidden(shown, batch.real))

    def _projected(self, model: Model, batch: Batch, known: Known) -> Float[Tensor, "b *coarse d"]:
        return feature_maps(model, batch.x).movedim(1, -1) @ known["projection"].to(model.device)


def feature_maps(model: Model, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b f *coarse"]:
    """The last feature map of each size that the encoder makes, on the finest grid that is not too fine.

    The encoder is told no class: labelled and unlabelled scans are seen alike.
    """
    found: dict[tuple[int, ...], Tensor] = {}

    def keep(_module: nn.Module, _given: Any, made: Tensor) -> None:
        found[tuple(made.shape[2:])] = made

    encoder: Any = model.encoder
    hooks = [layer.register_forward_hook(keep) for layer in encoder.body]
    try:
        encoder(x.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    sizes = sorted(found, key=lambda size: -torch.Size(size).numel())
    grid = next((size for size in sizes if torch.Size(size).numel() <= _MOST_PLACES), sizes[-1])
    return torch.cat([_regridded(found[size].float(), grid) for size in sizes], 1)


def _regridded(maps: Float[Tensor, "b f *space"], grid: tuple[int, ...]) -> Float[Tensor, "b f *coarse"]:
    """Averaged where the grid is coarser, interpolated where it is finer."""
    if maps.shape[2] > grid[0]:
        pool: Any = functional.adaptive_avg_pool2d if len(grid) == 2 else functional.adaptive_avg_pool3d
        return pool(maps, grid)
    if tuple(maps.shape[2:]) == grid:
        return maps
    return functional.interpolate(maps, grid, mode="bilinear" if len(grid) == 2 else "trilinear")


def _gaussians(batches: Iterable[Float[Tensor, "b *coarse d"]]) -> dict[str, Tensor]:
    """Mean and inverse covariance at each place."""
    total, outer, count = torch.zeros(()), torch.zeros(()), 0
    for rows in batches:
        rows = rows.double()
        total, outer = total + rows.sum(0), outer + torch.einsum("b...d,b...e->...de", rows, rows)
        count += len(rows)
    mean = total / count
    size = mean.shape[-1]
    covariance = outer / count - mean[..., :, None] * mean[..., None, :]
    common = covariance.reshape(-1, size, size).mean(0)
    share = count / (count + size)
    shrunk = share * covariance + (1 - share) * common + _RIDGE * common.diagonal().mean() * torch.eye(size)
    precision = torch.linalg.inv(shrunk).float().contiguous()
    return {"mean": mean.float(), "precision": precision, "shrinkage": torch.tensor([share, float(count)])}


def _memory(
    batches: Iterable[Float[Tensor, "b *coarse d"]], most: int, each: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Patches, each the farthest from those before it, so that no healthy patch is far from all (k-centre greedy)."""
    rows, whose = [], []
    for batch in batches:
        for one in batch:
            flat = one.flatten(0, -2)
            rows.append(flat[torch.randperm(len(flat), generator=generator)[:each]])
            whose += [len(rows) - 1] * len(rows[-1])
    patches = torch.cat(rows)
    chosen = [int((patches - patches.mean(0)).square().sum(1).argmin())]
    apart = torch.full((len(patches),), torch.inf)
    while len(chosen) < min(most, len(patches)):
        apart = apart.minimum((patches - patches[chosen[-1]]).square().sum(1))
        chosen.append(int(apart.argmax()))
    return {"bank": patches[chosen], "whose": torch.tensor(whose)[chosen]}


def _nearest(rows: Float[Tensor, "p d"], bank: Float[Tensor, "n d"], mine: Tensor) -> Float[Tensor, " p"]:
    """Distance to the nearest patch of the memory that is not the scan's own."""
    bank = bank[~mine] if bool(mine.any()) and not bool(mine.all()) else bank
    return torch.cat([torch.cdist(part, bank).min(1).values for part in rows.split(_ROWS)])


__all__ = ["Patches", "feature_maps"]
