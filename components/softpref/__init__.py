"""softpref: Soft Preference Optimization (arXiv 2405.00747) as a pipeline of stages."""

__version__ = "0.1.0"
