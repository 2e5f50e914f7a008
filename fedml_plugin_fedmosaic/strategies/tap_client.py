"""TAP's client half: two passes a round with a replacement between them, and the final stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedml_plugin_fedmosaic.core.errors import AdapterError, PlanError
from fedml_plugin_fedmosaic.core.types import (
    AdapterState,
    Branch,
    ClientContext,
    ClientState,
    ClientUpdate,
    Part,
    SharedTensors,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import (
    Distillation,
    LocalResult,
    ModelRef,
    Pass,
    Probe,
    ProbeResult,
    Result,
    Samples,
    Served,
    Work,
)
from fedml_plugin_fedmosaic.equations.tap import (
    distillation_weight,
    replaces,
    shared_is_replaced,
)
from fedml_plugin_fedmosaic.strategies.base import ClientBase
from fedml_plugin_fedmosaic.strategies.common import copy_local_to_global
from fedml_plugin_fedmosaic.strategies.tap_memory import (
    MEMORY,
    adopted,
    by_key,
    forget,
    logged,
    recall,
    remember,
    tasks_of,
)
from fedml_plugin_fedmosaic.strategies.tap_options import TapOptions
from fedml_plugin_fedmosaic.strategies.tap_sets import (
    FEDERATED,
    PERSONAL,
    SHARED,
    STUDENT,
    TEACHER,
    edition_of,
    initial_sets,
    keys_of,
    received,
    set_name,
    uploads,
    without_routed,
)

FINALIZE = "finalize"
"""The stage after the last round."""

VIEWS: Mapping[str, tuple[str, ...]] = {
    "regular": (FEDERATED,),
    "regular_ft": (TEACHER, FEDERATED),
    "personal": (PERSONAL,),
    "personal_post": (STUDENT, PERSONAL),
}
"""Reported view -> editions, the first that exists."""

_COMPARE, _FEDERATED_PASS, _PERSONAL_PASS = "compare", "federated", "personal"


class TapClient(ClientBase):
    """Keeps federated and personal adapter sets and decides which replace which.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: TapOptions) -> None:
        self._options = options
        self._view, self._train = {
            "both": (View.SUM, frozenset({Branch.LOCAL, Branch.GLOBAL})),
            "key": (View.LOCAL, frozenset({Branch.LOCAL})),
            "shared": (View.GLOBAL, frozenset({Branch.GLOBAL})),
        }[options.sets]

    def init_state(self, adapter: AdapterState, context: ClientContext) -> ClientState:
        """Federated and personal sets with the same fresh values.

        Raises:
            AdapterError: the adapter does not have two branches, or no P and Q to exchange.
        """
        options = self._options
        if options.exchange == "colora" and not any(key.part is Part.P for key in adapter):
            raise AdapterError(
                "TAP with exchange: colora exchanges P and Q, but the adapter has none",
                hint="leave adapter.type at auto, or set it to pq_lora",
            )
        keys = keys_of(context.manifest, by_task=options.key == "task")
        made = initial_sets(adapter, keys.values(), FEDERATED, context.seed)
        used = {set_name(FEDERATED, name) for name in self._used(keys)}
        federated: dict[str, AdapterState] = {
            name: tensors for name, tensors in made.items() if name in used
        }
        return ClientState(
            client_id=context.manifest.client_id,
            adapter=copy_local_to_global(adapter),
            sets={**federated, **edition_of(federated, FEDERATED, PERSONAL)},
            extra={MEMORY: {"keys": keys, "losses": {}, "log": {}}},
        )

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Takes the server's averages in as the federated sets; where there is none, they stay.

        Raises:
            PlanError: the downlink does not fit the client's sets.
        """
        used = self._used(recall(state)["keys"])
        sets = received(state.sets, downlink, FEDERATED, used, state.client_id)
        state = replace(state, sets=sets)
        if context.stage == FINALIZE:
            return self._begin_final(state, context)
        return state, (self._pass(_FEDERATED_PASS, FEDERATED, state, context.num_steps),)

    def advance(
        self, results: Mapping[str, Result], state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Federated pass -> comparison -> replacement -> personal pass."""
        memory = recall(state)
        federated, personal = results.get(_FEDERATED_PASS), results.get(_PERSONAL_PASS)
        if isinstance(federated, LocalResult):
            losses = by_key(federated.task_losses, memory["keys"])
            state = self._cleaned(remember(state, federated=losses), FEDERATED)
            probe = self._comparison(state)
            return (state, (probe,)) if probe else self._replace(state, None, context)
        compared = results.get(_COMPARE)
        if isinstance(compared, ProbeResult):
            return self._replace(state, compared, context)
        if isinstance(personal, LocalResult):
            losses = by_key(personal.task_losses, memory["keys"])
            state = remember(state, losses={**memory["losses"], **losses})
            return self._cleaned(state, PERSONAL), ()
        return state, ()

    def finish(
        self,
        result: LocalResult,  # noqa: ARG002 - what was trained is in the state's sets
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads the federated sets, never the personal ones; nothing after the last round."""
        if context.stage == FINALIZE:
            state = self._cleaned(self._cleaned(state, TEACHER), STUDENT)
            return ClientUpdate(header=header, tensors={}), state
        memory = recall(state)
        notes = {"trained": sorted(memory["federated"]), "report": memory["decision"]}
        none = self._options.exchange == "none"
        tensors = {} if none else uploads(state.sets, FEDERATED, self._used(memory["keys"]))
        update = ClientUpdate(header=replace(header, notes=notes), tensors=tensors)
        return update, forget(state, "federated", "decision")

    def serve(self, view: str, task: str, state: ClientState) -> Served:
        """The model of a task: shared and key set added; of a foreign task: the shared set alone.

        Views: ``regular`` is the federated model as the server left it, ``regular_ft`` the same
        after local fine-tuning, ``personal`` the personal model after the rounds, and
        ``personal_post`` that after the final stage. Before that stage the last two are the same.
        The names of the adapter's own views stand for branches of ``personal_post``. Without a
        shared set a foreign task gets the base model.

        Raises:
            PlanError: there is no such view.
        """
        editions = VIEWS.get(view, VIEWS["personal_post"])
        chosen = self._view
        if view not in VIEWS:
            if view not in list(View):
                known = ", ".join([*VIEWS, *View])
                raise PlanError(f"TAP has no view {view!r}", hint=f"known views: {known}")
            chosen = View(view)
        names = {name.partition(".")[0] for name in state.sets}
        edition = next((name for name in editions if name in names), PERSONAL)
        key = recall(state)["keys"].get(task)
        if key is None and self._view is not View.GLOBAL:
            chosen = View.GLOBAL if self._has_shared else View.BASE
        return Served(model=ModelRef(overlay=self._overlay(edition, key), view=chosen))

    @property
    def _has_shared(self) -> bool:
        return self._options.sets != "key"

    def _used(self, keys: Mapping[str, str]) -> list[str]:
        """Names of the keys that have a set, and ``shared`` if it has one."""
        names = [] if self._options.sets == "shared" else list(dict.fromkeys(keys.values()))
        return [*names, SHARED] if self._has_shared else names

    def _overlay(self, edition: str, key: str | None) -> tuple[str, ...]:
        """The sets of a key's model."""
        shared = (set_name(edition, SHARED),) if self._has_shared else ()
        if key is None or self._options.sets == "shared":
            return shared
        return (*shared, set_name(edition, key))

    def _cleaned(self, state: ClientState, edition: str) -> ClientState:
        if not self._has_shared:
            return state
        return replace(state, sets=without_routed(state.sets, edition))

    def _pass(
        self,
        name: str,
        edition: str,
        state: ClientState,
        num_steps: int,
        *,
        replay: bool = False,
        lr_scale: float = 1.0,
        distil: tuple[Distillation, ...] = (),
    ) -> Pass:
        """A pass that trains all sets of an edition together, each sample its key's."""
        keys: Mapping[str, str] = recall(state)["keys"]
        routed = self._options.sets != "shared"
        return Pass(
            name=name,
            view=self._view,
            train=self._train,
            num_steps=num_steps,
            lr_scale=lr_scale,
            distil=distil,
            overlay=self._overlay(edition, None),
            into=set_name(edition, SHARED) if self._has_shared else "",
            route={task: set_name(edition, key) for task, key in keys.items()} if routed else {},
            samples=Samples.REPLAY if replay else Samples.ROUND,
            salt=name if replay else "",
        )

    def _comparison(self, state: ClientState) -> Probe | None:
        """Both models of every key whose personal one was trained before; None without any."""
        options, memory = self._options, recall(state)
        compared = [
            key
            for key in dict.fromkeys(memory["keys"].values())
            if key in memory["losses"] and math.isfinite(self._margin(key, memory["keys"]))
        ]
        if options.test != "held_out" or not compared:
            return None
        models: dict[str, ModelRef] = {}
        tasks: dict[str, tuple[str, ...]] = {}
        for key in compared:
            for edition in (FEDERATED, PERSONAL):
                label = set_name(edition, key)
                models[label] = ModelRef(overlay=self._overlay(edition, key), view=self._view)
                tasks[label] = tasks_of(key, memory["keys"])
        return Probe(
            name=_COMPARE,
            models=models,
            tasks=tasks,
            samples=Samples.HELD_OUT,
            limit=options.test_samples,
        )

    def _margin(self, key: str, keys: Mapping[str, str]) -> float:
        return self._options.margin_of(self._option_name(key, keys))

    def _option_name(self, key: str, keys: Mapping[str, str]) -> str:
        """What the options call a key: its task, or its modalities."""
        if self._options.key == "task":
            return tasks_of(key, keys)[0]
        return key.partition(":")[0]

    def _replace(
        self, state: ClientState, compared: ProbeResult | None, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Puts federated sets in the places of the personal ones that lose, then trains these."""
        memory = recall(state)
        keys: Mapping[str, str] = memory["keys"]
        decision: dict[str, Any] = {}
        for key, pair in self._losses(memory, compared).items():
            margin = self._margin(key, keys)
            wins = replaces(pair[0], pair[1], margin, self._options.margin_kind)
            decision[key] = {"federated": pair[0], "personal": pair[1], "replaced": wins}
        votes = sum(entry["replaced"] for entry in decision.values())
        won = {key for key, entry in decision.items() if entry["replaced"]}
        if self._has_shared:
            shared = shared_is_replaced(votes, len(decision), self._options.vote)
            decision[SHARED] = {"votes": votes, "voters": len(decision), "replaced": shared}
            won |= {SHARED} if shared else set()
        replaced = won & set(self._used(keys))
        state = remember(
            replace(state, sets=adopted(state.sets, replaced)),
            decision=decision,
            log=logged(memory["log"], decision),
        )
        # The federated pass has just fitted the round's samples; fitting them twice would overfit.
        work = self._pass(_PERSONAL_PASS, PERSONAL, state, context.num_steps, replay=bool(replaced))
        return state, (work,)

    def _losses(
        self, memory: Mapping[str, Any], compared: ProbeResult | None
    ) -> dict[str, tuple[float | None, float | None]]:
        """Key -> losses of the federated and the personal model, for the keys with evidence.

        Keys without held-out samples are compared by their losses in training.
        """
        keys: Mapping[str, str] = memory["keys"]
        found: dict[str, tuple[float | None, float | None]] = {}
        for key in dict.fromkeys(keys.values()):
            tasks = dict.fromkeys(tasks_of(key, keys), key)
            pair: list[float] = []
            for edition in (FEDERATED, PERSONAL) if compared is not None else ():
                seen = compared.losses.get(set_name(edition, key), {}) if compared else {}
                pair += by_key(seen, tasks, compared.counts if compared else {}).values()
            if len(pair) == 2:
                found[key] = (pair[0], pair[1])
            elif key in memory["federated"]:
                found[key] = (memory["federated"][key], memory["losses"].get(key))
        return found

    def _begin_final(
        self, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Teacher: federated sets, fine-tuned. Student: personal sets, distilled from the teacher.

        Personal sets that no round has trained begin as the federated ones, as in a client's first
        round; so clients that were never drawn get a personal model, too.
        """
        options, memory = self._options, recall(state)
        keys: Mapping[str, str] = memory["keys"]
        fresh = {
            key
            for key in keys.values()
            if key not in memory["losses"] and replaces(None, None, self._margin(key, keys))
        }
        if fresh and not memory["losses"]:
            fresh.add(SHARED)
        sets = adopted(state.sets, fresh & set(self._used(keys)))
        sets = {
            **sets,
            **edition_of(sets, FEDERATED, TEACHER),
            **edition_of(sets, PERSONAL, STUDENT),
        }
        state = replace(state, sets=sets)
        steps = options.final_steps or context.num_steps
        scale = options.final_lr_scale
        return state, (
            self._pass("teacher", TEACHER, state, steps, replay=True, lr_scale=scale),
            self._pass(
                "student",
                STUDENT,
                state,
                steps,
                replay=True,
                lr_scale=scale,
                distil=self._distillations(keys),
            ),
        )

    def _distillations(self, keys: Mapping[str, str]) -> tuple[Distillation, ...]:
        """One term per key, with the teacher's model of that key."""
        terms = []
        for key in dict.fromkeys(keys.values()):
            name = self._option_name(key, keys)
            factor, temperature = (
                self._options.distillation_of(name),
                self._options.temperature_of(name),
            )
            if factor > 0:
                teacher = ModelRef(overlay=self._overlay(TEACHER, key), view=self._view)
                terms.append(
                    Distillation(
                        weight=distillation_weight(factor, temperature),
                        temperature=temperature,
                        teachers=(teacher,),
                        tasks=tasks_of(key, keys),
                    )
                )
        return tuple(terms)
