"""Watching a run: metric files, console, Weights & Biases, and the self-contained report.

The training loop talks to one object, `sailplan.observe.metrics.MetricWriter`; the report is made
afterwards from the run folder alone (`sailplan.observe.report.write_report`).
"""
