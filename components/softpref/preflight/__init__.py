"""Before the first stage: every parameter of a pipeline is checked and the members of a sweep are planned."""
