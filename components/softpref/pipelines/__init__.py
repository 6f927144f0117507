"""The pipelines: their graph, and the ways to run it here, in containers, or on a cluster.

`command` is the command line; `graph` the steps; `recipes` and `profiles` read what a job and a cluster set;
`placement` gives it to the steps; `packages` compiles them. A run here is `local`, with its `tasks` or
`containers` and what the `screen` shows; one on a cluster is a `submission`, which `waiting` follows. No
stage imports any of this.
"""
