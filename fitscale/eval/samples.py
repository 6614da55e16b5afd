"""Generated images, seen through every feature network at once, and the figures that come of it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from fitscale.config.errors import writing
from fitscale.config.schema import Config
from fitscale.data.pictures import write_contact_sheet
from fitscale.eval.draw import Networks
from fitscale.eval.features import FeatureNet
from fitscale.eval.figures import Figure, Seen, SeenReference, figures
from fitscale.eval.generate import Images, generate
from fitscale.eval.reference import Reference
from fitscale.eval.requests import Request, chunk_ranges
from fitscale.run.chunks import ChunkFolder

SAID = ("features", "spatial", "scores")  # what a network may say of an image
SHEET_IMAGES = 64
OF_EACH_SIZE = ("fd", "recognised")  # figures that are also given for the images of one size
LEAST_SHARE, LEAST_IMAGES = 0.05, 100  # of the images that a size must have for that


@dataclass(frozen=True)
class Eye:
    """A feature network, and what the images seen through it are compared with."""

    net: FeatureNet
    reference: Reference

    @property
    def identity(self) -> dict[str, str]:
        """Their part of the key of what is measured with them."""
        return {"features": self.net.identity[:16], "reference": self.reference.identity[:16]}


@dataclass
class Samples:
    """The images of `requests`, in chunks."""

    config: Config  # with the positions that the images are drawn with
    requests: list[Request]
    seed: int
    eyes: list[Eye]

    def __post_init__(self) -> None:
        self.ranges = chunk_ranges(len(self.requests))
        self.count = len(self.ranges)

    def compute(self, networks: Networks, number: int, show: Callable[[int], None]) -> dict[str, np.ndarray]:
        """What every network says of the images of a chunk, float32; the first images of all, for a contact sheet."""
        requests = [self.requests[i] for i in self.ranges[number]]
        sheet: dict[str, np.ndarray] = {}

        def look(images: Images) -> dict[str, np.ndarray]:
            for request, pixels in zip(images.requests, images.pixels_NCHW, strict=True):
                if request.index < SHEET_IMAGES:
                    sheet[f"image{request.index}"] = pixels.movedim(0, -1).cpu().numpy()
            said = {}
            pixels_N3HW = images.pixels_NCHW.expand(-1, 3, -1, -1)  # networks always get three channels
            for k, eye in enumerate(self.eyes):
                for name, answer in eye.net.look(pixels_N3HW).items():
                    said[f"{name}{k}"] = answer.cpu().numpy()
            return said

        seen = generate(networks, self.config, requests, self.seed, look, show)
        arrays = {name: np.stack([one.kept[name] for one in seen]) for name in seen[0].kept}
        return arrays | sheet | {"nfe": np.array([one.nfe for one in seen])}

    def fold(self, folder: ChunkFolder) -> Iterator[tuple[str, Figure, int]]:
        """(network, figure, number of images it is of), from the chunks in their order.

        What networks said is gathered in a file beside the chunks and mapped, so that memory does not grow with the
        number of images.
        """
        for k, eye in enumerate(self.eyes):
            features_NF, spatial_NS, scores_NK = (self._gathered(folder, f"{name}{k}") for name in SAID)
            assert features_NF is not None
            seen = Seen(features_NF, spatial_NS, scores_NK)
            labels = self._labels if eye.net.num_scores == self.config.model.num_classes else None
            for figure in figures(seen, eye.reference.seen, labels):
                yield eye.net.name, figure, len(self.requests)
            yield from self._of_each_size(eye, seen, labels)

    def _of_each_size(self, eye: Eye, seen: Seen, labels: np.ndarray | None) -> Iterator[tuple[str, Figure, int]]:
        side = self.config.model.patch_size * self.config.data.latent.factor
        sizes = [(request.rows * side, request.cols * side) for request in self.requests]
        whole = SeenReference(eye.reference.seen.statistics, None, None)
        for (height, width), number in sorted(Counter(sizes).items()):
            if len(sizes) > number >= max(LEAST_SHARE * len(sizes), LEAST_IMAGES):
                chosen = [place for place, size in enumerate(sizes) if size == (height, width)]
                scores = None if seen.scores_NK is None else seen.scores_NK[chosen]
                some = Seen(seen.features_NF[chosen], None, scores)
                for figure in figures(some, whole, None if labels is None else labels[chosen]):
                    if figure.metric in OF_EACH_SIZE:
                        yield eye.net.name, replace(figure, metric=f"{figure.metric}@{height}x{width}"), number

    @property
    def _labels(self) -> np.ndarray:
        return np.array([request.label for request in self.requests])

    def mean_nfe(self, folder: ChunkFolder) -> float:
        """Function evaluations of an image."""
        return float(np.mean(np.concatenate([folder.read(number, ("nfe",))["nfe"] for number in range(self.count)])))

    def write_sheet(self, folder: ChunkFolder, path: Path, title: str) -> None:
        """The first images, each under its label."""
        shown = self.requests[: min(SHEET_IMAGES, len(self.ranges[0]))]
        images = folder.read(0, [f"image{request.index}" for request in shown])
        with writing(path):
            in_order = [images[f"image{request.index}"] for request in shown]
            write_contact_sheet(path, in_order, [str(request.label) for request in shown], title)

    def _gathered(self, folder: ChunkFolder, name: str) -> np.ndarray | None:
        """An array of all images, mapped from a file; None if no chunk has it."""
        if name not in (first := folder.read(0, (name,))):
            return None
        # Of this process alone, and gone with it. Written, not mapped, while it grows: a full disk is an error so.
        with writing(folder.path), TemporaryFile(dir=folder.path) as file:
            for number, places in enumerate(self.ranges):
                array = folder.read(number, (name,)).get(name, np.empty(0))
                if array.shape != (len(places), *first[name].shape[1:]) or array.dtype != first[name].dtype:
                    raise folder.set_aside(number, f"{name}: not one row an image")
                file.write(array.tobytes())
            file.flush()
            shape = (len(self.requests), *first[name].shape[1:])
            return np.memmap(file, first[name].dtype, "r", shape=shape)
