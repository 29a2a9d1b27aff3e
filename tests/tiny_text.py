"""A TFDS dataset small enough to build in every test run."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds


def random_text(seed, words=60):
    rng = np.random.default_rng(seed)
    lexicon = ["red", "green", "blue", "fox", "naïve", "return", "    x", "=", "42", "(a,", "b)\n", "\n", "über"]
    return f"document {seed} " + " ".join(rng.choice(lexicon, words))


class TinyText(tfds.core.GeneratorBasedBuilder):
    """Config `split` has a validation split; `whole` has only a train split, with each text twice."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="split"), tfds.core.BuilderConfig(name="whole")]

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
        return tfds.core.DatasetInfo(builder=self, description="synthetic", features=features)

    def _split_generators(self, dl_manager):
        if self.builder_config.name == "whole":
            return {"train": self._generate_examples([*range(60), *range(60)])}
        return {"train": self._generate_examples(range(40)), "validation": self._generate_examples(range(100, 110))}

    def _generate_examples(self, seeds):
        for key, seed in enumerate(seeds):
            yield key, {"text": random_text(seed), "number": seed}


def published(name: str, version: str, texts: dict[str, int], words: int, path: Path) -> None:
    """Prepare a dataset under a published name with `texts` documents per split, as the published builder would. The
    builder is not registered afterwards, so that the dataset is read from its directory alone."""
    base, _, config = name.partition("/")

    class Published(TinyText, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=config)] if config else []

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(range(count)) for split, count in texts.items()}

        def _generate_examples(self, seeds):
            for key in seeds:
                yield key, {"text": random_text(key, words), "number": key}

    Published.name = base
    Published(data_dir=str(path), file_format="array_record").download_and_prepare(file_format="array_record")


def build(path: Path) -> Path:
    for config in ("split", "whole"):
        builder = TinyText(data_dir=str(path), config=config, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    return path
