"""The protocol: messages, and the pure machines of member and coordinator (no sockets, no arrays).

`member.handle` and `coordinator.handle` share the form `(state, event, now_s) -> (state, actions)`.
What an action demands of a body stands in `member_events` and `coordinator_events`.
"""
