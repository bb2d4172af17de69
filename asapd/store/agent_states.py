"""Changes of an agent's state that no probe brings: paused, resumed, fallen silent."""

from __future__ import annotations

from typing import assert_never

import msgspec

from asapd.core.errors import Refusal
from asapd.core.flapping import Flaps
from asapd.core.health import AgentState, State, Transition, fall_silent, pause, resume
from asapd.store import agent_history
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.agents import AgentsChanged, ChangeAgentState


def change(tx: Tx, unit: ChangeAgentState) -> AgentsChanged:
    """Change an agent's state; one that is so already stays as it is.

    Raises:
        RefuseError: there is no such agent.
    """
    row = tx.row(
        "SELECT state, since_us, ok_streak, fail_streak, changed, verdict, flapping_since_us FROM agent WHERE id = ?",
        (unit.agent,),
    )
    if row is None:
        raise RefuseError(Refusal("agent_not_found", f"there is no agent {unit.agent} in the directory: check the id"))
    state_name, since_us, ok_streak, fail_streak, *flaps = row
    known = AgentState(msgspec.convert(state_name, State), since_us, ok_streak, fail_streak, flaps=Flaps(*flaps))
    state, transition = _changed(unit, known)
    if transition is None:
        return AgentsChanged()
    reason = unit.reason or transition.reason
    tx.execute(
        "UPDATE agent SET state = ?, since_us = ?, ok_streak = ?, fail_streak = ?, changed = ?, verdict = ?, "
        "flapping_since_us = ? WHERE id = ?",
        (
            *(state.state, state.since_us, state.ok_streak, state.fail_streak),
            *(state.flaps.changed, state.flaps.verdict, state.flaps.since_us, unit.agent),
        ),
    )
    if known.flaps.since_us is not None and state.flaps.since_us is None:
        noted = agent_history.note(tx, unit.agent, "settled", unit.actor, unit.now_us, reason=reason)
        settled = {"history": [noted], "id": unit.agent, "state": state.state}
        tx.audit("agent.settled", unit.actor, unit.agent, settled, unit.now_us)
    event = {"pause": "paused", "resume": "resumed", "silence": "state"}[unit.verb]
    states = (transition.old, transition.new)
    noted = agent_history.note(tx, unit.agent, event, unit.actor, unit.now_us, states=states, reason=reason)
    details = {"from": transition.old, "history": [noted], "id": unit.agent, "reason": reason, "to": transition.new}
    tx.audit(f"agent.{event}", unit.actor, unit.agent, details, unit.now_us)
    return AgentsChanged(changed=[unit.agent])


def _changed(unit: ChangeAgentState, known: AgentState) -> tuple[AgentState, Transition | None]:
    match unit.verb:
        case "pause":
            return pause(known, unit.now_us)
        case "resume":
            return resume(known, unit.now_us)
        case "silence":
            return fall_silent(known, unit.now_us)
        case _:
            assert_never(unit.verb)
