"""Training stages on several devices and several nodes. Knows processes and jobs, and no loss."""
