"""The pipelines: their graph, and the ways to run it here, in containers, or on a cluster.

`command` is the command line; `graph` the steps; `recipes` and `profiles` read the settings of a job and of a
cluster; `placement` applies the latter to the steps; `packages` compiles. A run here is `local`, with its
`tasks` or `containers` and its `screen`; a run on a cluster is a `submission`, which `waiting` follows.
"""
