"""Published planners, each after its paper: what ours must beat, and must not beat unfairly.

Each chooses by its paper's cost model and rule. Each is honest: it is given the same profile,
links, memory limits, pins and depths as every other solver; where its rule does not look at one of
them, its plan is repaired by the smallest change that fits (`layout.repair`), and the result says
so. The plan is then predicted like everyone's.

How well a rule is known is said in each docstring: "known from the authors' code", "by two
re-implementations", or "general knowledge, not checked against the paper's text". No text of a
paper could be read in full, so every choice that was left open is listed with how it was fixed, in
the baseline's favour.
"""
