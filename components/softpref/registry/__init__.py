"""Stage 5, registry: the gate, registration and the champion."""
