"""The first step of a pipeline: checks every parameter and plans the members of a sweep."""
