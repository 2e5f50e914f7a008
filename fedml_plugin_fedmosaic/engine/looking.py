"""What an engine does with a client's model without training it: probes and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from fedml_plugin_fedmosaic.adapters.base import InjectedAdapter
from fedml_plugin_fedmosaic.config.sections import EvalConfig, OptimConfig
from fedml_plugin_fedmosaic.core.types import AdapterState, View
from fedml_plugin_fedmosaic.core.work import Probe, ProbeResult
from fedml_plugin_fedmosaic.data.base import Sample, TaskSpec
from fedml_plugin_fedmosaic.engine.base import ModelInfo, Score
from fedml_plugin_fedmosaic.engine.digests import vocabulary_digest
from fedml_plugin_fedmosaic.engine.mixers import Ensemble, ModelMixer
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.probe import run_probe
from fedml_plugin_fedmosaic.engine.scoring import score_task
from fedml_plugin_fedmosaic.engine.sets import AdapterSets
from fedml_plugin_fedmosaic.engine.tally import Tally


class LookingEngine(ABC):
    """One base model with one adapter, to be looked at.

    Attributes:
        info: the base model.
        adapter: handle on the injected adapter.
    """

    info: ModelInfo
    adapter: InjectedAdapter
    _bundle: ModelBundle
    _optim: OptimConfig
    _evaluation: EvalConfig
    _has_input_gate: bool

    @abstractmethod
    def _load(self, adapter: AdapterState) -> None:
        """Puts a client's tensors into the model."""

    @abstractmethod
    def _require_open(self) -> None:
        """Refuses an engine that is closed."""

    @abstractmethod
    def _forward_model(self) -> Any:
        """What is called for a forward pass."""

    def probe(
        self,
        probe: Probe,
        adapter: AdapterState,
        sets: Mapping[str, AdapterState],
        samples: Sequence[Sample],
    ) -> ProbeResult:
        """Looks at models without training them.

        Args:
            probe: which models, and what of them.
            adapter: the client's tensors.
            sets: the client's adapter sets that the probe names.
            samples: what they are shown.

        Returns:
            Losses per model and task; with ``logits`` and ``hidden`` also these tensors.

        Raises:
            AdapterError: tensors do not fit, or there is no such set.
            DataError: a sample cannot be encoded.
        """
        self._load(adapter)
        self.adapter.model.eval()
        self._bundle.processor.prefetch(samples)
        named = AdapterSets(self.adapter.parameters(), sets)
        tally = Tally(self.info.num_parameters, ())
        return run_probe(
            probe, self.adapter, named, samples, self._bundle.processor, self._optim, tally
        )

    def vocabulary(self) -> str:
        """Digest of the vocabulary: equal ones give logits of equal width and meaning."""
        return vocabulary_digest(self._bundle.processor.tokenizer, self._bundle.vocabulary_size)

    def evaluate(
        self,
        adapter: AdapterState | None,
        view: View,
        samples: Sequence[Sample],
        task: TaskSpec,
        *,
        mixer: ModelMixer | None = None,
    ) -> Score:
        """Scores one task.

        Args:
            adapter: a client's tensors; None for the untouched base model.
            view: branches to use; ignored for the base model.
            samples: test samples.
            task: says how answers are judged.
            mixer: changes the model's logits; see :mod:`engine.mixers`.

        Returns:
            The score; NaN without samples.
        """
        if adapter is None:
            self._require_open()
            view = View.BASE
        else:
            self._load(adapter)
        if view is not View.ENSEMBLE:
            self.adapter.set_view(view)
        self.adapter.model.eval()
        self._bundle.processor.prefetch(samples)
        model = self._forward_model()
        if view is View.ENSEMBLE:
            model = Ensemble(model, self.adapter)
        if mixer is not None:
            model = mixer(model, self._bundle.processor)
        return score_task(
            model,
            self._bundle.processor,
            samples,
            task,
            self._evaluation,
            # An input gate looks at the whole sequence, so choices cannot share their prompt.
            share_prompt=not (self._has_input_gate and view is View.GATED),
        )
