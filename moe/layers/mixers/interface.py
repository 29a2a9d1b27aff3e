"""Interface of a token mixer's layer, in training and in generation."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from moe.config import ModelConfig
from moe.layers.call import Call, Report
from moe.layers.inputs import KEEP_ALL, Dropout, Rows, Site
from moe.routing.balancing import LayerReport

#: Fields of a mixer's :class:`LayerReport` that are logged, as ``mixer_<field>``.
_METRICS = ("load_balancing_loss", "router_z_loss", "router_entropy", "expert_load")


class MixerLayer(nnx.Module):
    """Base of the layers of token mixers: ``join(heads, x)`` of what :meth:`prefill` or :meth:`step` return.

    Generation carries a state for every row and layer: any pytree of arrays [L,B,...], equal layers stacked.

    Attributes:
        signals: names of the signals that the layer has (``Call.signals``), each a method of (x, rows).
    """

    signals: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig, mixer: Any, *, rngs: nnx.Rngs):
        """Keep the settings; subclasses create their parameters.

        Args:
            config: of the model.
            mixer: of the layer.
            rngs: for the parameters.
        """
        del rngs
        self.config = config
        self.mixer = mixer
        self.reports = mixer.reports
        self.precision = config.low_precision_everywhere

    def run(self, x: Float[Array, "B T D"], call: Call) -> tuple[Float[Array, "B T D"], Report]:
        """Output for whole rows, or in generation for further tokens."""
        heads, state = call.mixed("mixer", self, x, call.drop.at(Site.ATTENTION_WEIGHTS))
        report = Report(state=state)
        if self.reports and call.mix is None:
            of_routers = self.report(x, call.rows)
            metrics = {f"mixer_{name}": getattr(of_routers, name) for name in _METRICS}
            report = report.replace(losses={"mixer": of_routers.sparsity_penalty}, metrics=metrics)
        signals = {name: getattr(self, name)(x, call.rows) for name in self.signals if name in call.signals}
        return self.join(heads, x), report.replace(signals=signals)

    @classmethod
    def empty_state(
        cls, config: ModelConfig, mixer: Any, leading: tuple[int, int], length: int, *, ahead: int = 0
    ) -> Any:
        """The state before the first token.

        Args:
            config: of the model.
            mixer: of the layers.
            leading: number of layers, and of rows: the first axes of every array.
            length: positions that a row has in the end.
            ahead: tokens beyond one that :meth:`step` gets at once, which may be taken back.
        """
        raise NotImplementedError(f"{cls.__name__} has no method empty_state: it cannot generate")

    def prefill(
        self, x: Float[Array, "B T D"], rows: Rows, drop: Dropout = KEEP_ALL
    ) -> tuple[Float[Array, "B T N V"], Any]:
        """Mix the tokens of whole rows, within each document.

        Returns:
            The heads, and what :meth:`fill` reads.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method prefill(x, rows, drop)")

    def fill(self, state: Any, found: Any, lengths: Int[Array, " B"]) -> Any:
        """State after prompts of these lengths, from an empty one and what :meth:`prefill` found: by default that."""
        del state, lengths
        return found

    def step(self, x: Float[Array, "B T D"], rows: Rows, state: Any) -> tuple[Float[Array, "B T N V"], Any]:
        """Mix further tokens of each row, usually one, with those before; return the heads and the state after them."""
        raise NotImplementedError(f"{type(self).__name__} has no method step(x, rows, state): it cannot generate")

    def report(self, x: Float[Array, "B T D"], rows: Rows) -> LayerReport:
        """Report of the routers of a mixer whose value says that it ``reports``, each array [routers,...].

        Its ``sparsity_penalty``, a weighted loss, is added to the objective.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method report(x, rows)")

    @classmethod
    def score_factors(cls, mixer: Any, factors: Float[Array, "*layers N"]) -> dict[str, Float[Array, ...]]:
        """Factors of the layer's parameters, by name, that multiply each head's scores by at most these factors.

        Args:
            mixer: of the layers.
            factors: of each layer and head, at most 1.
        """
        raise NotImplementedError(f"{cls.__name__} has no method score_factors(mixer, factors)")

    def join(self, heads: Float[Array, "B T N V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Output of the layer from its heads and its input."""
        raise NotImplementedError(f"{type(self).__name__} has no method join(heads, x)")
